#include "elementwise.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cpu/buffer.h"
#include "parallel.h"

namespace leangpt::train {
namespace {

// f(first, last) for shares of n rows; no share is smaller than some rows.
template <class F>
void for_rows(int64_t n, int64_t rows, const F& f) {
  parallel_for((n + rows - 1) / rows,
               [&](int64_t begin, int64_t end) { f(begin * rows, std::min(n, end * rows)); });
}

}  // namespace

void gated(const Gated& gated, int64_t rows) {
  for_rows(rows, 16, [&](int64_t first, int64_t last) { kernels().gated(gated, first, last); });
}

void rotary_forward(const RotaryQkv& rotary, int64_t num_tokens) {
  for_rows(num_tokens, 16,
           [&](int64_t first, int64_t last) { kernels().rotary_forward(rotary, first, last); });
}

void rotary_backward(const RotaryQkv& rotary, int64_t num_tokens) {
  // the same parts on any number of threads, so that their sums have the same bits
  constexpr int64_t kParts = 32;
  const int64_t part_tokens = (num_tokens + kParts - 1) / kParts, D = rotary.head_dim;
  const int64_t stride = round_up(D, kLanes);
  static thread_local cpu::Buffer<float> buffer;
  float* sums = buffer.get(2 * kParts * stride);
  std::memset(sums, 0, 2 * kParts * stride * sizeof(float));
  parallel_for(kParts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      RotaryQkv share = rotary;
      share.dq_weight = sums + 2 * part * stride;
      share.dk_weight = share.dq_weight + stride;
      kernels().rotary_backward(share, std::min(num_tokens, part * part_tokens),
                                std::min(num_tokens, (part + 1) * part_tokens));
    }
  });
  if (rotary.q_weight == nullptr) return;
  for (int64_t i = 0; i < D; ++i) {
    rotary.dq_weight[i] = rotary.dk_weight[i] = 0;
    for (int64_t part = 0; part < kParts; ++part) {
      rotary.dq_weight[i] += sums[2 * part * stride + i];
      rotary.dk_weight[i] += sums[(2 * part + 1) * stride + i];
    }
  }
}

void embedding(const Lookup& lookup, const Lookup& second, Dtype dtype, int64_t count,
               int64_t width, void* out) {
  const int64_t bytes = width * size_of(dtype);
  const auto row_of = [&](const Lookup& x, int64_t i) {
    return static_cast<const uint8_t*>(x.table) + x.index[i] * bytes;
  };
  for_rows(count, 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      uint8_t* to = static_cast<uint8_t*>(out) + i * bytes;
      if (second.table) {
        kernels().add_rows(row_of(lookup, i), row_of(second, i), dtype, width, to);
      } else {
        std::memcpy(to, row_of(lookup, i), bytes);
      }
    }
  });
}

void embedding_backward(const void* grad, const int64_t* index, Dtype dtype, int64_t count,
                        int64_t num_rows, int64_t width, void* out) {
  // the rows of grad, sorted by their index: those of r from first[r] on
  std::vector<int64_t> first(num_rows + 1), rows(count);
  for (int64_t i = 0; i < count; ++i) ++first[index[i] + 1];
  for (int64_t r = 0; r < num_rows; ++r) first[r + 1] += first[r];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < count; ++i) rows[next[index[i]]++] = i;
  const int64_t bytes = width * size_of(dtype);
  for_rows(num_rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      kernels().sum_of_rows(grad, dtype, width, rows.data() + first[r], first[r + 1] - first[r],
                            static_cast<uint8_t*>(out) + r * bytes);
    }
  });
}

}  // namespace leangpt::train
