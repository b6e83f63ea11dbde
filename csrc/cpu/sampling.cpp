#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "kernels.h"

namespace leangpt::cpu {
namespace {

// Word `token % 4` of Philox4x32-10 at counter (token / 4, position, sample, 0).
// Reference: Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405
uint32_t philox_word(uint64_t seed, int64_t sample, int64_t position, int64_t token) {
  uint32_t c[4] = {static_cast<uint32_t>(token / 4), static_cast<uint32_t>(position),
                   static_cast<uint32_t>(sample), 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c[token % 4];
}

double exponential_noise(const DrawSettings& s, int64_t token) {
  const double uniform =
      (philox_word(s.seed, s.sample_index, s.position, token) + 0.5) / 4294967296.0;
  return -std::log1p(-uniform);
}

// logits[token] of every distinct token of a list, changed once.
template <class F>
void change_each(const int64_t* tokens, int64_t count, int64_t vocab_size, std::vector<char>& seen,
                 const F& change) {
  seen.assign(vocab_size, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = tokens[i];
    if (token < 0 || token >= vocab_size || seen[token]) continue;
    seen[token] = 1;
    change(token);
  }
}

// The value of the last token that top-p keeps: the fewest most probable ones whose probabilities
// sum to at least p. Finds it by partition, as a selection that weighs: the candidates halve at
// each turn, and nothing is sorted whole.
double top_p_threshold(std::vector<double> values, double top_p) {
  if (values.empty()) return -std::numeric_limits<double>::infinity();  // penalties overflowed
  const double best = *std::max_element(values.begin(), values.end());
  double total = 0;
  for (double v : values) total += std::exp(v - best);
  double needed = top_p * total;
  auto first = values.begin(), last = values.end();
  double threshold = best;
  while (first < last) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, std::greater<double>());
    double above = 0;
    for (auto it = first; it <= middle; ++it) above += std::exp(*it - best);
    if (above < needed) {  // all of these are kept, and more
      needed -= above;
      threshold = *std::min_element(first, middle + 1);
      first = middle + 1;
    } else if (middle == first) {
      return *middle;
    } else {
      threshold = *middle;
      last = middle + 1;
      if (last - first <= 2) {  // too few to halve: the most probable one, or both
        const double larger = std::max(*first, *(first + 1)),
                     smaller = std::min(*first, *(first + 1));
        return std::exp(larger - best) >= needed ? larger : smaller;
      }
    }
  }
  return threshold;
}

void top_logprobs(const float* logits, int64_t vocab_size, double normalizer,
                  const DrawSettings& s) {
  const int64_t count = std::min(s.num_logprobs, vocab_size);
  std::vector<int64_t> order(vocab_size);
  for (int64_t i = 0; i < vocab_size; ++i) order[i] = i;
  const auto is_before = [&](int64_t a, int64_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  std::partial_sort(order.begin(), order.begin() + count, order.end(), is_before);
  for (int64_t i = 0; i < count; ++i) {
    s.top_tokens[i] = order[i];
    s.top_logprobs[i] = logits[order[i]] - normalizer;
  }
}

int64_t argmax(const double* values, int64_t count) {
  return std::max_element(values, values + count) - values;  // the first of equals
}

int64_t draw_token(const float* logits, int64_t vocab_size, const DrawSettings& s) {
  constexpr double kNever = -std::numeric_limits<double>::infinity();
  const int64_t count = std::min(vocab_size, s.vocab_limit);
  const bool has_penalty = s.repetition_penalty != 1 || s.presence_penalty != 0;
  if (s.temperature == 0 && !has_penalty) {
    const float best = kernels().max_or_nan(logits, static_cast<int>(count));
    return std::find(logits, logits + count, best) - logits;  // the first of equals
  }

  std::vector<double> values(logits, logits + count);
  if (has_penalty) {
    std::vector<char> seen;
    if (s.repetition_penalty != 1) {
      change_each(s.context, s.context_length, count, seen, [&](int64_t token) {
        double& v = values[token];
        const float logit = logits[token], penalty = static_cast<float>(s.repetition_penalty);
        v = logit > 0 ? logit / penalty : logit * penalty;
      });
    }
    if (s.presence_penalty != 0) {
      change_each(s.text, s.text_length, count, seen, [&](int64_t token) {
        values[token] = static_cast<float>(values[token]) - static_cast<float>(s.presence_penalty);
      });
    }
  }
  if (s.temperature == 0) return argmax(values.data(), count);

  for (double& v : values) v /= s.temperature;
  if (s.top_k > 0 && s.top_k < count) {
    std::vector<double> order = values;
    std::nth_element(order.begin(), order.begin() + s.top_k - 1, order.end(),
                     std::greater<double>());
    for (double& v : values) v = v < order[s.top_k - 1] ? kNever : v;
  }
  if (s.top_p < 1) {
    std::vector<double> kept;
    for (double v : values) {
      if (v != kNever) kept.push_back(v);
    }
    const double last = top_p_threshold(std::move(kept), s.top_p);
    for (double& v : values) v = v < last ? kNever : v;
  }
  const double best = *std::max_element(values.begin(), values.end());
  const double least = best + std::log(s.min_p);  // -infinity where min_p is 0

  // No noise is below 2^-34 by much, so -log(noise) is below 24: a token that far behind the best
  // drawn so far cannot win.
  constexpr double kMostGain = 24;
  int64_t winner = argmax(values.data(), count);
  double highest = values[winner] - std::log(exponential_noise(s, winner));
  for (int64_t token = 0; token < count; ++token) {
    const double v = values[token];
    if (v < least || v == kNever || v + kMostGain < highest) continue;
    const double perturbed = v - std::log(exponential_noise(s, token));
    if (perturbed > highest || (perturbed == highest && token < winner)) {
      highest = perturbed;
      winner = token;
    }
  }
  return winner;
}

}  // namespace

Drawn draw(const float* logits, int64_t vocab_size, const DrawSettings& s) {
  const float best = kernels().max_or_nan(logits, static_cast<int>(vocab_size));
  if (best != best) return {-1, std::numeric_limits<double>::quiet_NaN()};
  const int64_t token = draw_token(logits, vocab_size, s);
  if (s.num_logprobs < 0) return {token, 0};
  double total = 0;
  for (int64_t i = 0; i < vocab_size; ++i) total += std::exp(static_cast<double>(logits[i]) - best);
  const double normalizer = best + std::log(total);
  if (s.num_logprobs > 0) top_logprobs(logits, vocab_size, normalizer, s);
  return {token, logits[token] - normalizer};
}

}  // namespace leangpt::cpu
