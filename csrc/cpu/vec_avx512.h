// Vec: 16 floats, IVec: 16 int32, in one AVX-512 register each. The other vec_*.h offer the same
// names. Included inside the namespace of an ISA, under its target pragma.

struct Vec {
  __m512 v;
};
struct IVec {
  __m512i v;
};

static inline Vec zero() { return {_mm512_setzero_ps()}; }
static inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline void store_first(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
static inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
static inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
static inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Lanes first <= i < last of `a`, `other` elsewhere.
static inline Vec keep_lanes(Vec a, int first, int last, float other) {
  const auto below = [](int n) { return n <= 0 ? 0u : n >= 16 ? 0xFFFFu : (1u << n) - 1; };
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other),
                             static_cast<__mmask16>(below(last) & ~below(first)), a.v)};
}

static inline IVec broadcast_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline IVec operator+(IVec a, IVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline IVec operator-(IVec a, IVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
template <int kBits>
static inline IVec shift_left(IVec a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
static inline IVec shift_right(IVec a) {  // arithmetic
  return {_mm512_srai_epi32(a.v, kBits)};
}
static inline int32_t reduce_add(IVec a) { return _mm512_reduce_add_epi32(a.v); }
static inline Vec to_float(IVec a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline IVec round_to_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest, even
static inline void store_i8(int8_t* p, IVec a) {  // the low byte of each lane
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

static inline Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline Vec load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline void store_bf16(uint16_t* p, Vec a) {  // to nearest, even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x00400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}

// The `which`-th of each of 16 pairs; the other one may be written by another thread meanwhile.
static inline void store_in_pairs(uint16_t* pairs, const uint16_t* elements, int which) {
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements));
  const __m512i low = _mm512_cvtepu16_epi32(packed);
  _mm512_mask_storeu_epi16(pairs, which == 0 ? 0x55555555u : 0xAAAAAAAAu,
                           which == 0 ? low : _mm512_slli_epi32(low, 16));
}

static inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for integral n in [-126, 127].
static inline Vec scale_by_power_of_2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// high * 65536 + middle * 256 + low, rounded once: the three digits of an exact integer.
static inline Vec combine_digits(IVec high, IVec middle, IVec low) {
  const __m512d k16 = _mm512_set1_pd(65536.0), k8 = _mm512_set1_pd(256.0);
  const auto half = [&](__m256i h, __m256i m, __m256i l) {
    const __m512d sum =
        _mm512_fmadd_pd(_mm512_cvtepi32_pd(h), k16,
                        _mm512_fmadd_pd(_mm512_cvtepi32_pd(m), k8, _mm512_cvtepi32_pd(l)));
    return _mm512_cvtpd_ps(sum);
  };
  const __m256 first = half(_mm512_castsi512_si256(high.v), _mm512_castsi512_si256(middle.v),
                            _mm512_castsi512_si256(low.v));
  const __m256 second =
      half(_mm512_extracti64x4_epi64(high.v, 1), _mm512_extracti64x4_epi64(middle.v, 1),
           _mm512_extracti64x4_epi64(low.v, 1));
  return {_mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1)};
}

// How many rows of a product are in registers at a time, and how many Vecs of outputs for that many
// rows, so that the sums fit the registers: 24 of 32. Few rows take the whole panel, and so read it
// as one stream.
constexpr int kTileRows = 6;
// Up to so many rows share blocks of weights in shared_float_linear.
constexpr int kMostSharingRows = 32;
constexpr int tile_vecs(int rows) { return rows <= kTileRows ? 4 : 1; }
constexpr int grouped_tile_vecs(int tokens) { return tokens == 1 ? 4 : 2; }
// Queries that attend together.
constexpr int kMaxQueries = 12;
constexpr int kAttentionSums = 24;
