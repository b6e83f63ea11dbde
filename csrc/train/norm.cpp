#include "norm.h"

#include <algorithm>
#include <cstring>

#include "../cpu/buffer.h"
#include "parallel.h"

namespace leangpt::train {

void norm_forward(const Norm& norm, int64_t rows) {
  constexpr int64_t kRows = 16;  // a thread's share is a multiple of them
  parallel_for((rows + kRows - 1) / kRows, [&](int64_t begin, int64_t end) {
    kernels().norm_forward(norm, begin * kRows, std::min(rows, end * kRows));
  });
}

void norm_backward(const Norm& norm, int64_t rows, float* dweight, float* dbias) {
  // the same parts on any number of threads, so that their sums have the same bits
  constexpr int64_t kParts = 32;
  const int64_t part_rows = (rows + kParts - 1) / kParts, n = norm.num_columns;
  const int64_t stride = round_up(n, kLanes);
  static thread_local cpu::Buffer<float> buffer;
  float* parts = buffer.get(2 * kParts * stride);
  std::memset(parts, 0, 2 * kParts * stride * sizeof(float));
  parallel_for(kParts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* sums = parts + 2 * part * stride;
      kernels().norm_backward(norm, std::min(rows, part * part_rows),
                              std::min(rows, (part + 1) * part_rows), sums, sums + stride);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    dweight[i] = dbias[i] = 0;
    for (int64_t part = 0; part < kParts; ++part) {
      dweight[i] += parts[2 * part * stride + i];
      dbias[i] += parts[(2 * part + 1) * stride + i];
    }
  }
}

}  // namespace leangpt::train
