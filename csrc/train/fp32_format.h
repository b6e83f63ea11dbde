// Products of float32: a unit is one input.
struct Fp32Format {
  using Element = float;
  static constexpr int kInputs = 1;
  static constexpr int64_t kBlockRows = 96, kBlockInputs = 1024;
  static constexpr int kRows = kTileRows;   // of a tile
  static constexpr bool kHasTiles = false;  // see ../cpu/amx.h
  static constexpr bool kIsSplit = false;   // see split_format_amx.h
  static constexpr int64_t units(int64_t inputs) { return inputs; }
  static inline Vec unit(Vec first, Vec) { return first; }
  static inline Vec dot(Vec sum, Vec column, const float* row) {
    return fma(column, broadcast(*row), sum);
  }
};
