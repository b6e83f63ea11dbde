// Shadow memory: who accessed a granule of memory last, and whether that happened before what a
// thread does now.
//
// Time is a counter that grows at each synchronisation. An access at time t happened before another
// one if both threads passed, after t, the same barrier; or if the first thread released and the
// second one acquired, through an atomic, a time after t. The last write is kept exactly; of the
// reads since then their thread, or that they were of one warp, one block, or several blocks.
#pragma once
#include "machine.h"

namespace simt {

enum class Access : uint8_t { kRead, kWrite, kAtomic };

struct Actor {
  Warp& warp;
  int lane;  // kWholeWarp: an access of all lanes together, such as ldmatrix
  uint32_t id;
  static constexpr int kWholeWarp = -1;
  Actor(Warp& w, int l) : warp(w), lane(l), id(w.thread_id(l < 0 ? 0 : l)) {}
};

// The cells of global memory from `address` to the end of its page of kPageBytes.
constexpr uintptr_t kPageBytes = 4096;
Cell* global_cells(const Launch& launch, uintptr_t address);

// A check of `count` cells, and the record of the access. `stored` are the bytes about to be
// written over `memory`, if known: a write of what is there already, as compilers do from many
// threads, does not race with other writes.
void check_cells(const Actor& actor, Access access, Cell* cells, size_t count, int granule,
                 const std::byte* memory, const std::byte* stored);

// The synchronisation of an atomic at an address, and of a fence.
void release(Warp& warp, int lane, uintptr_t address);
void acquire(Warp& warp, uintptr_t address);
void fence(Warp& warp, int lane);

// Forget everything before a launch if the clock or the memory for it runs full.
void begin_launch();

}  // namespace simt
