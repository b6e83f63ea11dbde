// How products run with AVX2; the same names as blocks_none.h and products.h, which say what they
// are.

constexpr int kMaxTileRows = 128;
// A tile, and behind it what tiles share, see linear_avx2.h: a block of weights, sums, int8 rows.
constexpr int kCopiedBytes = 65536;
constexpr int kCopiedFloats = kCopiedBytes / (kPanelWidth * 4);  // inputs of a block
constexpr int kCopiedInt16s = kCopiedBytes / (kPanelWidth * 2);
// Up to so many rows float32 weights are not copied; a block of them stays in the L1 cache.
constexpr int kMostDirectRows = 32;
constexpr int kSharedFloats = 64;
constexpr int kFetchedAhead = 16384;
constexpr int kMaxWideDigits = 2;
constexpr int64_t kTileFloats = kMaxTileRows * kPanelWidth * (1 + kMaxWideDigits) +
                                kCopiedBytes / 4 +
                                kMaxTileRows * kCopiedInt16s * kMaxWideDigits / 2;
constexpr int kFetchingRows = 6;
constexpr bool kFetchesTwice = false;
constexpr bool kHasTiles = false;
constexpr bool kSharesFloatBlocks = true, kSharesIntBlocks = true;
template <class Format>
constexpr bool shares_float_blocks(int rows) {
  return rows > kTileRows;
}
template <int kDigits>
static bool shares_int_blocks(const Matrix& w, int rows) {
  constexpr int kMostInputs = 8192;  // of 12 by 8 bits: their sum fits an int32
  return w.group == 0 && rows > kTileRows / kDigits && w.padded_k() <= kMostInputs;
}
static inline bool is_multiplied_in_tiles(const Matrix&, int) { return false; }

constexpr int kCeilingSums = 5;

// Bytes are multiplied with bytes, into pairs in an int16: with weights of at most 15 a pair is at
// most 3,840, and 8 of them fit.
constexpr int kInt4Steps = 4;
struct Int4Sum {
  __m256i lo, hi;
};
static inline Int4Sum start_int4_sum(IVec) {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
static inline Int4Sum dot_int4(Int4Sum sum, Int8Weights w, const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  const __m256i x = _mm256_set1_epi32(four);
  return {_mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(w.lo, x)),
          _mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(w.hi, x))};
}
static inline IVec finish_int4_sum(IVec before, Int4Sum sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(before.lo, _mm256_madd_epi16(sum.lo, ones)),
          _mm256_add_epi32(before.hi, _mm256_madd_epi16(sum.hi, ones))};
}

// 16 lines of 4 bytes each, less the 128 that is added to them.
constexpr bool kWidensInt8Cache = true;
struct WidenedInt8Format {
  using Element = float;
  struct Weights {
    Vec inputs[4];
  };
  static constexpr int kInputs = 4;
  static inline Weights load_weights(const uint8_t* p) {
    const Int8Weights bytes = load_int8_weights(p);
    const __m256i offset = _mm256_set1_epi8(-128);
    const IVec x = {_mm256_xor_si256(bytes.lo, offset), _mm256_xor_si256(bytes.hi, offset)};
    return {{to_float(shift_right<24>(shift_left<24>(x))),
             to_float(shift_right<24>(shift_left<16>(x))),
             to_float(shift_right<24>(shift_left<8>(x))), to_float(shift_right<24>(x))}};
  }
  static inline Vec dot(Vec sum, const Weights& w, const float* a) {
    for (int i = 0; i < kInputs; ++i) sum = fma(w.inputs[i], broadcast(a[i]), sum);
    return sum;
  }
};
