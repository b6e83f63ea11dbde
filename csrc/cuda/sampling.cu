// Draws of tokens by the rule of kernels/reference.py, a block a row: what cpu/sampling.cpp draws.
//
// Nothing is sorted, and no histogram of the vocabulary is made. The token is the argmax of logits
// / temperature - log(noise); whether top-p keeps it shows in the sum of the weights above it.
// Where it does not, what is not above it is not kept either, and the argmax of the rest is tried:
// since the weights above are what top-p keeps most of, the first or second one mostly is it. The
// k-th largest logit is found among the few that reach the k-th largest of what each thread has
// seen.
//
// Doubles decide, as on the CPU, but floats say first which tokens can be near a decision. Sums
// have a fixed order.
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "launch.h"

namespace leangpt::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 4;   // loads of a thread that are under way at once
constexpr int kBins = 256;  // of a radix digit

// Word `token % 4` of Philox4x32-10 at counter (token / 4, position, sample, 0), for 4 tokens.
// Reference: Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405
__device__ uint4 philox(uint64_t seed, int64_t sample, int64_t position, int first_token) {
  uint4 c = {static_cast<uint32_t>(first_token / 4), static_cast<uint32_t>(position),
             static_cast<uint32_t>(sample), 0};
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c.x} * 0xD2511F53u, p1 = uint64_t{c.z} * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

__device__ double log_noise(uint32_t word) { return log(-log1p(-((word + 0.5) / 4294967296.0))); }

// The same within 5e-4, which is the error of __logf near 1.
__device__ float approximate_log_noise(uint32_t word) {
  constexpr float kUnit = 1.0f / 4294967296.0f;
  const float uniform = (static_cast<float>(word) + 0.5f) * kUnit;
  const float complement = (static_cast<float>(~word) + 0.5f) * kUnit;
  return __logf(uniform < 1.0f / 1024 ? fmaf(uniform, 0.5f * uniform, uniform)
                                      : -__logf(complement));
}

// The first token of the largest value.
template <class T>
struct Candidate {
  T value = -INFINITY;
  int token = INT32_MAX;

  __device__ void consider(const Candidate& other) {
    if (other.value > value || (other.value == value && other.token < token)) *this = other;
  }
};

template <class T>
__device__ Candidate<T> from_lane(const Candidate<T>& x, int distance) {
  Candidate<T> other;
  other.value = __shfl_xor_sync(0xFFFFFFFF, x.value, distance);
  other.token = __shfl_xor_sync(0xFFFFFFFF, x.token, distance);
  return other;
}
template <class T>
__device__ T from_lane(T x, int distance) {
  return __shfl_xor_sync(0xFFFFFFFF, x, distance);
}

// What combine(x, y) makes of the values of all threads, in the same order in each run; for all.
template <class T, class Combine>
__device__ T reduce(T x, const Combine& combine) {
  __shared__ __align__(16) uint8_t room[kWarps * 16];
  static_assert(sizeof(T) <= 16);
  T* of_warps = reinterpret_cast<T*>(room);
  for (int distance = 16; distance > 0; distance /= 2) x = combine(x, from_lane(x, distance));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warps[0];
  for (int w = 1; w < kWarps; ++w) x = combine(x, of_warps[w]);
  __syncthreads();  // `room` may be used again
  return x;
}

template <class T>
__device__ Candidate<T> reduce_best(const Candidate<T>& x) {
  return reduce(x, [](Candidate<T> a, const Candidate<T>& b) {
    a.consider(b);
    return a;
  });
}

template <class T>
__device__ T reduce_sum(T x) {
  return reduce(x, [](T a, T b) { return a + b; });
}

// Logits, and what penalties make of them.
struct Row {
  const float* logits;
  int count;
  bool is_aligned;  // to 16 bytes
  // Bits of the tokens that a penalty meets, or null.
  const uint32_t *in_context, *in_text;
  float repetition_penalty, presence_penalty;

  __device__ float value(int token, float logit) const {
    const uint32_t bit = 1u << token % 32;
    if (in_context && in_context[token / 32] & bit) {
      logit =
          logit > 0 ? __fdiv_rn(logit, repetition_penalty) : __fmul_rn(logit, repetition_penalty);
    }
    if (in_text && in_text[token / 32] & bit) logit = __fsub_rn(logit, presence_penalty);
    return logit;
  }
  __device__ float value(int token) const { return value(token, logits[token]); }

  // f(token, 4 logits) for each 4 tokens; a thread always gets the same. Logits behind the last are
  // -infinity.
  template <class F>
  __device__ void for_each_4(const F& f) const {
    constexpr int kStep = kThreads * 4;
    for (int start = static_cast<int>(threadIdx.x) * 4; start < count; start += kStep * kAhead) {
      float fours[kAhead][4];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_4(start + i * kStep, fours[i]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) f(start + i * kStep, fours[i]);
    }
  }
  // f(token, value) for each token.
  template <class F>
  __device__ void for_each(const F& f) const {
    for_each_4([&](int first, const float (&four)[4]) {
      for (int i = 0; i < 4; ++i) {
        if (first + i < count) f(first + i, value(first + i, four[i]));
      }
    });
  }

 private:
  __device__ void load_4(int first, float (&four)[4]) const {
    if (is_aligned && first + 4 <= count) {
      *reinterpret_cast<float4*>(four) = *reinterpret_cast<const float4*>(logits + first);
    } else {
      for (int i = 0; i < 4; ++i) four[i] = first + i < count ? logits[first + i] : -INFINITY;
    }
  }
};

// Scratch of a row: bits of the tokens in its context and in its text, and a list of tokens.
__host__ __device__ int64_t bit_words(int vocab_size) { return (vocab_size + 31) / 32; }
__host__ __device__ int64_t scratch_words(int vocab_size) {
  return 2 * bit_words(vocab_size) + vocab_size;
}

__device__ const uint32_t* mark(uint32_t* bits, const int64_t* tokens, int64_t length, int count) {
  for (int64_t i = threadIdx.x; i < bit_words(count); i += kThreads) bits[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < length; i += kThreads) {
    const int64_t token = tokens[i];
    if (token >= 0 && token < count) atomicOr(bits + token / 32, 1u << token % 32);
  }
  __syncthreads();
  return bits;
}

// The tokens for which is_in(token, value), in any order, and how many.
template <class IsIn>
__device__ int collect(const Row& row, const IsIn& is_in, int32_t* list) {
  __shared__ int length;
  if (threadIdx.x == 0) length = 0;
  __syncthreads();
  row.for_each([&](int token, float value) {
    if (is_in(token, value)) list[atomicAdd(&length, 1)] = token;
  });
  __syncthreads();
  const int collected = length;
  __syncthreads();
  return collected;
}

// The k-th largest of one value of each thread, k <= kThreads.
__device__ float kth_of_threads(float value, int k) {
  __shared__ float values[kThreads];
  __shared__ float found;
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = value;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < kThreads; ++i) {
    before += values[i] > value || (values[i] == value && i < thread);
  }
  if (before == k - 1) found = value;
  __syncthreads();
  return found;
}

// Unsigned integers in the order of the floats.
__device__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float from_order_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// The k-th largest of some keys, and how many of those that are equal to it are among the k
// largest.
struct Kth {
  uint32_t key;
  int rank;
};

// Of key(i) for i < length where is_in(i): digit by digit, from the highest on.
template <class Key, class IsIn>
__device__ Kth kth_key(int length, int k, const Key& key, const IsIn& is_in) {
  __shared__ int bins[kBins];
  __shared__ Kth found;  // its digits so far
  const int thread = static_cast<int>(threadIdx.x);
  Kth kth = {0, k};
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < kBins) bins[thread] = 0;
    __syncthreads();
    for (int i = thread; i < length; i += kThreads) {
      if (!is_in(i)) continue;
      const uint64_t digits = uint64_t{key(i)} >> shift;
      if (digits / kBins == kth.key) atomicAdd(bins + digits % kBins, 1);
    }
    __syncthreads();
    if (thread < kBins) {
      int above = 0;
      for (int bin = 0; bin < kBins; ++bin) above += bin > thread ? bins[bin] : 0;
      if (above < kth.rank && kth.rank <= above + bins[thread]) {
        found = {kth.key * kBins + thread, kth.rank - above};
      }
    }
    __syncthreads();
    kth = found;
    __syncthreads();
  }
  return kth;
}

// The k largest values, of equals the first tokens, 0 < k <= count: those above `value`, and those
// equal to it up to `last_token`.
struct Largest {
  float value;
  int last_token;

  __device__ bool has(int token, float v) const {
    return v > value || (v == value && token <= last_token);
  }
};
__device__ Largest k_largest(const Row& row, int k, int32_t* list) {
  float least = -INFINITY;
  if (k <= kThreads) {  // then at least k values reach the k-th largest of the threads' own
    float own = -INFINITY;
    row.for_each([&](int, float value) { own = fmaxf(own, value); });
    least = kth_of_threads(own, k);
  }
  const int length = collect(row, [&](int, float value) { return value >= least; }, list);
  const auto value = [&](int i) { return row.value(list[i]) + 0.0f; };  // -0 is equal to 0
  const Kth kth =
      kth_key(length, k, [&](int i) { return order_key(value(i)); }, [](int) { return true; });
  const float kth_value = from_order_key(kth.key);
  const Kth token = kth_key(
      length, kth.rank, [&](int i) { return ~static_cast<uint32_t>(list[i]); },
      [&](int i) { return value(i) == kth_value; });
  return {kth_value, static_cast<int>(~token.key)};
}

// What is drawn from, once greedy draws are done: the values from `kth` on, over the temperature.
struct Distribution {
  Row row;
  double temperature, top_p;
  uint64_t seed;
  int64_t sample_index, position;
  Candidate<float> best;
  float kth;
  double least;  // over the temperature, by min-p

  // Of differences of values, in float; finite, so that equal values differ by 0.
  __device__ float inverse_temperature() const {
    return fminf(static_cast<float>(1 / temperature), 3e38f);
  }

  // Of the values above `bound`: the token of the largest value over the temperature less the log
  // of its noise.
  __device__ int draw(float bound) const {
    constexpr float kMostGain = 24;  // no noise is below 2^-34 by much, so -log(noise) is below it
    constexpr float kScreenError = 1e-3f;
    const double best_scaled = best.value / temperature;
    const float inverse = inverse_temperature();
    const uint4 of_best = philox(seed, sample_index, position, best.token);
    Candidate<double> winner;
    winner.value = best_scaled - log_noise(word(of_best, best.token % 4));
    winner.token = best.token;
    float to_reach = static_cast<float>(winner.value - best_scaled) - kScreenError;
    row.for_each_4([&](int first, float (&four)[4]) {
      bool is_near = false;
      for (int i = 0; i < 4; ++i) {
        if (first + i >= row.count) continue;
        four[i] = row.value(first + i, four[i]);
        is_near |= (four[i] - best.value) * inverse + kMostGain >= to_reach;
      }
      if (!is_near) return;
      const uint4 words = philox(seed, sample_index, position, first);
      for (int i = 0; i < 4; ++i) {
        if (first + i >= row.count || !(four[i] > bound && four[i] >= kth)) continue;
        const float relative = (four[i] - best.value) * inverse;
        const uint32_t noise = word(words, i);
        if (relative - approximate_log_noise(noise) < to_reach) continue;
        const double scaled = four[i] / temperature;
        if (scaled < least) continue;
        winner.consider({scaled - log_noise(noise), first + i});
        to_reach = static_cast<float>(winner.value - best_scaled) - kScreenError;
      }
    });
    return reduce_best(winner).token;
  }

  // The sum of the weights of the values above `bound`, where the largest value has 1.
  template <class T>
  __device__ double weight_above(float bound) const {
    const float inverse = inverse_temperature();
    const double best_scaled = best.value / temperature;
    double sum = 0;
    row.for_each([&](int, float value) {
      if (!(value > bound && value >= kth)) return;
      if constexpr (sizeof(T) == sizeof(float)) {
        sum += expf((value - best.value) * inverse);
      } else {
        sum += exp(value / temperature - best_scaled);
      }
    });
    return reduce_sum(sum);
  }

  // Whether top-p keeps this value: unless what is above it is enough.
  __device__ bool keeps(float value, double total) const {
    if (value == best.value) return true;
    constexpr double kScreenError = 4e-6;
    const double excess = weight_above<float>(value) - top_p * total;
    if (fabs(excess) > kScreenError * total) return excess < 0;
    return weight_above<double>(value) < top_p * weight_above<double>(-INFINITY);
  }

  static __device__ uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }
};

__device__ int draw_token(const Row& row, const DrawSettings& s, const Candidate<float>& best,
                          int32_t* list) {
  if (s.temperature == 0 || isinf(best.value)) return best.token;  // infinite: penalties overflowed
  const bool has_top_k = s.top_k > 0 && s.top_k < row.count;
  const Distribution distribution = {
      row,
      s.temperature,
      s.top_p,
      s.seed,
      s.sample_index,
      s.position,
      best,
      has_top_k ? k_largest(row, static_cast<int>(s.top_k), list).value : -INFINITY,
      best.value / s.temperature + log(s.min_p)};
  const double total = s.top_p < 1 ? distribution.weight_above<float>(-INFINITY) : 0;
  float bound = -INFINITY;
  while (true) {
    const int token = distribution.draw(bound);
    const float value = row.value(token);
    if (s.top_p >= 1 || distribution.keeps(value, total)) return token;
    bound = value;
  }
}

// The most probable tokens, of equals the first ones; each counts those before it.
__device__ void top_logprobs(const Row& row, const DrawSettings& s, double normalizer,
                             int32_t* list) {
  const int count = static_cast<int>(min(s.num_logprobs, int64_t{row.count}));
  const Largest largest = k_largest(row, count, list);
  collect(row, [&](int token, float logit) { return largest.has(token, logit); }, list);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const float logit = row.logits[list[i]];
    int before = 0;
    for (int j = 0; j < count; ++j) {
      const float other = row.logits[list[j]];
      before += other > logit || (other == logit && list[j] < list[i]);
    }
    s.top_tokens[before] = list[i];
    s.top_logprobs[before] = logit - normalizer;
  }
}

__device__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ float max_or_nan(float a, float b) { return a != a || a > b ? a : b; }

__global__ void __launch_bounds__(kThreads)
    sample_kernel(const float* logits, int64_t stride, int vocab_size, const DrawSettings* settings,
                  Drawn* out, uint32_t* scratch) {
  const DrawSettings s = settings[blockIdx.x];
  logits += blockIdx.x * stride;
  scratch += blockIdx.x * scratch_words(vocab_size);
  auto* list = reinterpret_cast<int32_t*>(scratch + 2 * bit_words(vocab_size));
  const Row all = {logits, vocab_size, is_aligned(logits)};
  Row row = all;
  row.count = static_cast<int>(min(int64_t{vocab_size}, s.vocab_limit));
  row.repetition_penalty = static_cast<float>(s.repetition_penalty);
  row.presence_penalty = static_cast<float>(s.presence_penalty);
  if (s.repetition_penalty != 1) {
    row.in_context = mark(scratch, s.context, s.context_length, row.count);
  }
  if (s.presence_penalty != 0) {
    row.in_text = mark(scratch + bit_words(vocab_size), s.text, s.text_length, row.count);
  }

  float largest = -INFINITY;  // NaN where a logit is NaN or infinite
  Candidate<float> best;
  all.for_each([&](int token, float logit) {
    largest = max_or_nan(largest, isfinite(logit) ? logit : NAN);
    if (token < row.count) best.consider({row.value(token, logit), token});
  });
  largest = reduce(largest, max_or_nan);
  if (largest != largest) {
    if (threadIdx.x == 0) out[blockIdx.x] = {-1, NAN};
    return;
  }
  best = reduce_best(best);
  const int token = draw_token(row, s, best, list);
  if (s.num_logprobs < 0) {
    if (threadIdx.x == 0) out[blockIdx.x] = {token, 0};
    return;
  }
  double total = 0;
  all.for_each([&](int, float logit) { total += expf(logit - largest); });
  const double normalizer = largest + log(reduce_sum(total));
  if (s.num_logprobs > 0) top_logprobs(all, s, normalizer, list);
  if (threadIdx.x == 0) out[blockIdx.x] = {token, logits[token] - normalizer};
}

__global__ void __launch_bounds__(kThreads)
    log_probs_kernel(const float* logits, int64_t stride, int vocab_size, const int64_t* targets,
                     float* logprobs) {
  logits += blockIdx.x * stride;
  const Row row = {logits, vocab_size, is_aligned(logits)};
  float largest = -INFINITY;
  row.for_each([&](int, float logit) { largest = fmaxf(largest, logit); });
  largest = reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  float total = 0;
  row.for_each([&](int, float logit) { total += expf(logit - largest); });
  total = reduce_sum(total);
  if (threadIdx.x == 0) {
    logprobs[blockIdx.x] = logits[targets[blockIdx.x]] - largest - logf(total);
  }
}

}  // namespace

int64_t sample_scratch_bytes(int vocab_size, int num_rows) {
  return num_rows * scratch_words(vocab_size) * int64_t{sizeof(uint32_t)};
}

void sample(const float* logits, int64_t stride, int vocab_size, const DrawSettings* settings,
            Drawn* out, void* scratch, int num_rows, cudaStream_t stream) {
  if (num_rows == 0) return;
  sample_kernel<<<num_rows, kThreads, 0, stream>>>(logits, stride, vocab_size, settings, out,
                                                   static_cast<uint32_t*>(scratch));
  check_launch("sample");
}

void log_probs(const float* logits, int64_t stride, int vocab_size, const int64_t* targets,
               float* logprobs, int num_rows, cudaStream_t stream) {
  if (num_rows == 0) return;
  log_probs_kernel<<<num_rows, kThreads, 0, stream>>>(logits, stride, vocab_size, targets,
                                                      logprobs);
  check_launch("log_probs");
}

}  // namespace leangpt::cuda
