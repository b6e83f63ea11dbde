// The table of an ISA, from sources that are written once against Vec.

// clang-format off: the order matters
#include "elementwise-inl.h"
#include "linear-inl.h"
#include "attention-inl.h"
#include "pack-inl.h"
#include "ceilings-inl.h"
// clang-format on

const Kernels kTable = {
    kMaxQueries,  kMaxTileRows, kTileFloats, activation_row_bytes,
    convert_row,  linear_tile,  layer_norm,  rms_norm,
    rotate,       scale,        append_kv,   attend_chunk,
    merge_states, finish_state, unpack_row,  pack_panel,
    max_or_nan,   log_sum_exp,  read_memory, multiply_registers,
};
