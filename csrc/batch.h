// The tokens of one step, of any sequences, and their way into the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "kv_blocks.h"
#include "model.h"

namespace leangpt {

// A flat batch of tokens: a piece of a prompt is many tokens of one sequence, decoding is one token
// of each of many, and a batch may mix both.
struct Batch {
  const int64_t *tokens, *sequences, *positions;
  int64_t num_tokens;
  const int64_t* output_rows;
  int64_t num_outputs;
};

struct Row {
  Sequence* sequence;
  int64_t position;
  int64_t place;  // in the cache: the position, behind the prefix
  bool is_last;   // of its sequence in this batch
};

// Check a batch, and only then give its sequences their pages: its rows, and the pages to copy
// before the step writes any. The sequences' lengths are the caller's to raise once it has run.
// Throws std::invalid_argument or CacheFull, with nothing changed.
std::vector<Row> admit(const Batch& batch, const ModelConfig& config, KvBlocks& blocks,
                       std::vector<BlockCopy>* copies);

// Throws std::invalid_argument unless there is a target in the vocabulary for each output.
void check_targets(const Batch& batch, const int64_t* targets, int64_t vocab_size);

}  // namespace leangpt
