// Products of float32: a unit is one input.
struct Fp32Format {
  using Element = float;
  static constexpr int kInputs = 1;
  static constexpr int kRows = kTileRows;   // of a tile
  static constexpr bool kHasTiles = false;  // see ../cpu/amx.h
  static inline Vec unit(Vec first, Vec) { return first; }
  static inline Vec dot(Vec sum, Vec column, const float* row) {
    return fma(column, broadcast(*row), sum);
  }
};
