// Bytes of packed weights, keys and values as bfloat16, in which integers and floats of 8 bits are
// exact.
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

// Floats of 8 bits (e4m3) in the high halves of two 16-bit lanes, as bfloat16.
__device__ __forceinline__ uint32_t fp8_to_bf16(uint32_t bytes) {
  // the exponent at the low end of the one of bfloat16, whose bias is 120 more
  const uint32_t small = lop3<kAndOr>(bytes >> 4, 0x07F007F0, bytes & 0x80008000);
  const uint32_t power = 0x7B807B80;  // 2^120
  const __nv_bfloat162 x = __hmul2(reinterpret_cast<const __nv_bfloat162&>(small),
                                   reinterpret_cast<const __nv_bfloat162&>(power));
  return reinterpret_cast<const uint32_t&>(x);
}

}  // namespace leangpt::cuda
