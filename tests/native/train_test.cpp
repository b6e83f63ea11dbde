// The ops of training without Python and torch, for the sanitizers (`make sanitize`): each on
// odd sizes, in memory of exactly the size it is told, with the same bits on one thread and on
// three; products and attention against plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../cpu/isa.h"
#include "attention.h"
#include "elementwise.h"
#include "gemm.h"
#include "heap.h"
#include "norm.h"
#include "optimizer.h"
#include "parallel.h"

namespace leangpt::train {
namespace {

int threads = 1;
thread_local bool is_in_parallel = false;

}  // namespace

int num_threads() { return threads; }

void run_threads(int64_t count, const std::function<void(int64_t)>& f) {
  if (is_in_parallel) {
    for (int64_t t = 0; t < count; ++t) f(t);
    return;
  }
  std::vector<std::thread> team;
  for (int64_t t = 0; t < count; ++t) {
    team.emplace_back([&, t] {
      is_in_parallel = true;
      f(t);
    });
  }
  for (std::thread& thread : team) thread.join();
}

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

using Floats = std::vector<float>;

std::mt19937_64 generator;

Floats randn(int64_t size) {
  std::normal_distribution<float> normal;
  Floats values(size);
  for (float& value : values) value = normal(generator);
  return values;
}

uint16_t to_bf16(float value) {  // cut off
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

float to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Elements of a dtype, in memory of exactly their size.
class Memory {
 public:
  Memory(Dtype dtype, const Floats& values) : dtype_(dtype), floats_(values) {
    if (dtype == Dtype::kFp32) return;
    for (const float value : values) halves_.push_back(to_bf16(value));
    halves_.shrink_to_fit();
    floats_.clear();
    floats_.shrink_to_fit();
  }
  Memory(Dtype dtype, int64_t size) : Memory(dtype, Floats(size, NAN)) {}

  void* data() {
    return dtype_ == Dtype::kFp32 ? static_cast<void*>(floats_.data()) : halves_.data();
  }
  Dtype dtype() const { return dtype_; }
  Floats values() const {
    if (dtype_ == Dtype::kFp32) return floats_;
    Floats values;
    for (const uint16_t half : halves_) values.push_back(to_float(half));
    return values;
  }

 private:
  Dtype dtype_;
  Floats floats_;
  std::vector<uint16_t> halves_;
};

// What `run` gives on one thread, which three must give too; nothing of it may be NaN.
Floats check(const std::function<Floats()>& run) {
  threads = 1;
  const Floats one = run();
  threads = 3;
  const Floats three = run();
  CHECK(one.size() == three.size());
  CHECK(std::memcmp(one.data(), three.data(), one.size() * sizeof(float)) == 0);
  for (const float value : one) CHECK(std::isfinite(value));
  return one;
}

Floats joined(const std::vector<Floats>& parts) {
  Floats all;
  for (const Floats& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

Operand operand(Memory& x, int64_t rows, int64_t columns, bool is_transposed) {
  if (is_transposed) return {x.data(), x.dtype(), 1, rows};
  return {x.data(), x.dtype(), columns, 1};
}

void run_products(Dtype dtype, Dtype compute) {
  constexpr int64_t kSizes[][3] = {{1, 1, 1},      {35, 5, 17},     {97, 130, 300},
                                   {70, 33, 1100}, {17, 2000, 300}, {40, 70, 0}};
  for (const auto& [m, n, k] : kSizes) {
    for (const int layout : {0, 1, 2, 3}) {
      Memory a(dtype, randn(m * k)), b(dtype, randn(k * n));
      const bool is_a_transposed = layout & 1, is_b_transposed = layout & 2;
      const Floats bias = randn(n), addend = randn(m * n);
      const Floats out = check([&] {
        Floats out(m * n, NAN);
        Epilogue epilogue;
        epilogue.out = out.data();
        epilogue.stride = n;
        epilogue.bias = bias.data();
        epilogue.addend = addend.data();
        gemm(operand(a, m, k, is_a_transposed), operand(b, k, n, is_b_transposed), m, n, k, compute,
             epilogue);
        return out;
      });
      const Floats av = a.values(), bv = b.values();
      const double unit = dtype == compute || compute == Dtype::kFp32 ? 2e-6 : 8e-3;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          double sum = bias[j] + addend[i * n + j];
          for (int64_t l = 0; l < k; ++l) {
            const float x = av[is_a_transposed ? l * m + i : i * k + l];
            sum += static_cast<double>(x) * bv[is_b_transposed ? j * k + l : l * n + j];
          }
          CHECK(std::abs(sum - out[i * n + j]) <= unit * (8 + 4 * std::sqrt(k)));
        }
      }
    }
  }
}

void run_symmetric_products() {
  for (const int64_t m : {1, 16, 41, 113}) {
    const int64_t k = 70;
    Memory a(Dtype::kFp32, randn(m * k));
    const Operand rows = operand(a, m, k, false);
    const auto multiply = [&](Product product) {
      Floats out(m * m, NAN);
      Epilogue epilogue;
      epilogue.out = out.data();
      epilogue.stride = m;
      gemm(rows, rows.transposed(), m, m, k, Dtype::kFp32, epilogue, product);
      return out;
    };
    const Floats half = check([&] { return multiply(Product::kSymmetric); });
    const Floats full = check([&] { return multiply(Product::kFull); });
    for (int64_t i = 0; i < m * m; ++i) {
      CHECK(std::abs(half[i] - full[i]) <= 1e-4f);
      CHECK(half[i] == half[i % m * m + i / m]);
    }
  }
}

void run_activations(Dtype dtype) {
  const int64_t m = 97, n = 77, k = 19;  // so many rows that tiles finish some among others
  Memory a(dtype, randn(m * k)), b(dtype, randn(k * n));
  for (const auto activation : {Activation::kGeluTanh, Activation::kGelu, Activation::kRelu2}) {
    check([&] {
      Memory h(dtype, m * n), activated(dtype, m * n), dh(dtype, m * n), again(dtype, m * n);
      Epilogue epilogue;
      epilogue.dtype = dtype;
      epilogue.stride = n;
      epilogue.activation = activation;
      epilogue.out = h.data();
      epilogue.activated = activated.data();
      const Operand left = operand(a, m, k, false), right = operand(b, k, n, false);
      gemm(left, right, m, n, k, dtype, epilogue);
      epilogue.inner = h.data();
      epilogue.out = dh.data();
      epilogue.activated = again.data();
      gemm(left, right, m, n, k, dtype, epilogue);
      CHECK(activated.values() == again.values());
      return joined({h.values(), activated.values(), dh.values()});
    });
  }
  Memory h(dtype, randn(m * 2 * n)), da(dtype, randn(m * n));
  check([&] {
    Memory activated(dtype, m * n), again(dtype, m * n), dh(dtype, m * 2 * n);
    Gated values = {};
    values.dtype = dtype;
    values.width = n;
    values.h = h.data();
    values.a = activated.data();
    gated(values, m);
    values.a = again.data();
    values.da = da.data();
    values.dh = dh.data();
    gated(values, m);
    CHECK(activated.values() == again.values());
    return joined({activated.values(), dh.values()});
  });
}

void run_attention(Dtype dtype, int64_t queries, int64_t keys, int64_t head_dim, int64_t window) {
  const int64_t B = 2, H = 4, H_kv = 2, T = queries, S = keys, D = head_dim;
  Memory q(dtype, randn(B * T * H * D)), k(dtype, randn(B * S * H_kv * D));
  Memory v(dtype, randn(B * S * H_kv * D)), dout(dtype, randn(B * T * H * D));
  const float scale = 0.3f;
  const Floats all = check([&] {
    Memory out(dtype, B * T * H * D), dq(dtype, B * T * H * D);
    Memory dk(dtype, B * S * H_kv * D), dv(dtype, B * S * H_kv * D);
    Floats lse(B * H * T, NAN);
    Attention a = {};
    a.dtype = dtype;
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    const int64_t q_strides[3] = {T * H * D, H * D, D}, strides[3] = {S * H_kv * D, H_kv * D, D};
    for (int i = 0; i < 3; ++i) {
      a.q_strides[i] = q_strides[i];
      a.k_strides[i] = a.v_strides[i] = strides[i];
    }
    a.num_sequences = B;
    a.num_queries = T;
    a.num_keys = S;
    a.num_heads = H;
    a.num_kv_heads = H_kv;
    a.head_dim = D;
    a.window = window;
    a.scale = scale;
    a.out = out.data();
    a.lse = lse.data();
    attention(a);
    a.dout = dout.data();
    a.dq = dq.data();
    a.dk = dk.data();
    a.dv = dv.data();
    attention(a);
    return joined({out.values(), lse, dq.values(), dk.values(), dv.values()});
  });
  const Floats qv = q.values(), kv = k.values(), vv = v.values();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t t = 0; t < T; ++t) {
        const int64_t end = S - T + t + 1, first = std::max<int64_t>(0, end - window);
        const auto at = [&](int64_t s) { return ((b * S + s) * H_kv + h / (H / H_kv)) * D; };
        std::vector<double> sums(D);
        double total = 0;
        for (int64_t s = first; s < end; ++s) {
          double score = 0;
          for (int64_t d = 0; d < D; ++d) {
            score += static_cast<double>(qv[((b * T + t) * H + h) * D + d]) * kv[at(s) + d];
          }
          const double weight = std::exp(scale * score);
          total += weight;
          for (int64_t d = 0; d < D; ++d) sums[d] += weight * vv[at(s) + d];
        }
        for (int64_t d = 0; d < D; ++d) {
          const double error = sums[d] / total - all[((b * T + t) * H + h) * D + d];
          CHECK(std::abs(error) <= (dtype == Dtype::kFp32 ? 1e-5 : 5e-2));
        }
      }
    }
  }
}

void run_norms(Dtype dtype, Dtype total_dtype, Dtype y_dtype, bool is_rms) {
  const int64_t rows = 67, n = 45;
  Memory x(dtype, randn(rows * n)), residual(total_dtype, randn(rows * n));
  Memory dy(y_dtype, randn(rows * n)), dstream(total_dtype, randn(rows * n));
  const Floats weight = randn(n), bias = randn(n);
  check([&] {
    Memory y(y_dtype, rows * n), total(total_dtype, rows * n);
    Memory dtotal(total_dtype, rows * n), dx(dtype, rows * n);
    Floats mean(rows, NAN), rstd(rows, NAN), dweight(n, NAN), dbias(n, NAN);
    Norm norm = {};
    norm.dtype = dtype;
    norm.total_dtype = total_dtype;
    norm.y_dtype = y_dtype;
    norm.num_columns = n;
    norm.is_rms = is_rms;
    norm.eps = 1e-5f;
    norm.x = x.data();
    norm.residual = residual.data();
    norm.total = total.data();
    norm.y = y.data();
    norm.weight = weight.data();
    norm.bias = bias.data();
    norm.mean = mean.data();
    norm.rstd = rstd.data();
    norm_forward(norm, rows);
    norm.dy = dy.data();
    norm.dstream = dstream.data();
    norm.dtotal = dtotal.data();
    norm.dx = dx.data();
    norm_backward(norm, rows, dweight.data(), dbias.data());
    return joined({y.values(), total.values(), dtotal.values(), dx.values(), dweight, dbias, rstd});
  });
}

void run_rotary(Dtype dtype, int64_t head_dim, bool has_weights) {
  const int64_t B = 2, T = 35, H = 3, H_kv = 1, D = head_dim, half = D / 2;
  const Floats cos = randn(T * half), sin = randn(T * half);
  const Floats q_weight = randn(D), k_weight = randn(D);
  Memory qkv(dtype, randn(B * T * (H + 2 * H_kv) * D));
  Memory dq(dtype, randn(B * T * H * D)), dk(dtype, randn(B * T * H_kv * D));
  Memory dv(dtype, randn(B * T * H_kv * D));
  check([&] {
    Memory q(dtype, B * T * H * D), k(dtype, B * T * H_kv * D), v(dtype, B * T * H_kv * D);
    Memory dqkv(dtype, B * T * (H + 2 * H_kv) * D);
    Floats dq_weight(D), dk_weight(D);
    RotaryQkv rotary = {};
    rotary.dtype = dtype;
    rotary.seq_len = T;
    rotary.num_heads = H;
    rotary.num_kv_heads = H_kv;
    rotary.head_dim = D;
    rotary.cos = cos.data();
    rotary.sin = sin.data();
    rotary.eps = 1e-6f;
    if (has_weights) {
      rotary.q_weight = q_weight.data();
      rotary.k_weight = k_weight.data();
    }
    rotary.qkv = qkv.data();
    rotary.q = q.data();
    rotary.k = k.data();
    rotary.v = v.data();
    rotary_forward(rotary, B * T);
    rotary.q = dq.data();
    rotary.k = dk.data();
    rotary.v = dv.data();
    rotary.dqkv = dqkv.data();
    rotary.dq_weight = dq_weight.data();
    rotary.dk_weight = dk_weight.data();
    rotary_backward(rotary, B * T);
    return joined({q.values(), k.values(), v.values(), dqkv.values(), dq_weight, dk_weight});
  });
}

void run_embedding(Dtype dtype) {
  const int64_t count = 100, num_rows = 61, width = 37;
  Memory table(dtype, randn(num_rows * width)), second(dtype, randn(num_rows * width));
  Memory grad(dtype, randn(count * width));
  std::vector<int64_t> index(count), positions(count);
  for (int64_t i = 0; i < count; ++i) {
    index[i] = static_cast<int64_t>(generator() % (num_rows - 1));
    positions[i] = i % num_rows;
  }
  const Floats all = check([&] {
    Memory out(dtype, count * width), sum(dtype, count * width), dtable(dtype, num_rows * width);
    const Lookup lookup = {table.data(), index.data(), num_rows};
    embedding(lookup, {}, dtype, count, width, out.data());
    embedding(lookup, {second.data(), positions.data(), num_rows}, dtype, count, width, sum.data());
    embedding_backward(grad.data(), index.data(), dtype, count, num_rows, width, dtable.data());
    return joined({out.values(), dtable.values(), sum.values()});
  });
  for (int64_t i = 0; i < count; ++i) {
    CHECK(all[i * width + 5] == table.values()[index[i] * width + 5]);
  }
  for (int64_t i = 0; i < width; ++i) {
    CHECK(all[(count + num_rows - 1) * width + i] == 0);  // a row that nobody took
  }
}

void run_cross_entropy() {
  const int64_t n = 1030;
  const Floats row = randn(n);
  const CrossEntropy loss = {0.1, 0.01, 0.5};
  check([&] {
    Floats logits = row;
    const float value = kernels().cross_entropy(loss, logits.data(), n, n - 1, true);
    logits.push_back(value);
    return logits;
  });
}

void run_optimizers() {
  constexpr int64_t kSizes[] = {0, 1, 15, 16, 40'001};
  for (const Dtype dtype : {Dtype::kFp32, Dtype::kBf16}) {
    std::vector<Floats> params, grads, moments;
    for (const int64_t size : kSizes) {
      params.push_back(randn(size));
      grads.push_back(randn(size));
      moments.push_back(randn(size));
    }
    check([&] {
      std::vector<Memory> param, grad;
      std::vector<Floats> exp_avg = moments, exp_avg_sq = moments, masters = params;
      std::vector<AdamWPart> tensors;
      std::vector<Elements> elements;
      for (size_t i = 0; i < params.size(); ++i) {
        param.emplace_back(dtype, params[i]);
        grad.emplace_back(dtype, grads[i]);
        for (float& value : exp_avg_sq[i]) value = std::abs(value);
      }
      for (size_t i = 0; i < params.size(); ++i) {
        tensors.push_back({param[i].data(), grad[i].data(), exp_avg[i].data(), exp_avg_sq[i].data(),
                           i % 2 ? masters[i].data() : nullptr, dtype, dtype, kSizes[i]});
        elements.push_back({grad[i].data(), dtype, kSizes[i]});
      }
      adamw({0.5f, 1e-3f, 1e-2f, 0.1f, 0.05f, 1.0f, 1e-8f}, tensors);
      Floats all = {static_cast<float>(sum_squares(elements))};
      for (size_t i = 0; i < params.size(); ++i) {
        all = joined({all, param[i].values(), exp_avg[i], exp_avg_sq[i], masters[i]});
      }
      return all;
    });
  }

  constexpr int64_t kShapes[][2] = {{1, 1}, {7, 1}, {5, 33}, {40, 40}, {100, 17}, {0, 4}};
  std::vector<Floats> params, grads;
  for (const auto& [rows, columns] : kShapes) {
    params.push_back(randn(rows * columns));
    grads.push_back(randn(rows * columns));
  }
  check([&] {
    std::vector<Floats> param = params, buffer = params;
    std::vector<MuonMatrix> matrices;
    for (size_t i = 0; i < params.size(); ++i) {
      matrices.push_back(
          {param[i].data(), grads[i].data(), buffer[i].data(), kShapes[i][0], kShapes[i][1]});
    }
    muon({1.0f, 0.95f, 0.02f, 0.1f}, matrices);
    return joined({joined(param), joined(buffer)});
  });
}

// Each item is covered once, also where a call stands within another.
void run_shares() {
  for (threads = 1; threads <= 4; ++threads) {
    for (const int64_t n : {0, 1, 2, 3, 5, 16, 37, 100}) {
      std::vector<int> counts(n), inner(n * n);
      parallel_for(n, [&](int64_t begin, int64_t end) {
        CHECK(begin < end);
        for (int64_t i = begin; i < end; ++i) {
          ++counts[i];
          parallel_for(n, [&](int64_t first, int64_t last) {
            for (int64_t j = first; j < last; ++j) ++inner[i * n + j];
          });
        }
      });
      for (const int count : counts) CHECK(count == 1);
      for (const int count : inner) CHECK(count == 1);
    }
  }
  threads = 1;
}

void run_heap() {
  constexpr size_t kSize = (size_t{1} << 20) + 1;  // whole pages are taken
  Heap heap;
  uint8_t* memory[3];
  for (uint8_t*& m : memory) {
    m = static_cast<uint8_t*>(heap.take(kSize));
    CHECK(m != nullptr);
    std::memset(m, 1, kSize);
  }
  const size_t distance = memory[1] - memory[0];
  CHECK(distance >= kSize && memory[2] == memory[1] + distance);
  heap.give_back(memory[1], kSize);
  CHECK(heap.take(2 * kSize) == memory[2] + distance);  // not where one has room
  CHECK(heap.take(kSize) == memory[1]);
  for (const int i : {0, 2, 1}) heap.give_back(memory[i], kSize);
  CHECK(heap.take(3 * distance) == memory[0]);  // three are one again
  CHECK(heap.take(size_t{1} << 60) == nullptr);

  std::vector<std::thread> team;
  for (uint8_t t = 1; t <= 3; ++t) {
    team.emplace_back([&heap, t] {
      for (int i = 0; i < 50; ++i) {
        auto* mine = static_cast<uint8_t*>(heap.take(kSize));
        std::memset(mine, t, kSize);
        CHECK(mine[0] == t && mine[kSize - 1] == t);
        heap.give_back(mine, kSize);
      }
    });
  }
  for (std::thread& thread : team) thread.join();
}

}  // namespace
}  // namespace leangpt::train

int main() {
  using namespace leangpt;
  using namespace leangpt::train;
  try {
    cpu::active_isa();
  } catch (const std::runtime_error& e) {
    std::printf("skipped: %s\n", e.what());
    return std::strstr(e.what(), "not supported by this CPU") == nullptr;
  }
  for (const Dtype dtype : {Dtype::kFp32, Dtype::kBf16}) {
    for (const Dtype compute : {Dtype::kFp32, Dtype::kBf16}) run_products(dtype, compute);
    run_activations(dtype);
    run_attention(dtype, 33, 33, 8, 33);
    run_attention(dtype, 50, 77, 20, 9);
    for (const bool is_rms : {false, true}) {
      run_norms(dtype, dtype, dtype, is_rms);
      run_norms(dtype, Dtype::kFp32, dtype, is_rms);
      run_norms(dtype, Dtype::kFp32, Dtype::kFp32, is_rms);
    }
    for (const int64_t head_dim : {2, 24, 64}) {
      for (const bool has_weights : {false, true}) run_rotary(dtype, head_dim, has_weights);
    }
    run_embedding(dtype);
  }
  run_symmetric_products();
  run_cross_entropy();
  run_optimizers();
  run_heap();
  run_shares();
  std::printf("ok: %s\n", cpu::isa_name(cpu::active_isa()));
}
