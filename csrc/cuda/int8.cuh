// Bytes of packed weights, keys and values as bfloat16, in which integers of 8 bits are exact.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ptx.cuh"

namespace leangpt::cuda {

// The integers u - 128 for bytes u in the low halves of two 16-bit lanes, as bfloat16.
__device__ __forceinline__ uint32_t bytes_to_bf16(uint32_t bytes) {
  // 0x4300 is 128, its last bit counts 1: there is room for 7 bits of u, and 128 or, where the 8th
  // is not set, 256 to subtract
  const uint32_t low = lop3<kAndOr>(bytes, 0x007F007F, 0x43004300);
  const uint32_t offset = lop3<kNotAndOr>(bytes, 0x00800080, 0x43004300);
  const __nv_bfloat162 q = __hsub2(reinterpret_cast<const __nv_bfloat162&>(low),
                                   reinterpret_cast<const __nv_bfloat162&>(offset));
  return reinterpret_cast<const uint32_t&>(q);
}

}  // namespace leangpt::cuda
