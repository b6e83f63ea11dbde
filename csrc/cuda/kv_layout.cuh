// Where keys and values lie in a page of the cache.
//
// A page's keys of a head are multiplied with queries, and its values with weights, by
// mma.m16n8k16: the keys are two tiles of 8 keys for each 16 dimensions, the values two tiles of 8
// dimensions. What a lane needs of both tiles, 8 elements, lies together, the lanes after each
// other, and these steps of 32 lanes after each other. Which dimension takes which place within the
// 16 that are summed is free: a lane has 4 neighbours of each key, in queries as in keys.
//
// int8: a byte is the integer plus 128, which is multiplied with the float32 scale of its key or
// value. fp8: a byte is a float of 4 bits of exponent and 3 of mantissa (e4m3), with such a scale.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace leangpt::cuda {

constexpr int kStepDims = 16;
constexpr int kLaneElements = 8;  // of a lane and a step
constexpr int kStepElements = 32 * kLaneElements;

// Elements of 8 bits have scales.
template <KvKind kKind>
constexpr bool kHasKvScales = kKind == KvKind::kInt8 || kKind == KvKind::kFp8;
template <KvKind kKind>
constexpr int kKvElementBytes = kHasKvScales<kKind> ? 1 : 2;
template <KvKind kKind>
constexpr int kKvScaleBytes = kHasKvScales<kKind> ? kPageSize * 4 : 0;

// Of the keys of a head in a page, or of the values.
template <KvKind kKind>
__host__ __device__ constexpr int kv_elements_bytes(int num_steps) {
  return num_steps * kStepElements * kKvElementBytes<kKind>;
}

// Of all that a page holds of a head: keys, values, scales of the keys, scales of the values.
template <KvKind kKind>
__host__ __device__ constexpr int kv_head_bytes(int num_steps) {
  return 2 * (kv_elements_bytes<kKind>(num_steps) + kKvScaleBytes<kKind>);
}

__host__ __device__ constexpr int num_steps_of(int head_dim) {
  return (head_dim + kStepDims - 1) / kStepDims;
}

// Element `dim` of the key in a slot of the page; its 4 neighbours, from a multiple of 4 on,
// follow.
__device__ constexpr int key_element(int slot, int dim) {
  const int lane = slot % 8 * 4 + dim % kStepDims / 4;
  return dim / kStepDims * kStepElements + lane * kLaneElements + slot / 8 * 4 + dim % 4;
}

// Element `dim` of the value in a slot.
__device__ constexpr int value_element(int slot, int dim) {
  const int lane = dim % 8 * 4 + slot % 8 / 2;
  return dim / kStepDims * kStepElements + lane * kLaneElements + dim % kStepDims / 8 * 4 +
         slot / 8 * 2 + slot % 2;
}

// f(std::integral_constant of the kind). Throws std::invalid_argument for one that the kernels do
// not know.
template <class F>
auto with_kind(KvKind kind, const char* kernel, const F& f) {
  switch (kind) {
    case KvKind::kBf16:
      return f(std::integral_constant<KvKind, KvKind::kBf16>());
    case KvKind::kFp16:
      return f(std::integral_constant<KvKind, KvKind::kFp16>());
    case KvKind::kInt8:
      return f(std::integral_constant<KvKind, KvKind::kInt8>());
    case KvKind::kFp8:
      return f(std::integral_constant<KvKind, KvKind::kFp8>());
  }
  throw std::invalid_argument(std::string(kernel) +
                              ": the cache must be bf16, fp16, int8 or fp8, got kind " +
                              std::to_string(static_cast<int>(kind)));
}

// Throws std::invalid_argument for heads that the kernels cannot take.
inline void check_heads(const HeadShape& shape, const char* kernel) {
  const std::string prefix = std::string(kernel) + ": ";
  if (shape.head_dim < 1 || shape.head_dim > kMaxHeadDim) {
    throw std::invalid_argument(prefix + "head_dim must be at most " + std::to_string(kMaxHeadDim) +
                                ", got " + std::to_string(shape.head_dim));
  }
  if (shape.n_kv_head < 1 || shape.n_head < 1 || shape.n_head % shape.n_kv_head) {
    throw std::invalid_argument(prefix + "n_head (" + std::to_string(shape.n_head) +
                                ") must be a multiple of n_kv_head (" +
                                std::to_string(shape.n_kv_head) + ")");
  }
}

}  // namespace leangpt::cuda
