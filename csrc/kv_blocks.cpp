#include "kv_blocks.h"

#include <string>

namespace leangpt {

int64_t KvBlocks::add() {
  sequences_[next_sequence_] = Sequence();
  return next_sequence_++;
}

int64_t KvBlocks::fork(int64_t sequence) {
  Sequence copy = at(sequence);
  for (int32_t block : copy.block_table) ++counts_[block];
  sequences_[next_sequence_] = std::move(copy);
  return next_sequence_++;
}

void KvBlocks::truncate(int64_t sequence, int64_t length) {
  Sequence& s = at(sequence);
  if (length < 0 || length > s.length - s.prefix) {
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " holds " +
                                std::to_string(s.length - s.prefix) +
                                " tokens: cannot keep the first " + std::to_string(length));
  }
  s.length = s.prefix + length;
  const size_t blocks = round_up(s.length, kBlockSize) / kBlockSize;
  while (s.block_table.size() > blocks) {
    release_block(s.block_table.back());
    s.block_table.pop_back();
  }
}

void KvBlocks::drop(int64_t sequence) {
  for (int32_t block : at(sequence).block_table) release_block(block);
  sequences_.erase(sequence);
}

Sequence& KvBlocks::at(int64_t sequence) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) {
    throw std::invalid_argument("there is no sequence " + std::to_string(sequence) +
                                ": it was dropped, or never added");
  }
  return found->second;
}

int32_t KvBlocks::shared_page(const Sequence& s) const {
  const bool is_shared = s.length % kBlockSize != 0 && counts_[s.block_table.back()] > 1;
  return is_shared ? s.block_table.back() : -1;
}

void KvBlocks::reserve(const std::unordered_map<int64_t, int64_t>& new_tokens,
                       std::vector<BlockCopy>* copies) {
  int64_t needed = 0;
  std::unordered_map<int32_t, int32_t> leaving;  // sequences that part from a shared page
  for (const auto& [sequence, tokens] : new_tokens) {
    const Sequence& s = at(sequence);
    needed += round_up(s.length + tokens, kBlockSize) / kBlockSize -
              static_cast<int64_t>(s.block_table.size());
    const int32_t page = shared_page(s);
    if (page >= 0 && ++leaving[page] < counts_[page]) ++needed;  // the last of them may keep it
  }
  if (needed > free_blocks()) {
    throw CacheFull("the key/value cache is full: this step needs " + std::to_string(needed) +
                    " more pages of " + std::to_string(kBlockSize) + " tokens, " +
                    std::to_string(free_blocks()) + " of " + std::to_string(num_blocks_) +
                    " are free. Drop sequences, or make the cache larger (num_blocks)");
  }
  for (const auto& [sequence, tokens] : new_tokens) {
    Sequence& s = at(sequence);
    const int32_t old = shared_page(s);
    if (old >= 0) {
      const int32_t fresh = take_block();
      copies->push_back({old, fresh});
      release_block(old);
      s.block_table.back() = fresh;
    }
    const size_t blocks = round_up(s.length + tokens, kBlockSize) / kBlockSize;
    while (s.block_table.size() < blocks) s.block_table.push_back(take_block());
  }
}

int32_t KvBlocks::take_block() {
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

void KvBlocks::release_block(int32_t block) {
  if (--counts_[block] == 0) free_.push_back(block);
}

}  // namespace leangpt
