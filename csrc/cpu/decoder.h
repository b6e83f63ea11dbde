// Runs a packed model over growing sequences, a batch of tokens at a step.
//
// The results of a sequence have the same bits whatever else is in the batch, however its tokens
// were cut into steps, and with any number of threads: every sum runs in an order that depends on
// the sequence alone (linear-inl.h, attention-inl.h), and threads share out whole rows, heads and
// outputs.
#pragma once

#include <cstdint>
#include <vector>

#include "../adapter.h"
#include "../batch.h"
#include "../model.h"
#include "buffer.h"
#include "kv_cache.h"
#include "linear.h"
#include "sampling.h"

namespace leangpt::cpu {

class Decoder {
 public:
  Decoder(const Model& model, KvKind kv_kind, int32_t num_blocks);

  KvBlocks& blocks() { return blocks_; }

  // The number of an adapter of `n_layer` layers, whose matrices must outlive the decoder.
  int32_t add_adapter(const LayerDeltas* layers);
  // A sequence with these keys and values (n_layer, prefix, n_kv_head, head_dim) in front, whose
  // tokens go through an adapter (-1: none). Throws std::invalid_argument or CacheFull.
  int64_t add_sequence(const float* keys, const float* values, int64_t prefix, int32_t adapter);

  // Append the tokens to their sequences; write (num_outputs, n_embd) hidden states behind the
  // final norm, (num_outputs, vocab_size) logits, or the log-probability of each target. Throws
  // std::invalid_argument or CacheFull, with nothing appended.
  void hidden(const Batch& batch, float* out);
  void logits(const Batch& batch, float* out);
  void logprobs(const Batch& batch, const int64_t* targets, float* out);
  // Draw a token for each output row, by its settings.
  void sample(const Batch& batch, const DrawSettings* settings, Drawn* out);

 private:
  // Consecutive rows of one sequence that attend together.
  struct Tile {
    int64_t first_row;
    int rows;
  };

  // The rows whose sequences have the same adapter.
  struct AdaptedRows {
    int32_t adapter;
    std::vector<int64_t> rows;
  };

  void prepare(const Batch& batch);
  void run_blocks(const Batch& batch);
  void attend(int layer, const float* qkv, float* out);
  void multiply_delta(const Delta& delta, const std::vector<int64_t>& rows, const float* x,
                      int64_t stride, float* out);
  const float* const* low_rank_products(int layer, Delta LayerDeltas::* of, const float* x,
                                        int64_t stride);
  void norm_and_multiply(const float* weight, const float* bias, const Matrix& w, int layer,
                         Delta LayerDeltas::* of, float* out, int64_t stride,
                         Activation activation);
  void add_product(const float* x, int64_t stride, const Matrix& w, int layer,
                   Delta LayerDeltas::* of);
  void normalize(const float* x, const float* weight, const float* bias, float* out) const;
  // Calls f(i, logits) for each output row. Logits are written to `out`, or to scratch where that
  // is null. With settings, those that cannot be drawn may be the lowest float instead.
  template <class F>
  void for_logits(const Batch& batch, float* out, const DrawSettings* settings, const F& f);
  bool can_screen(const DrawSettings* settings, int64_t count) const;
  void screened_logits(int64_t count, const DrawSettings* settings, float* logits);

  const Model model_;
  KvBlocks blocks_;
  KvCache cache_;
  std::vector<Row> rows_;
  std::vector<Tile> tiles_;
  std::vector<std::vector<LayerDeltas>> adapters_;  // by number, of each layer
  std::vector<AdaptedRows> adapted_;
  std::vector<const float*> addends_;  // of each row, or null
  Linear linear_;
  Buffer<float> stream_, normed_, qkv_, attended_, inner_, states_, rotations_, first_values_,
      logits_;
  Buffer<float> narrow_, products_, branch_;  // of deltas
};

}  // namespace leangpt::cpu
