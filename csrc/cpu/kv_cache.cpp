#include "kv_cache.h"

#include <sys/mman.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace leangpt::cpu {

KvCache::KvCache(int n_layer, int n_kv_head, int head_dim, KvKind kind, int32_t num_blocks)
    : n_layer_(n_layer), kind_(kind) {
  constexpr int64_t kBytes[] = {4, 2, 1}, kTogether[] = {1, 2, 4};  // elements of a key
  const int64_t bytes = kBytes[static_cast<int>(kind)];
  const int64_t scales = kind == KvKind::kInt8 ? kLanes * sizeof(float) : 0;
  value_offset_ = round_up(head_dim, kTogether[static_cast<int>(kind)]) * kLanes * bytes + scales;
  head_bytes_ = value_offset_ + round_up(head_dim, kLanes) * kLanes * bytes + scales;
  block_bytes_ = head_bytes_ * n_kv_head;
  layer_bytes_ = block_bytes_ * num_blocks;
  void* memory = mmap(nullptr, layer_bytes_ * n_layer, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::runtime_error("the key/value cache of " + std::to_string(num_blocks) +
                             " pages needs " + std::to_string((layer_bytes_ * n_layer) >> 20) +
                             " MiB of address space, which the system refuses: lower num_blocks");
  }
  memory_ = static_cast<uint8_t*>(memory);
}

KvCache::~KvCache() { munmap(memory_, layer_bytes_ * n_layer_); }

void KvCache::copy(const std::vector<BlockCopy>& copies) {
  for (const auto& [from, to] : copies) {
    for (int layer = 0; layer < n_layer_; ++layer) {
      std::memcpy(page(layer, 0, to), page(layer, 0, from), block_bytes_);
    }
  }
}

KvPages KvCache::pages(int layer, int kv_head, const Sequence& sequence) const {
  return {page(layer, kv_head, 0), sequence.block_table.data(), block_bytes_, value_offset_, kind_};
}

uint8_t* KvCache::page(int layer, int kv_head, int32_t block) const {
  return memory_ + layer * layer_bytes_ + block * block_bytes_ + kv_head * head_bytes_;
}

}  // namespace leangpt::cpu
