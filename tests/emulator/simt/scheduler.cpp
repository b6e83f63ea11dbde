// The scheduler: blocks, warps and the groups of lanes that diverge, barriers, and what can go
// wrong with them.
#include <algorithm>

#include "shadow.h"

namespace simt {

namespace {

constexpr int64_t kLongestSlice = 1 << 20;
constexpr uint32_t kMostThreads = 1u << 29;

Mask guarded_lanes(Warp& warp, const Instruction& instruction) {
  if (!instruction.is_guarded) return kAllLanes;
  // bytes: in lanes that do not take part there may be any, and a bool that is neither 0 nor 1
  // would count for its neighbours
  const uint8_t* predicate = warp.reg<uint8_t>(instruction.guard);
  Mask lanes = 0;
  for (int i = 0; i < kWarpSize; ++i)
    lanes |= Mask{(predicate[i] != 0) != instruction.is_negated} << i;
  return lanes;
}

int first_lane(Mask lanes) { return __builtin_ctz(lanes); }

std::byte* aligned(std::vector<std::byte>& memory, size_t alignment) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (alignment - address % alignment) % alignment;
}

}  // namespace

uint32_t Warp::thread_id(int lane) const { return block->first_thread + index * kWarpSize + lane; }

std::string Dim3::text() const {
  return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

std::string Warp::name(int lane) const {
  const Launch& launch = *block->launch;
  return "thread " + launch.dim.at(index * kWarpSize + lane).text() + " of block " +
         launch.grid.at(block->index).text();
}

void fault(const Warp& warp, int lane, const std::string& message) {
  const Launch& launch = *warp.block->launch;
  const uint32_t pc = static_cast<uint32_t>(launch.current - launch.program.code.data());
  throw Fault(launch.program.name + launch.grid.text() + ": " + message + " [" + warp.name(lane) +
              ", " + launch.place(pc) + "]");
}

void Launch::run() {
  if (!grid.count()) return;
  if (!dim.count() || dim.count() > 1024 || dim.z > 64)
    throw Fault("launch of " + std::to_string(dim.count()) + " threads a block");
  if (grid.x > 0x7FFFFFFF || grid.y > 0xFFFF || grid.z > 0xFFFF)
    throw Fault("launch of too large a grid");
  if (grid.count() * dim.count() > kMostThreads)
    throw Fault("launch of more threads than the emulator can name");
  begin_launch();
  current = program.code.data();
  start_time = ++now;
  random.seed(static_cast<uint32_t>(options.seed * 2654435761u + 1));
  random.discard(8);

  const uint32_t num_blocks = static_cast<uint32_t>(grid.count());
  block_order.resize(num_blocks);
  for (uint32_t i = 0; i < num_blocks; ++i)
    block_order[i] = options.order == 1 ? num_blocks - 1 - i : i;
  if (options.order == 2) std::shuffle(block_order.begin(), block_order.end(), random);

  blocks.resize(std::min<uint32_t>(std::max(options.resident, 1), num_blocks));
  for (Block& block : blocks) start(block);
  while (!ready.empty()) {
    size_t next = options.order == 0 ? 0 : ready.size() - 1;
    if (options.order == 2) next = random() % ready.size();
    Warp& warp = *ready[next];
    ready.erase(ready.begin() + next);
    run_slice(warp);
    if (warp.block->num_exited == dim.count() && num_started < num_blocks) start(*warp.block);
  }
  for (const Block& block : blocks)
    if (block.num_exited != dim.count()) report_deadlock();
}

void Launch::report_deadlock() {
  for (Block& block : blocks)
    for (Warp& warp : block.warps)
      for (const Group& group : warp.groups) {
        current = &program.code[group.pc];
        fault(warp, first_lane(group.lanes), "it waits for ever at a barrier");
      }
  throw Fault(program.name + ": blocks wait for ever");
}

// The next block of the grid takes the place of `block`.
void Launch::start(Block& block) {
  const uint32_t num_threads = static_cast<uint32_t>(dim.count());
  block.launch = this;
  block.index = block_order[num_started++];
  block.first_thread = block.index * num_threads;
  block.synced = now;
  block.acquired.clear();
  block.num_exited = 0;
  std::fill_n(block.barriers, kNumBarriers, Barrier{});
  constexpr size_t kAlignment = 1024;
  block.shared_memory.assign(shared_bytes + kAlignment, std::byte{0xFF});
  block.shared = aligned(block.shared_memory, kAlignment);
  block.granules.assign((shared_bytes >> program.shared_granule) + 1, Block::kUninitialised);
  const uint32_t last = (1u << program.shared_granule) - 1;
  for (const auto& [begin, end] : program.shared_gaps)
    std::fill(block.granules.begin() + ((begin + last) >> program.shared_granule),
              block.granules.begin() + (end >> program.shared_granule), Block::kGap);
  block.cells.assign(block.granules.size(), Cell{});
  block.warps.resize((num_threads + kWarpSize - 1) / kWarpSize);
  for (size_t w = 0; w < block.warps.size(); ++w) start(block, static_cast<int>(w));
}

void Launch::start(Block& block, int index) {
  Warp& warp = block.warps[index];
  const uint32_t first = index * kWarpSize;
  const uint32_t size = std::min<uint32_t>(kWarpSize, static_cast<uint32_t>(dim.count()) - first);
  warp.block = &block;
  warp.index = index;
  warp.exists = size == kWarpSize ? kAllLanes : (1u << size) - 1;
  warp.groups.assign(1, Group{0, warp.exists, Group::kReady, 0});
  warp.synced = now;
  warp.seen.clear();
  warp.pair_synced.clear();
  warp.copies.clear();
  warp.local.assign(program.local_bytes * kWarpSize, std::byte{0xFF});
  for (int i = 0; i < kWarpSize; ++i) {
    warp.copy_group[i] = 0;
    warp.fence[i] = {};
    warp.observed[i].clear();
  }
  if (warp.register_file.empty()) {
    constexpr size_t kAlignment = 64;
    warp.register_file.assign(program.register_bytes + kAlignment, std::byte{0});
    warp.registers = aligned(warp.register_file, kAlignment);
    std::copy(program.constants.begin(), program.constants.end(), warp.registers);
  }
  // special registers, in the order of SPECIAL_REGISTERS of registers.py
  uint32_t* special = warp.reg<uint32_t>(0);
  const auto set = [&](const auto& value_of_lane) {
    for (int i = 0; i < kWarpSize; ++i) *special++ = value_of_lane(i);
  };
  set([&](int i) { return dim.at(first + i).x; });
  set([&](int i) { return dim.at(first + i).y; });
  set([&](int i) { return dim.at(first + i).z; });
  for (const Dim3& d : {dim, grid.at(block.index), grid})
    for (uint32_t value : {d.x, d.y, d.z}) set([&](int) { return value; });
  set([](int i) { return i; });
  set([&](int) { return index; });
  set([](int i) { return 1u << i; });
  set([](int i) { return (1u << i) - 1; });
  set([](int i) { return (2u << i) - 1; });
  set([](int i) { return ~((2u << i) - 1); });
  set([](int i) { return ~((1u << i) - 1); });
  set([&](int) { return static_cast<uint32_t>(block.warps.size()); });
  ready.push_back(&warp);
}

// Run the warp until all its threads wait or have exited, or until another warp's turn comes.
void Launch::run_slice(Warp& warp) {
  running = &warp;
  int64_t budget = options.preempt > 0 ? 1 + random() % (2 * options.preempt) : kLongestSlice;
  num_instructions += budget;
  if (num_instructions > options.max_instructions) fault(warp, 0, "the kernel does not end");
  while (!warp.groups.empty()) {
    // groups that stand at the same instruction go on together
    for (size_t i = 0; i < warp.groups.size(); ++i)
      for (size_t j = warp.groups.size() - 1; j > i; --j)
        if (warp.groups[i].pc == warp.groups[j].pc && warp.groups[i].state != Group::kAtBarrier &&
            warp.groups[j].state != Group::kAtBarrier) {
          warp.groups[i].lanes |= warp.groups[j].lanes;
          warp.groups[i].state = Group::kReady;
          warp.groups.erase(warp.groups.begin() + j);
        }
    // the one furthest behind goes first, so that they meet; now and then one it may wait for
    size_t next = warp.groups.size();
    const bool at_random = warp.groups.size() > 1 && random() % 8 == 0;
    uint32_t num_ready = 0;
    for (size_t i = 0; i < warp.groups.size(); ++i) {
      if (warp.groups[i].state != Group::kReady) continue;
      ++num_ready;
      if (next == warp.groups.size() ||
          (at_random ? random() % num_ready == 0 : warp.groups[i].pc < warp.groups[next].pc))
        next = i;
    }
    if (next == warp.groups.size()) {
      for (const Group& group : warp.groups)
        if (group.state == Group::kAtCollective) {
          current = &program.code[group.pc];
          std::string others;
          for (const Group& other : warp.groups)
            if (&other != &group)
              others +=
                  " " + warp.name(first_lane(other.lanes)) + " waits at " + place(other.pc) + ";";
          fault(warp, first_lane(group.lanes),
                "warp divergence: a warp operation waits for lanes that are elsewhere;" + others);
        }
      break;  // all at the barrier
    }
    run_group(warp, next, budget);
    const bool can_go_on = std::any_of(warp.groups.begin(), warp.groups.end(),
                                       [](const Group& g) { return g.state == Group::kReady; });
    if (budget <= 0 && can_go_on) {
      ready.insert(options.order == 1 ? ready.begin() : ready.end(), &warp);  // behind all others
      return;
    }
  }
  num_instructions -= std::max<int64_t>(budget, 0);
}

// Run a group until it waits, ends, splits, might meet another group, or the budget is spent.
void Launch::run_group(Warp& warp, size_t index, int64_t& budget) {
  const Instruction* const code = program.code.data();
  const bool is_alone = warp.groups.size() == 1;
  const Mask lanes = warp.groups[index].lanes;
  uint32_t& pc = warp.groups[index].pc;
  for (bool is_first = true;; is_first = false) {
    if (budget <= 0 || (!is_first && !is_alone && program.is_label[pc])) return;
    --budget;
    const Instruction& instruction = code[pc];
    current = &instruction;
    const Mask active = lanes & guarded_lanes(warp, instruction);
    if (instruction.control == Control::kNone) {
      if (active) instruction.run(warp, instruction, active);
      ++pc;
      continue;
    }
    if (!active) {
      ++pc;
      continue;
    }
    const bool is_split = active != lanes;
    if (is_split) {  // those whose guard is false go on by themselves
      warp.groups[index].lanes = active;
      warp.groups.push_back(
          {pc + 1, lanes & ~active, Group::kReady, 0});  // `pc` is no longer valid
    }
    switch (instruction.control) {
      case Control::kBranch:
        warp.groups[index].pc = static_cast<uint32_t>(instruction.immediate);
        break;
      case Control::kExit:
        return exit(warp, index);
      case Control::kBarrier:
      case Control::kArrive:
        arrive_barrier(warp, index);
        if (warp.groups[index].state != Group::kReady) return;
        break;
      case Control::kCollective:
        if (!arrive_collective(warp, index)) return;
        break;
      case Control::kNone:
        break;
    }
    if (is_split) return;
  }
}

// Run a warp operation for the lanes whose partners are all here; the others wait. True if none has
// to.
bool Launch::arrive_collective(Warp& warp, size_t index) {
  Group& group = warp.groups[index];
  const Instruction& instruction = program.code[group.pc];
  Mask existing = 0;
  for (const Group& other : warp.groups) existing |= other.lanes;
  Mask complete = 0;
  for (Mask rest = group.lanes; rest;) {
    const int lane = first_lane(rest);
    Mask members = kAllLanes, same = group.lanes;
    if (instruction.member_mask >= 0) {
      const uint32_t* masks = warp.reg<uint32_t>(instruction.operands[instruction.member_mask]);
      members = masks[lane];
      same = 0;
      for (Mask m = group.lanes; m; m &= m - 1)
        if (masks[first_lane(m)] == members) same |= 1u << first_lane(m);
    }
    if (same & ~members)
      fault(warp, first_lane(same & ~members),
            "warp operation: the calling lane is not in its own mask");
    if (members & ~warp.exists)
      fault(warp, lane, "warp operation: the mask names lanes that the warp does not have");
    if (members & ~existing)
      fault(warp, lane,
            "warp operation: it waits for " + warp.name(first_lane(members & ~existing)) +
                ", which has exited");
    if (members & group.lanes & ~same)
      fault(warp, lane, "warp operation: lanes of one mask come with different masks");
    if ((members & ~group.lanes) == 0) {
      instruction.run(warp, instruction, members);
      complete |= members;
    }
    rest &= ~same;
  }
  if (complete == group.lanes) {
    ++group.pc;
    return true;
  }
  const uint32_t next = group.pc + 1;
  group.lanes &= ~complete;
  group.state = Group::kAtCollective;
  if (complete) warp.groups.push_back({next, complete, Group::kReady, 0});
  return false;
}

// A group comes to a barrier. Operands: its number, how many threads it is for or 0; of a reduction
// a result in front and a predicate behind.
void Launch::arrive_barrier(Warp& warp, size_t group_index) {
  Group& group = warp.groups[group_index];
  Block& block = *warp.block;
  const Instruction& instruction = program.code[group.pc];
  const bool is_reduction = instruction.num_operands == 4;
  const int lane = first_lane(group.lanes);
  const uint32_t index = warp.reg<uint32_t>(instruction.operands[is_reduction])[lane];
  const uint32_t num_wanted = warp.reg<uint32_t>(instruction.operands[is_reduction + 1])[lane];
  if (index >= kNumBarriers) fault(warp, lane, "there is no barrier " + std::to_string(index));
  if (num_wanted % kWarpSize || num_wanted > (dim.count() + kWarpSize - 1) / kWarpSize * kWarpSize)
    fault(warp, lane, "a barrier cannot be for " + std::to_string(num_wanted) + " threads");
  Barrier& barrier = block.barriers[index];
  if (!num_wanted && block.num_exited)
    fault(warp, lane,
          "barrier divergence: a thread waits at a barrier, others of its block have exited");
  if (barrier.num_arrived && !num_wanted && barrier.pc != group.pc)
    fault(warp, lane,
          "barrier divergence: other threads of the block wait at another barrier, " +
              place(barrier.pc));
  if (barrier.num_arrived && barrier.num_wanted != num_wanted)
    fault(warp, lane,
          "barrier " + std::to_string(index) + ": others say it is for " +
              std::to_string(barrier.num_wanted) + " threads, " + place(barrier.pc));
  if (num_wanted && group.lanes != warp.exists)
    fault(warp, lane, "warp divergence: a barrier of a part of the block is for whole warps");
  barrier.pc = group.pc;
  barrier.num_wanted = num_wanted;
  if (is_reduction)
    for (Mask lanes = group.lanes; lanes; lanes &= lanes - 1)
      barrier.num_true += warp.reg<bool>(instruction.operands[3])[first_lane(lanes)];
  if (num_wanted) barrier.arrived.emplace_back(warp.index, now++);
  barrier.num_arrived += num_wanted ? kWarpSize : __builtin_popcount(group.lanes);
  if (instruction.control == Control::kArrive) {
    ++group.pc;
  } else {
    group.state = Group::kAtBarrier;
    group.barrier = static_cast<uint8_t>(index);
  }
  if (barrier.num_arrived < (num_wanted ? num_wanted : dim.count())) return;
  if (barrier.num_arrived > num_wanted && num_wanted)
    fault(warp, lane, "more threads than it is for come to barrier " + std::to_string(index));
  open(block, barrier, static_cast<uint8_t>(index));
}

// All have come to a barrier: those who wait there go on.
void Launch::open(Block& block, Barrier& barrier, uint8_t index) {
  ++now;
  if (!barrier.num_wanted) block.synced = now;
  std::vector<uint32_t> seen(barrier.num_wanted ? block.warps.size() : 0);
  for (const auto& [arrived, time] : barrier.arrived) {
    const std::vector<uint32_t>& before = block.warps[arrived].seen;
    for (size_t i = 0; i < before.size(); ++i) seen[i] = std::max(seen[i], before[i]);
    seen[arrived] = std::max(seen[arrived], time + 1);
  }
  for (Warp& warp : block.warps) {
    bool is_woken = false, was_ready = false;
    for (Group& group : warp.groups) {
      was_ready |= group.state == Group::kReady;
      if (group.state != Group::kAtBarrier || group.barrier != index) continue;
      const Instruction& instruction = program.code[group.pc];
      if (instruction.run) instruction.run(warp, instruction, group.lanes);
      group.state = Group::kReady;
      ++group.pc;
      is_woken = true;
    }
    if (!is_woken) continue;
    if (barrier.num_wanted) {
      warp.seen.resize(block.warps.size());
      for (size_t i = 0; i < seen.size(); ++i) warp.seen[i] = std::max(warp.seen[i], seen[i]);
    }
    if (&warp != running && !was_ready) ready.push_back(&warp);
  }
  barrier = {};
}

void Launch::exit(Warp& warp, size_t index) {
  Block& block = *warp.block;
  const Mask lanes = warp.groups[index].lanes;
  for (const Barrier& barrier : block.barriers)
    if (barrier.num_arrived && !barrier.num_wanted)
      fault(warp, first_lane(lanes),
            "barrier divergence: a thread exits, others of its block wait at a barrier, " +
                place(barrier.pc));
  block.num_exited += __builtin_popcount(lanes);
  warp.groups.erase(warp.groups.begin() + index);
}

}  // namespace simt
