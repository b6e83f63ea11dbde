// Matrix products: sums of Format::kRows rows and kPanel columns in registers, one unit of 32 bits
// of each row and each column a step. Panels of the right operand lie as a stream of steps. Each
// output is summed in one order, whatever tile it is in: inputs in blocks of kBlockSteps, and the
// blocks added.

constexpr int kTileVecs = tile_vecs(kTileRows);
constexpr int kPanel = kTileVecs * kLanes;
// Of a panel, 256 steps are 64 KB, which stay in the L2 cache.
constexpr int kBlockSteps = 256;

static inline Vec load_elements(const float* p) { return load(p); }
static inline Vec load_elements(const uint16_t* p) { return load_bf16(p); }
static inline void store_elements(float* p, Vec v) { store(p, v); }

// The first n elements, zeros behind them.
template <class T>
static inline Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load_elements(p);
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load_elements(lanes);
}
// Zeros behind the first n lanes.
static inline Vec keep_first(Vec v, int64_t n) {
  return n >= kLanes ? v : keep_lanes(v, 0, static_cast<int>(n), 0.0f);
}

// As it is after a store and a load.
template <class T>
static inline Vec rounded(Vec v) {
  T lanes[kLanes];
  store_elements(lanes, v);
  return load_elements(lanes);
}
template <class T>
static inline void store_first_elements(T* p, Vec v, int64_t n) {
  if (n >= kLanes) {
    store_elements(p, v);
    return;
  }
  T lanes[kLanes];
  store_elements(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// f(T()) with the type of a dtype.
template <class F>
static inline auto with_type(Dtype dtype, const F& f) {
  return dtype == Dtype::kFp32 ? f(float()) : f(uint16_t());
}

// f(Format()) with the format that products in a dtype have on this ISA.
template <class F>
static inline auto with_format(Dtype compute, const F& f) {
  return compute == Dtype::kFp32 ? f(Fp32Products()) : f(Bf16Format());
}

template <class Format>
constexpr int64_t steps_of(int64_t inputs) {
  return Format::units(inputs);
}

// Strips of `width` rows from `first` on of x, whose rows are adjacent in memory (row_stride 1),
// each as [step][width] units at `strip_stride`. Whole Vecs are written: what is behind a step is
// written again by the next one, or is padding.
template <class Format, class T>
static void pack_adjacent(const T* x, int64_t column_stride, int64_t first, int64_t count,
                          int64_t extent, int64_t inputs, int width, int64_t strip_stride,
                          float* out) {
  const int64_t steps = steps_of<Format>(inputs);
  for (int64_t step = 0; step < steps; ++step) {
    const T* even = x + step * Format::kInputs * column_stride;
    const bool has_odd = Format::kInputs == 2 && step * 2 + 1 < inputs;
    float* at = out + step * width;
    for (int64_t row = first; row < first + count; row += width, at += strip_stride) {
      for (int v = 0; v < width; v += kLanes) {
        const int64_t left = extent - row - v;
        if (left <= 0) break;
        if constexpr (std::is_same<T, typename Format::Element>::value && Format::kInputs == 2) {
          if (has_odd && left >= kLanes) {
            store(at + v, Format::unit_of(even + row + v, even + column_stride + row + v));
            continue;
          }
        }
        const Vec a = load_first(even + row + v, left);
        const Vec b = has_odd ? load_first(even + column_stride + row + v, left) : zero();
        store(at + v, Format::unit(a, b));
      }
    }
  }
}

// `count` elements as units, as many as fill whole Vecs of units.
template <class Format, class T>
static void convert_row(const T* x, int64_t count, float* out) {
  auto* elements = reinterpret_cast<typename Format::Element*>(out);
  const int64_t end = steps_of<Format>(count) * Format::kInputs;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_elements(elements + i, load_elements(x + i));
  if (i < end) {
    store_first_elements(elements + i, load_first(x + i, count - i), end - i);
  }
}

template <class Format, class T>
static void pack_panel_of(const T* x, const Operand& layout, int64_t first, int64_t extent,
                          int64_t inputs, float* panel) {
  if (layout.row_stride == 1) {
    pack_adjacent<Format>(x, layout.column_stride, first, kPanel, extent, inputs, kPanel, 0, panel);
    return;
  }
  // transposed in blocks of 16 rows and 16 steps
  constexpr int64_t kBlockInputs = kLanes * Format::kInputs;
  const int64_t steps = steps_of<Format>(inputs);
  for (int r = 0; r < kPanel; r += kLanes) {
    for (int64_t step = 0; step < steps; step += kLanes) {
      Vec block[kLanes];
      const int64_t left = inputs - step * Format::kInputs;
      for (int i = 0; i < kLanes; ++i) {
        float row[kLanes] = {};
        if (first + r + i < extent) {
          convert_row<Format>(x + (first + r + i) * layout.row_stride + step * Format::kInputs,
                              left < kBlockInputs ? left : kBlockInputs, row);
        }
        block[i] = load(row);
      }
      transpose(block);
      for (int i = 0; i < kLanes && step + i < steps; ++i) {
        store(panel + (step + i) * kPanel + r, block[i]);
      }
    }
  }
}

// For products of float32 in parts: float32 first, a block of inputs at a time.
template <class Format, class T>
static void split_panel_of(const T* x, const Operand& layout, int64_t first, int64_t extent,
                           int64_t inputs, float* panel) {
  float block[Format::kSplitInputs * kPanel];
  for (int64_t input = 0; input < inputs; input += Format::kSplitInputs) {
    const int64_t count =
        inputs - input < Format::kSplitInputs ? inputs - input : Format::kSplitInputs;
    pack_panel_of<Fp32Format>(x + input * layout.column_stride, layout, first, extent, count,
                              block);
    std::memset(block + count * kPanel, 0, (Format::kSplitInputs - count) * kPanel * sizeof(float));
    Format::split_columns(block, panel + Format::units(input) * kPanel);
  }
}

static void pack_panel(const Operand& x, Dtype compute, int64_t first, int64_t extent,
                       int64_t inputs, float* panel) {
  with_format(compute, [&](auto format) {
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      using Format = decltype(format);
      const auto* data = static_cast<const T*>(x.data);
      if constexpr (Format::kIsSplit) {
        split_panel_of<Format>(data, x, first, extent, inputs, panel);
      } else {
        pack_panel_of<Format>(data, x, first, extent, inputs, panel);
      }
    });
  });
}

// Rows that are adjacent in memory (row_stride 1), each with its units side by side, turned in
// blocks of 16 rows and 16 steps.
template <class Format, class T>
static void turn_rows(const T* x, int64_t column_stride, int64_t first, int64_t count,
                      int64_t extent, int64_t inputs, float* out) {
  constexpr int64_t kBlockInputs = kLanes * Format::kInputs;
  const int64_t steps = steps_of<Format>(inputs);
  for (int64_t r = 0; r < count; r += kLanes) {
    for (int64_t step = 0; step < steps; step += kLanes) {
      Vec block[kLanes];
      for (Vec& units : block) units = zero();
      const int64_t left = inputs - step * Format::kInputs;
      pack_adjacent<Format>(x + step * Format::kInputs * column_stride, column_stride, first + r,
                            kLanes, extent, left < kBlockInputs ? left : kBlockInputs, kLanes, 0,
                            reinterpret_cast<float*>(block));
      transpose(block);
      for (int i = 0; i < kLanes && r + i < count; ++i) {
        store_first_elements(out + (r + i) * steps + step, block[i], steps - step);
      }
    }
  }
}

template <class Format, class T>
static Rows pack_rows_of(const T* x, const Operand& layout, int64_t first, int64_t count,
                         int64_t extent, int64_t inputs, float* scratch) {
  constexpr int kRows = Format::kRows;
  const int64_t steps = steps_of<Format>(inputs);
  const int64_t padded = Format::kHasTiles ? count : round_up(count, kRows);
  if (layout.column_stride != 1) {
    if constexpr (Format::kHasTiles) {
      turn_rows<Format>(x, layout.column_stride, first, count, extent, inputs, scratch);
      return {scratch, steps, 1, kRows * steps};
    } else {  // a tile is [step][kRows] units, and a Vec of padding
      const int64_t tile_stride = kRows * steps + kLanes;
      pack_adjacent<Format>(x, layout.column_stride, first, count, extent, inputs, kRows,
                            tile_stride, scratch);
      return {scratch, 1, kRows, tile_stride};
    }
  }
  constexpr bool is_as_multiplied = std::is_same<T, typename Format::Element>::value;
  if (is_as_multiplied && count == padded && inputs % Format::kInputs == 0 &&
      layout.row_stride % Format::kInputs == 0) {
    const int64_t stride = layout.row_stride / Format::kInputs;
    return {reinterpret_cast<const float*>(x + first * layout.row_stride), stride, 1,
            kRows * stride};
  }
  for (int64_t r = 0; r < padded; ++r) {
    float* row = scratch + r * steps;
    if (r < count) {
      convert_row<Format>(x + (first + r) * layout.row_stride, inputs, row);
    } else {
      std::memset(row, 0, steps * sizeof(float));
    }
  }
  return {scratch, steps, 1, kRows * steps};
}

// Rows for products of float32 in parts. A row is a line longer than its units, so that the rows of
// a tile are not all in the same sets of a cache.
template <class Format, class T>
static Rows split_rows_of(const T* x, const Operand& layout, int64_t first, int64_t count,
                          int64_t extent, int64_t inputs, float* scratch) {
  constexpr int64_t kBlock = Format::kSplitInputs;
  const int64_t stride = Format::units(inputs) + kLanes;
  const auto split_row = [&](const auto* row, int64_t input, int64_t r) {
    const int64_t left = inputs - input;
    Format::split_row(load_first(row, left),
                      left > kLanes ? load_first(row + kLanes, left - kLanes) : zero(),
                      scratch + r * stride + Format::units(input));
  };
  if (layout.column_stride == 1) {
    for (int64_t r = 0; r < count; ++r) {
      const T* row = x + (first + r) * layout.row_stride;
      for (int64_t input = 0; input < inputs; input += kBlock) {
        const T* ahead = row + input + 2 * layout.row_stride;
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + kLanes);
        split_row(row + input, input, r);
      }
    }
  } else {
    float turned[kLanes * kBlock];
    for (int64_t input = 0; input < inputs; input += kBlock) {
      const int64_t left = inputs - input < kBlock ? inputs - input : kBlock;
      for (int64_t r = 0; r < count; r += kLanes) {
        const int64_t num_rows = count - r < kLanes ? count - r : kLanes;
        turn_rows<Fp32Format>(x + input * layout.column_stride, layout.column_stride, first + r,
                              num_rows, extent, left, turned);
        for (int64_t i = 0; i < num_rows; ++i) split_row(turned + i * left, input, r + i);
      }
    }
  }
  return {scratch, stride, 1, Format::kRows * stride};
}

static Rows pack_rows(const Operand& x, Dtype compute, int64_t first, int64_t count, int64_t extent,
                      int64_t inputs, float* scratch) {
  return with_format(compute, [&](auto format) {
    return with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      using Format = decltype(format);
      const auto* data = static_cast<const T*>(x.data);
      if constexpr (Format::kIsSplit) {
        return split_rows_of<Format>(data, x, first, count, extent, inputs, scratch);
      } else {
        return pack_rows_of<Format>(data, x, first, count, extent, inputs, scratch);
      }
    });
  });
}

template <class Format, int kVecs>
static void multiply_tile(const float* row, int64_t row_stride, int64_t step_stride,
                          const float* panel, int64_t steps, float* out, int64_t out_stride,
                          bool adds) {
  Vec sums[kTileRows][kVecs];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
  }
  for (int64_t step = 0; step < steps; ++step) {
    Vec columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = load(panel + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        sums[r][v] = Format::dot(sums[r][v], columns[v], row + r * row_stride);
      }
    }
    panel += kPanel;
    row += step_stride;
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = out + r * out_stride + v * kLanes;
      store(at, adds ? load(at) + sums[r][v] : sums[r][v]);
    }
  }
}

template <class Format>
static void multiply_in_vecs(const Rows& rows, const float* panel, int64_t num_rows,
                             int64_t columns, int64_t steps, float* out, int64_t out_stride,
                             bool adds) {
  const auto multiply_tiles = [&](auto tile) {
    for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
      const int64_t block = steps - begin < kBlockSteps ? steps - begin : kBlockSteps;
      for (int64_t r = 0; r < num_rows; r += kTileRows) {
        const float* row = rows.units + r / kTileRows * rows.tile_stride + begin * rows.step_stride;
        tile(row, rows.row_stride, rows.step_stride, panel + begin * kPanel, block,
             out + r * out_stride, out_stride, adds || begin > 0);
      }
    }
  };
  switch (columns >= kPanel ? kTileVecs : (columns + kLanes - 1) / kLanes) {
    case 1:
      return multiply_tiles(multiply_tile<Format, 1>);
    case 2:
      return multiply_tiles(multiply_tile < Format, kTileVecs < 2 ? kTileVecs : 2 >);
    case 3:
      return multiply_tiles(multiply_tile < Format, kTileVecs < 3 ? kTileVecs : 3 >);
    default:
      return multiply_tiles(multiply_tile<Format, kTileVecs>);
  }
}

// All steps of the first `columns` columns of a panel, to out or added to it; what else it has
// columns of the panel for is not said. `finish(r)` is called once row r is there, for one row
// after the other.
template <class Format, class F>
static void multiply_panel(const Rows& rows, const float* panel, int64_t num_rows, int64_t columns,
                           int64_t steps, float* out, int64_t out_stride, bool adds,
                           const F& finish) {
  if constexpr (Format::kHasTiles) {
    Format::multiply(rows, panel, num_rows, steps, out, out_stride, adds, finish);
  } else {
    multiply_in_vecs<Format>(rows, panel, num_rows, columns, steps, out, out_stride, adds);
    for (int64_t r = 0; r < num_rows; ++r) finish(r);
  }
}

static BlockSizes block_sizes(Dtype compute) {
  return with_format(compute, [](auto format) {
    using Format = decltype(format);
    return BlockSizes{Format::kRows, Format::kBlockRows, Format::kBlockInputs};
  });
}

static bool multiplies_whole_blocks(int64_t units, Dtype compute) {
  return units > kBlockSteps ||
         with_format(compute, [](auto format) { return decltype(format)::kHasTiles; });
}

static int64_t units(int64_t inputs, Dtype compute) {
  return with_format(compute, [&](auto format) { return steps_of<decltype(format)>(inputs); });
}

enum class ActivationPass { kNone, kForward, kBackward };

// What an epilogue makes of the sums of a row.
template <class T, ActivationPass kPass, Activation kActivation>
class Finish {
 public:
  Finish(const float* sums, const Region& region, const Epilogue& e)
      : sums_(sums), region_(region), e_(e) {}

  [[gnu::always_inline]] inline void operator()(int64_t r) const {
    const int64_t row = (region_.first_row + r) * e_.stride + region_.first_column;
    const int64_t columns = region_.num_columns;
    T* out = static_cast<T*>(e_.out) + row;
    T* activated = static_cast<T*>(e_.activated) + row;
    const T* inner = static_cast<const T*>(e_.inner) + row;
    // rows lie far apart: no prefetcher of the CPU sees the next ones coming
    constexpr int64_t kRowsAhead = 8, kLine = 64 / sizeof(T);
    for (int64_t c = 0; c < columns; c += kLine) {
      const int64_t at = kRowsAhead * e_.stride + c;
      __builtin_prefetch(out + at, 1);
      if (e_.addend) {
        __builtin_prefetch(static_cast<const uint8_t*>(e_.addend) +
                           (row + at) * size_of(e_.addend_dtype));
      }
      if constexpr (kPass != ActivationPass::kNone) __builtin_prefetch(activated + at, 1);
      if constexpr (kPass == ActivationPass::kBackward) __builtin_prefetch(inner + at);
    }
    const float* sums = sums_ + r * kPanel;
    const float* bias = e_.bias ? e_.bias + region_.first_column : nullptr;
    const auto finish_vec = [&](int64_t c, int64_t left) __attribute__((always_inline)) {
      Vec value = load(sums + c);
      if (bias) value = value + load_first(bias + c, left);
      if (e_.addend) {
        value = value + with_type(e_.addend_dtype, [&](auto type) {
                  return load_first(static_cast<const decltype(type)*>(e_.addend) + row + c, left);
                });
      }
      if constexpr (kPass == ActivationPass::kForward) {
        value = rounded<T>(value);  // what backward will see
        store_first_elements(activated + c, activate<kActivation>(value).value, left);
      } else if constexpr (kPass == ActivationPass::kBackward) {
        const Activated given = activate<kActivation>(load_first(inner + c, left));
        store_first_elements(activated + c, given.value, left);
        value = value * given.slope;
      }
      store_first_elements(out + c, value, left);
    };
    if (columns == kPanel) {
      for (int64_t c = 0; c < kPanel; c += kLanes) finish_vec(c, kLanes);
    } else {
      for (int64_t c = 0; c < columns; c += kLanes) finish_vec(c, columns - c);
    }
  }

 private:
  const float* sums_;
  const Region region_;
  const Epilogue e_;
};

// f(Finish) with the one of an epilogue.
template <class F>
static void with_finish(const float* sums, const Region& region, const Epilogue& e, const F& f) {
  with_type(e.dtype, [&](auto type) {
    using T = decltype(type);
    const auto with_activation = [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      if (e.inner) {
        f(Finish<T, ActivationPass::kBackward, kActivation>(sums, region, e));
      } else {
        f(Finish<T, ActivationPass::kForward, kActivation>(sums, region, e));
      }
    };
    switch (e.activation) {
      case Activation::kGeluTanh:
        return with_activation(std::integral_constant<Activation, Activation::kGeluTanh>());
      case Activation::kGelu:
        return with_activation(std::integral_constant<Activation, Activation::kGelu>());
      case Activation::kRelu2:
        return with_activation(std::integral_constant<Activation, Activation::kRelu2>());
      default:
        return f(Finish<T, ActivationPass::kNone, Activation::kNone>(sums, region, e));
    }
  });
}

static void multiply(const Rows& rows, const float* panel, Dtype compute, int64_t inputs,
                     const Region& region, const Epilogue& epilogue, float* sums) {
  with_format(compute, [&](auto format) {
    using Format = decltype(format);
    with_finish(sums, region, epilogue, [&](const auto& finish) {
      multiply_panel<Format>(rows, panel, region.num_rows, region.num_columns,
                             steps_of<Format>(inputs), sums, kPanel, false, finish);
    });
  });
}

static void sum_rows(const void* x, Dtype dtype, int64_t rows, int64_t n, int64_t first_column,
                     int64_t columns, float* out) {
  with_type(dtype, [&](auto type) {
    const auto* elements = static_cast<const decltype(type)*>(x) + first_column;
    constexpr int64_t kBlockRows = 64;  // short sums, so that they lose little
    constexpr int kVecs = 8;            // of a row at a time: whole cache lines
    for (int64_t c = 0; c < columns; c += kVecs * kLanes) {
      Vec totals[kVecs];
      for (Vec& total : totals) total = zero();
      for (int64_t first = 0; first < rows; first += kBlockRows) {
        Vec sums[kVecs];
        for (Vec& sum : sums) sum = zero();
        for (int64_t r = first; r < rows && r < first + kBlockRows; ++r) {
          for (int v = 0; v < kVecs; ++v) {
            const int64_t column = c + v * kLanes;
            if (column >= columns) break;
            sums[v] = sums[v] + load_first(elements + r * n + column, columns - column);
          }
        }
        for (int v = 0; v < kVecs; ++v) totals[v] = totals[v] + sums[v];
      }
      for (int v = 0; v < kVecs && c + v * kLanes < columns; ++v) {
        const int64_t column = c + v * kLanes;
        store_first_elements(out + first_column + column, totals[v], columns - column);
      }
    }
  });
}
