// Vec: 16 floats, IVec: 16 int32, in two AVX2 registers each; the same names as vec_avx512.h.

struct Vec {
  __m256 lo, hi;
};
struct IVec {
  __m256i lo, hi;
};

static inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline void store_first(float* p, Vec a, int n) {
  float lanes[16];
  store(lanes, a);
  std::memcpy(p, lanes, n * sizeof(float));
}
static inline Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
static inline Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
static inline Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
static inline Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
static inline Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
static inline Vec abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
static inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
static inline float reduce_add(Vec a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
static inline float reduce_max(Vec a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
static inline Vec keep_lanes(Vec a, int first, int last, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto keep = [&](__m256 part, int offset) {
    const __m256i i = _mm256_add_epi32(lane, _mm256_set1_epi32(offset));
    const __m256i is_before_last = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), i);
    const __m256i is_before_first = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), i);
    return _mm256_blendv_ps(
        _mm256_set1_ps(other), part,
        _mm256_castsi256_ps(_mm256_andnot_si256(is_before_first, is_before_last)));
  };
  return {keep(a.lo, 0), keep(a.hi, 8)};
}

static inline IVec broadcast_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline IVec operator+(IVec a, IVec b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
static inline IVec operator-(IVec a, IVec b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
template <int kBits>
static inline IVec shift_left(IVec a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
static inline IVec shift_right(IVec a) {
  return {_mm256_srai_epi32(a.lo, kBits), _mm256_srai_epi32(a.hi, kBits)};
}
static inline int32_t reduce_add(IVec a) {
  const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1))));
}
static inline Vec to_float(IVec a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
static inline IVec round_to_int(Vec a) {
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
static inline void store_i8(int8_t* p, IVec a) {
  const __m256i mask = _mm256_set1_epi32(0xFF);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, mask),
                                            _mm256_and_si256(a.hi, mask));  // 0-3, 8-11, 4-7, 12-15
  const __m256i ordered = _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}

static inline __m256 load_8_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline Vec load_bf16(const uint16_t* p) { return {load_8_bf16(p), load_8_bf16(p + 8)}; }
static inline Vec load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
static inline __m256i upper_halves(__m256 x) {  // rounded to nearest, even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
static inline void store_bf16(uint16_t* p, Vec a) {
  const __m256i words = _mm256_packus_epi32(upper_halves(a.lo), upper_halves(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0)));
}

static inline void store_in_pairs(uint16_t* pairs, const uint16_t* elements, int which) {
  for (int i = 0; i < 16; ++i) pairs[2 * i + which] = elements[i];
}

static inline Vec round(Vec a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
static inline __m256 power_of_2(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
static inline Vec scale_by_power_of_2(Vec a, Vec n) {
  return {_mm256_mul_ps(a.lo, power_of_2(n.lo)), _mm256_mul_ps(a.hi, power_of_2(n.hi))};
}

static inline Vec combine_digits(IVec high, IVec middle, IVec low) {
  const __m256d k16 = _mm256_set1_pd(65536.0), k8 = _mm256_set1_pd(256.0);
  const auto quarter = [&](__m128i h, __m128i m, __m128i l) {
    const __m256d sum =
        _mm256_fmadd_pd(_mm256_cvtepi32_pd(h), k16,
                        _mm256_fmadd_pd(_mm256_cvtepi32_pd(m), k8, _mm256_cvtepi32_pd(l)));
    return _mm256_cvtpd_ps(sum);
  };
  const auto half = [&](__m256i h, __m256i m, __m256i l) {
    const __m128 first =
        quarter(_mm256_castsi256_si128(h), _mm256_castsi256_si128(m), _mm256_castsi256_si128(l));
    const __m128 second = quarter(_mm256_extracti128_si256(h, 1), _mm256_extracti128_si256(m, 1),
                                  _mm256_extracti128_si256(l, 1));
    return _mm256_insertf128_ps(_mm256_castps128_ps256(first), second, 1);
  };
  return {half(high.lo, middle.lo, low.lo), half(high.hi, middle.hi, low.hi)};
}

using Bf16Activation = float;

struct Bf16Weights {
  Vec even, odd;  // 16 outputs: the first and the second of 2 inputs
};
static inline Bf16Weights load_bf16_weights(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi32(-65536);
  const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)),
           _mm256_castsi256_ps(_mm256_and_si256(hi, mask))}};
}
static inline Vec dot_bf16(Vec sum, Bf16Weights w, const float* a) {
  return fma(w.odd, broadcast(a[1]), fma(w.even, broadcast(a[0]), sum));
}

// 16 outputs with 4 inputs each, as bytes. They are widened to int16 where they are multiplied:
// vpmaddubsw would saturate.
struct Int8Weights {
  __m256i lo, hi;
};
static inline Int8Weights load_int8_weights(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
static inline void load_int4_weights(const uint8_t* p, Int8Weights& low, Int8Weights& high) {
  const Int8Weights both = load_int8_weights(p);
  const __m256i mask = _mm256_set1_epi8(0x0F);
  low = {_mm256_and_si256(both.lo, mask), _mm256_and_si256(both.hi, mask)};
  high = {_mm256_and_si256(_mm256_srli_epi16(both.lo, 4), mask),
          _mm256_and_si256(_mm256_srli_epi16(both.hi, 4), mask)};
}
static inline IVec dot_int8(IVec sum, Int8Weights w, const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  const __m256i x = _mm256_set1_epi32(four);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
  const auto products = [&](__m256i bytes) {
    const __m256i even_bytes = _mm256_and_si256(bytes, _mm256_set1_epi16(0x00FF));
    return _mm256_add_epi32(_mm256_madd_epi16(even_bytes, even),
                            _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), odd));
  };
  return {_mm256_add_epi32(sum.lo, products(w.lo)), _mm256_add_epi32(sum.hi, products(w.hi))};
}

// How many rows of a product are in registers at a time, and how many Vecs of outputs for that many
// rows, so that the sums fit the registers: 12 of 16, two for each Vec. Few rows take the whole
// panel, and so read it as one stream.
constexpr int kTileRows = 6;
constexpr int kMostSharingRows = 0;
constexpr int tile_vecs(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int grouped_tile_vecs(int tokens) { return tokens == 1 ? 4 : 1; }
constexpr int kMaxQueries = 4;
constexpr int kAttentionSums = 4;
