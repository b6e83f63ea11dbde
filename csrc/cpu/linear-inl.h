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

constexpr int64_t kStepBytes = 256;
// Inputs are summed in blocks, and the blocks added: long sums lose less so. 256 steps are 64 KB of
// a panel, which stay in the L2 cache.
constexpr int64_t kBlockSteps = 256;
// A tile of few rows is bound by memory: it asks for weights before it needs them. For the L2
// cache, since the L1 cache has fewer requests under way at a time, and on some CPUs once more for
// the L1 cache; int4 weights, of which a line takes more instructions, for that one in any case.
// All measured: benchmarks/records/.
static inline void prefetch_weights(const uint8_t* at) {
  if constexpr (kFetchesTwice) {
    __builtin_prefetch(at + 16384, 0, 2);
    __builtin_prefetch(at + 2048);
  } else {
    __builtin_prefetch(at + 4096, 0, 2);
  }
}
static inline void prefetch_int4_weights(const uint8_t* at) {
  if constexpr (kFetchesTwice) __builtin_prefetch(at + 16384, 0, 2);
  __builtin_prefetch(at + 2048);
}

// What a tile of integers asks for. Alone with a panel: its own weights.
struct OwnWeights {
  inline void int8(const uint8_t* at) const { prefetch_weights(at); }
  inline void int4(const uint8_t* at) const { prefetch_int4_weights(at); }
  inline void steps(int64_t) const {}
};
// One of some: for each step so many bytes of the next panel, so that memory is never idle.
struct NextWeights {
  const uint8_t* next;
  int64_t bytes;
  inline void int8(const uint8_t*) const {}
  inline void int4(const uint8_t*) const {}
  inline void steps(int64_t count) {
    const uint8_t* end = next + count * bytes;
    for (; next < end; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

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

template <class Format, int kRows, int kVecs>
static void float_tile(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes, int64_t steps,
                       bool is_first, float* out) {
  Vec sums[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
  }
  for (int64_t step = 0; step < steps; ++step) {
    typename Format::Weights weights[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const uint8_t* at = panel + step * kStepBytes + v * 64;
      if constexpr (kRows <= kFetchingRows) prefetch_weights(at);
      weights[v] = Format::load_weights(at);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto* a = reinterpret_cast<const typename Format::Element*>(rows + r * row_bytes) +
                      step * Format::kInputs;
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Format::dot(sums[r][v], weights[v], a);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = out + r * kPanelWidth + v * kLanes;
      store(at, is_first ? sums[r][v] : load(at) + sums[r][v]);
    }
  }
}

// Calls f(first, Int<n>, tile, tiles) for tiles of rows as even as they can be, of at most kMost.
template <int kMost, class F>
static void each_tile(int rows, const F& f) {
  const int tiles = (rows + kMost - 1) / kMost;
  for (int t = 0; t < tiles; ++t) {
    const int first = t * rows / tiles;
    with_constant<kMost>((t + 1) * rows / tiles - first, [&](auto n) { f(first, n, t, tiles); });
  }
}

// As float_tile, of a block of weights that some tiles share, one after the other: the sums go on
// from block to block, and with each step it asks for `fetched_bytes` at `next`.
template <class Format, int kRows>
static void shared_tile(const uint8_t* weights, const uint8_t* rows, int64_t row_bytes, int steps,
                        const uint8_t* next, int fetched_bytes, bool goes_on, float* out) {
  Vec sums[kRows][kPanelVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) {
      sums[r][v] = goes_on ? load(out + r * kPanelWidth + v * kLanes) : zero();
    }
  }
  for (int step = 0; step < steps; ++step, next += fetched_bytes) {
    for (int i = 0; i < fetched_bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    typename Format::Weights of_step[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) {
      of_step[v] = Format::load_weights(weights + step * kStepBytes + v * 64);
    }
    for (int r = 0; r < kRows; ++r) {
      const auto* a = reinterpret_cast<const typename Format::Element*>(rows + r * row_bytes) +
                      step * Format::kInputs;
      for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = Format::dot(sums[r][v], of_step[v], a);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanelVecs; ++v) store(out + r * kPanelWidth + v * kLanes, sums[r][v]);
  }
}

// Of some more rows than ask for their weights themselves: each block comes from memory once and is
// multiplied from the L1 cache. Tiles ask for equal shares of what comes next, so that memory is
// never idle.
template <class Format>
static void shared_float_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                                int panel, float* tile) {
  constexpr int kSharedSteps = 64, kFetchedAhead = 32768;
  static_assert(kBlockSteps % kSharedSteps == 0);
  float* part = tile + kMaxTileRows * kPanelWidth;
  const int64_t steps = w.steps();
  for (int64_t step = 0; step < steps; step += kSharedSteps) {
    const int count = static_cast<int>(steps - step < kSharedSteps ? steps - step : kSharedSteps);
    const uint8_t* weights = w.data + panel * w.panel_bytes() + step * kStepBytes;
    float* sums = step < kBlockSteps ? tile : part;
    each_tile<kTileRows>(rows, [&](int r, auto n, int t, int tiles) {
      shared_tile<Format, decltype(n)::value>(
          weights,
          a.rows + (first_row + r) * a.row_bytes +
              step * Format::kInputs * sizeof(typename Format::Element),
          a.row_bytes, count, weights + kFetchedAhead + t * count * kStepBytes / tiles,
          static_cast<int>(kStepBytes) / tiles, step % kBlockSteps != 0, sums + r * kPanelWidth);
    });
    if (sums == part &&
        (step % kBlockSteps == kBlockSteps - kSharedSteps || step + count == steps)) {
      for (int64_t i = 0; i < rows * kPanelWidth; i += kLanes) {
        store(tile + i, load(tile + i) + load(part + i));
      }
    }
  }
}

// On those ISAs whose tiles share blocks of weights.
template <class Format>
static void blocked_float_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                                 int panel, float* tile);
template <int kDigits>
static void blocked_int_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                               int panel, float* tile);

// On those with tiles: f(r, sum) for one row after the other, as Finish has it.
template <class F>
static void linear_in_tiles(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                            int panel, float* tile, const F& finish);

template <class Format>
static void float_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                         int panel, float* tile) {
  if constexpr (kSharesFloatBlocks) {
    if (shares_float_blocks<Format>(rows)) {
      return blocked_float_linear<Format>(w, a, first_row, rows, panel, tile);
    }
  }
  if constexpr (kMostSharingRows > 0) {
    if (rows > kFetchingRows && rows <= kMostSharingRows) {
      return shared_float_linear<Format>(w, a, first_row, rows, panel, tile);
    }
  }
  const int64_t steps = w.steps();
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    const int64_t block = steps - step < kBlockSteps ? steps - step : kBlockSteps;
    const int64_t input_bytes = step * Format::kInputs * sizeof(typename Format::Element);
    const uint8_t* weights = w.data + panel * w.panel_bytes() + step * kStepBytes;
    for (int r = 0; r < rows; r += kTileRows) {
      const uint8_t* row = a.rows + (first_row + r) * a.row_bytes + input_bytes;
      with_constant<kTileRows>(rows - r < kTileRows ? rows - r : kTileRows, [&](auto R) {
        constexpr int kRows = decltype(R)::value, kVecs = tile_vecs(kRows);
        for (int v = 0; v < kPanelVecs; v += kVecs) {
          float_tile<Format, kRows, kVecs>(weights + v * 64, row, a.row_bytes, block, step == 0,
                                           tile + r * kPanelWidth + v * kLanes);
        }
      });
    }
  }
}

// int8 with one scale an output: the whole sum is an exact integer. Outputs from the given Vec of
// the panel on.
template <int kTokens, int kDigits, int kVecs, class Fetch>
static void int8_tile(const Matrix& w, const Activations& a, int64_t first_row, int panel, int vec,
                      Fetch fetch, float* out) {
  const int64_t steps = w.steps(), padded_k = w.padded_k();
  const uint8_t* weights = w.data + panel * w.panel_bytes() + vec * 64;
  const auto* digits = reinterpret_cast<const int8_t*>(a.rows + first_row * a.row_bytes);
  IVec sums[kTokens * kDigits][kVecs];
  for (int r = 0; r < kTokens * kDigits; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = broadcast_i32(a.offsets[first_row * kDigits + r]);
    }
  }
  constexpr int64_t kBetweenFetches = 16;
  for (int64_t first = 0; first < steps; first += kBetweenFetches) {
    const int64_t end = steps - first < kBetweenFetches ? steps : first + kBetweenFetches;
    fetch.steps(end - first);
    for (int64_t step = first; step < end; ++step) {
      Int8Weights bytes[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        const uint8_t* at = weights + step * kStepBytes + v * 64;
        fetch.int8(at);
        bytes[v] = load_int8_weights(at);
      }
      for (int r = 0; r < kTokens * kDigits; ++r) {
        const int8_t* x = digits + r * padded_k + step * 4;
        for (int v = 0; v < kVecs; ++v) sums[r][v] = dot_int8(sums[r][v], bytes[v], x);
      }
    }
  }
  const float* scales = static_cast<const float*>(w.scales) + panel * kPanelWidth + vec * kLanes;
  for (int v = 0; v < kVecs; ++v) {
    const Vec scale = load(scales + v * kLanes);
    for (int t = 0; t < kTokens; ++t) {
      const Vec value = [&] {
        if constexpr (kDigits == 3) {
          return combine_digits(sums[3 * t][v], sums[3 * t + 1][v], sums[3 * t + 2][v]);
        } else {
          return to_float(sums[t][v]);
        }
      }();
      store(out + t * kPanelWidth + v * kLanes,
            value * (scale * broadcast(a.scales[first_row + t])));
    }
  }
}

// Add to `sums` the products of a group with rows that lie `stride` apart. Not inlined it would
// keep them in memory.
template <int kRows, int kVecs, class Fetch>
[[gnu::always_inline]] static inline void add_int4_group(const uint8_t* group, const int8_t* inputs,
                                                         int64_t stride, int steps,
                                                         const Fetch& fetch,
                                                         IVec (&sums)[kRows][kVecs]) {
  // Inputs are broadcast once for some outputs; few rows read their weights as one stream.
  constexpr int kTogether = kRows <= 3 ? 1 : kVecs;
  for (int first = 0; first < steps; first += kInt4Steps) {
    Int4Sum some[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) some[r][v] = start_int4_sum(sums[r][v]);
    }
    const int end = steps - first < kInt4Steps ? steps : first + kInt4Steps;
    for (int step = first; step < end; ++step) {
      for (int first_vec = 0; first_vec < kVecs; first_vec += kTogether) {
        Int8Weights low[kTogether], high[kTogether];
        for (int v = 0; v < kTogether; ++v) {
          const uint8_t* at = group + step * kStepBytes + (first_vec + v) * 64;
          fetch.int4(at);
          load_int4_weights(at, low[v], high[v]);
        }
        for (int r = 0; r < kRows; ++r) {
          const int8_t* x = inputs + r * stride + step * 8;
          Int4Sum* of_row = some[r] + first_vec;
          for (int v = 0; v < kTogether; ++v) of_row[v] = dot_int4(of_row[v], low[v], x);
          for (int v = 0; v < kTogether; ++v) of_row[v] = dot_int4(of_row[v], high[v], x + 4);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) sums[r][v] = finish_int4_sum(sums[r][v], some[r][v]);
    }
  }
}

// Adds what a group gives to a total: its digits' sums are below 2^24, exact as floats.
template <int kDigits>
static inline Vec add_group(Vec total, const IVec* digits, Vec scale) {
  Vec value = to_float(digits[0]);
  if constexpr (kDigits == 3) {
    value = fma(value, broadcast(65536.0f),
                fma(to_float(digits[1]), broadcast(256.0f), to_float(digits[2])));
  }
  return fma(scale, value, total);
}

// Grouped integers: the sum of each group is an exact integer, groups are added as floats, one
// after the other.
template <bool kIsInt4, int kTokens, int kDigits, int kVecs, class Fetch>
static void grouped_tile(const Matrix& w, const Activations& a, int64_t first_row, int panel,
                         int vec, Fetch fetch, float* out) {
  constexpr int kInputs = kIsInt4 ? 8 : 4;
  const int64_t padded_k = w.padded_k(), groups = w.groups();
  const int group_steps = w.group / kInputs;
  const uint8_t* weights = w.data + panel * w.panel_bytes() + vec * 64;
  const int64_t first_scale = panel * groups * kPanelWidth + vec * kLanes;
  const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + first_scale;
  const uint16_t* minimums = w.minimums ? w.minimums + first_scale : nullptr;
  const auto* digits = reinterpret_cast<const int8_t*>(a.rows + first_row * a.row_bytes);
  Vec totals[kTokens][kVecs];
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVecs; ++v) totals[t][v] = zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    IVec sums[kTokens * kDigits][kVecs];
    for (int t = 0; t < kTokens; ++t) {
      for (int d = 0; d < kDigits; ++d) {
        const int32_t offset = a.offsets[((first_row + t) * groups + g) * kDigits + d];
        for (int v = 0; v < kVecs; ++v) sums[t * kDigits + d][v] = broadcast_i32(offset);
      }
    }
    fetch.steps(group_steps);
    const uint8_t* group = weights + g * group_steps * kStepBytes;
    const int8_t* inputs = digits + g * w.group;
    if constexpr (kIsInt4) {
      add_int4_group<kTokens * kDigits, kVecs>(group, inputs, padded_k, group_steps, fetch, sums);
    } else {
      for (int step = 0; step < group_steps; ++step) {
        Int8Weights bytes[kVecs];
        for (int v = 0; v < kVecs; ++v) {
          const uint8_t* at = group + step * kStepBytes + v * 64;
          fetch.int8(at);
          bytes[v] = load_int8_weights(at);
        }
        for (int r = 0; r < kTokens * kDigits; ++r) {
          const int8_t* x = inputs + r * padded_k + step * 4;
          for (int v = 0; v < kVecs; ++v) sums[r][v] = dot_int8(sums[r][v], bytes[v], x);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      const Vec scale = load_f16(scales + g * kPanelWidth + v * kLanes);
      const Vec minimum = minimums ? load_f16(minimums + g * kPanelWidth + v * kLanes) : zero();
      for (int t = 0; t < kTokens; ++t) {
        IVec of_token[kDigits];
        for (int d = 0; d < kDigits; ++d) of_token[d] = sums[t * kDigits + d][v];
        const int64_t at = (first_row + t) * groups + g;
        totals[t][v] = add_group<kDigits>(totals[t][v], of_token, scale * broadcast(a.scales[at]));
        if (minimums) totals[t][v] = fma(minimum, broadcast(a.sums[at]), totals[t][v]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int v = 0; v < kVecs; ++v) store(out + t * kPanelWidth + v * kLanes, totals[t][v]);
  }
}

template <int kDigits>
static void int_linear(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                       int panel, float* tile) {
  constexpr int kTokens = kTileRows / kDigits;
  constexpr int kMostAskingRows = 32;  // more take longer to multiply than memory to give a panel
  if constexpr (kSharesIntBlocks) {
    if (shares_int_blocks<kDigits>(w, rows)) {
      return blocked_int_linear<kDigits>(w, a, first_row, rows, panel, tile);
    }
  }
  const int64_t panel_bytes = w.panel_bytes();
  const uint8_t* next_panel = w.data + (panel + 1) * panel_bytes;
  each_tile<kTokens>(rows, [&](int r, auto n, int t, int tiles) {
    constexpr int kRows = decltype(n)::value;
    constexpr int kVecs = tile_vecs(kRows * kDigits), kGroupedVecs = grouped_tile_vecs(kRows);
    const auto multiply = [&](int vec, auto fetch) {
      float* out = tile + r * kPanelWidth + vec * kLanes;
      if (w.group == 0) {
        int8_tile<kRows, kDigits, kVecs>(w, a, first_row + r, panel, vec, fetch, out);
      } else if (w.kind == WeightKind::kInt8) {
        grouped_tile<false, kRows, kDigits, kGroupedVecs>(w, a, first_row + r, panel, vec, fetch,
                                                          out);
      } else {
        grouped_tile<true, kRows, kDigits, kGroupedVecs>(w, a, first_row + r, panel, vec, fetch,
                                                         out);
      }
    };
    const int vecs = w.group == 0 ? kVecs : kGroupedVecs;
    for (int v = 0; v < kPanelVecs; v += vecs) {
      if (tiles == 1) {
        multiply(v, OwnWeights());
        continue;
      }
      const int parts = tiles * kPanelVecs / vecs, part = t * kPanelVecs / vecs + v / vecs;
      const int64_t bytes = rows <= kMostAskingRows ? kStepBytes / parts : 0;
      multiply(v, NextWeights{next_panel + part * panel_bytes / parts, bytes});
    }
  });
}

template <Activation kActivation>
static inline Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
    const Vec u = x * fma(x * x, broadcast(0.044715f), broadcast(1.0f));
    return x / (broadcast(1.0f) + exp(u * broadcast(-1.5957691216057308f)));
  } else if constexpr (kActivation == Activation::kGelu) {
    float lanes[kLanes];
    store(lanes, x);
    for (float& lane : lanes) lane = 0.5f * lane * std::erfc(-0.70710678118654752f * lane);
    return load(lanes);
  } else if constexpr (kActivation == Activation::kRelu2) {
    const Vec positive = max(zero(), x);
    return positive * positive;
  } else {
    return x;
  }
}

// What becomes of the sums of a panel, row by row.
template <Activation kActivation>
class Finish {
 public:
  Finish(const Matrix& w, int panel, const Epilogue& e)
      : bias_(w.bias ? w.bias + int64_t{panel} * kPanelWidth : nullptr),
        column_(int64_t{panel} * kPanelWidth),
        e_(e) {}

  // Row r of the outputs, whose sums are sum(v), the v-th Vec of kPanelVecs.
  template <class Sum>
  [[gnu::always_inline]] inline void operator()(int r, const Sum& sum) const {
    constexpr int kRowsAhead = 8;
    constexpr bool kIsGated = kActivation == Activation::kSwiglu;
    float* out = e_.out + r * e_.stride + (kIsGated ? column_ / 2 : column_);
    // rows lie far apart: no prefetcher of the CPU sees the next ones coming
    for (int v = 0; v < (kIsGated ? kPanelVecs / 2 : kPanelVecs); ++v) {
      __builtin_prefetch(out + kRowsAhead * e_.stride + v * kLanes, 1);
    }
    const float* addend = e_.addends && e_.addends[r] ? e_.addends[r] + column_ : nullptr;
    const auto value_of = [&](int v) {
      Vec value = sum(v);
      if (bias_) value = value + load(bias_ + v * kLanes);
      if (addend) value = value + load(addend + v * kLanes);
      return value;
    };
    if constexpr (kIsGated) {  // Vecs alternate between gate and up
      for (int v = 0; v < kPanelVecs; v += 2) {
        if ((column_ + v * kLanes) / 2 >= e_.stride) break;
        const Vec gate = value_of(v), up = value_of(v + 1);
        store(out + v / 2 * kLanes, gate / (broadcast(1.0f) + exp(zero() - gate)) * up);
      }
      return;
    }
    for (int v = 0; v < kPanelVecs; ++v) {
      const int64_t left = e_.stride - column_ - v * kLanes;
      if (left <= 0) break;
      Vec value = activate<kActivation>(value_of(v));
      float* at = out + v * kLanes;
      if (e_.adds) value = value + load(at);
      if (left >= kLanes) {
        store(at, value);
      } else {  // logits: their rows are not padded
        store_first(at, value, static_cast<int>(left));
      }
    }
  }

 private:
  const float* bias_;
  int64_t column_;
  Epilogue e_;
};

// f(Finish) with the one of an epilogue.
template <class F>
static inline void with_finish(const Matrix& w, int panel, const Epilogue& e, const F& f) {
  switch (e.activation) {
    case Activation::kGeluTanh:
      return f(Finish<Activation::kGeluTanh>(w, panel, e));
    case Activation::kGelu:
      return f(Finish<Activation::kGelu>(w, panel, e));
    case Activation::kRelu2:
      return f(Finish<Activation::kRelu2>(w, panel, e));
    case Activation::kSwiglu:
      return f(Finish<Activation::kSwiglu>(w, panel, e));
    default:
      return f(Finish<Activation::kNone>(w, panel, e));
  }
}

static void sum_tile(const Matrix& w, const Activations& a, int64_t first_row, int rows, int panel,
                     float* tile) {
  switch (w.kind) {
    case WeightKind::kFp32:
      return float_linear<Fp32Format>(w, a, first_row, rows, panel, tile);
    case WeightKind::kBf16:
      return float_linear<Bf16Format>(w, a, first_row, rows, panel, tile);
    default:
      if (w.digits == 3) {
        int_linear<3>(w, a, first_row, rows, panel, tile);
      } else {
        int_linear<1>(w, a, first_row, rows, panel, tile);
      }
  }
}

static void linear_tile(const Matrix& w, const Activations& a, int64_t first_row, int rows,
                        int panel, float* tile, const Epilogue& epilogue) {
  with_finish(w, panel, epilogue, [&](const auto& finish) {
    if constexpr (kHasTiles) {
      if (is_multiplied_in_tiles(w, rows)) {
        return linear_in_tiles(w, a, first_row, rows, panel, tile, finish);
      }
    }
    sum_tile(w, a, first_row, rows, panel, tile);
    for (int r = 0; r < rows; ++r) {
      finish(r, [=](int v) { return load(tile + r * kPanelWidth + v * kLanes); });
    }
  });
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

// `n` floats, of which all from `filled` on count as 0, as a scale times integers of 8, 16 or 24
// bits; an integer is 1 to 3 balanced digits of base 256, each in [-128, 127], the highest first,
// in rows of `stride`. `sums` gets the sum of each digit. The scale is NaN where an input is NaN or
// infinite.
template <int kDigits>
static float split_digits(const float* x, int64_t filled, int64_t n, int8_t* digits, int64_t stride,
                          int32_t* sums) {
  constexpr float kLargest[] = {127.0f, 32639.0f, 8355000.0f};  // what such digits can express
  constexpr float largest_integer = kLargest[kDigits - 1];
  Vec largest = zero(), probe = zero();
  for (int64_t i = 0; i < filled; i += kLanes) {
    const Vec v = load(x + i);
    largest = max(largest, abs(v));
    probe = fma(v, zero(), probe);  // NaN where the row has NaN or infinity, which max may lose
  }
  const float magnitude = reduce_max(largest);
  float scale = magnitude / largest_integer;
  float inverse = magnitude > 0 ? largest_integer / magnitude : 0.0f;
  if (inverse > 3e38f) {
    inverse = 3e38f;
    scale = 1.0f / inverse;
  }
  IVec totals[kDigits];
  for (IVec& total : totals) total = broadcast_i32(0);
  for (int64_t i = 0; i < n; i += kLanes) {
    IVec q = i < filled ? round_to_int(load(x + i) * broadcast(inverse)) : broadcast_i32(0);
    for (int d = kDigits - 1; d >= 0; --d) {
      const IVec digit = shift_right<24>(shift_left<24>(q));
      store_i8(digits + d * stride + i, digit);
      totals[d] = totals[d] + digit;
      q = shift_right<8>(q - digit);
    }
  }
  for (int d = 0; d < kDigits; ++d) sums[d] = reduce_add(totals[d]);
  return scale + reduce_add(probe);
}

template <int kDigits>
static void quantize_row(const float* x, const Matrix& w, const Activations& a, int64_t row) {
  const int64_t padded_k = w.padded_k(), groups = w.groups();
  const int64_t group = w.group == 0 ? padded_k : w.group, given = round_up(w.k, kLanes);
  const int zero_point = w.kind == WeightKind::kInt8 ? 128 : 8;
  auto* digits = reinterpret_cast<int8_t*>(a.rows + row * a.row_bytes);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group;
    const int64_t filled = given - first < group ? (given > first ? given - first : 0) : group;
    int32_t sums[kDigits];
    const float scale =
        split_digits<kDigits>(x + first, filled, group, digits + first, padded_k, sums);
    double total = 0;
    for (int d = 0; d < kDigits; ++d) {
      a.offsets[(row * groups + g) * kDigits + d] = -zero_point * sums[d];
      total = total * 256 + sums[d];
    }
    a.scales[row * groups + g] = scale;
    a.sums[row * groups + g] = scale * static_cast<float>(total);
  }
}

static void convert_row(const float* x, const Matrix& w, const Activations& a, int64_t row) {
  const int64_t padded_k = w.padded_k();
  uint8_t* out = a.rows + row * a.row_bytes;
  if (w.kind == WeightKind::kInt8 || w.kind == WeightKind::kInt4) {
    if (w.digits == 3) {
      quantize_row<3>(x, w, a, row);
    } else {
      quantize_row<1>(x, w, a, row);
    }
  } else if (w.kind == WeightKind::kBf16 && sizeof(Bf16Activation) == 2) {
    for (int64_t i = 0; i < padded_k; i += kLanes) {
      store_bf16(reinterpret_cast<uint16_t*>(out) + i, load(x + i));
    }
  } else {
    std::memcpy(out, x, padded_k * sizeof(float));
  }
}
