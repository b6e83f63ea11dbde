// The kernels that are compiled once for each instruction set, and the plain structs they take. Raw
// pointers, no torch, no threads: a caller hands out tiles and rows.
#pragma once

#include <cstdint>

namespace leangpt::cpu {

constexpr int kLanes = 16;       // floats of a Vec, keys of a page
constexpr int kPanelVecs = 4;    // Vecs of outputs in a panel
constexpr int kPanelWidth = 64;  // outputs of a panel
constexpr int kChunkKeys = 256;  // keys whose softmax is formed at once
constexpr int kMaxTileQueries = 12;
constexpr int kMaxHeadDim = 512;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

enum class WeightKind : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

// A weight matrix (n outputs, k inputs), packed in panels of 64 outputs, one after the other, so
// that a product reads its weights as one stream. A step of a panel is 4 times 64 bytes, for 16
// outputs each:
//   fp32  1 input  x 16 outputs
//   bf16  2 inputs x 16 outputs, those of an output side by side
//   int8  4 inputs x 16 outputs, likewise; a byte is the weight plus 128
//   int4  8 inputs x 16 outputs: low halves of the bytes as the 4 first inputs, high halves as the
//   4
//         next; the weight plus 8
// Integers q stand for the weight scale * q (+ minimum). Scales are float32 per output where group
// is 0; otherwise there is a float16 scale, and a float16 minimum if the format is asymmetric, for
// each `group` inputs: [panel][group][64].
struct Matrix {
  const uint8_t* data;
  const void* scales;
  const uint16_t* minimums;  // null: symmetric
  const float* bias;         // round_up(n, 64) floats, or null
  WeightKind kind;
  int32_t n, k;
  int32_t group;  // 0: one scale an output
  int32_t
      digits;  // of the activations that integers are multiplied with: 3 (24 bits) or 1 (8 bits)

  int panels() const { return static_cast<int>(round_up(n, kPanelWidth) / kPanelWidth); }
  int64_t padded_k() const { return round_up(k, group > kLanes ? group : kLanes); }
  int64_t groups() const { return group == 0 ? 1 : padded_k() / group; }
  int64_t steps() const {
    constexpr int kInputs[] = {1, 2, 4, 8};
    return padded_k() / kInputs[static_cast<int>(kind)];
  }
  int64_t panel_bytes() const { return steps() * kPanelWidth * 4; }
};

// Rows of activations in the form that a format multiplies: float32, bfloat16, or integers. An
// integer row is `digits` rows of int8, from the highest digit (base 256) to the lowest; all belong
// to one scale for each group of inputs.
struct Activations {
  uint8_t* rows;
  int64_t row_bytes;
  float* scales;     // (rows, groups)
  int32_t* offsets;  // (rows, groups, digits): minus the zero point times the sum of the digits
  float* sums;       // (rows, groups): scale times the sum of the integers
};

enum class KvKind : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

// Where the keys and values of one sequence and key head lie: page b holds keys 16 b to 16 b + 15
// as a Vec of keys for each element (bf16: for each pair of elements, int8: for each four), and
// from `value_offset` on the values as Vecs of elements for each value (bf16: for each pair of
// values, int8: for each four). In int8 the scales of the 16 keys lie behind them, and those of the
// values behind these; a byte is the integer plus 128.
struct KvPages {
  const uint8_t* base;
  const int32_t* block_table;
  int64_t block_bytes;
  int64_t value_offset;
  KvKind kind;
};

// Some queries that attend to the keys of one sequence together.
struct AttentionTile {
  KvPages pages;
  const float* queries[kMaxTileQueries];  // D floats each, scaled
  int32_t first_key[kMaxTileQueries];     // a query sees the keys first_key <= i < last_key
  int32_t last_key[kMaxTileQueries];
  int32_t num_queries;
  int32_t head_dim;
};

// A softmax in the making: [0] the largest score, [1] the sum of weights, and from [16] on the
// weighted sum of values.
constexpr int64_t attention_state_floats(int head_dim) {
  return kLanes + round_up(head_dim, kLanes);
}

enum class Activation : int32_t { kNone = 0, kGeluTanh = 1, kGelu = 2, kRelu2 = 3, kSwiglu = 4 };

// What becomes of a tile of a product.
struct Epilogue {
  float* out;
  int64_t stride;
  bool adds;  // to what is there
  Activation activation;
};

struct Kernels {
  int max_queries;
  int64_t (*activation_row_bytes)(const Matrix&);
  // One row of k floats (zeros behind them up to a multiple of 16) to the form that `w` multiplies.
  void (*convert_row)(const float* x, const Matrix& w, const Activations& a, int64_t row);
  // Rows [first_row, first_row + rows) times a panel; `tile` is scratch of rows * 64 floats.
  void (*linear_tile)(const Matrix& w, const Activations& a, int64_t first_row, int rows, int panel,
                      float* tile, const Epilogue& epilogue);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int n,
                     float* out);
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  // In place: pairs (x[i], x[i + D/2]).
  void (*rotate)(float* x, const float* cos, const float* sin, int head_dim);
  void (*scale)(const float* x, float factor, int n, float* out);
  // Write a key and a value to their place in a page. The last of a sequence clears what will be
  // the other one of its pair.
  void (*append_kv)(const float* key, const float* value, int head_dim, KvKind kind, uint8_t* page,
                    int64_t value_offset, int slot, bool is_last);
  // Keys of chunk `chunk` of the queries' keys into states[q], which hold what earlier chunks gave.
  void (*attend_chunk)(const AttentionTile& tile, int chunk, float* const* states);
  void (*merge_states)(float* into, const float* from, int head_dim);
  void (*finish_state)(const float* state, int head_dim, float* out);
  // Unpacked row of a matrix: round_up(k, 16) floats.
  void (*unpack_row)(const Matrix& w, int row, float* out);
  // Pack 64 rows into a panel, its scales and minimums. They are padded_k() floats, zeros behind
  // the first k.
  void (*pack_panel)(const Matrix& w, const float* const* rows, uint8_t* panel, void* scales,
                     uint16_t* minimums);
  float (*max_or_nan)(const float* x, int n);
  float (*log_sum_exp)(const float* x, int n);
  // For benchmarks, see ceilings-inl.h.
  float (*read_memory)(const uint8_t* p, int64_t bytes);
  int (*multiply_registers)(WeightKind kind, int64_t rounds);
};

const Kernels& kernels();  // of the active ISA, see isa.h

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

}  // namespace leangpt::cpu
