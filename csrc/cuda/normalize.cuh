// The norm of one row by a warp: of its own kernel (layer_norm.cu) and of products that have it in
// front (linear_decode.cu), with the same bits.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace leangpt::cuda {

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, distance);
  }
  return x;
}

// f(column, float4) for each 4 columns of the row, and those behind its width up to a multiple of
// 16, which are zero.
//   layer norm  (x - mean) / sqrt(variance + eps) * weight + bias
//   RMS norm    x / sqrt(mean(x^2) + eps) * weight
template <class F>
__device__ __forceinline__ void normalize_row(const float* __restrict__ x, const Norm& norm,
                                              int width, const F& f) {
  const int first = static_cast<int>(threadIdx.x) % 32 * 4;
  const auto load = [&](const float* from, int column) {
    return *reinterpret_cast<const float4*>(from + column);
  };
  float mean = 0;
  if (!norm.is_rms) {
    float4 sum = {};
    for (int column = first; column < width; column += 128) {
      const float4 v = load(x, column);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    mean = warp_sum((sum.x + sum.y) + (sum.z + sum.w)) / static_cast<float>(width);
  }
  float squares = 0;
  for (int column = first; column < width; column += 128) {
    const float4 v = load(x, column);
    const float values[] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; ++i) {
      const float centered = column + i < width ? values[i] - mean : 0.0f;
      squares = fmaf(centered, centered, squares);
    }
  }
  const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + norm.eps);
  const int padded = (width + kLanes - 1) / kLanes * kLanes;
  for (int column = first; column < padded; column += 128) {
    const float4 v = load(x, column), weight = load(norm.weight, column);
    const float4 bias = norm.bias ? load(norm.bias, column) : float4{};
    f(column, float4{fmaf((v.x - mean) * rstd, weight.x, bias.x),
                     fmaf((v.y - mean) * rstd, weight.y, bias.y),
                     fmaf((v.z - mean) * rstd, weight.z, bias.z),
                     fmaf((v.w - mean) * rstd, weight.w, bias.w)});
  }
}

}  // namespace leangpt::cuda
