#include "heap.h"

#include <sys/mman.h>
#include <unistd.h>

#include <iterator>

namespace leangpt::train {
namespace {

constexpr size_t kPage = 4096;

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

Heap::Heap() {
#if defined(MAP_NORESERVE) && defined(MADV_HUGEPAGE)
  const size_t bytes = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;
  madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: it may be refused
  base_ = static_cast<uint8_t*>(memory);
  free_[0] = bytes;
#endif
}

void* Heap::take(size_t bytes) {
  bytes = whole_pages(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    if (range->second < bytes) continue;
    const auto [offset, size] = *range;
    free_.erase(range);
    if (size > bytes) free_[offset + bytes] = size - bytes;
    return base_ + offset;
  }
  return nullptr;
}

void Heap::give_back(void* memory, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t offset = static_cast<uint8_t*>(memory) - base_;
  auto range = free_.emplace(offset, whole_pages(bytes)).first;
  const auto next = std::next(range);
  if (next != free_.end() && range->first + range->second == next->first) {
    range->second += next->second;
    free_.erase(next);
  }
  if (range == free_.begin()) return;
  const auto previous = std::prev(range);
  if (previous->first + previous->second == range->first) {
    previous->second += range->second;
    free_.erase(range);
  }
}

}  // namespace leangpt::train
