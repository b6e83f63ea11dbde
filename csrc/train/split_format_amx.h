// Products of float32 in tiles of bf16. Three bf16 have the 24 bits of a float32,
//
//   x = x0 + x1 + x2,  x0 = bf16(x),  x1 = bf16(x - x0),  x2 = x - x0 - x1
//
// and of the nine products of two such sums the three smallest, of x1 y2, x2 y1 and x2 y2, are
// below the rounding of the largest (2^-26 of it): six remain. Infinities become NaN, as does what
// rounds to one, above 3.39e38. Parts below 1.2e-38 are zero: numbers below 1e-33 lose bits.
//
// Henry, Tang, Heinecke, 2019, https://arxiv.org/abs/1904.06376
struct SplitFormat {
  static constexpr bool kIsSplit = true;
  static constexpr bool kHasTiles = true;
  static constexpr int kRows = 32;  // of two tiles
  static constexpr int64_t kBlockRows = 192, kBlockInputs = 512;

  // 32 inputs are a block: of a row, 16 units of each part; of a panel, 16 steps of each part.
  static constexpr int64_t kSplitInputs = 32;
  static constexpr int64_t kSplitUnits = 3 * kTileSteps;
  static constexpr int64_t units(int64_t inputs) {
    return (inputs + kSplitInputs - 1) / kSplitInputs * kSplitUnits;
  }

  static constexpr int64_t kColumns = kPanelStepBytes / sizeof(float);  // of a panel

  // 16 bf16 as they are in float32.
  static inline Vec widened(__m256i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  // The three parts of 32 numbers, one after the other.
  template <class F>
  static inline void split(Vec first, Vec second, const F& store_part) {
    for (int part = 0; part < 3; ++part) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
      store_part(part, both);
      first = first - widened(_mm512_castsi512_si256(both));
      second = second - widened(_mm512_extracti64x4_epi64(both, 1));
    }
  }

  // 32 inputs of a row.
  static inline void split_row(Vec first, Vec second, float* block) {
    split(first, second, [&](int part, __m512i both) {
      store(block + part * kTileSteps, {_mm512_castsi512_ps(both)});
    });
  }
  // 32 inputs of all columns of a panel: [input][column].
  static inline void split_columns(const float* x, float* block) {
    for (int step = 0; step < kTileSteps; ++step) {
      for (int column = 0; column < kColumns; column += kLanes) {
        split(load(x + 2 * step * kColumns + column), load(x + (2 * step + 1) * kColumns + column),
              [&](int part, __m512i both) {
                const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
                const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
                store(block + (part * kTileSteps + step) * kColumns + column,
                      {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))});
              });
      }
    }
  }

  template <int kPart>
  static inline void load_rows(const uint8_t* rows, int64_t row_bytes) {
    load_tile<4>(rows + kPart * 64, row_bytes);
    load_tile<5>(rows + kPart * 64 + 16 * row_bytes, row_bytes);
  }
  template <int kPart>
  static inline void load_columns(const uint8_t* panel) {
    load_tile<6>(panel + kPart * kTileSteps * kPanelStepBytes, kPanelStepBytes);
    load_tile<7>(panel + kPart * kTileSteps * kPanelStepBytes + 64, kPanelStepBytes);
  }
  static inline void multiply_parts() {
    Bf16Tiles::multiply<0, 4, 6>();
    Bf16Tiles::multiply<1, 4, 7>();
    Bf16Tiles::multiply<2, 5, 6>();
    Bf16Tiles::multiply<3, 5, 7>();
  }
  // 32 rows and half a panel; in an order in which parts are loaded once or twice.
  static inline void multiply_block(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes) {
    load_rows<0>(rows, row_bytes);
    load_columns<2>(panel);
    multiply_parts();
    load_columns<1>(panel);
    multiply_parts();
    load_rows<1>(rows, row_bytes);
    multiply_parts();
    load_columns<0>(panel);
    multiply_parts();
    load_rows<2>(rows, row_bytes);
    multiply_parts();
    load_rows<0>(rows, row_bytes);
    multiply_parts();
  }

  // One half of the panel after the other, each for all rows; with each block of inputs it asks for
  // some of the next panel. With the second half rows are whole: those before are finished while
  // others are multiplied.
  template <class F>
  static void multiply(const Rows& rows, const float* panel, int64_t num_rows, int64_t units,
                       float* out, int64_t out_stride, bool adds, const F& finish) {
    const int64_t finished_a_block = (kRows * kSplitUnits + units - 1) / units;
    int64_t finished = 0;
    const int64_t row_bytes = rows.row_stride * sizeof(float);
    const int64_t passes = (num_rows + kRows - 1) / kRows * 2;
    const int64_t fetched_bytes = (kSplitUnits * kPanelStepBytes / passes + 63) / 64 * 64;
    const uint8_t* next = reinterpret_cast<const uint8_t*>(panel + units * kColumns);
    configure_tiles(16, 16, kTileSteps);
    for (int64_t column = 0; column < kColumns; column += kColumns / 2) {
      for (int64_t r = 0; r < num_rows; r += kRows) {
        const Sums sums = {reinterpret_cast<uint8_t*>(out + r * out_stride + column),
                           out_stride * static_cast<int64_t>(sizeof(float))};
        load_sums(sums, 16 * sums.row_bytes, 64, adds);
        for (int64_t unit = 0; unit < units; unit += kSplitUnits) {
          for (int64_t i = 0; i < fetched_bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
          next += fetched_bytes;
          multiply_block(reinterpret_cast<const uint8_t*>(panel + unit * kColumns + column),
                         reinterpret_cast<const uint8_t*>(rows.units + r * rows.row_stride + unit),
                         row_bytes);
          if (column == 0) continue;
          for (int64_t i = 0; i < finished_a_block && finished < r; ++i) finish(finished++);
        }
        store_sums(sums, 16 * sums.row_bytes, 64);
      }
    }
    while (finished < num_rows) finish(finished++);
    release_tiles();
  }
};
