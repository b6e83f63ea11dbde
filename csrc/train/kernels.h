// The kernels of training that are compiled once for each instruction set, and the plain structs
// they take. Raw pointers, no torch, no threads: a caller hands out strips, tiles, rows and heads.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace leangpt::train {

enum class Dtype : int32_t { kFp32 = 0, kBf16 = 1 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : 2; }

// A matrix: element (i, j) at i * row_stride + j * column_stride, one of which is 1.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t row_stride, column_stride;

  Operand transposed() const { return {data, dtype, column_stride, row_stride}; }
};

// Rows of the left operand of a product, in the form that it is multiplied in. 32 bits are a unit:
// one float32, or two bf16 of adjacent inputs; a step of the product takes one unit of each row.
struct Rows {
  const float* units;
  int64_t row_stride, step_stride, tile_stride;  // in units; a tile is `tile_rows` rows
};

// What becomes of a tile of a product: value = sums + bias + addend, and
//   no activation   out = value
//   forward         out = value, activated = act(value)
//   backward        value is the gradient of act(inner): out = value act'(inner), activated =
//   act(inner)
// Matrices of tiles are row-major, with `stride` columns.
struct Epilogue {
  void* out = nullptr;
  Dtype dtype = Dtype::kFp32;
  int64_t stride = 0;
  const float* bias = nullptr;
  const void* addend = nullptr;
  Dtype addend_dtype = Dtype::kFp32;
  Activation activation = Activation::kNone;
  void* activated = nullptr;    // of `dtype`
  const void* inner = nullptr;  // of `dtype`
};

// Causal attention of H query heads to H_kv key heads. Query t of T stands at position S - T + t
// and sees the last `window` keys up to its own.
struct Attention {
  Dtype dtype;
  // element (b, t, h, d) at b * strides[0] + t * strides[1] + h * strides[2] + d
  const void *q, *k, *v;
  int64_t q_strides[3], k_strides[3], v_strides[3];
  int64_t num_sequences, num_queries, num_keys;  // B, T, S
  int64_t num_heads, num_kv_heads, head_dim;     // H, H_kv, D
  int64_t window;
  float scale;
  void* out;   // (B, T, H, D)
  float* lse;  // (B, H, T): log of the sum of exp(scale * score)
  // backward alone
  const void* dout = nullptr;  // (B, T, H, D)
  void *dq, *dk, *dv;          // as q, k and v, contiguous
};

// Normalization of rows. With a residual, total = residual + x is written and normalized; without
// one it is x.
struct Norm {
  Dtype dtype, total_dtype, y_dtype;  // of x; of the sum and the residual; of what is normalized
  int64_t num_columns;
  bool is_rms;
  float eps;
  const void *x, *residual;
  void *total, *y;
  const float *weight, *bias;
  float *mean, *rstd;  // of each row
  // backward alone
  const void *dy, *dstream;  // gradients of y and of total
  void *dtotal, *dx;         // dx: as dtotal, in the dtype of x, where that is another one
};

// The gated activation a = silu(gate) up, of rows h = (gate, up).
struct Gated {
  Dtype dtype;
  int64_t width;   // of gate, up and a
  const void* h;   // (rows, 2 width)
  void* a;         // (rows, width)
  const void* da;  // (rows, width): its gradient, in backward alone
  void* dh;        // (rows, 2 width)
};

// Queries, keys and values out of packed heads, the first two normalized, if they have weights, and
// turned. A token has H query heads, H_kv key heads and as many value heads of D elements.
struct RotaryQkv {
  Dtype dtype;
  int64_t seq_len;                            // T
  int64_t num_heads, num_kv_heads, head_dim;  // H, H_kv, D
  const float *cos, *sin;                     // (B or 1, T, D / 2)
  int64_t table_stride;                       // from sequence to sequence; 0: one for all
  const float *q_weight, *k_weight;           // (D,), or null
  float eps;
  void* qkv;                     // (B, T, H + 2 H_kv, D)
  void *q, *k, *v;               // contiguous; in backward their gradients
  void* dqkv;                    // backward alone; then qkv is null without weights
  float *dq_weight, *dk_weight;  // whole Vecs, sums over the tokens of a call
};

struct CrossEntropy {
  double label_smoothing, z_loss;
  double factor;  // of all losses and gradients
};

// A step of AdamW, see optimizer-inl.h, with factors that depend on its number.
struct AdamW {
  float grad_scale;
  float decay;      // learning rate * weight decay
  float step_size;  // learning rate / (1 - beta1^step)
  float one_minus_beta1, one_minus_beta2;
  float second_correction;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

// Elements of a parameter and what a step of AdamW needs of them.
struct AdamWPart {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  float* master;  // null: `param` is stepped itself
  Dtype dtype, grad_dtype;
  int64_t size;
};

// A product is computed in blocks of rows, whose left operand is packed once, and of inputs: so
// many of each at most that a packed block stays in the L2 cache. Rows are multiplied in tiles.
struct BlockSizes {
  int64_t tile_rows, rows, inputs;
};

// Some rows and columns of an output.
struct Region {
  int64_t first_row, num_rows, first_column, num_columns;
};

struct Kernels {
  int panel_width;  // columns of a product are computed so many at a time
  BlockSizes (*block_sizes)(Dtype compute);
  // Whether all rows of a block take a panel together: its steps are more than are summed at once,
  // or many rows are multiplied sooner.
  bool (*multiplies_whole_blocks)(int64_t units, Dtype compute);
  // Units of one row or column of a product with so many inputs.
  int64_t (*units)(int64_t inputs, Dtype compute);

  // Rows of x from `first` on, as the right operand of products whose columns they are: a panel of
  // [step][panel_width] units. x has `extent` rows; what is packed beyond is not said.
  void (*pack_panel)(const Operand& x, Dtype compute, int64_t first, int64_t extent, int64_t inputs,
                     float* panel);
  // Rows [first, first + count) of x as the left operand, in `scratch` or where they are; it has
  // room for the units of round_up(count, tile_rows) rows and 16 more for each tile.
  Rows (*pack_rows)(const Operand& x, Dtype compute, int64_t first, int64_t count, int64_t extent,
                    int64_t inputs, float* scratch);
  // What `epilogue` says of the rows times a panel, which give this part of the output. `sums` is
  // scratch (round_up(num_rows, tile_rows), panel_width).
  void (*multiply)(const Rows& rows, const float* panel, Dtype compute, int64_t inputs,
                   const Region& region, const Epilogue& epilogue, float* sums);
  // Sums over the rows of a (rows, n) matrix, of `columns` columns from the given one on.
  void (*sum_rows)(const void* x, Dtype dtype, int64_t rows, int64_t n, int64_t first_column,
                   int64_t columns, float* out);

  // The query heads that read one key head of one sequence. `scratch` is attention_scratch()
  // floats; backward is where there is a `dout`.
  int64_t (*attention_scratch)(const Attention& a);
  void (*attention_forward)(const Attention& a, int64_t sequence, int64_t kv_head, float* scratch);
  void (*attention_backward)(const Attention& a, int64_t sequence, int64_t kv_head, float* scratch);

  void (*norm_forward)(const Norm& norm, int64_t first_row, int64_t last_row);
  // Adds the rows' share to dweight and dbias, which are whole Vecs of floats.
  void (*norm_backward)(const Norm& norm, int64_t first_row, int64_t last_row, float* dweight,
                        float* dbias);
  // The loss of a row of n logits, which become their gradients if those are asked for.
  float (*cross_entropy)(const CrossEntropy& loss, float* logits, int64_t n, int64_t target,
                         bool with_gradient);

  void (*gated)(const Gated& gated, int64_t first_row, int64_t last_row);
  void (*rotary_forward)(const RotaryQkv& rotary, int64_t first_token, int64_t last_token);
  void (*rotary_backward)(const RotaryQkv& rotary, int64_t first_token, int64_t last_token);
  // out = a + b, rows of n.
  void (*add_rows)(const void* a, const void* b, Dtype dtype, int64_t n, void* out);
  // out = the sum of these rows of x (rows, n), one after the other.
  void (*sum_of_rows)(const void* x, Dtype dtype, int64_t n, const int64_t* rows, int64_t count,
                      void* out);

  void (*adamw)(const AdamW& step, const AdamWPart& part);
  double (*sum_squares)(const void* x, Dtype dtype, int64_t n);
};

const Kernels& kernels();  // of the active ISA, see ../cpu/isa.h

namespace portable {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
namespace avx512_bf16 {
extern const Kernels kTable;
}
namespace amx {
extern const Kernels kTable;
}

}  // namespace leangpt::train
