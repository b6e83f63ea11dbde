// How many rows a product takes at a time, and whether they share blocks of weights.

constexpr int kMaxTileRows = 96;  // with a panel of weights they stay in the L2 cache
constexpr int64_t kTileFloats = kMaxTileRows * kPanelWidth * 2;  // and sums of a block
// Whether tiles of few rows ask for weights twice, for the L2 cache and for the L1 cache.
constexpr bool kFetchesTwice = false;
// Whether the CPU has registers for tiles, see amx.h.
constexpr bool kHasTiles = false;
// Whether there are products that share them, and which do.
constexpr bool kSharesFloatBlocks = false, kSharesIntBlocks = false;
template <class Format>
constexpr bool shares_float_blocks(int) {
  return false;
}
template <int kDigits>
static bool shares_int_blocks(const Matrix&, int) {
  return false;
}
// Whether linear_in_tiles multiplies them.
static inline bool is_multiplied_in_tiles(const Matrix&, int) { return false; }
