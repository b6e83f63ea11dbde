// Packed weights (../matrix.h) as operands of tensor cores: copied to shared memory as they are,
// and unpacked to bfloat16 in registers.
//
// Weights are the rows of mma.m16n8k16, 16 outputs, and the rows of activations its columns: 8
// tokens fill a tile. Inputs are multiplied in blocks of 32, by two of them. Which input takes
// which place is free, if both operands agree: thread t of the 4 that share an output or token has
// the inputs 8t to 8t + 7 of the block, 16 bytes of a bfloat16 row, and whole words of a panel in
// every format. So is which output is which row: neighbours, which one access reads, are rows g and
// g + 8, registers that follow each other.
//
// Integers are exact in bfloat16. So sums of a block are of integers, and float32 scales (and
// minimums, times the sum of the activations) are applied to them.
#pragma once

#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "../matrix.h"
#include "bytes.cuh"
#include "ptx.cuh"

namespace leangpt::cuda {

constexpr int kBlockInputs = 32;

// A matrix as kernels see it: what Matrix computes, computed.
struct Weights {
  const uint8_t* data;
  const float* output_scales;         // one an output, or null
  const uint16_t *scales, *minimums;  // float16 [panel][group][64], or null
  const float* bias;
  int64_t panel_bytes;
  int n, k;
  int steps, blocks;  // of a panel; the last block may have half of its steps
  int groups;
  int group_shift;  // block >> group_shift is its group
};

// Throws std::invalid_argument for a format that the kernels do not know.
inline Weights as_weights(const Matrix& w, const char* kernel) {
  const std::string prefix = std::string(kernel) + ": ";
  if (w.kind != WeightKind::kBf16 && w.kind != WeightKind::kInt8 && w.kind != WeightKind::kInt4) {
    throw std::invalid_argument(
        prefix + "weights must be packed as bf16, int8 or int4 on CUDA, got kind " +
        std::to_string(static_cast<int>(w.kind)) + "; fp32 models are to be packed as bf16");
  }
  Weights weights = {w.data};
  if (w.kind != WeightKind::kBf16 && w.group == 0) {
    weights.output_scales = static_cast<const float*>(w.scales);
  } else if (w.kind != WeightKind::kBf16) {
    weights.scales = static_cast<const uint16_t*>(w.scales);
    weights.minimums = w.minimums;
    while (kBlockInputs << weights.group_shift < w.group) ++weights.group_shift;
    if (kBlockInputs << weights.group_shift != w.group) {
      throw std::invalid_argument(prefix + "groups must be of 32, 64, 128, .. inputs, got " +
                                  std::to_string(w.group));
    }
  }
  weights.bias = w.bias;
  weights.panel_bytes = w.panel_bytes();
  weights.n = w.n;
  weights.k = w.k;
  weights.steps = static_cast<int>(w.steps());
  weights.blocks = static_cast<int>((w.padded_k() + kBlockInputs - 1) / kBlockInputs);
  weights.groups = static_cast<int>(w.groups());
  return weights;
}

// The integers u - 8 for the lowest 4 bits of two 16-bit lanes, as bfloat16.
__device__ __forceinline__ uint32_t nibbles_to_bf16(uint32_t nibbles) {
  const uint32_t low = lop3<kAndOr>(nibbles, 0x000F000F, 0x43004300), offset = 0x43084308;
  const __nv_bfloat162 q = __hsub2(reinterpret_cast<const __nv_bfloat162&>(low),
                                   reinterpret_cast<const __nv_bfloat162&>(offset));
  return reinterpret_cast<const uint32_t&>(q);
}

// The weights of kTiles mma tiles, 16 outputs each, for a block of inputs. Thread g of the 8 that
// have the same inputs has outputs 2g and 2g + 1 of a tile, as its rows g and g + 8.
template <WeightKind kKind, int kTiles>
struct WeightTile {
  static_assert(kTiles == 1 || kTiles == 2);
  static constexpr bool kIsInteger = kKind != WeightKind::kBf16;
  static constexpr int kOutputs = 16 * kTiles, kThreadOutputs = 2 * kTiles;
  // words of an output that a thread has
  static constexpr int kWords = kKind == WeightKind::kBf16 ? 4 : kKind == WeightKind::kInt8 ? 2 : 1;
  static constexpr int kSteps = 4 * kWords;
  static constexpr int kChunks = kOutputs / 4;  // of 16 bytes in a step
  static constexpr int kScaleChunks = kOutputs / 8;
  static constexpr int kDataBytes = kSteps * kChunks * 16;
  static constexpr int kBytes = kDataBytes + (kIsInteger ? 2 * kScaleChunks * 16 : 0);

  uint32_t words[kTiles][2][4];  // operands of the two mma of each tile
  float scales[kThreadOutputs], minimums[kThreadOutputs];

  // Where a chunk of a step lies in shared memory: by word, by thread t that reads it, and swizzled
  // so that the half chunks which 16 lanes read at once are in all banks.
  static __device__ __forceinline__ unsigned place(unsigned word, unsigned t, unsigned chunk) {
    const unsigned swizzle = kTiles == 2 ? 2 * t : t & 2;
    return ((word * 4 + t) * kChunks + (chunk ^ swizzle)) * 16;
  }

  // What one of kThreads threads copies to shared memory, block after block of inputs.
  template <int kThreads>
  class Copies {
   public:
    __device__ __forceinline__ Copies(const Weights& w, int first_output, int first_block,
                                      unsigned thread)
        : thread_(thread), block_(first_block) {
      const int panel = first_output / kPanelWidth, lane = first_output % kPanelWidth;
      data_ = w.data + panel * w.panel_bytes +
              (int64_t{first_block} * kSteps * kPanelWidth + lane) * 4 + thread % kChunks * 16;
      const unsigned part = thread / kScaleChunks;  // first the scales, then the minimums
      const uint16_t* of_groups = part == 0 ? w.scales : part == 1 ? w.minimums : nullptr;
      has_scales_ = of_groups != nullptr;
      const int64_t first_group = int64_t{panel} * w.groups;
      scales_ = of_groups + first_group * kPanelWidth + lane + thread % kScaleChunks * 8;
    }

    // Start to copy the next block.
    __device__ __forceinline__ void start(const Weights& w, uint8_t* shared) {
      constexpr unsigned kCopies = kSteps * kChunks;
#pragma unroll
      for (unsigned first = 0; first < kCopies; first += kThreads) {
        if (first + kThreads > kCopies && first + thread_ >= kCopies) break;
        const unsigned step = (first + thread_) / kChunks;
        cp_async_16(shared + place(step % kWords, step / kWords, thread_ % kChunks),
                    data_ + step * (kPanelWidth * 4),
                    block_ * kSteps + static_cast<int>(step) < w.steps);
      }
      if (kIsInteger && has_scales_) {
        cp_async_16(shared + kDataBytes + thread_ * 16,
                    scales_ + (block_ >> w.group_shift) * int64_t{kPanelWidth}, true);
      }
      data_ += kSteps * kPanelWidth * 4;
      ++block_;
    }

   private:
    unsigned thread_;
    int block_;
    const uint8_t* data_;
    const uint16_t* scales_;  // or minimums
    bool has_scales_;
  };

  // Read what was copied, by a warp.
  __device__ __forceinline__ void load(const Weights& w, const uint8_t* shared) {
    const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint8_t* at = shared + place(word, t, 4 * i + g / 2) + g % 2 * 8;
        const uint2 two = *reinterpret_cast<const uint2*>(at);
        unpack(two.x, word, 0, words[i]);
        unpack(two.y, word, 1, words[i]);
      }
    }
    if constexpr (kIsInteger) {
      const uint8_t* at = shared + kDataBytes + g * 4;
      load_halves(w.scales, at, 1.0f, scales);
      load_halves(w.minimums, at + kScaleChunks * 16, 0.0f, minimums);
    }
  }

 private:
  // Put a word of the first (row 0) or second output of a tile where the two mma take it from.
  static __device__ __forceinline__ void unpack(uint32_t packed, int word, int row,
                                                uint32_t (&out)[2][4]) {
    if constexpr (kKind == WeightKind::kBf16) {
      out[word / 2][word % 2 * 2 + row] = packed;
    } else {
      const uint32_t first = __byte_perm(packed, 0, 0x4140);
      const uint32_t second = __byte_perm(packed, 0, 0x4342);
      if constexpr (kKind == WeightKind::kInt8) {
        out[word][row] = bytes_to_bf16(first);
        out[word][2 + row] = bytes_to_bf16(second);
      } else {
        out[0][row] = nibbles_to_bf16(first);
        out[0][2 + row] = nibbles_to_bf16(second);
        out[1][row] = nibbles_to_bf16(first >> 4);
        out[1][2 + row] = nibbles_to_bf16(second >> 4);
      }
    }
  }

  // Float16 values of a thread's outputs, or what stands for them where there are none.
  static __device__ __forceinline__ void load_halves(const void* source, const uint8_t* shared,
                                                     float none, float (&out)[kThreadOutputs]) {
    if (source == nullptr) {
#pragma unroll
      for (float& value : out) value = none;
      return;
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(shared + i * 32));
      out[2 * i] = two.x;
      out[2 * i + 1] = two.y;
    }
  }
};

}  // namespace leangpt::cuda
