// One step of a product with bf16 or 8-bit weights, on CPUs with AVX-512 but neither BF16 nor VNNI.
#include "vec_avx512.h"

using Bf16Activation = float;

struct Bf16Weights {
  __m512 even, odd;  // 16 outputs: the first and the second of 2 inputs
};
static inline Bf16Weights load_bf16_weights(const uint8_t* p) {
  const __m512i pairs = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
}
static inline Vec dot_bf16(Vec sum, Bf16Weights w, const float* a) {
  return fma({w.odd}, broadcast(a[1]), fma({w.even}, broadcast(a[0]), sum));
}

// The bytes of 16 outputs with 4 inputs each, widened to int16: inputs 0 and 2, and inputs 1 and 3.
// Products of 16 bits are exact; vpmaddubsw on the bytes themselves would saturate.
struct Int8Weights {
  __m512i even, odd;
};
static inline Int8Weights widen(__m512i bytes) {
  return {_mm512_and_si512(bytes, _mm512_set1_epi16(0x00FF)), _mm512_srli_epi16(bytes, 8)};
}
static inline Int8Weights load_int8_weights(const uint8_t* p) {
  return widen(_mm512_loadu_si512(p));
}
static inline void load_int4_weights(const uint8_t* p, Int8Weights& low, Int8Weights& high) {
  const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(0x0F);
  low = widen(_mm512_and_si512(both, mask));
  high = widen(_mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
}
static inline IVec dot_int8(IVec sum, Int8Weights w, const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  const __m512i x = _mm512_set1_epi32(four);
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), odd = _mm512_srai_epi16(x, 8);
  const __m512i products =
      _mm512_add_epi32(_mm512_madd_epi16(w.even, even), _mm512_madd_epi16(w.odd, odd));
  return {_mm512_add_epi32(sum.v, products)};
}
