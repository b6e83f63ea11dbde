// With AMX all bf16 products are in tiles, and those of int8 of more rows than a few; the same
// names as blocks_none.h, which says what they are.

constexpr int kMaxTileRows = 256;
// A tile, and behind it the sums of each digit.
constexpr int64_t kTileFloats = kMaxTileRows * kPanelWidth * 4;
constexpr int kMostRowsWithoutTiles = 2;
constexpr bool kFetchesTwice = true;
constexpr bool kHasTiles = true;
constexpr bool kSharesFloatBlocks = false, kSharesIntBlocks = true;
template <class Format>
constexpr bool shares_float_blocks(int) {
  return false;
}
template <int kDigits>
static bool shares_int_blocks(const Matrix& w, int rows) {
  return w.group != 0 && rows > (kDigits == 1 ? 8 : 4);
}
static inline bool is_multiplied_in_tiles(const Matrix& w, int rows) {
  return w.kind == WeightKind::kBf16 ||
         (w.kind == WeightKind::kInt8 && w.group == 0 && rows * w.digits > kTileRows);
}
