// Scratch memory that grows and is kept, aligned to a cache line and zero where it was never
// written. Large ones lie in huge pages where the system has them: a tile of a product touches a
// line in each of many rows, and looking up their addresses takes longer than writing them.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace leangpt::cpu {

template <class T>
class Buffer {
 public:
  // Room for `count` elements; what was there is lost where it has to grow.
  T* get(int64_t count) {
    if (count > capacity_) {
      data_.reset();
      capacity_ = 0;
      const bool is_large = count * sizeof(T) >= kHugePage;
      const size_t alignment = is_large ? kHugePage : 64;
      const size_t bytes = (count * sizeof(T) + 64 + alignment - 1) / alignment * alignment;
      void* memory = std::aligned_alloc(alignment, bytes);
      if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      if (is_large) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: it may be refused
#endif
      std::memset(memory, 0, bytes);
      data_.reset(static_cast<T*>(memory));
      capacity_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

}  // namespace leangpt::cpu
