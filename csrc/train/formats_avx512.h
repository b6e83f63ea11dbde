// Products of float32, and of bf16 with the instruction for a pair of inputs.
#include "bf16_pairs_avx512.h"

struct Bf16Format : Bf16Pairs {
  static constexpr int kRows = kTileRows;  // of a tile
  static constexpr bool kHasTiles = false;
};
using Fp32Products = Fp32Format;
