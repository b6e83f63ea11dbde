// One step of a product with bf16 or 8-bit weights, on CPUs with AVX-512 BF16 and VNNI.
#include "vec_avx512.h"

using Bf16Activation = uint16_t;  // the CPU multiplies bf16 by bf16

struct Bf16Weights {
  __m512i v;  // 16 outputs, 2 inputs each
};
static inline Bf16Weights load_bf16_weights(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline Vec dot_bf16(Vec sum, Bf16Weights w, const uint16_t* a) {
  int32_t pair;
  std::memcpy(&pair, a, sizeof pair);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)_mm512_set1_epi32(pair))};
}

struct Int8Weights {
  __m512i v;  // 16 outputs, 4 inputs each, unsigned
};
static inline Int8Weights load_int8_weights(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void load_int4_weights(const uint8_t* p, Int8Weights& low, Int8Weights& high) {
  const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(0x0F);
  low.v = _mm512_and_si512(both, mask);
  high.v = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
}
// As assembly: g++ 12 copies the sums around the intrinsic, and runs out of registers.
static inline IVec dot_int8(IVec sum, Int8Weights w, const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(_mm512_set1_epi32(four)));
  return sum;
}
