// AMX: eight tiles of registers, each of up to 16 rows of 64 bytes, and products of two tiles added
// to a third. Here tiles 0 to 3 hold sums (16 rows by 16 columns), 4 and 5 rows of the left operand
// (a row: 64 bytes of inputs), 6 and 7 columns of the right one (a row: 4 bytes of inputs of each
// of 16 columns). As assembly: the intrinsics do not say that they read memory.
//
// Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3.

// Sums of bf16 products: those of the even and of the odd inputs of a tile apart, each one after
// the other, then added to what is there. No subnormal numbers, no exceptions.
struct Bf16Tiles {
  template <int kSums, int kRows, int kColumns>
  static inline void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
  }
};

// Exact sums of products of signed bytes (rows) and unsigned ones (columns).
struct Int8Tiles {
  template <int kSums, int kRows, int kColumns>
  static inline void multiply() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
  }
};

template <int kTile>
static inline void load_tile(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
static inline void store_tile(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
static inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows of each tile and their bytes. Clears all tiles.
static inline void configure_tiles(const int (&rows)[8], const int (&row_bytes)[8]) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } sizes;
  static_assert(sizeof sizes == 64);
  for (int tile = 0; tile < 8; ++tile) {
    sizes.rows[tile] = static_cast<uint8_t>(rows[tile]);
    sizes.row_bytes[tile] = static_cast<uint16_t>(row_bytes[tile]);
  }
  asm volatile("ldtilecfg %0" ::"m"(sizes));
}
// For products of `first` and `second` rows by `steps` times 4 bytes of inputs.
static inline void configure_tiles(int first, int second, int steps) {
  configure_tiles({first, first, second, second, first, second, steps, steps},
                  {64, 64, 64, 64, steps * 4, steps * 4, 64, 64});
}
// What is in the tiles no longer has to be kept when the thread is interrupted.
static inline void release_tiles() { asm volatile("tilerelease"); }
