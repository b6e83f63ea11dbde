// The norm of one row by a warp: of its own kernel (layer_norm.cu) and of products that have it in
// front (linear_decode.cu), with the same bits.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"
#include "ptx.cuh"

namespace leangpt::cuda {

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, distance);
  }
  return x;
}

// 16 bytes of a row.
struct alignas(16) Four {
  float values[4];
};

// f(column, Four) for each 4 columns of the row, and those behind its width up to a multiple of 16,
// which are zero.
//   layer norm  (x - mean) / sqrt(variance + eps) * weight + bias
//   RMS norm    x / sqrt(mean(x^2) + eps) * weight
template <class F>
__device__ __forceinline__ void normalize_row(const float* __restrict__ x, const Norm& norm,
                                              int width, const F& f) {
  const int first = static_cast<int>(threadIdx.x) % 32 * 4;
  const auto load = [](const float* from, int column) {
    return *reinterpret_cast<const Four*>(from + column);
  };
  float mean = 0;
  if (!norm.is_rms) {
    Four sums = {};
    for (int column = first; column < width; column += 128) {
      const Four v = load(x, column);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.values[i] += v.values[i];
    }
    const float sum = (sums.values[0] + sums.values[1]) + (sums.values[2] + sums.values[3]);
    mean = warp_sum(sum) / static_cast<float>(width);
  }
  float squares = 0;
  for (int column = first; column < width; column += 128) {
    const Four v = load(x, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float centered = column + i < width ? v.values[i] - mean : 0.0f;
      squares = fmaf(centered, centered, squares);
    }
  }
  const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + norm.eps);
  const int padded = (width + kLanes - 1) / kLanes * kLanes;
  for (int column = first; column < padded; column += 128) {
    const Four v = load(x, column), weight = load(norm.weight, column);
    const Four bias = norm.bias ? load(norm.bias, column) : Four{};
    Four out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float normed = fmaf((v.values[i] - mean) * rstd, weight.values[i], bias.values[i]);
      out.values[i] = column + i < width ? normed : 0.0f;  // NaN stays within the width
    }
    f(column, out);
  }
}

// To bfloat16.
__device__ __forceinline__ uint2 round_four(const Four& v) {
  return {pack_bf16(v.values[0], v.values[1]), pack_bf16(v.values[2], v.values[3])};
}

}  // namespace leangpt::cuda
