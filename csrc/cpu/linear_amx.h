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

template <class F>
static void bf16_linear_in_tiles(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                                 int panel, float* tile, const F& finish) {
  constexpr int64_t kSummedSteps = 1024;  // longer sums are added in parts: they lose less so
  const uint8_t* weights = w.data + panel * w.panel_bytes();
  const uint8_t* row = a.rows + first_row * a.row_bytes;
  float* part = tile + kMaxTileRows * kPanelWidth;
  // f(r) as soon as the sums of row r are there
  const auto multiply_part = [&](int64_t step, int64_t steps, float* sums, const auto& f) {
    const uint8_t *at = weights + step * kStepBytes, *inputs = row + step * 4;
    if (rows > kMostRowsWithoutTiles) {
      return multiply_in_tiles<Bf16Tiles>(at, inputs, a.row_bytes, rows, steps, false,
                                          sums_of(sums), f);
    }
    with_tile_rounding([&] {
      with_constant<kMostRowsWithoutTiles>(rows, [&](auto n) {
        multiply_bf16_rows<decltype(n)::value>(at, inputs, a.row_bytes, steps, sums);
      });
    });
    for (int r = 0; r < rows; ++r) f(r);
  };
  const auto sum_of = [=](int r, int v) { return load(tile + r * kPanelWidth + v * kLanes); };
  const auto both_of = [=](int r, int v) {
    return sum_of(r, v) + load(part + r * kPanelWidth + v * kLanes);
  };
  const int64_t last = (w.steps() - 1) / kSummedSteps * kSummedSteps;
  if (last == 0) {
    return multiply_part(0, w.steps(), tile,
                         [&](int r) { finish(r, [=](int v) { return sum_of(r, v); }); });
  }
  multiply_part(0, kSummedSteps, tile, [](int) {});
  for (int64_t step = kSummedSteps; step < last; step += kSummedSteps) {
    multiply_part(step, kSummedSteps, part, [&](int r) {
      for (int v = 0; v < kPanelVecs; ++v) {
        store(tile + r * kPanelWidth + v * kLanes, both_of(r, v));
      }
    });
  }
  multiply_part(last, w.steps() - last, part,
                [&](int r) { finish(r, [=](int v) { return both_of(r, v); }); });
}

// Integers of one scale an output.
template <int kDigits, class F>
static void int8_linear_in_tiles(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                                 int panel, float* tile, const F& finish) {
  auto* sums = reinterpret_cast<int32_t*>(tile);
  const float* scales = static_cast<const float*>(w.scales) + panel * kPanelWidth;
  const float* row_scales = a.scales + first_row;
  const int32_t* offsets = a.offsets + first_row * kDigits;
  const auto finish_row_of_digits = [=, &finish](int i) {
    if (i % kDigits < kDigits - 1) return;
    const int r = i / kDigits;
    const Vec row_scale = broadcast(row_scales[r]);
    finish(r, [=](int v) {
      const auto digit = [&](int d) {
        const int32_t* at = sums + (r * kDigits + d) * kPanelWidth + v * kLanes;
        return IVec{_mm512_loadu_si512(at)} + broadcast_i32(offsets[r * kDigits + d]);
      };
      Vec value;
      if constexpr (kDigits == 3) {
        value = combine_digits(digit(0), digit(1), digit(2));
      } else {
        value = to_float(digit(0));
      }
      return value * (load(scales + v * kLanes) * row_scale);
    });
  };
  multiply_in_tiles<Int8Tiles>(w.data + panel * w.panel_bytes(), a.rows + first_row * a.row_bytes,
                               w.padded_k(), rows * kDigits, w.steps(), false, sums_of(sums),
                               finish_row_of_digits);
}

template <class F>
static void linear_in_tiles(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                            int panel, float* tile, const F& finish) {
  const auto linear = w.kind == WeightKind::kBf16 ? bf16_linear_in_tiles<F>
                      : w.digits == 3             ? int8_linear_in_tiles<3, F>
                                                  : int8_linear_in_tiles<1, F>;
  linear(w, a, first_row, rows, panel, tile, finish);
}

// What the sums of group `g` give, added to `out`, for some rows.
template <int kDigits, bool kHasMinimums>
static inline void add_sums(const Matrix& w, const Activations& a, int64_t first_row, int tokens,
                            int panel, int64_t g, const int32_t* sums, float* out) {
  const int64_t groups = w.groups(), first_scale = (panel * groups + g) * kPanelWidth;
  Vec scales[kPanelVecs], minimums[kPanelVecs];
  for (int v = 0; v < kPanelVecs; ++v) {
    scales[v] = load_f16(static_cast<const uint16_t*>(w.scales) + first_scale + v * kLanes);
    if constexpr (kHasMinimums) minimums[v] = load_f16(w.minimums + first_scale + v * kLanes);
  }
  const float *row_scales = a.scales + first_row * groups + g,
              *row_sums = a.sums + first_row * groups + g;
  const int32_t* offsets = a.offsets + (first_row * groups + g) * kDigits;
  for (int t = 0; t < tokens; ++t) {
    const Vec row_scale = broadcast(row_scales[t * groups]);
    const Vec row_sum = kHasMinimums ? broadcast(row_sums[t * groups]) : zero();
    IVec offset[kDigits];
    for (int d = 0; d < kDigits; ++d) offset[d] = broadcast_i32(offsets[t * groups * kDigits + d]);
    for (int v = 0; v < kPanelVecs; ++v) {
      IVec digits[kDigits];
      for (int d = 0; d < kDigits; ++d) {
        const int32_t* sum = sums + (t * kDigits + d) * kPanelWidth + v * kLanes;
        digits[d] = IVec{_mm512_loadu_si512(sum)} + offset[d];
      }
      float* at = out + t * kPanelWidth + v * kLanes;
      Vec total = add_group<kDigits>(load(at), digits, scales[v] * row_scale);
      if constexpr (kHasMinimums) total = fma(minimums[v], row_sum, total);
      store(at, total);
    }
  }
}

// The sums of one group, of at most 32 rows.
static inline void multiply_group(const uint8_t* group, const int8_t* rows, int64_t row_bytes,
                                  int num_rows, int steps, int32_t* sums) {
  const auto* row = reinterpret_cast<const uint8_t*>(rows);
  const Sums out = sums_of(sums);
  if (num_rows <= 16) {
    clear_sums();
    for (int step = 0; step < steps; step += kTileSteps) {
      multiply_row_of_tiles<Int8Tiles>(group + step * kStepBytes, row + step * 4, row_bytes);
    }
    store_sums(out, 128, 64);
    return;
  }
  for (int half = 0; half < 256; half += 128) {
    multiply_half<Int8Tiles>(group + half, row, row_bytes, steps, false, {nullptr, 0},
                             {out.at + half, out.row_bytes});
  }
}

// Grouped integers: int4 weights of some groups are unpacked for all rows. Few groups and 32 rows
// at a time, so that these, the sums and what they are added to stay in the L1 cache.
template <int kDigits, bool kHasMinimums>
static void grouped_int_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                               int panel, float* tile) {
  constexpr int kTokens = 32 / kDigits, kUnpackedSteps = 16, kSums = 32 * kPanelWidth;
  const int64_t padded_k = w.padded_k(), groups = w.groups();
  const int group_steps = w.group / 4;
  const int together = group_steps < kUnpackedSteps ? kUnpackedSteps / group_steps : 1;
  auto* sums = reinterpret_cast<int32_t*>(tile + kMaxTileRows * kPanelWidth);
  auto* unpacked = reinterpret_cast<uint8_t*>(sums + 2 * kSums);
  const uint8_t* packed = w.data + panel * w.panel_bytes();
  std::memset(tile, 0, rows * kPanelWidth * sizeof(float));
  for (int64_t first = 0; first < groups; first += together) {
    const int count = static_cast<int>(groups - first < together ? groups - first : together);
    const uint8_t* weights = packed;
    if (w.kind == WeightKind::kInt4) {
      weights = unpacked;
      for (int step = 0; step < count * group_steps; step += 2) {
        for (int v = 0; v < kPanelVecs; ++v, packed += 64) {
          prefetch_int4_weights(packed);
          Int8Weights low, high;
          load_int4_weights(packed, low, high);
          _mm512_storeu_si512(unpacked + step * kStepBytes + v * 64, low.v);
          _mm512_storeu_si512(unpacked + (step + 1) * kStepBytes + v * 64, high.v);
        }
      }
    } else {
      packed += count * group_steps * kStepBytes;
    }
    int configured = 0;
    for (int t = 0; t < rows; t += kTokens) {
      const int tokens = rows - t < kTokens ? rows - t : kTokens;
      const int num_rows = tokens * kDigits;
      if (num_rows != configured) {
        const int few = num_rows < 16 ? num_rows : 16;
        configure_tiles(few, num_rows > 16 ? num_rows - 16 : few, tile_steps(group_steps));
        configured = num_rows;
      }
      const auto* digits =
          reinterpret_cast<const int8_t*>(a.rows) + (first_row + t) * kDigits * padded_k;
      // what a group gave is added while the next one is multiplied
      for (int64_t g = first; g <= first + count; ++g) {
        if (g < first + count) {
          multiply_group(weights + (g - first) * group_steps * kStepBytes, digits + g * w.group,
                         padded_k, num_rows, group_steps, sums + g % 2 * kSums);
        }
        if (g == first) continue;
        add_sums<kDigits, kHasMinimums>(w, a, first_row + t, tokens, panel, g - 1,
                                        sums + (g - 1) % 2 * kSums, tile + t * kPanelWidth);
      }
    }
  }
  release_tiles();
}

template <int kDigits>
static void blocked_int_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                               int panel, float* tile) {
  const auto multiply =
      w.minimums ? grouped_int_linear<kDigits, true> : grouped_int_linear<kDigits, false>;
  multiply(w, a, first_row, rows, panel, tile);
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
