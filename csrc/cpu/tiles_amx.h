// Products of some rows with a panel of 64 columns, in tiles of AMX: a step of the panel, 4 bytes
// of inputs of each column, is a row of four tiles.

constexpr int kTileSteps = 16;
constexpr int64_t kPanelStepBytes = 256;

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
  configure_tiles(num_rows, num_rows, steps < kTileSteps ? steps : kTileSteps);
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

// 16 rows and some more, and half a panel; with each 16 steps it asks for memory at `next`.
template <class Tiles>
static void multiply_many(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes, int steps,
                          bool adds, const uint8_t* next, int fetched_bytes, const Sums& sums) {
  load_sums(sums, 16 * sums.row_bytes, 64, adds);
  for (int step = 0; step < steps; step += kTileSteps) {
    for (int i = 0; i < fetched_bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += fetched_bytes;
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

// Whole tiles of steps, or fewer than one has.
template <class Tiles>
static void multiply_block(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes,
                           int num_rows, int steps, bool adds, const Sums& sums) {
  const int passes = num_rows / 32 * 2 + (num_rows % 32 > 16 ? 2 : 0);
  // of the block that comes next, evenly
  constexpr int kTileBytes = kTileSteps * static_cast<int>(kPanelStepBytes);
  const int fetched_bytes = passes == 0 ? 0 : (kTileBytes / passes + 63) / 64 * 64;
  const uint8_t* next = panel + steps * kPanelStepBytes;
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
      configure_tiles(16, count - 16, steps < kTileSteps ? steps : kTileSteps);
      configured = count;
    }
    for (int half = 0; half < 256; half += 128) {
      multiply_many<Tiles>(panel + half, row, row_bytes, steps, adds, next, fetched_bytes,
                           {out.at + half, out.row_bytes});
      next += fetched_bytes * (steps / kTileSteps);
    }
  }
}

// Begins the sums, or adds to them: rows that lie `row_bytes` apart times some steps of a panel.
template <class Tiles>
static void multiply_in_tiles(const uint8_t* panel, const uint8_t* rows, int64_t row_bytes,
                              int num_rows, int64_t steps, bool adds, const Sums& sums) {
  // At most 96 KB serve all rows from the L2 cache, or 32 where many rows want room there for their
  // own inputs. Those of one tile share nothing: the less often they store their sums the better.
  // Blocks are even, since each asks for as much of the next one as it has itself.
  const int64_t most = num_rows > 64 ? 8 : num_rows > 16 ? 24 : 64;
  const int64_t tiles = steps / kTileSteps, whole = tiles * kTileSteps;
  const int64_t blocks = (tiles + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t step = i * tiles / blocks * kTileSteps;
    const int64_t block = (i + 1) * tiles / blocks * kTileSteps - step;
    multiply_block<Tiles>(panel + step * kPanelStepBytes, rows + step * 4, row_bytes, num_rows,
                          static_cast<int>(block), adds || step > 0, sums);
  }
  if (whole < steps) {
    multiply_block<Tiles>(panel + whole * kPanelStepBytes, rows + whole * 4, row_bytes, num_rows,
                          static_cast<int>(steps - whole), adds || whole > 0, sums);
  }
  release_tiles();
}
