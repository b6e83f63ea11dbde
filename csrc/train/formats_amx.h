// Products of bf16 in tiles of AMX, whose rows hold the inputs of a row of the left operand, and of
// float32 in tiles of bf16.
#include "../cpu/amx.h"
//
#include "../cpu/tiles_amx.h"
//
#include "bf16_pairs_avx512.h"

struct Bf16Format : Bf16Pairs {
  static constexpr int kRows = 16;  // of a tile
  static constexpr int64_t kBlockRows = 256;
  static constexpr bool kHasTiles = true;

  template <class F>
  static void multiply(const Rows& rows, const float* panel, int64_t num_rows, int64_t steps,
                       float* out, int64_t out_stride, bool adds, const F& finish) {
    constexpr int64_t kUnitBytes = sizeof(float);
    multiply_in_tiles<Bf16Tiles>(
        reinterpret_cast<const uint8_t*>(panel), reinterpret_cast<const uint8_t*>(rows.units),
        rows.row_stride * kUnitBytes, static_cast<int>(num_rows), steps, adds,
        {reinterpret_cast<uint8_t*>(out), out_stride * kUnitBytes}, finish);
  }
};

#include "split_format_amx.h"

using Fp32Products = SplitFormat;
