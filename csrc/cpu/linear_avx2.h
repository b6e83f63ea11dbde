// Products of more rows than one tile has: all tiles multiply a block of weights before the next
// one is read. Where weights are narrower than what is multiplied they share a copy of it, widened
// once, 16 outputs after the other, of which lines 256 bytes apart would use a quarter of the L1
// cache. The sums run in the same order as those of few rows.
//
// Each tile asks for its share of the weights that come next, line after line: memory gives them
// while tiles multiply, and the CPU's own prefetchers see one stream. Asked for by the first tile
// of a block alone, they came late: benchmarks/records/.
//
// The copy, sums that go on in the next block, and int8 rows widened lie behind the tile, see
// kTileFloats.

// Where a product's tiles find what they share.
struct Shared {
  uint8_t* weights;
  uint8_t* sums;  // (rows, 64) float32, or for each digit of a row int32
  int16_t* rows;
  explicit Shared(float* tile)
      : weights(reinterpret_cast<uint8_t*>(tile + kMaxTileRows * kPanelWidth)),
        sums(weights + kCopiedBytes),
        rows(reinterpret_cast<int16_t*>(sums + kMaxTileRows * kPanelWidth * 4 * kMaxWideDigits)) {}
};

// Sums of some rows and 16 outputs, over the inputs of a block, whose weights lie `kStride` floats
// apart. With every two inputs it asks for the weights at `next`, which moves on by so many bytes.
template <int kRows, int kStride>
static void block_tile(const float* weights, const float* rows, int64_t stride, int inputs,
                       const uint8_t* next, int fetched_bytes, bool goes_on, float* sums) {
  Vec totals[kRows];
  for (int r = 0; r < kRows; ++r) totals[r] = goes_on ? load(sums + r * kPanelWidth) : zero();
  for (int i = 0; i < inputs; i += 2, next += fetched_bytes) {
    __builtin_prefetch(next, 0, 2);
    for (int j = i; j < i + 2; ++j) {
      const Vec w = load(weights + j * kStride);
      for (int r = 0; r < kRows; ++r) {
        totals[r] = fma(w, broadcast(rows[r * stride + j]), totals[r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) store(sums + r * kPanelWidth, totals[r]);
}

template <class Format>
static void copy_floats(const uint8_t* panel, int inputs, float* copy) {
  for (int i = 0; i < inputs; i += Format::kInputs) {
    for (int v = 0; v < kPanelVecs; ++v) {
      const auto weights = Format::load_weights(panel + i / Format::kInputs * kStepBytes + v * 64);
      float* to = copy + (v * kCopiedFloats + i) * kLanes;
      if constexpr (Format::kInputs == 1) {
        store(to, weights);
      } else {
        store(to, weights.even);
        store(to + kLanes, weights.odd);
      }
    }
  }
}

template <class Format, bool kCopies>
static void multiply_float_blocks(const Matrix& w, const Activations& a, int64_t first_row,
                                  int rows, int panel, float* tile) {
  constexpr int kInputs = kCopies ? kCopiedFloats : kSharedFloats;
  constexpr int kStride = kCopies ? kLanes : kPanelWidth;
  constexpr int kBlockInputs = kBlockSteps * Format::kInputs;
  const Shared shared(tile);
  auto* sums = reinterpret_cast<float*>(shared.sums);
  const int64_t inputs = w.padded_k(), stride = a.row_bytes / 4;
  for (int64_t first = 0; first < inputs; first += kInputs) {
    const int count = static_cast<int>(inputs - first < kInputs ? inputs - first : kInputs);
    const int steps = count / Format::kInputs;
    const uint8_t* block = w.data + panel * w.panel_bytes() + first / Format::kInputs * kStepBytes;
    const uint8_t* next = block + (kCopies ? steps * kStepBytes : kFetchedAhead);
    const auto* weights = reinterpret_cast<const float*>(block);
    if constexpr (kCopies) {
      auto* copy = reinterpret_cast<float*>(shared.weights);
      copy_floats<Format>(block, count, copy);
      weights = copy;
    }
    for (int v = 0; v < kPanelVecs; ++v) {
      const float* of_vec = weights + v * (kCopies ? kCopiedFloats * kLanes : kLanes);
      each_tile<kTileRows>(rows, [&](int r, auto n, int t, int tiles) {
        const auto* x = reinterpret_cast<const float*>(a.rows + (first_row + r) * a.row_bytes);
        block_tile<decltype(n)::value, kStride>(
            of_vec, x + first, stride, count, next + (v * tiles + t) * steps * 64 / tiles,
            128 / Format::kInputs / tiles, first % kBlockInputs != 0,
            sums + r * kPanelWidth + v * kLanes);
      });
    }
    if ((first + count) % kBlockInputs != 0 && first + count != inputs) continue;
    for (int i = 0; i < rows * kPanelWidth; i += kLanes) {
      store(tile + i, first < kBlockInputs ? load(sums + i) : load(tile + i) + load(sums + i));
    }
  }
}

template <class Format>
static void blocked_float_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                                 int panel, float* tile) {
  if constexpr (Format::kInputs == 1) {
    if (rows <= kMostDirectRows) {
      return multiply_float_blocks<Format, false>(w, a, first_row, rows, panel, tile);
    }
  }
  multiply_float_blocks<Format, true>(w, a, first_row, rows, panel, tile);
}

// The weights of a block, less the 128 that is added to them: 16 outputs with inputs 0 and 2, then
// with 1 and 3, of each four.
static void copy_int8(const uint8_t* panel, int inputs, int16_t* copy) {
  const __m256i offset = _mm256_set1_epi16(128), mask = _mm256_set1_epi16(0x00FF);
  for (int step = 0; step < inputs / 4; ++step) {
    for (int v = 0; v < kPanelVecs; ++v) {
      const Int8Weights bytes = load_int8_weights(panel + step * kStepBytes + v * 64);
      auto* to = reinterpret_cast<__m256i*>(copy + v * kCopiedInt16s * kLanes + step * 64);
      const auto even = [&](__m256i x) {
        return _mm256_sub_epi16(_mm256_and_si256(x, mask), offset);
      };
      const auto odd = [&](__m256i x) { return _mm256_sub_epi16(_mm256_srli_epi16(x, 8), offset); };
      _mm256_store_si256(to, even(bytes.lo));
      _mm256_store_si256(to + 1, even(bytes.hi));
      _mm256_store_si256(to + 2, odd(bytes.lo));
      _mm256_store_si256(to + 3, odd(bytes.hi));
    }
  }
}

// Digits of a row in the order of the copied weights. Three digits of base 256 become two of base
// 4096, in [-2048, 2047] and [-2040, 2040], side by side for each four inputs.
template <int kDigits>
static void widen_row(const int8_t* digits, int64_t padded_k, int inputs, int16_t* row) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const auto put = [&](__m256i words) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(row), _mm256_shuffle_epi8(words, order));
    row += 16;
  };
  if constexpr (kDigits == 1) {
    for (int i = 0; i < inputs; i += 16) {
      put(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(digits + i))));
    }
  } else {
    for (int i = 0; i < inputs; i += 8) {
      const auto digit = [&](int d) {
        return _mm256_cvtepi8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(digits + d * padded_k + i)));
      };
      const __m256i all =
          _mm256_add_epi32(_mm256_slli_epi32(digit(0), 16),
                           _mm256_add_epi32(_mm256_slli_epi32(digit(1), 8), digit(2)));
      const __m256i high = _mm256_srai_epi32(_mm256_add_epi32(all, _mm256_set1_epi32(2048)), 12);
      put(_mm256_packs_epi32(high, _mm256_sub_epi32(all, _mm256_slli_epi32(high, 12))));
    }
  }
}

// Sums of some tokens and 16 outputs, over the inputs of a block; kDigits here is that of the
// widened rows.
template <int kTokens, int kDigits>
static void block_int8_tile(const int16_t* weights, const int16_t* rows, int steps,
                            const uint8_t* next, int fetched_bytes, bool goes_on, int32_t* sums) {
  constexpr int kStride = kCopiedInt16s * kDigits;
  IVec totals[kTokens][kDigits];
  const auto at = [&](int t, int d) {
    return reinterpret_cast<__m256i*>(sums + (t * kDigits + d) * kPanelWidth);
  };
  for (int t = 0; t < kTokens; ++t) {
    for (int d = 0; d < kDigits; ++d) {
      totals[t][d] = goes_on ? IVec{_mm256_load_si256(at(t, d)), _mm256_load_si256(at(t, d) + 1)}
                             : broadcast_i32(0);
    }
  }
  for (int step = 0; step < steps; ++step, next += fetched_bytes) {
    __builtin_prefetch(next, 0, 2);
    const auto* w = reinterpret_cast<const __m256i*>(weights + step * 64);
    const IVec even = {_mm256_load_si256(w), _mm256_load_si256(w + 1)};
    const IVec odd = {_mm256_load_si256(w + 2), _mm256_load_si256(w + 3)};
    for (int t = 0; t < kTokens; ++t) {
      for (int d = 0; d < kDigits; ++d) {
        const int16_t* x = rows + t * kStride + (step * kDigits + d) * 4;
        const auto add = [&](IVec pair_weights, const int16_t* pair) {
          int32_t bits;
          std::memcpy(&bits, pair, sizeof bits);
          const __m256i both = _mm256_set1_epi32(bits);
          IVec& total = totals[t][d];
          total.lo = _mm256_add_epi32(total.lo, _mm256_madd_epi16(pair_weights.lo, both));
          total.hi = _mm256_add_epi32(total.hi, _mm256_madd_epi16(pair_weights.hi, both));
        };
        add(even, x);
        add(odd, x + 2);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int d = 0; d < kDigits; ++d) {
      _mm256_store_si256(at(t, d), totals[t][d].lo);
      _mm256_store_si256(at(t, d) + 1, totals[t][d].hi);
    }
  }
}

// high * 4096 + low, rounded once.
static inline Vec combine_wide_digits(IVec high, IVec low) {
  const __m256d base = _mm256_set1_pd(4096.0);
  const auto quarter = [&](__m128i h, __m128i l) {
    return _mm256_cvtpd_ps(_mm256_fmadd_pd(_mm256_cvtepi32_pd(h), base, _mm256_cvtepi32_pd(l)));
  };
  const auto half = [&](__m256i h, __m256i l) {
    const __m128 first = quarter(_mm256_castsi256_si128(h), _mm256_castsi256_si128(l));
    const __m128 second = quarter(_mm256_extracti128_si256(h, 1), _mm256_extracti128_si256(l, 1));
    return _mm256_insertf128_ps(_mm256_castps128_ps256(first), second, 1);
  };
  return {half(high.lo, low.lo), half(high.hi, low.hi)};
}

template <int kDigits>
static void blocked_int_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                               int panel, float* tile) {
  constexpr int kWide = kDigits == 3 ? 2 : 1;
  const Shared shared(tile);
  auto* weights = reinterpret_cast<int16_t*>(shared.weights);
  auto* sums = reinterpret_cast<int32_t*>(shared.sums);
  const int64_t inputs = w.padded_k();
  for (int64_t first = 0; first < inputs; first += kCopiedInt16s) {
    const int count =
                  static_cast<int>(inputs - first < kCopiedInt16s ? inputs - first : kCopiedInt16s),
              steps = count / 4;
    const uint8_t* block = w.data + panel * w.panel_bytes() + first / 4 * kStepBytes;
    const uint8_t* next = block + steps * kStepBytes;
    copy_int8(block, count, weights);
    for (int r = 0; r < rows; ++r) {
      const auto* row = reinterpret_cast<const int8_t*>(a.rows + (first_row + r) * a.row_bytes);
      widen_row<kDigits>(row + first, inputs, count, shared.rows + r * kCopiedInt16s * kWide);
    }
    for (int v = 0; v < kPanelVecs; ++v) {
      each_tile<kDigits == 3 ? 2 : 5>(rows, [&](int r, auto n, int t, int tiles) {
        block_int8_tile<decltype(n)::value, kWide>(
            weights + v * kCopiedInt16s * kLanes, shared.rows + r * kCopiedInt16s * kWide, steps,
            next + (v * tiles + t) * steps * 64 / tiles, 64 / tiles, first != 0,
            sums + r * kWide * kPanelWidth + v * kLanes);
      });
    }
  }
  const float* scales = static_cast<const float*>(w.scales) + panel * kPanelWidth;
  for (int v = 0; v < kPanelVecs; ++v) {
    const Vec scale = load(scales + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      const auto digit = [&](int d) {
        const auto* at =
            reinterpret_cast<const __m256i*>(sums + (r * kWide + d) * kPanelWidth + v * kLanes);
        return IVec{_mm256_load_si256(at), _mm256_load_si256(at + 1)};
      };
      Vec value;
      if constexpr (kDigits == 3) {
        value = combine_wide_digits(digit(0), digit(1));
      } else {
        value = to_float(digit(0));
      }
      store(tile + r * kPanelWidth + v * kLanes,
            value * (scale * broadcast(a.scales[first_row + r])));
    }
  }
}
