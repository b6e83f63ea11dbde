// Rounding to bf16, and products of bf16 with float32 sums, two inputs a unit, on CPUs that have
// them.
static inline void store_elements(uint16_t* p, Vec v) {  // to nearest, even; no subnormal numbers
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v.v));
}

struct Bf16Pairs {
  using Element = uint16_t;
  static constexpr int kInputs = 2;
  static constexpr int64_t kBlockRows = 96, kBlockInputs = 1024;
  static constexpr bool kIsSplit = false;
  static constexpr int64_t units(int64_t inputs) { return (inputs + 1) / 2; }
  // Of two inputs of 16 rows or columns: the first in the low halves, rounded to nearest, even.
  static inline Vec unit(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first.v));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second.v));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  static inline Vec unit_of(const uint16_t* first, const uint16_t* second) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    return {_mm512_castsi512_ps(_mm512_or_si512(
        _mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)))};
  }
  static inline Vec dot(Vec sum, Vec column, const float* row) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)column.v, (__m512bh)_mm512_set1_ps(*row))};
  }
};
