// The kernels that are compiled once for each instruction set, and the plain structs they take. Raw
// pointers, no torch, no threads: a caller hands out tiles and rows.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace leangpt::cpu {

constexpr int kPanelVecs = 4;    // Vecs of outputs in a panel
constexpr int kChunkKeys = 256;  // keys whose softmax is formed at once
constexpr int kMaxTileQueries = 12;
constexpr int kMaxHeadDim = 512;

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

// What becomes of a tile of a product.
struct Epilogue {
  float* out;
  int64_t stride;
  bool adds;  // to what is there
  Activation activation;
  // for each row what is added in front of the activation, round_up(n, 64) floats, or null; null:
  // nothing for any
  const float* const* addends = nullptr;
};

struct Kernels {
  int max_queries;
  int max_tile_rows;    // of a product
  int64_t tile_floats;  // of scratch for it
  int64_t (*activation_row_bytes)(const Matrix&);
  // One row of k floats (zeros behind them up to a multiple of 16) to the form that `w` multiplies.
  void (*convert_row)(const float* x, const Matrix& w, const Activations& a, int64_t row);
  // Rows [first_row, first_row + rows) times a panel; `tile` is scratch of tile_floats.
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
namespace amx {
extern const Kernels kTable;
}

}  // namespace leangpt::cpu
