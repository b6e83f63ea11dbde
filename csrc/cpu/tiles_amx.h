// Products of some rows with a panel of 64 columns, in tiles of AMX: a step of the panel, 4 bytes
// of inputs of each column, is a row of four tiles.

constexpr int kTileSteps = 16;
constexpr int64_t kPanelStepBytes = 256;

// Of a tile: as many as there are.
static inline int tile_steps(int steps) { return steps < kTileSteps ? steps : kTileSteps; }

// Where sums lie: rows of 64 that are `row_bytes` apart.
struct Sums {
  uint8_t* at;
  int64_t row_bytes;
};

static inline void clear_sums() {
  clear_tile<0>();
  clear_tile<1>();
  clear_tile<2>();
  clear_tile<3>();
}

// Tiles 0 to 3, which lie at 0, `column`, `row` and `row + column` bytes.
static inline void load_sums(const Sums& sums, int64_t row, int64_t column, bool adds) {
  if (!adds) return clear_sums();
  load_tile<0>(sums.at, sums.row_bytes);
  load_tile<1>(sums.at + column, sums.row_bytes);
  load_tile<2>(sums.at + row, sums.row_bytes);
  load_tile<3>(sums.at + row + column, sums.row_bytes);
}
static inline void store_sums(const Sums& sums, int64_t row, int64_t column) {
  store_tile<0>(sums.at, sums.row_bytes);
  store_tile<1>(sums.at + column, sums.row_bytes);
  store_tile<2>(sums.at + row, sums.row_bytes);
  store_tile<3>(sums.at + row + column, sums.row_bytes);
}

// Adds 16 steps of at most 16 rows times a whole panel.
template <class Tiles>
static inline void multiply_row_of_tiles(const uint8_t* panel, const uint8_t* rows,
                                         int64_t row_bytes) {
  load_tile<4>(rows, row_bytes);
  load_tile<6>(panel, kPanelStepBytes);
  Tiles::template multiply<0, 4, 6>();
  load_tile<7>(panel + 64, kPanelStepBytes);
  Tiles::template multiply<1, 4, 7>();
  load_tile<6>(panel + 128, kPanelStepBytes);
  Tiles::template multiply<2, 4, 6>();
  load_tile<7>(panel + 192, kPanelStepBytes);
  Tiles::template multiply<3, 4, 7>();
}

// At most 16 rows. They are bound by memory: weights are asked for before they are needed.
template <class Tiles>
static void multiply_few(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes, int num_rows,
                         int steps, bool adds, const Sums& sums) {
  configure_tiles(num_rows, num_rows, tile_steps(steps));
  load_sums(sums, 128, 64, adds);
  for (int step = 0; step < steps; step += kTileSteps) {
    const uint8_t* at = panel + step * kPanelStepBytes;
    for (int line = 0; line < kTileSteps * 4; ++line) {
      __builtin_prefetch(at + 16384 + line * 64, 0, 2);
      __builtin_prefetch(at + 4096 + line * 64);
    }
    multiply_row_of_tiles<Tiles>(at, rows + step * 4, row_bytes);
  }
  store_sums(sums, 128, 64);
}

// What lies behind a block of a panel, asked for evenly: some bytes with each tile of steps.
struct Ahead {
  const uint8_t* next;
  int bytes;

  static Ahead in_passes(const uint8_t* next, int passes) {
    return {next, (kTileSteps * static_cast<int>(kPanelStepBytes) / passes + 63) / 64 * 64};
  }
  inline void ask() {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += bytes;
  }
  Ahead after(int steps) const { return {next + bytes * (steps / kTileSteps), bytes}; }
};

// 16 rows and some more, and half a panel. Inlined, so that a call that asks for nothing has no
// loop.
template <class Tiles>
[[gnu::always_inline]] static inline void multiply_half(const uint8_t* panel, const uint8_t* rows,
                                                        int64_t row_bytes, int steps, bool adds,
                                                        Ahead ahead, const Sums& sums) {
  load_sums(sums, 16 * sums.row_bytes, 64, adds);
  for (int step = 0; step < steps; step += kTileSteps) {
    ahead.ask();
    const uint8_t* at = panel + step * kPanelStepBytes;
    load_tile<6>(at, kPanelStepBytes);
    load_tile<4>(rows + step * 4, row_bytes);
    Tiles::template multiply<0, 4, 6>();
    load_tile<7>(at + 64, kPanelStepBytes);
    Tiles::template multiply<1, 4, 7>();
    load_tile<5>(rows + 16 * row_bytes + step * 4, row_bytes);
    Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<3, 5, 7>();
  }
  store_sums(sums, 16 * sums.row_bytes, 64);
}

// More than 16 rows, 32 at a time with one half of the panel and then the other.
template <class Tiles>
static void multiply_some(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes,
                          int num_rows, int steps, bool adds, const Sums& sums) {
  Ahead ahead = Ahead::in_passes(panel + steps * kPanelStepBytes,
                                 num_rows / 32 * 2 + (num_rows % 32 > 16 ? 2 : 0));
  int configured = 0;
  for (int r = 0; r < num_rows; r += 32) {
    const int count = num_rows - r < 32 ? num_rows - r : 32;
    const uint8_t* row = rows + r * row_bytes;
    const Sums out = {sums.at + r * sums.row_bytes, sums.row_bytes};
    if (count <= 16) {
      multiply_few<Tiles>(panel, row, row_bytes, count, steps, adds, out);
      break;
    }
    if (count != configured) {
      configure_tiles(16, count - 16, tile_steps(steps));
      configured = count;
    }
    for (int half = 0; half < 256; half += 128) {
      multiply_half<Tiles>(panel + half, row, row_bytes, steps, adds, ahead,
                           {out.at + half, out.row_bytes});
      ahead = ahead.after(steps);
    }
  }
}

// Many rows, 16 at a time with the whole panel: their inputs are read once, and the panel, which
// lies in the L1 cache, twice as often as its halves would be. While the next 16 rows are
// multiplied, `finish` is called for those whose sums are there: tiles leave the rest of the CPU
// idle.
template <class Tiles, class F>
static void multiply_many(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes,
                          int num_rows, int steps, bool adds, const Sums& sums, const F& finish) {
  Ahead ahead = Ahead::in_passes(panel + steps * kPanelStepBytes, (num_rows + 15) / 16);
  configure_tiles(16, 16, tile_steps(steps));
  const int tiles = (steps + kTileSteps - 1) / kTileSteps,
            finished_a_tile = (16 + tiles - 1) / tiles;
  int finished = 0;
  for (int r = 0; r < num_rows; r += 16) {
    const int count = num_rows - r;
    if (count < 16) configure_tiles(count, count, tile_steps(steps));
    const Sums out = {sums.at + r * sums.row_bytes, sums.row_bytes};
    load_sums(out, 128, 64, adds);
    for (int step = 0; step < steps; step += kTileSteps) {
      ahead.ask();
      multiply_row_of_tiles<Tiles>(panel + step * kPanelStepBytes, rows + r * row_bytes + step * 4,
                                   row_bytes);
      for (int i = 0; i < finished_a_tile && finished < r; ++i) finish(finished++);
    }
    store_sums(out, 128, 64);
  }
  while (finished < num_rows) finish(finished++);
}

// At most how many rows are few, and some.
constexpr int kFewRows = 16, kSomeRows = 64;

// Some steps of a panel, whole tiles of them or fewer than one has.
template <class Tiles, class F>
static void multiply_block(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes,
                           int num_rows, int steps, bool adds, const Sums& sums, const F& finish) {
  if (num_rows > kSomeRows) {
    return multiply_many<Tiles>(panel, rows, row_bytes, num_rows, steps, adds, sums, finish);
  }
  const auto multiply = num_rows > kFewRows ? multiply_some<Tiles> : multiply_few<Tiles>;
  multiply(panel, rows, row_bytes, num_rows, steps, adds, sums);
  for (int r = 0; r < num_rows; ++r) finish(r);
}

// Begins the sums, or adds to them: rows that lie `row_bytes` apart times some steps of a panel.
// `finish(r)` is called once the sums of row r are there, for one row after the other.
template <class Tiles, class F>
static void multiply_in_tiles(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes,
                              int num_rows, int64_t steps, bool adds, const Sums& sums,
                              const F& finish) {
  // A block of at most 32 KB serves many rows from the L1 cache, one of 96 KB some from the L2
  // cache. Those of one tile share nothing: the less often they store their sums the better.
  // Blocks are even, since each asks for as much of the next one as it has itself.
  const int64_t most = num_rows > kSomeRows ? 8 : num_rows > kFewRows ? 24 : 64;
  const int64_t tiles = steps / kTileSteps, whole = tiles * kTileSteps;
  const int64_t blocks = (tiles + most - 1) / most;
  const auto multiply = [&](int64_t step, int64_t count) {
    const auto block = [&](const auto& f) {
      multiply_block<Tiles>(panel + step * kPanelStepBytes, rows + step * 4, row_bytes, num_rows,
                            static_cast<int>(count), adds || step > 0, sums, f);
    };
    step + count < steps ? block([](int) {}) : block(finish);
  };
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t step = i * tiles / blocks * kTileSteps;
    multiply(step, (i + 1) * tiles / blocks * kTileSteps - step);
  }
  if (whole < steps) multiply(whole, steps - whole);
  release_tiles();
}
