// Memory of large tensors, kept for the next ones when it is given back: a step of training takes
// again what the step before had, and the system needs longer to clear new pages for a gradient
// than a product takes to fill them. Addresses are reserved once, as many as the machine has bytes
// of memory; pages come as they are first written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace leangpt::train {

class Heap {
 public:
  Heap();
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  // The lowest addresses that are free, or null where there are not as many on end.
  void* take(size_t bytes);
  void give_back(void* memory, size_t bytes);

 private:
  std::mutex mutex_;
  uint8_t* base_ = nullptr;
  std::map<size_t, size_t> free_;  // offset and bytes of each range; no two are adjacent
};

}  // namespace leangpt::train
