// The launchers of the CUDA kernels. All pointers are device memory but where it says host; all
// work is queued on `stream`. A launcher throws std::invalid_argument for what its kernel cannot
// take, and std::runtime_error where the launch fails. Sizes and ids inside device memory (tokens,
// pages, rows) were checked by the caller. Strides are in elements and multiples of 16, rows begin
// at multiples of 16 bytes, and what lies in a row behind its width, up to the stride, is zero and
// stays so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../adapter.h"
#include "../draw.h"
#include "../matrix.h"

namespace leangpt::cuda {

constexpr int kPageSize = 16;    // keys of a page
constexpr int kSplitKeys = 256;  // keys whose softmax is formed at once
constexpr int kMaxHeadDim = 256;

// A norm in front of a product. Weight and bias are padded with zeros to a multiple of 16; layer
// norm has a bias or none, RMS norm has none.
struct Norm {
  const float* weight;
  const float* bias;
  float eps;
  bool is_rms;
};

// Rows that are multiplied: either float32 rows of the stream, with the norm in front and rounded
// to bfloat16 behind it, or bfloat16 rows as they are.
struct LinearInput {
  const float* stream;   // (.., stride), or null
  const uint16_t* rows;  // bfloat16 (num_rows, stride), or null
  int64_t stride;
  const int32_t* row_of;  // of the stream: row i of the product is row row_of[i] there; null: i
  Norm norm;
  uint16_t* normed;  // of the stream: scratch for (num_rows, stride) bfloat16
};

// Where the product goes: exactly one of the first pointers is set.
struct LinearOutput {
  float* out;      // out = product + bias
  float* stream;   // stream += product + bias
  uint16_t* bf16;  // bf16 = activation(product + bias); kSwiglu: half as many outputs
  int64_t stride;
  Activation activation;
  // What adapters add to product + bias of some rows, or null: row i gets row addend_of[i] of the
  // float32 addends (.., round_up(outputs, 64)), none where that is negative.
  const float* addends = nullptr;
  const int32_t* addend_of = nullptr;
};

// The product of rows with the bf16, int8 or int4 weights of a packed matrix. The bits of a row
// depend on that row and the matrix alone.
void linear_decode(const Matrix& w, const LinearInput& in, const LinearOutput& out, int num_rows,
                   cudaStream_t stream);

// What linear_decode does after the product, for float32 products (num_rows, stride) that a library
// made of w's weights.
void finish_products(const Matrix& w, const float* products, int64_t stride,
                     const LinearOutput& out, int num_rows, cudaStream_t stream);

// out (num_rows, out_stride), float32 or bfloat16, = norm of rows row_of[i] (null: i) of x.
void normalize(const float* x, int64_t stride, const int32_t* row_of, const Norm& norm, int width,
               float* out, int64_t out_stride, int num_rows, cudaStream_t stream);
void normalize(const float* x, int64_t stride, const int32_t* row_of, const Norm& norm, int width,
               uint16_t* out, int64_t out_stride, int num_rows, cudaStream_t stream);

// stream (num_rows, stride) = row tokens[i] of the embedding + row positions[i] of `learned`, if
// any. A token below 0 is one that was drawn: -1 - i is that of drawn[i].
void embed(const Matrix& embedding, const float* learned, int64_t learned_stride,
           const int32_t* tokens, const Drawn* drawn, const int32_t* positions, float* stream_out,
           int64_t stride, int num_rows, cudaStream_t stream);

// Rows of one adapter, of which a kernel reads the matrices once for all: rows[first ..
// first + num_rows) of DeltaRows.
struct DeltaTile {
  int32_t adapter, first, num_rows;  // num_rows 0: none
};
constexpr int kDeltaTileRows = 4;  // at most

// The rows of a step whose sequences have adapters.
struct DeltaRows {
  const int32_t* rows;  // of the step, the rows of an adapter one after the other
  const DeltaTile* tiles;
  int num_tiles;
};

// The deltas of one matrix, by adapter: that of adapter a is deltas[a * stride], in device memory
// as what it points to.
struct MatrixDeltas {
  const Delta* deltas;
  int64_t stride;
  int32_t is_bottleneck;  // the others are left out
  int outputs;            // of the matrix
  int most_ranks;         // of any
};

// addends (.., round_up(outputs, 64)) = what the deltas add to products of these rows; addend i is
// that of rows[i]. x is what the deltas read: float32 or bfloat16 rows of the step. Where an
// adapter has no such delta there is -0, which is neutral. `narrow` is scratch for
// (.., round_up(most_ranks, 64)) floats.
void multiply_deltas(const MatrixDeltas& deltas, const DeltaRows& rows, const uint16_t* x,
                     int64_t stride, float* narrow, float* addends, cudaStream_t stream);
void multiply_deltas(const MatrixDeltas& deltas, const DeltaRows& rows, const float* x,
                     int64_t stride, float* narrow, float* addends, cudaStream_t stream);

// stream (num_rows, stride) += branch + its addends, see LinearOutput.
void add_branch(const float* branch, const float* addends, const int32_t* addend_of, int outputs,
                float* stream_out, int64_t stride, int num_rows, cudaStream_t stream);

// bf16 and int8 as cpu::KvKind.
enum class KvKind : int32_t { kBf16 = 1, kInt8 = 2, kFp16 = 3, kFp8 = 4 };

// The pages of one layer. In a page (block_bytes) the heads of keys follow each other, and what one
// of them holds is one piece of memory: 16 keys, their 16 values and, for int8 and fp8 (e4m3), the
// float32 scales of the keys and those of the values. Elements lie as mma.m16n8k16 takes them from
// a lane, so that a lane's share of 16 dimensions is one load; see kv_layout.cuh. Dimensions are
// padded to a multiple of 16 with zeros. What was never written must be readable: clear the memory
// once.
struct KvLayer {
  uint8_t* base;
  int64_t block_bytes;
  KvKind kind;
};
int64_t kv_block_bytes(int n_kv_head, int head_dim, KvKind kind);

// What a step's rows are, for attention: row i belongs to a sequence whose pages are
// block_tables[table_of[i] * table_stride + ..], and stands there at place places[i]: its position,
// behind the sequence's prefix.
struct StepRows {
  const int32_t* places;
  const int32_t* table_of;
  const int32_t* block_tables;
  int64_t table_stride;
  int num_rows;
};

struct HeadShape {
  int n_head, n_kv_head, head_dim;
};

// rotations (num_rows, head_dim): the cosines, then the sines, of positions[i] * frequencies
// (head_dim / 2 radians a position), times `magnitude`; once a step, for all of its layers.
void rotary_angles(const int32_t* positions, const float* frequencies, float magnitude,
                   int head_dim, float* rotations, int num_rows, cudaStream_t stream);

// From float32 qkv rows: norms of heads (null: none), rotary (rotations null: none), queries
// scaled by head_dim^-0.5 to bfloat16 (num_rows, query_stride), keys and values to their pages.
// With pages of fp16 the queries are fp16 too. With `first_values` (num_rows, n_kv_head * head_dim;
// null: none) the first layer leaves its values there, and others add them to theirs.
struct AppendArgs {
  const float* qkv;
  int64_t qkv_stride;
  const float *q_norm, *k_norm;
  float norm_eps;
  const float* rotations;  // rotary_angles
  uint16_t* queries;
  int64_t query_stride;
  float* first_values;
  bool is_first_layer;
};
void append_kv(const AppendArgs& args, const HeadShape& shape, const StepRows& rows,
               const KvLayer& layer, cudaStream_t stream);

// The first keys and values of a sequence, in every layer: those of a prefix, (n_layer, length,
// n_kv_head, head_dim) float32, to its pages block_table[place / 16]. `layer` is the first one.
struct Prefix {
  const float *keys, *values;
  int length, n_layer;
};
void write_prefix(const Prefix& prefix, const HeadShape& shape, const int32_t* block_table,
                  const KvLayer& layer, int64_t layer_bytes, cudaStream_t stream);

// In every layer: pages[to] = pages[from]; `copies` are (from, to) pairs. No `to` is in another
// pair.
void copy_pages(uint8_t* base, int64_t layer_bytes, int n_layer, int64_t block_bytes,
                const int32_t* copies, int num_copies, cudaStream_t stream);

// Rows that follow each other in the batch and in one sequence, and attend together.
struct AttentionTile {
  int32_t first_row, num_rows;
};
struct AttentionArgs {
  const uint16_t* queries;  // of append_kv
  uint16_t* out;            // bfloat16 (num_rows, stride)
  int64_t stride;           // a multiple of 4
  const AttentionTile* tiles;
  int num_tiles;
  int max_keys;        // upper bound of places + 1: the grid is sized for it
  int sliding_window;  // 0: none
  float* scratch;      // attention_scratch_floats
};
int attention_tile_rows(const HeadShape& shape);  // rows of a tile at most
int64_t attention_scratch_floats(const HeadShape& shape, int num_rows, int max_keys);
void attention_decode(const AttentionArgs& args, const HeadShape& shape, const StepRows& rows,
                      const KvLayer& layer, cudaStream_t stream);

// A draw for each row of logits (num_rows, stride), as cpu::draw: the same tokens,
// log-probabilities within 1e-6. `settings`, and what it points to, is device memory; so is `out`.
void sample(const float* logits, int64_t stride, int vocab_size, const DrawSettings* settings,
            Drawn* out, void* scratch, int num_rows, cudaStream_t stream);
int64_t sample_scratch_bytes(int vocab_size, int num_rows);

// logprobs[i] = log softmax(logits[i])[targets[i]]
void log_probs(const float* logits, int64_t stride, int vocab_size, const int64_t* targets,
               float* logprobs, int num_rows, cudaStream_t stream);

}  // namespace leangpt::cuda
