// Matrix products over packed panels. Each output is summed over its inputs in one order, the same
// for any number of rows: floats one input after the other, integers exactly. So a row has the same
// bits alone and among others.

template <int kN>
struct Int {
  static constexpr int value = kN;
};

// f(Int<n>) for 1 <= n <= kMax.
template <int kMax, class F>
static inline void with_constant(int n, const F& f) {
  if constexpr (kMax == 1) {
    f(Int<1>());
  } else {
    if (n == kMax) {
      f(Int<kMax>());
    } else {
      with_constant<kMax - 1>(n, f);
    }
  }
}

constexpr int64_t kBlockSteps = 512;  // 32 KB of a panel: those of a tile stay in the L2 cache
constexpr int64_t kPrefetchBytes =
    1024;  // ahead of where a few rows read their weights from memory

struct Fp32Format {
  using Element = float;
  using Weights = Vec;
  static constexpr int kInputs = 1;
  static inline Weights load_weights(const uint8_t* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  static inline Vec dot(Vec sum, Weights w, const float* a) { return fma(w, broadcast(*a), sum); }
};

struct Bf16Format {
  using Element = Bf16Activation;
  using Weights = Bf16Weights;
  static constexpr int kInputs = 2;
  static inline Weights load_weights(const uint8_t* p) { return load_bf16_weights(p); }
  static inline Vec dot(Vec sum, Weights w, const Element* a) { return dot_bf16(sum, w, a); }
};

template <class Format, int kRows, int kPanels>
static void float_tile(const uint8_t* panel, int64_t panel_bytes, const uint8_t* rows,
                       int64_t row_bytes, int64_t steps, bool is_first, float* out) {
  Vec sums[kRows][kPanels];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      sums[r][p] = is_first ? zero() : load(out + r * kItemWidth + p * kLanes);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    typename Format::Weights weights[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      const uint8_t* at = panel + p * panel_bytes + step * 64;
      if constexpr (kRows <= 2) __builtin_prefetch(at + kPrefetchBytes);
      weights[p] = Format::load_weights(at);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto* a = reinterpret_cast<const typename Format::Element*>(rows + r * row_bytes) +
                      step * Format::kInputs;
      for (int p = 0; p < kPanels; ++p) sums[r][p] = Format::dot(sums[r][p], weights[p], a);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) store(out + r * kItemWidth + p * kLanes, sums[r][p]);
  }
}

template <class Format>
static void float_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                         int first_panel, int panels, float* tile) {
  const int64_t panel_bytes = w.panel_bytes(), steps = w.steps();
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    const int64_t block = steps - step < kBlockSteps ? steps - step : kBlockSteps;
    const int64_t input_bytes = step * Format::kInputs * sizeof(typename Format::Element);
    for (int r = 0; r < rows; r += kTileRows) {
      const uint8_t* row = a.rows + (first_row + r) * a.row_bytes + input_bytes;
      for (int p = 0; p < panels; p += kTilePanels) {
        const uint8_t* panel = w.data + (first_panel + p) * panel_bytes + step * 64;
        float* out = tile + r * kItemWidth + p * kLanes;
        with_constant<kTileRows>(rows - r < kTileRows ? rows - r : kTileRows, [&](auto R) {
          with_constant<kTilePanels>(
              panels - p < kTilePanels ? panels - p : kTilePanels, [&](auto P) {
                float_tile<Format, decltype(R)::value, decltype(P)::value>(
                    panel, panel_bytes, row, a.row_bytes, block, step == 0, out);
              });
        });
      }
    }
  }
}

// int8 with one scale an output: the whole sum is an exact integer.
template <int kTokens, int kDigits, int kPanels>
static void int8_tile(const Matrix& w, const Activations& a, int64_t first_row, int first_panel,
                      float* out) {
  const int64_t panel_bytes = w.panel_bytes(), steps = w.steps(), padded_k = w.padded_k();
  const uint8_t* panel = w.data + first_panel * panel_bytes;
  const auto* digits = reinterpret_cast<const int8_t*>(a.rows + first_row * a.row_bytes);
  IVec sums[kTokens * kDigits][kPanels];
  for (int r = 0; r < kTokens * kDigits; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      sums[r][p] = broadcast_i32(a.offsets[first_row * kDigits + r]);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Int8Weights weights[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      const uint8_t* at = panel + p * panel_bytes + step * 64;
      if constexpr (kTokens <= 2) __builtin_prefetch(at + kPrefetchBytes);
      weights[p] = load_int8_weights(at);
    }
    for (int r = 0; r < kTokens * kDigits; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        sums[r][p] = dot_int8(sums[r][p], weights[p], digits + r * padded_k + step * 4);
      }
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    const Vec scale =
        load(static_cast<const float*>(w.scales) + static_cast<int64_t>(first_panel + p) * kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const Vec value = [&] {
        if constexpr (kDigits == 3) {
          return combine_digits(sums[3 * t][p], sums[3 * t + 1][p], sums[3 * t + 2][p]);
        } else {
          return to_float(sums[t][p]);
        }
      }();
      store(out + t * kItemWidth + p * kLanes,
            value * (scale * broadcast(a.scales[first_row + t])));
    }
  }
}

// Grouped integers: the sum of each group is an exact integer, groups are added as floats, one
// after the other.
template <bool kIsInt4, int kTokens, int kDigits, int kPanels>
static void grouped_tile(const Matrix& w, const Activations& a, int64_t first_row, int first_panel,
                         float* out) {
  constexpr int kInputs = kIsInt4 ? 8 : 4;
  const int64_t panel_bytes = w.panel_bytes(), padded_k = w.padded_k(), groups = w.groups();
  const int group_steps = w.group / kInputs;
  const uint8_t* panel = w.data + first_panel * panel_bytes;
  const auto* scales = static_cast<const uint16_t*>(w.scales) + first_panel * groups * kLanes;
  const uint16_t* minimums = w.minimums ? w.minimums + first_panel * groups * kLanes : nullptr;
  const auto* digits = reinterpret_cast<const int8_t*>(a.rows + first_row * a.row_bytes);
  Vec totals[kTokens][kPanels];
  for (int t = 0; t < kTokens; ++t) {
    for (int p = 0; p < kPanels; ++p) totals[t][p] = zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    IVec sums[kTokens * kDigits][kPanels];
    for (int t = 0; t < kTokens; ++t) {
      for (int d = 0; d < kDigits; ++d) {
        const int32_t offset = a.offsets[((first_row + t) * groups + g) * kDigits + d];
        for (int p = 0; p < kPanels; ++p) sums[t * kDigits + d][p] = broadcast_i32(offset);
      }
    }
    const uint8_t* group = panel + g * group_steps * 64;
    const int8_t* inputs = digits + g * w.group;
    for (int step = 0; step < group_steps; ++step) {
      for (int p = 0; p < kPanels; ++p) {
        const uint8_t* at = group + p * panel_bytes + step * 64;
        if constexpr (kTokens <= 2) __builtin_prefetch(at + kPrefetchBytes);
        if constexpr (kIsInt4) {
          Int8Weights low, high;
          load_int4_weights(at, low, high);
          for (int r = 0; r < kTokens * kDigits; ++r) {
            const int8_t* x = inputs + r * padded_k + step * 8;
            sums[r][p] = dot_int8(dot_int8(sums[r][p], low, x), high, x + 4);
          }
        } else {
          const Int8Weights weights = load_int8_weights(at);
          for (int r = 0; r < kTokens * kDigits; ++r) {
            sums[r][p] = dot_int8(sums[r][p], weights, inputs + r * padded_k + step * 4);
          }
        }
      }
    }
    for (int p = 0; p < kPanels; ++p) {
      const Vec scale = load_f16(scales + (p * groups + g) * kLanes);
      const Vec minimum = minimums ? load_f16(minimums + (p * groups + g) * kLanes) : zero();
      for (int t = 0; t < kTokens; ++t) {
        // the sums of a group are below 2^24, exact as floats
        Vec value = to_float(sums[t * kDigits][p]);
        if constexpr (kDigits == 3) {
          value = fma(
              value, broadcast(65536.0f),
              fma(to_float(sums[t * 3 + 1][p]), broadcast(256.0f), to_float(sums[t * 3 + 2][p])));
        }
        const int64_t at = (first_row + t) * groups + g;
        totals[t][p] = fma(scale * broadcast(a.scales[at]), value, totals[t][p]);
        if (minimums) totals[t][p] = fma(minimum, broadcast(a.sums[at]), totals[t][p]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int p = 0; p < kPanels; ++p) store(out + t * kItemWidth + p * kLanes, totals[t][p]);
  }
}

template <int kDigits>
static void int_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                       int first_panel, int panels, float* tile) {
  constexpr int kTokens = kTileRows / kDigits;
  for (int r = 0; r < rows; r += kTokens) {
    with_constant<kTokens>(rows - r < kTokens ? rows - r : kTokens, [&](auto T) {
      constexpr int kRows = decltype(T)::value;
      // one token needs few registers for its sums: then more panels are read side by side
      constexpr int kGroupedPanels = kRows == 1 ? kTilePanels : kGroupedTilePanels;
      const int width = w.group == 0 ? kTilePanels : kGroupedPanels;
      for (int p = 0; p < panels; p += width) {
        float* out = tile + r * kItemWidth + p * kLanes;
        const int64_t row = first_row + r;
        const int panel = first_panel + p;
        const int count = panels - p < width ? panels - p : width;
        if (w.group == 0) {
          with_constant<kTilePanels>(count, [&](auto P) {
            int8_tile<kRows, kDigits, decltype(P)::value>(w, a, row, panel, out);
          });
        } else if (w.kind == WeightKind::kInt8) {
          with_constant<kGroupedPanels>(count, [&](auto P) {
            grouped_tile<false, kRows, kDigits, decltype(P)::value>(w, a, row, panel, out);
          });
        } else {
          with_constant<kGroupedPanels>(count, [&](auto P) {
            grouped_tile<true, kRows, kDigits, decltype(P)::value>(w, a, row, panel, out);
          });
        }
      }
    });
  }
}

static Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case Activation::kGeluTanh: {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
      const Vec u = x * fma(x * x, broadcast(0.044715f), broadcast(1.0f));
      return x / (broadcast(1.0f) + exp(u * broadcast(-1.5957691216057308f)));
    }
    case Activation::kGelu: {
      float lanes[kLanes];
      store(lanes, x);
      for (float& lane : lanes) lane = 0.5f * lane * std::erfc(-0.70710678118654752f * lane);
      return load(lanes);
    }
    case Activation::kRelu2: {
      const Vec positive = max(zero(), x);
      return positive * positive;
    }
    default:
      return x;
  }
}

static void finish_tile(const Matrix& w, float* tile, int rows, int first_panel, int panels,
                        const Epilogue& e) {
  const bool is_gated = e.activation == Activation::kSwiglu;
  for (int r = 0; r < rows; ++r) {
    float* out =
        e.out + r * e.stride + static_cast<int64_t>(first_panel) * kLanes / (is_gated ? 2 : 1);
    const float* sums = tile + r * kItemWidth;
    for (int p = 0; p < panels; ++p) {
      const int64_t column = static_cast<int64_t>(first_panel + p) * kLanes;
      Vec value = load(sums + p * kLanes);
      if (w.bias) value = value + load(w.bias + column);
      if (is_gated) {  // panels alternate between gate and up
        Vec up = load(sums + (p + 1) * kLanes);
        if (w.bias) up = up + load(w.bias + column + kLanes);
        const Vec gate = value / (broadcast(1.0f) + exp(zero() - value));
        store(out + p / 2 * kLanes, gate * up);
        ++p;
        continue;
      }
      value = activate(value, e.activation);
      float* at = out + p * kLanes;
      if (e.adds) value = value + load(at);
      if (column + kLanes <= e.stride) {
        store(at, value);
      } else {  // logits: their rows are not padded
        store_first(at, value, static_cast<int>(e.stride - column));
      }
    }
  }
}

static void linear_tile(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                        int first_panel, int panels, float* tile, const Epilogue& epilogue) {
  switch (w.kind) {
    case WeightKind::kFp32:
      float_linear<Fp32Format>(w, a, first_row, rows, first_panel, panels, tile);
      break;
    case WeightKind::kBf16:
      float_linear<Bf16Format>(w, a, first_row, rows, first_panel, panels, tile);
      break;
    default:
      if (w.digits == 3) {
        int_linear<3>(w, a, first_row, rows, first_panel, panels, tile);
      } else {
        int_linear<1>(w, a, first_row, rows, first_panel, panels, tile);
      }
  }
  finish_tile(w, tile, rows, first_panel, panels, epilogue);
}

static int64_t activation_row_bytes(const Matrix& w) {
  switch (w.kind) {
    case WeightKind::kFp32:
      return w.padded_k() * sizeof(float);
    case WeightKind::kBf16:
      return w.padded_k() * sizeof(Bf16Activation);
    default:
      return w.padded_k() * w.digits;
  }
}

// Integers of 24 bits (8 with one digit) that stand for the row, with a scale for each group.
static void quantize_row(const float* x, const Matrix& w, const Activations& a, int64_t row) {
  const int64_t padded_k = w.padded_k(), groups = w.groups();
  const int64_t group = w.group == 0 ? padded_k : w.group, given = round_up(w.k, kLanes);
  const int zero_point = w.kind == WeightKind::kInt8 ? 128 : 8;
  const float largest_integer =
      w.digits == 3 ? 8355000.0f : 127.0f;  // what balanced digits can express
  auto* digits = reinterpret_cast<int8_t*>(a.rows + row * a.row_bytes);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group;
    const int64_t filled = given - first < group ? (given > first ? given - first : 0) : group;
    Vec largest = zero(), probe = zero();
    for (int64_t i = 0; i < filled; i += kLanes) {
      const Vec v = load(x + first + i);
      largest = max(largest, abs(v));
      probe = fma(v, zero(), probe);  // NaN where the row has NaN or infinity, which max may lose
    }
    const float magnitude = reduce_max(largest);
    const float scale = magnitude / largest_integer + reduce_add(probe);
    float inverse = magnitude > 0 ? largest_integer / magnitude : 0.0f;
    if (inverse > 3e38f) inverse = 3e38f;
    IVec sums[3] = {broadcast_i32(0), broadcast_i32(0), broadcast_i32(0)};
    for (int64_t i = 0; i < group; i += kLanes) {
      IVec q =
          i < filled ? round_to_int(load(x + first + i) * broadcast(inverse)) : broadcast_i32(0);
      for (int d = w.digits - 1; d >= 0; --d) {  // balanced: each digit in [-128, 127]
        const IVec digit = shift_right<24>(shift_left<24>(q));
        store_i8(digits + d * padded_k + first + i, digit);
        sums[d] = sums[d] + digit;
        q = shift_right<8>(q - digit);
      }
    }
    double total = 0;
    for (int d = 0; d < w.digits; ++d) {
      const int32_t sum = reduce_add(sums[d]);
      a.offsets[(row * groups + g) * w.digits + d] = -zero_point * sum;
      total = total * 256 + sum;
    }
    a.scales[row * groups + g] = scale;
    a.sums[row * groups + g] = scale * static_cast<float>(total);
  }
}

static void convert_row(const float* x, const Matrix& w, const Activations& a, int64_t row) {
  const int64_t padded_k = w.padded_k();
  uint8_t* out = a.rows + row * a.row_bytes;
  if (w.kind == WeightKind::kInt8 || w.kind == WeightKind::kInt4) {
    quantize_row(x, w, a, row);
  } else if (w.kind == WeightKind::kBf16 && sizeof(Bf16Activation) == 2) {
    for (int64_t i = 0; i < padded_k; i += kLanes) {
      store_bf16(reinterpret_cast<uint16_t*>(out) + i, load(x + i));
    }
  } else {
    std::memcpy(out, x, padded_k * sizeof(float));
  }
}
