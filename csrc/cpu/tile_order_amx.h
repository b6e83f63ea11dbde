// What Bf16Tiles gives, bit for bit, without tiles: for few rows, since a tile of one row takes the
// time of one of 16.

// 16 columns with two inputs each, as floats.
struct Pairs {
  Vec first, second;
  explicit Pairs(const uint8_t* p) : Pairs(_mm512_loadu_si512(p)) {}
  explicit Pairs(__m512i pairs)
      : first{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
        second{_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))} {}
};

// The sums that a product of tiles adds to those before it.
struct TileSum {
  Vec even = zero(), odd = zero();

  template <class T>
  void add(const Pairs& columns, const T* row) {
    int32_t pair;
    std::memcpy(&pair, row, sizeof pair);
    const Pairs inputs(_mm512_set1_epi32(pair));
    even = fma(columns.first, inputs.first, even);
    odd = fma(columns.second, inputs.second, odd);
  }
  Vec total() const { return even + odd; }
};

// Subnormal numbers are zeros within f(), as they are in tiles.
template <class F>
static inline void with_tile_rounding(const F& f) {
  constexpr unsigned kFlushed = 0x8040;  // of results and of inputs
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kFlushed);
  f();
  _mm_setcsr(before);
}
