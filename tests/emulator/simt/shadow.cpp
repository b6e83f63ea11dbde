#include "shadow.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

namespace simt {

uint32_t now = 1;

namespace {

// bits of Cell::writer and Cell::reader above the thread's id
constexpr uint32_t kAtomicFlag = 1u << 31;
constexpr uint32_t kWarpFlag = 1u << 29, kBlockFlag = 2u << 29, kGridFlag = 3u << 29;
constexpr uint32_t kScope = 3u << 29, kThread = (1u << 29) - 1;

// An access was by one thread, or by several of one warp, block or grid: then `who` holds the flag
// and the first thread.
bool is_in(const Block& block, uint32_t who) {
  const size_t num_threads = block.launch->dim.count();
  return (who & kThread) - block.first_thread < num_threads;
}

// Is the time before what `block` acquired from the other thread, its warp or its block?
bool is_acquired(const Block& block, uint32_t who, uint32_t time) {
  if (block.acquired.empty()) return false;
  const Launch& launch = *block.launch;
  const uint32_t num_threads = static_cast<uint32_t>(launch.dim.count());
  const uint32_t thread = who & kThread, first = thread - thread % num_threads;
  const uint32_t in_block = thread - first, warp = first + in_block / kWarpSize * kWarpSize;
  const auto covers = [&](uint32_t key) {
    const auto found = block.acquired.find(key);
    return found != block.acquired.end() && time < found->second;
  };
  const uint32_t scope = who & kScope;
  if (scope == kGridFlag) {  // all the other blocks count
    for (uint32_t i = 0; i < launch.grid.count(); ++i)
      if (i != block.index && !covers(kBlockFlag | i * num_threads)) return false;
    return true;
  }
  return covers(kBlockFlag | first) || (scope != kBlockFlag && covers(kWarpFlag | warp)) ||
         (scope == 0 && covers(thread));
}

// Did an access of `who` at `time`, in this launch, happen before what the actor does now?
bool happened_before(const Actor& actor, uint32_t who, uint32_t time) {
  Warp& warp = actor.warp;
  const Block& block = *warp.block;
  const uint32_t scope = who & kScope, thread = who & kThread;
  if (scope == kGridFlag) return time < block.synced && is_acquired(block, who, time);
  if (!is_in(block, who)) return is_acquired(block, who, time);
  if (time < block.synced) return true;
  if (!warp.seen.empty()) {
    const uint32_t seen = scope == kBlockFlag
                              ? *std::min_element(warp.seen.begin(), warp.seen.end())
                              : warp.seen[(thread - block.first_thread) / kWarpSize];
    if (time < seen) return true;
  }
  if (scope == kBlockFlag) return false;
  const int other = static_cast<int>(thread - block.first_thread) - warp.index * kWarpSize;
  if (other < 0 || other >= kWarpSize) return false;
  if (time < warp.synced) return true;
  if (actor.lane == Actor::kWholeWarp) return false;
  if (scope == 0 && other == actor.lane) return true;
  if (warp.pair_synced.empty()) return false;
  const uint32_t* pairs = &warp.pair_synced[actor.lane * kWarpSize];
  return time < (scope == 0 ? pairs[other] : *std::max_element(pairs, pairs + kWarpSize));
}

std::string describe(const Launch& launch, uint32_t who) {
  const uint32_t num_threads = static_cast<uint32_t>(launch.dim.count()), thread = who & kThread;
  const std::string block = "block " + launch.grid.at(thread / num_threads).text();
  switch (who & kScope) {
    case 0:
      return "thread " + launch.dim.at(thread % num_threads).text() + " of " + block;
    case kWarpFlag:
      return "several threads of warp " + std::to_string(thread % num_threads / kWarpSize) +
             " of " + block;
    case kBlockFlag:
      return "several warps of " + block;
    default:
      return "several blocks";
  }
}

[[noreturn]] void race(const Actor& actor, Access access, const char* earlier, uint32_t who,
                       size_t byte, const std::byte* memory) {
  static const char* const names[] = {"read", "write", "atomic"};
  const Launch& launch = *actor.warp.block->launch;
  const Block& block = *actor.warp.block;
  std::string where;
  const std::byte* address = memory + byte;
  if (address >= block.shared && address < block.shared + launch.shared_bytes) {
    where = "shared memory at byte " + std::to_string(address - block.shared);
  } else {
    for (const Buffer& b : launch.buffers)
      if (b.memory && address >= b.memory && address < b.memory + (b.end - b.begin))
        where = std::string("'") + b.name + "' at byte " + std::to_string(address - b.memory);
  }
  fault(actor.warp, std::max(actor.lane, 0),
        "data race on " + where + ": " + names[static_cast<int>(access)] + " after a" + earlier +
            " of " + describe(launch, who) + ", without synchronisation between them");
}

// The reads that a cell remembers after one more of them.
void add_reader(Cell& cell, const Actor& actor, uint32_t start_time) {
  const uint32_t me = actor.lane == Actor::kWholeWarp ? kWarpFlag | actor.id : actor.id;
  if (cell.read_time < start_time || cell.reader == me ||
      happened_before(actor, cell.reader, cell.read_time)) {
    cell.reader = me;
  } else if ((cell.reader & kScope) != kGridFlag) {
    const Block& block = *actor.warp.block;
    const uint32_t first_of_warp = block.first_thread + actor.warp.index * kWarpSize;
    if (!is_in(block, cell.reader))
      cell.reader = kGridFlag;
    else if ((cell.reader & kScope) != kBlockFlag &&
             (cell.reader & kThread) - first_of_warp < kWarpSize)
      cell.reader = kWarpFlag | first_of_warp;
    else
      cell.reader = kBlockFlag | block.first_thread;
  }
  cell.read_time = now;
}

// The cells of kPageBytes of memory. A launch uses, and touches, as many as there are granules in
// it.
struct Page {
  Cell cells[kPageBytes];
};
struct Free {
  void operator()(Page* page) const { std::free(page); }
};
std::unordered_map<uintptr_t, std::unique_ptr<Page, Free>> pages;
struct Recent {
  uintptr_t number = ~uintptr_t{0};
  Page* page = nullptr;
};
std::array<Recent, 256> recent;

}  // namespace

Cell* global_cells(const Launch& launch, uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  Recent& entry = recent[number % recent.size()];
  if (entry.number != number) {
    auto& page = pages[number];
    if (!page) page.reset(static_cast<Page*>(std::calloc(1, sizeof(Page))));
    entry = {number, page.get()};
  }
  return entry.page->cells + (address % kPageBytes >> launch.program.global_granule);
}

void begin_launch() {
  constexpr uint32_t kLatest = 3u << 30;
  constexpr size_t kMostPages = 1 << 13;
  if (now > kLatest || pages.size() > kMostPages) {
    pages.clear();
    recent.fill({});
    now = 1;
  }
}

void check_cells(const Actor& actor, Access access, Cell* cells, size_t count, int granule,
                 const std::byte* memory, const std::byte* stored) {
  const Warp& warp = actor.warp;
  const Block& block = *warp.block;
  const Launch& launch = *block.launch;
  const uint32_t start = launch.start_time, first = block.first_thread, block_synced = block.synced;
  const uint32_t num_threads = static_cast<uint32_t>(launch.dim.count());
  const size_t width = size_t{1} << granule;

  const auto is_ordered = [&](uint32_t who, uint32_t time) {
    return time < start ||
           (time < block_synced && (who & kThread) - first < num_threads &&
            (who & kScope) != kGridFlag) ||
           happened_before(actor, who, time);
  };
  for (size_t i = 0; i < count; ++i) {
    Cell& cell = cells[i];
    const uint32_t writer = cell.writer & kThread;
    const bool was_atomic = cell.writer & kAtomicFlag;
    if (!(access == Access::kAtomic && was_atomic) && !is_ordered(writer, cell.write_time)) {
      const bool same_warp =
          is_in(block, writer) && (writer - first) / kWarpSize == static_cast<uint32_t>(warp.index);
      const bool is_harmless =
          access == Access::kWrite && !was_atomic &&
          ((launch.options.race == 2 && same_warp) ||
           (stored && std::memcmp(memory + i * width, stored + i * width, width) == 0));
      if (!is_harmless)
        race(actor, access, was_atomic ? "n atomic" : " write", writer, i * width, memory);
    }
    if (access == Access::kRead) {
      if (cell.read_time < start) {
        cell.reader = actor.lane == Actor::kWholeWarp ? kWarpFlag | actor.id : actor.id;
        cell.read_time = now;
      } else {
        add_reader(cell, actor, start);
      }
    } else {
      if (!is_ordered(cell.reader, cell.read_time))
        race(actor, access, " read", cell.reader, i * width, memory);
      cell.writer = actor.id | (access == Access::kAtomic ? kAtomicFlag : 0);
      cell.write_time = now;
      cell.read_time = 0;
    }
  }
}

void release(Warp& warp, int lane, uintptr_t address) {
  Block& block = *warp.block;
  const auto& fence = warp.fence[lane];
  Clock& clock = block.launch->released[address];
  const auto raise = [&](uint32_t key, uint32_t time) { clock[key] = std::max(clock[key], time); };
  const uint32_t thread = warp.thread_id(lane);
  raise(thread, fence.time);
  raise(kWarpFlag | (block.first_thread + warp.index * kWarpSize), fence.warp_synced);
  raise(kBlockFlag | block.first_thread, fence.block_synced);
  for (const auto& [key, time] : block.acquired) raise(key, time);
}

void acquire(Warp& warp, uintptr_t address) {
  Block& block = *warp.block;
  const auto found = block.launch->released.find(address);
  if (found == block.launch->released.end()) return;
  for (const auto& [key, time] : found->second) {
    uint32_t& known = block.acquired[key];
    known = std::max(known, time);
  }
}

void fence(Warp& warp, int lane) {
  for (uintptr_t address : warp.observed[lane]) acquire(warp, address);
  warp.observed[lane].clear();
  warp.fence[lane] = {++now, warp.synced, warp.block->synced};
}

}  // namespace simt
