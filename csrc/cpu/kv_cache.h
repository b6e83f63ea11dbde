// Keys and values of growing sequences, in pages of 16 tokens. Sequences that were forked share
// pages, which are counted; one that is shared is copied before it is written to.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "kernels.h"

namespace leangpt::cpu {

// No page is left for what was asked.
struct CacheFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Sequence {
  std::vector<int32_t> block_table;
  int64_t length = 0;
};

class KvCache {
 public:
  static constexpr int kBlockSize = kLanes;

  // Memory for `num_blocks` pages in each layer; the system hands it out as it is first written to.
  KvCache(int n_layer, int n_kv_head, int head_dim, KvKind kind, int32_t num_blocks);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int64_t add();
  int64_t fork(int64_t sequence);
  void truncate(int64_t sequence, int64_t length);
  void drop(int64_t sequence);
  // Throws std::invalid_argument for a sequence that is not there.
  Sequence& at(int64_t sequence);

  // The page that the next token is written to, where other sequences hold it too; else -1.
  int32_t shared_page(const Sequence& sequence) const;
  int32_t num_holders(int32_t page) const { return counts_[page]; }
  // Pages that growing sequence by `tokens` takes, the copy of a shared one included.
  int64_t blocks_needed(const Sequence& sequence, int64_t tokens) const;
  // Give the sequence pages of its own for that many more tokens. Throws CacheFull, and changes
  // nothing then.
  void reserve(Sequence& sequence, int64_t tokens);

  int32_t num_blocks() const { return num_blocks_; }
  int32_t free_blocks() const { return static_cast<int32_t>(free_.size()) + num_blocks_ - used_; }

  KvPages pages(int layer, int kv_head, const Sequence& sequence) const;
  uint8_t* page(int layer, int kv_head, int32_t block) const;
  int64_t value_offset() const { return value_offset_; }
  KvKind kind() const { return kind_; }

 private:
  int32_t take_block();
  void release_block(int32_t block);

  int n_layer_;
  KvKind kind_;
  int32_t num_blocks_;
  int64_t value_offset_, head_bytes_, block_bytes_, layer_bytes_;
  uint8_t* memory_;
  std::vector<int32_t> counts_;  // sequences that use a page
  std::vector<int32_t> free_;    // pages that were used before, the latest last
  int32_t used_ = 0;             // pages from here on were never used
  std::unordered_map<int64_t, Sequence> sequences_;
  int64_t next_sequence_ = 0;
};

}  // namespace leangpt::cpu
