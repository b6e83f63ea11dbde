// The table of an ISA, from sources that are written once against Vec.

// clang-format off: the order matters
#include "../cpu/exp-inl.h"
#include "activation-inl.h"
#include "gemm-inl.h"
#include "attention-inl.h"
#include "cross_entropy-inl.h"
#include "norm-inl.h"
#include "embedding-inl.h"
#include "gated-inl.h"
#include "optimizer-inl.h"
#include "rotary-inl.h"
// clang-format on

const Kernels kTable = {
    kPanel,
    block_sizes,
    multiplies_whole_blocks,
    units,
    pack_panel,
    pack_rows,
    multiply,
    sum_rows,
    attention_scratch,
    attention_forward,
    attention_backward,
    norm_forward,
    norm_backward,
    cross_entropy,
    gated,
    rotary_forward,
    rotary_backward,
    add_rows,
    sum_of_rows,
    adamw,
    sum_squares,
};
