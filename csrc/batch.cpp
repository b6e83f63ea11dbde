#include "batch.h"

#include <string>
#include <unordered_map>

namespace leangpt {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string text(int64_t n) { return std::to_string(n); }

}  // namespace

std::vector<Row> admit(const Batch& batch, const ModelConfig& config, KvBlocks& blocks,
                       std::vector<BlockCopy>* copies) {
  std::unordered_map<int64_t, int64_t> new_tokens;
  std::vector<Row> rows(batch.num_tokens);
  for (int64_t i = 0; i < batch.num_tokens; ++i) {
    const int64_t token = batch.tokens[i];
    if (token < 0 || token >= config.vocab_size) {
      fail("token ids must be in [0, " + text(config.vocab_size) + "), got " + text(token));
    }
    Sequence& sequence = blocks.at(batch.sequences[i]);
    const int64_t place = sequence.length + new_tokens[batch.sequences[i]]++;
    const int64_t expected = place - sequence.prefix;
    if (batch.positions[i] != expected) {
      fail("the next position of sequence " + text(batch.sequences[i]) + " is " + text(expected) +
           ", got " + text(batch.positions[i]));
    }
    if (expected >= config.max_seq_len) {
      fail("a sequence holds at most " + text(config.max_seq_len) + " tokens, got " +
           text(expected + 1));
    }
    rows[i] = {&sequence, expected, place, false};
  }
  for (int64_t i = 0; i < batch.num_outputs; ++i) {
    if (batch.output_rows[i] < 0 || batch.output_rows[i] >= batch.num_tokens) {
      fail("output rows must be in [0, " + text(batch.num_tokens) + "), got " +
           text(batch.output_rows[i]));
    }
  }
  blocks.reserve(new_tokens, copies);
  for (int64_t i = 0; i < batch.num_tokens; ++i) {
    const int64_t length = rows[i].sequence->length + new_tokens[batch.sequences[i]];
    rows[i].is_last = rows[i].place == length - 1;
  }
  return rows;
}

void check_targets(const Batch& batch, const int64_t* targets, int64_t vocab_size) {
  for (int64_t i = 0; i < batch.num_outputs; ++i) {
    if (targets[i] < 0 || targets[i] >= vocab_size) {
      fail("targets must be in [0, " + text(vocab_size) + "), got " + text(targets[i]));
    }
  }
}

}  // namespace leangpt
