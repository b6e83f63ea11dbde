// From the products of a layer's first matrix to what attention reads: queries, and keys and values
// in their pages.

#include <cmath>
#include <stdexcept>
#include <string>

#include "kv_layout.cuh"
#include "launch.h"
#include "normalize.cuh"
#include "ptx.cuh"

namespace leangpt::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;

// NaN if x is NaN or infinite, else 0.
__device__ float nan_probe(float x) { return x * 0.0f; }

// x of a head in a warp's shared memory -> x / sqrt(mean(x^2) + eps) * weight
__device__ void normalize_head(float* x, const float* weight, float eps, int head_dim, int lane) {
  float squares = 0;
  for (int d = lane; d < head_dim; d += 32) squares = fmaf(x[d], x[d], squares);
  const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(head_dim) + eps);
  for (int d = lane; d < head_dim; d += 32) x[d] *= rstd * weight[d];
  __syncwarp();
}

// Reference: Su et al., 2021, https://arxiv.org/abs/2104.09864
__device__ void rotate(float* x, const float* rotations, int head_dim, int lane) {
  const int half = head_dim / 2;
  for (int i = lane; i < half; i += 32) {
    const float first = x[i], second = x[i + half];
    const float cosine = rotations[i], sine = rotations[half + i];
    x[i] = first * cosine - second * sine;
    x[i + half] = second * cosine + first * sine;
  }
  __syncwarp();
}

// The largest number of 8 bits.
template <KvKind kKind>
constexpr float kLargest = kKind == KvKind::kInt8 ? 127.0f : 448.0f;

// The float of 4 bits of exponent and 3 of mantissa that is nearest to x, of two the even one;
// |x| is 448 at most, but for roundings.
__device__ uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(fabsf(x));
  // 20 bits of mantissa go, and the exponent's bias is 120 less
  const uint32_t normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3);
  // below 2^-6 they are multiples of 2^-9
  const auto small = static_cast<uint32_t>(rintf(fabsf(x) * 512.0f));
  return (fabsf(x) < 0.015625f ? small : normal) | (__float_as_uint(x) >> 24 & 0x80);
}

// The byte that a number of 8 bits is kept as (kv_layout.cuh).
template <KvKind kKind>
__device__ float encode(float x) {
  return kKind == KvKind::kInt8 ? rintf(x) + 128.0f : static_cast<float>(to_e4m3(x));
}

// The bytes of a row of 8 bits, as floats, and the scale that their numbers are multiplied with:
// NaN where an element is NaN or infinite, so that it is not lost.
template <KvKind kKind>
__device__ float quantize(float* x, int width, int lane) {
  float largest = 0, probe = 0;
  for (int d = lane; d < width; d += 32) {
    largest = fmaxf(largest, fabsf(x[d]));
    probe += nan_probe(x[d]);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, distance));
  }
  float scale = largest / kLargest<kKind>;
  float inverse = largest > 0 ? kLargest<kKind> / largest : 0.0f;
  if (inverse > 3e38f) {  // so small that it would be infinite
    inverse = 3e38f;
    scale = 1.0f / inverse;
  }
  for (int d = lane; d < width; d += 32) x[d] = encode<kKind>(x[d] * inverse);
  __syncwarp();
  return scale + warp_sum(probe);
}

__device__ uint8_t to_byte(float x) { return static_cast<uint8_t>(static_cast<int>(x)); }

template <KvKind kKind>
__device__ uint16_t to_16_bits(float x) {
  return kKind == KvKind::kFp16 ? __half_as_ushort(__float2half_rn(x))
                                : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
template <KvKind kKind>
__device__ uint32_t pack(float low, float high) {
  return kKind == KvKind::kFp16 ? pack_fp16(low, high) : pack_bf16(low, high);
}

template <KvKind kKind>
__device__ void store_key(float* x, uint8_t* page, int slot, int num_steps, int lane) {
  const int width = num_steps * kStepDims;
  if constexpr (kHasKvScales<kKind>) {
    const float scale = quantize<kKind>(x, width, lane);
    for (int d = lane * 4; d < width; d += 128) {
      *reinterpret_cast<uchar4*>(page + key_element(slot, d)) = {
          to_byte(x[d]), to_byte(x[d + 1]), to_byte(x[d + 2]), to_byte(x[d + 3])};
    }
    auto* scales = reinterpret_cast<float*>(page + 2 * kv_elements_bytes<kKind>(num_steps));
    if (lane == 0) scales[slot] = scale;
  } else {
    for (int d = lane * 4; d < width; d += 128) {
      *reinterpret_cast<uint2*>(page + key_element(slot, d) * 2) = {
          pack<kKind>(x[d], x[d + 1]), pack<kKind>(x[d + 2], x[d + 3])};
    }
  }
}

template <KvKind kKind>
__device__ void store_value(float* x, uint8_t* page, int slot, int num_steps, int lane) {
  const int width = num_steps * kStepDims;
  uint8_t* values = page + kv_elements_bytes<kKind>(num_steps);
  if constexpr (kHasKvScales<kKind>) {
    const float scale = quantize<kKind>(x, width, lane);
    for (int d = lane; d < width; d += 32) values[value_element(slot, d)] = to_byte(x[d]);
    auto* scales = reinterpret_cast<float*>(values + kv_elements_bytes<kKind>(num_steps));
    if (lane == 0) scales[kPageSize + slot] = scale;
  } else {
    auto* elements = reinterpret_cast<uint16_t*>(values);
    for (int d = lane; d < width; d += 32)
      elements[value_element(slot, d)] = to_16_bits<kKind>(x[d]);
  }
}

// A warp takes a head of a row: of queries, then of keys, then of values.
template <KvKind kKind>
__global__ void __launch_bounds__(kThreads)
    append_kernel(AppendArgs args, HeadShape shape, StepRows rows, KvLayer layer,
                  float softmax_scale) {
  __shared__ __align__(16) float elements[kWarps][kMaxHeadDim];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int num_heads = shape.n_head + 2 * shape.n_kv_head, D = shape.head_dim;
  const int64_t item = int64_t{blockIdx.x} * kWarps + warp;
  const int64_t row = item / num_heads;
  const int head = static_cast<int>(item % num_heads);
  if (row >= rows.num_rows) return;

  float* x = elements[warp];
  const int num_steps = num_steps_of(D);
  const float* source = args.qkv + row * args.qkv_stride + head * D;
  for (int d = lane; d < num_steps * kStepDims; d += 32) x[d] = d < D ? source[d] : 0.0f;
  __syncwarp();
  const bool is_query = head < shape.n_head, is_value = head >= shape.n_head + shape.n_kv_head;
  if (!is_value) {
    const float* norm = is_query ? args.q_norm : args.k_norm;
    if (norm) normalize_head(x, norm, args.norm_eps, D, lane);
    if (args.rotations) rotate(x, args.rotations + row * D, D, lane);
  } else if (args.first_values) {
    const int value_head = head - shape.n_head - shape.n_kv_head;
    float* first = args.first_values + (row * shape.n_kv_head + value_head) * D;
    for (int d = lane; d < D; d += 32) {
      if (args.is_first_layer) {
        first[d] = x[d];
      } else {
        x[d] += first[d];
      }
    }
    __syncwarp();
  }
  if (is_query) {
    uint16_t* query = args.queries + row * args.query_stride + head * D;
    for (int d = lane; d < D; d += 32) query[d] = to_16_bits<kKind>(x[d] * softmax_scale);
    return;
  }
  const int place = rows.places[row], slot = place % kPageSize;
  const int page = rows.block_tables[rows.table_of[row] * rows.table_stride + place / kPageSize];
  const int kv_head = (head - shape.n_head) % shape.n_kv_head;
  uint8_t* of_head =
      layer.base + page * layer.block_bytes + kv_head * int64_t{kv_head_bytes<kKind>(num_steps)};
  if (is_value) {
    store_value<kKind>(x, of_head, slot, num_steps, lane);
  } else {
    store_key<kKind>(x, of_head, slot, num_steps, lane);
  }
}

__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const int32_t* __restrict__ positions, const float* __restrict__ frequencies,
                  float magnitude, int half, float* __restrict__ rotations, int num_rows) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = item / half;
  const int i = static_cast<int>(item % half);
  if (row >= num_rows) return;
  // the angle in float32, as the models were trained with; in half turns, which are reduced exactly
  const float angle = static_cast<float>(positions[row]) * frequencies[i];
  double sine, cosine;
  sincospi(angle * 0.31830988618379067154, &sine, &cosine);
  rotations[row * 2 * half + i] = static_cast<float>(cosine) * magnitude;
  rotations[row * 2 * half + half + i] = static_cast<float>(sine) * magnitude;
}

// A warp takes the keys of a head, or its values, at a place of the prefix, in layer y.
template <KvKind kKind>
__global__ void __launch_bounds__(kThreads)
    prefix_kernel(Prefix prefix, HeadShape shape, const int32_t* __restrict__ block_table,
                  KvLayer layer, int64_t layer_bytes) {
  __shared__ __align__(16) float elements[kWarps][kMaxHeadDim];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int D = shape.head_dim, num_steps = num_steps_of(D);
  const int item = static_cast<int>(blockIdx.x) * kWarps + warp;
  const int place = item / (2 * shape.n_kv_head), part = item % (2 * shape.n_kv_head);
  if (place >= prefix.length) return;
  const int head = part / 2;
  const bool is_value = part % 2 == 1;
  const int64_t source =
      ((int64_t{blockIdx.y} * prefix.length + place) * shape.n_kv_head + head) * D;
  const float* from = (is_value ? prefix.values : prefix.keys) + source;
  float* x = elements[warp];
  for (int d = lane; d < num_steps * kStepDims; d += 32) x[d] = d < D ? from[d] : 0.0f;
  __syncwarp();
  uint8_t* of_head = layer.base + blockIdx.y * layer_bytes +
                     block_table[place / kPageSize] * layer.block_bytes +
                     head * int64_t{kv_head_bytes<kKind>(num_steps)};
  if (is_value) {
    store_value<kKind>(x, of_head, place % kPageSize, num_steps, lane);
  } else {
    store_key<kKind>(x, of_head, place % kPageSize, num_steps, lane);
  }
}

// Block x copies a pair of pages in layer y.
__global__ void __launch_bounds__(kThreads)
    copy_kernel(uint8_t* base, int64_t layer_bytes, int64_t block_bytes,
                const int32_t* __restrict__ copies) {
  uint8_t* layer = base + blockIdx.y * layer_bytes;
  const auto* from = reinterpret_cast<const uint4*>(layer + copies[2 * blockIdx.x] * block_bytes);
  auto* to = reinterpret_cast<uint4*>(layer + copies[2 * blockIdx.x + 1] * block_bytes);
  for (int64_t i = threadIdx.x; i < block_bytes / 16; i += kThreads) to[i] = from[i];
}

unsigned blocks_for(int64_t items, int of_block) {
  return static_cast<unsigned>((items + of_block - 1) / of_block);
}

}  // namespace

int64_t kv_block_bytes(int n_kv_head, int head_dim, KvKind kind) {
  const int num_steps = num_steps_of(head_dim);
  const int head_bytes =
      with_kind(kind, "kv_block_bytes", [&](auto k) { return kv_head_bytes<k()>(num_steps); });
  return int64_t{n_kv_head} * head_bytes;
}

void rotary_angles(const int32_t* positions, const float* frequencies, float magnitude,
                   int head_dim, float* rotations, int num_rows, cudaStream_t stream) {
  if (head_dim % 2) {
    throw std::invalid_argument("rotary_angles: head_dim must be even, got " +
                                std::to_string(head_dim));
  }
  if (num_rows == 0) return;
  const int half = head_dim / 2;
  rotary_kernel<<<blocks_for(int64_t{num_rows} * half, kThreads), kThreads, 0, stream>>>(
      positions, frequencies, magnitude, half, rotations, num_rows);
  check_launch("rotary_angles");
}

void append_kv(const AppendArgs& args, const HeadShape& shape, const StepRows& rows,
               const KvLayer& layer, cudaStream_t stream) {
  check_heads(shape, "append_kv");
  if (args.rotations && shape.head_dim % 2) {
    throw std::invalid_argument("append_kv: rotary needs an even head_dim, got " +
                                std::to_string(shape.head_dim));
  }
  if (rows.num_rows == 0) return;
  const int64_t warps = int64_t{rows.num_rows} * (shape.n_head + 2 * shape.n_kv_head);
  const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  with_kind(layer.kind, "append_kv", [&](auto kind) {
    append_kernel<kind()><<<blocks_for(warps, kWarps), kThreads, 0, stream>>>(args, shape, rows,
                                                                              layer, softmax_scale);
  });
  check_launch("append_kv");
}

void write_prefix(const Prefix& prefix, const HeadShape& shape, const int32_t* block_table,
                  const KvLayer& layer, int64_t layer_bytes, cudaStream_t stream) {
  check_heads(shape, "write_prefix");
  if (prefix.length == 0) return;
  const int64_t warps = int64_t{prefix.length} * 2 * shape.n_kv_head;
  const dim3 grid(blocks_for(warps, kWarps), prefix.n_layer);
  with_kind(layer.kind, "write_prefix", [&](auto kind) {
    prefix_kernel<kind()>
        <<<grid, kThreads, 0, stream>>>(prefix, shape, block_table, layer, layer_bytes);
  });
  check_launch("write_prefix");
}

void copy_pages(uint8_t* base, int64_t layer_bytes, int n_layer, int64_t block_bytes,
                const int32_t* copies, int num_copies, cudaStream_t stream) {
  if (num_copies == 0) return;
  copy_kernel<<<dim3(num_copies, n_layer), kThreads, 0, stream>>>(base, layer_bytes, block_bytes,
                                                                  copies);
  check_launch("copy_pages");
}

}  // namespace leangpt::cuda
