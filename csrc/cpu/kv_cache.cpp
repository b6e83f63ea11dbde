#include "kv_cache.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

namespace leangpt::cpu {

KvCache::KvCache(int n_layer, int n_kv_head, int head_dim, KvKind kind, int32_t num_blocks)
    : n_layer_(n_layer), kind_(kind), num_blocks_(num_blocks) {
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

int64_t KvCache::add() {
  sequences_[next_sequence_] = Sequence();
  return next_sequence_++;
}

int64_t KvCache::fork(int64_t sequence) {
  Sequence copy = at(sequence);
  for (int32_t block : copy.block_table) ++counts_[block];
  sequences_[next_sequence_] = std::move(copy);
  return next_sequence_++;
}

void KvCache::truncate(int64_t sequence, int64_t length) {
  Sequence& s = at(sequence);
  if (length < 0 || length > s.length) {
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " holds " +
                                std::to_string(s.length) + " tokens: cannot keep the first " +
                                std::to_string(length));
  }
  const size_t blocks = round_up(length, kBlockSize) / kBlockSize;
  while (s.block_table.size() > blocks) {
    release_block(s.block_table.back());
    s.block_table.pop_back();
  }
  s.length = length;
}

void KvCache::drop(int64_t sequence) {
  for (int32_t block : at(sequence).block_table) release_block(block);
  sequences_.erase(sequence);
}

Sequence& KvCache::at(int64_t sequence) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    throw std::invalid_argument("there is no sequence " + std::to_string(sequence) +
                                ": it was dropped, or never added");
  }
  return found->second;
}

int64_t KvCache::blocks_needed(const Sequence& s, int64_t tokens) const {
  const int64_t blocks = round_up(s.length + tokens, kBlockSize) / kBlockSize;
  return blocks - static_cast<int64_t>(s.block_table.size()) + (shared_page(s) >= 0);
}

int32_t KvCache::shared_page(const Sequence& s) const {
  const bool is_shared = s.length % kBlockSize != 0 && counts_[s.block_table.back()] > 1;
  return is_shared ? s.block_table.back() : -1;
}

void KvCache::reserve(Sequence& s, int64_t tokens) {
  const int64_t needed = blocks_needed(s, tokens);
  if (needed > free_blocks()) {
    throw CacheFull("the key/value cache is full: " + std::to_string(needed) + " more pages of " +
                    std::to_string(kBlockSize) + " tokens are needed, " +
                    std::to_string(free_blocks()) + " of " + std::to_string(num_blocks_) +
                    " are free. Drop sequences, or make the cache larger (num_blocks)");
  }
  const int32_t old = shared_page(s);
  if (old >= 0) {
    const int32_t fresh = take_block();
    for (int layer = 0; layer < n_layer_; ++layer) {
      std::memcpy(page(layer, 0, fresh), page(layer, 0, old), block_bytes_);
    }
    release_block(old);
    s.block_table.back() = fresh;
  }
  const size_t blocks = round_up(s.length + tokens, kBlockSize) / kBlockSize;
  while (s.block_table.size() < blocks) s.block_table.push_back(take_block());
}

KvPages KvCache::pages(int layer, int kv_head, const Sequence& sequence) const {
  return {page(layer, kv_head, 0), sequence.block_table.data(), block_bytes_, value_offset_, kind_};
}

uint8_t* KvCache::page(int layer, int kv_head, int32_t block) const {
  return memory_ + layer * layer_bytes_ + block * block_bytes_ + kv_head * head_bytes_;
}

int32_t KvCache::take_block() {
  int32_t block;
  if (free_.empty()) {
    block = used_++;
    counts_.resize(used_);
  } else {
    block = free_.back();
    free_.pop_back();
  }
  counts_[block] = 1;
  return block;
}

void KvCache::release_block(int32_t block) {
  if (--counts_[block] == 0) free_.push_back(block);
}

}  // namespace leangpt::cpu
