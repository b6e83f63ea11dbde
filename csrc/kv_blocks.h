// Which pages of a key/value cache hold which tokens of growing sequences: 16 tokens a page.
// Sequences that were forked share pages, which are counted; one that is shared is copied before it
// is written to. The pages' memory is the engine's own.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "matrix.h"

namespace leangpt {

// No page is left for what was asked.
struct CacheFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Sequence {
  std::vector<int32_t> block_table;
  int64_t length = 0;    // of what it holds in the cache
  int64_t prefix = 0;    // places at its start that are not tokens, and have no positions
  int32_t adapter = -1;  // its number in the decoder; -1: none
};

// What a page holds is to be copied to another, in every layer.
struct BlockCopy {
  int32_t from, to;
};

class KvBlocks {
 public:
  static constexpr int kBlockSize = kLanes;

  explicit KvBlocks(int32_t num_blocks) : num_blocks_(num_blocks) {}

  int64_t add();
  int64_t fork(int64_t sequence);
  // Keep the prefix and the first `length` tokens.
  void truncate(int64_t sequence, int64_t length);
  void drop(int64_t sequence);
  // Throws std::invalid_argument for a sequence that is not there.
  Sequence& at(int64_t sequence);

  // Give each sequence pages of its own for that many more tokens, and append the copies that this
  // takes. Throws CacheFull, and changes nothing then.
  void reserve(const std::unordered_map<int64_t, int64_t>& new_tokens,
               std::vector<BlockCopy>* copies);

  int32_t num_blocks() const { return num_blocks_; }
  int32_t free_blocks() const { return static_cast<int32_t>(free_.size()) + num_blocks_ - used_; }

 private:
  // The page that the next token is written to, where other sequences hold it too; else -1.
  int32_t shared_page(const Sequence& sequence) const;
  int32_t take_block();
  void release_block(int32_t block);

  int32_t num_blocks_;
  std::vector<int32_t> counts_;  // sequences that use a page
  std::vector<int32_t> free_;    // pages that were used before, the latest last
  int32_t used_ = 0;             // pages from here on were never used
  std::unordered_map<int64_t, Sequence> sequences_;
  int64_t next_sequence_ = 0;
};

}  // namespace leangpt
