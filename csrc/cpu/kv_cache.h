// The memory of keys and values, in the pages that KvBlocks gives to sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "../kv_blocks.h"
#include "kernels.h"

namespace leangpt::cpu {

class KvCache {
 public:
  // Memory for `num_blocks` pages in each layer; the system hands it out as it is first written to.
  KvCache(int n_layer, int n_kv_head, int head_dim, KvKind kind, int32_t num_blocks);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  void copy(const std::vector<BlockCopy>& copies);
  KvPages pages(int layer, int kv_head, const Sequence& sequence) const;
  uint8_t* page(int layer, int kv_head, int32_t block) const;
  int64_t value_offset() const { return value_offset_; }
  KvKind kind() const { return kind_; }

 private:
  int n_layer_;
  KvKind kind_;
  int64_t value_offset_, head_bytes_, block_bytes_, layer_bytes_;
  uint8_t* memory_;
};

}  // namespace leangpt::cpu
