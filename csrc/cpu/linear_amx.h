// Products of more rows than a few, in tiles of AMX. Panels lie as tiles are multiplied.

template <class T>
static Sums sums_of(T* sums) {
  return {reinterpret_cast<uint8_t*>(sums), kPanelWidth * 4};
}

// A tile multiplies 16 rows in the time of one, so one or two go without.
template <int kRows>
static void multiply_bf16_rows(const uint8_t* weights, const uint8_t* rows, int64_t row_bytes,
                               int64_t steps, float* sums) {
  Vec totals[kRows][kPanelVecs];
  for (auto& of_row : totals) {
    for (Vec& total : of_row) total = zero();
  }
  for (int64_t first = 0; first < steps; first += kTileSteps) {
    const int64_t end = steps - first < kTileSteps ? steps : first + kTileSteps;
    TileSum parts[kRows][kPanelVecs];
    for (int64_t step = first; step < end; ++step) {
      for (int v = 0; v < kPanelVecs; ++v) {
        const uint8_t* at = weights + step * kStepBytes + v * 64;
        prefetch_weights(at);
        const Pairs pairs(at);
        for (int r = 0; r < kRows; ++r) parts[r][v].add(pairs, rows + r * row_bytes + step * 4);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kPanelVecs; ++v) totals[r][v] = totals[r][v] + parts[r][v].total();
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) {
      store(sums + r * kPanelWidth + v * kLanes, totals[r][v]);
    }
  }
}

template <class Format>
static void blocked_float_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                                 int panel, float* tile) {
  constexpr int64_t kSummedSteps = 1024;  // longer sums are added in parts: they lose less so
  const uint8_t* weights = w.data + panel * w.panel_bytes();
  const uint8_t* row = a.rows + first_row * a.row_bytes;
  float* part = tile + kMaxTileRows * kPanelWidth;
  for (int64_t step = 0; step < w.steps(); step += kSummedSteps) {
    const int64_t steps = w.steps() - step < kSummedSteps ? w.steps() - step : kSummedSteps;
    float* sums = step == 0 ? tile : part;
    const uint8_t *at = weights + step * kStepBytes, *inputs = row + step * 4;
    if (rows <= kMostRowsWithoutTiles) {
      with_tile_rounding([&] {
        with_constant<kMostRowsWithoutTiles>(rows, [&](auto n) {
          multiply_bf16_rows<decltype(n)::value>(at, inputs, a.row_bytes, steps, sums);
        });
      });
    } else {
      multiply_in_tiles<Bf16Tiles>(at, inputs, a.row_bytes, rows, steps, false, sums_of(sums));
    }
    if (step == 0) continue;
    for (int64_t i = 0; i < rows * kPanelWidth; i += kLanes) {
      store(tile + i, load(tile + i) + load(part + i));
    }
  }
}

template <int kDigits>
static void blocked_int8_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                                int panel, float* tile) {
  auto* sums = reinterpret_cast<int32_t*>(tile + kMaxTileRows * kPanelWidth);
  multiply_in_tiles<Int8Tiles>(w.data + panel * w.panel_bytes(), a.rows + first_row * a.row_bytes,
                               w.padded_k(), rows * kDigits, w.steps(), false, sums_of(sums));
  const float* scales = static_cast<const float*>(w.scales) + panel * kPanelWidth;
  const int32_t* offsets = a.offsets + first_row * kDigits;
  for (int r = 0; r < rows; ++r) {
    const Vec row_scale = broadcast(a.scales[first_row + r]);
    for (int column = 0; column < kPanelWidth; column += kLanes) {
      const auto digit = [&](int d) {
        const int32_t* at = sums + (r * kDigits + d) * kPanelWidth + column;
        return IVec{_mm512_loadu_si512(at)} + broadcast_i32(offsets[r * kDigits + d]);
      };
      Vec value;
      if constexpr (kDigits == 3) {
        value = combine_digits(digit(0), digit(1), digit(2));
      } else {
        value = to_float(digit(0));
      }
      store(tile + r * kPanelWidth + column, value * (load(scales + column) * row_scale));
    }
  }
}

// Four products of whole tiles a round.
template <WeightKind kKind>
static int multiply_tiles(int64_t rounds) {
  using Tiles = std::conditional_t<kKind == WeightKind::kBf16, Bf16Tiles, Int8Tiles>;
  configure_tiles(16, 16, kTileSteps);
  for (int64_t i = 0; i < rounds; ++i) {
    Tiles::template multiply<0, 4, 6>();
    Tiles::template multiply<1, 4, 7>();
    Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<3, 5, 7>();
  }
  release_tiles();
  return 4 * 16 * 16 * kTileSteps * (kKind == WeightKind::kBf16 ? 2 : 4) * 2;
}
