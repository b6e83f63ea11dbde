// Instructions that access memory, every access checked: bounds, alignment, initialisation, races.
#include "memory.h"

#include <algorithm>
#include <cmath>

#include "define.h"
#include "half.h"
#include "shadow.h"

namespace simt {

namespace {

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic";
}

[[noreturn]] void wild(const Actor& actor, Access access, uintptr_t address) {
  const Launch& launch = *actor.warp.block->launch;
  std::string where = "no memory of the kernel is near this address";
  uintptr_t nearest = 1 << 16;
  for (const Buffer& b : launch.buffers) {
    const bool is_behind = address >= b.end;
    const uintptr_t distance = is_behind ? address - b.end : b.begin - address;
    if (distance >= nearest) continue;
    nearest = distance;
    where = std::to_string(distance) +
            (is_behind ? " bytes behind the end of '" : " bytes before the start of '") + b.name +
            "'";
  }
  fault(actor.warp, std::max(actor.lane, 0),
        std::string("global ") + verb(access) + " out of bounds: " + where);
}

// The buffer that holds all of an access. Buffers may overlap.
const Buffer& buffer_of(const Actor& actor, Access access, uintptr_t address, size_t num_bytes) {
  const std::vector<Buffer>& buffers = actor.warp.block->launch->buffers;
  static size_t recent = 0;
  const auto holds = [&](const Buffer& b) {
    return address >= b.begin && address + num_bytes <= b.end;
  };
  if (recent < buffers.size() && holds(buffers[recent])) return buffers[recent];
  auto found = std::upper_bound(buffers.begin(), buffers.end(), address,
                                [](uintptr_t a, const Buffer& b) { return a < b.begin; });
  while (found != buffers.begin())
    if (holds(*--found)) {
      recent = found - buffers.begin();
      return *found;
    }
  for (const Buffer& b : buffers)
    if (address >= b.begin && address < b.end)
      fault(actor.warp, std::max(actor.lane, 0),
            std::string("global ") + verb(access) + " of " + std::to_string(num_bytes) +
                " bytes over the end of '" + b.name + "'");
  wild(actor, access, address);
}

std::byte* global_memory(const Actor& actor, Access access, uintptr_t address, size_t num_bytes,
                         size_t alignment, const std::byte* stored) {
  Launch& launch = *actor.warp.block->launch;
  const Buffer& buffer = buffer_of(actor, access, address, num_bytes);
  const uintptr_t offset = address - buffer.begin;
  const auto refuse = [&](const std::string& what, uintptr_t byte) {
    fault(actor.warp, std::max(actor.lane, 0),
          what + verb(access) + " of " + std::to_string(num_bytes) + " bytes in '" + buffer.name +
              "' at byte " + std::to_string(byte));
  };
  if (!buffer.memory) refuse("use after free: global ", offset);
  if (address % alignment) refuse("misaligned global ", offset);
  if (buffer.initialised) {
    uint8_t* states = buffer.initialised + offset;
    if (access == Access::kWrite || stored) {
      std::memset(states, 1, num_bytes);
    } else {
      const void* fresh = std::memchr(states, 0, num_bytes);
      if (fresh)
        refuse("global memory that nobody wrote: ",
               static_cast<const uint8_t*>(fresh) - buffer.initialised);
    }
  }
  std::byte* memory = buffer.memory + offset;
  if (launch.options.race) {
    const int granule = launch.program.global_granule;
    check_cells(actor, access, global_cells(launch, address), num_bytes >> granule, granule, memory,
                stored);
  }
  return memory;
}

}  // namespace

std::byte* shared_memory(const Actor& actor, Access access, uint64_t offset, size_t num_bytes,
                         size_t alignment, const std::byte* stored) {
  Block& block = *actor.warp.block;
  const Launch& launch = *block.launch;
  const int granule = launch.program.shared_granule, lane = std::max(actor.lane, 0);
  if (offset + num_bytes > launch.shared_bytes || offset > launch.shared_bytes)
    fault(actor.warp, lane,
          std::string("shared ") + verb(access) + " out of bounds: byte " + std::to_string(offset) +
              " of " + std::to_string(launch.shared_bytes));
  if (offset % alignment)
    fault(actor.warp, lane,
          std::string("misaligned shared ") + verb(access) + " of " + std::to_string(num_bytes) +
              " bytes at byte " + std::to_string(offset));
  const size_t first = offset >> granule, count = num_bytes >> granule;
  uint8_t* states = &block.granules[first];
  if (!launch.program.shared_gaps.empty() && std::memchr(states, Block::kGap, count))
    fault(actor.warp, lane,
          std::string("shared ") + verb(access) + " out of bounds: between two variables, byte " +
              std::to_string(offset));
  if (access == Access::kWrite || stored) {
    std::fill_n(states, count, Block::kInitialised);
  } else {
    for (size_t i = 0; i < count; ++i)
      if (states[i] != Block::kInitialised)
        fault(actor.warp, lane,
              (states[i] == Block::kInFlight ? "read of the destination of a cp.async before its "
                                               "wait_group, shared memory at byte "
                                             : "read of uninitialised shared memory at byte ") +
                  std::to_string(offset + (i << granule)));
  }
  std::byte* memory = block.shared + offset;
  if (launch.options.race)
    check_cells(actor, access, &block.cells[first], count, granule, memory, stored);
  return memory;
}

namespace {

std::byte* local_memory(const Actor& actor, Access access, uint64_t offset, size_t num_bytes) {
  const size_t size = actor.warp.block->launch->program.local_bytes;
  if (offset + num_bytes > size || offset > size)
    fault(actor.warp, actor.lane, std::string("local ") + verb(access) + " out of bounds");
  return actor.warp.local.data() + actor.lane * size + offset;
}

std::byte* param_memory(const Actor& actor, Access access, uint64_t offset, size_t num_bytes) {
  const Launch& launch = *actor.warp.block->launch;
  if (access != Access::kRead)
    fault(actor.warp, actor.lane, "write to the parameters of the kernel");
  if (offset + num_bytes > launch.num_params || offset > launch.num_params)
    fault(actor.warp, actor.lane, "read behind the parameters of the kernel");
  return const_cast<std::byte*>(launch.params) + offset;
}

// The checked memory of one lane's access.
std::byte* memory_of(const Actor& actor, Space space, Access access, uint64_t address,
                     size_t num_bytes, size_t alignment, const std::byte* stored = nullptr) {
  if (space == Space::kGeneric) {
    const Block& block = *actor.warp.block;
    const uint64_t shared = reinterpret_cast<uintptr_t>(block.shared),
                   local = reinterpret_cast<uintptr_t>(actor.warp.local.data());
    if (address - shared < block.launch->shared_bytes) {
      space = Space::kShared;
      address -= shared;
    } else if (address - local < actor.warp.local.size()) {
      space = Space::kLocal;
      address -= local + actor.lane * block.launch->program.local_bytes;
    } else {
      space = Space::kGlobal;
    }
  }
  if (space == Space::kShared)
    return shared_memory(actor, access, address, num_bytes, alignment, stored);
  if (space == Space::kLocal) return local_memory(actor, access, address, num_bytes);
  if (space == Space::kParam) return param_memory(actor, access, address, num_bytes);
  return global_memory(actor, access, address, num_bytes, alignment, stored);
}

// The address in a lane: 32 bits in shared memory.
uint64_t address_of(Warp& warp, const Instruction& i, uint32_t operand, int lane) {
  if (i.space == Space::kShared) return uint32_t(warp.reg<uint32_t>(operand)[lane] + i.immediate);
  return warp.reg<uint64_t>(operand)[lane] + i.immediate;
}

template <class F>
void for_lanes(Mask lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

void before_strong(Warp& warp, const Instruction& i, int lane, uintptr_t address) {
  if (i.order & kRelease) fence(warp, lane);
  if (warp.fence[lane].time) release(warp, lane, address);
}
void after_strong(Warp& warp, const Instruction& i, int lane, uintptr_t address) {
  warp.observed[lane].insert(address);
  if (i.order & kAcquire) fence(warp, lane);
}

// ld: results, address
template <class T>
void load(Warp& warp, const Instruction& i, Mask lanes) {
  const int count = i.num_operands - 1;
  const size_t num_bytes = count * sizeof(T);
  for_lanes(lanes, [&](int lane) {
    const Actor actor(warp, lane);
    const uint64_t address = address_of(warp, i, i.operands[count], lane);
    const std::byte* memory =
        memory_of(actor, i.space, i.order & kStrong ? Access::kAtomic : Access::kRead, address,
                  num_bytes, num_bytes);
    for (int k = 0; k < count; ++k)
      std::memcpy(&warp.reg<T>(i.operands[k])[lane], memory + k * sizeof(T), sizeof(T));
    if (i.order & kStrong) after_strong(warp, i, lane, reinterpret_cast<uintptr_t>(memory));
  });
}

// st: address, values
template <class T>
void store(Warp& warp, const Instruction& i, Mask lanes) {
  const int count = i.num_operands - 1;
  const size_t num_bytes = count * sizeof(T);
  std::byte values[32];
  for_lanes(lanes, [&](int lane) {
    const Actor actor(warp, lane);
    for (int k = 0; k < count; ++k)
      std::memcpy(values + k * sizeof(T), &warp.reg<T>(i.operands[k + 1])[lane], sizeof(T));
    const uint64_t address = address_of(warp, i, i.operands[0], lane);
    std::byte* memory =
        memory_of(actor, i.space, i.order & kStrong ? Access::kAtomic : Access::kWrite, address,
                  num_bytes, num_bytes, values);
    if (i.order & kStrong) before_strong(warp, i, lane, reinterpret_cast<uintptr_t>(memory));
    std::memcpy(memory, values, num_bytes);
  });
}

// atom: result, address, value, and for cas the new value. red: address, value.
template <bool has_result, class T, class F>
void atomic(Warp& warp, const Instruction& i, Mask lanes) {
  const uint32_t* operand = i.operands + has_result;
  const bool is_exchange = i.num_operands == 3 + has_result;
  for_lanes(lanes, [&](int lane) {
    const Actor actor(warp, lane);
    const uint64_t address = address_of(warp, i, operand[0], lane);
    std::byte* memory = memory_of(actor, i.space, Access::kAtomic, address, sizeof(T), sizeof(T));
    before_strong(warp, i, lane, reinterpret_cast<uintptr_t>(memory));
    T old;
    std::memcpy(&old, memory, sizeof old);
    const T value = warp.reg<T>(operand[1])[lane],
            other = is_exchange ? warp.reg<T>(operand[2])[lane] : T();
    const T result = (*kept<F>)(old, value, other);
    std::memcpy(memory, &result, sizeof result);
    if (has_result) {
      warp.reg<T>(i.operands[0])[lane] = old;
      after_strong(warp, i, lane, reinterpret_cast<uintptr_t>(memory));
    }
  });
}

template <class T, class F>
void define_atomic(const std::string& name, const F& f, bool is_exchange = false) {
  if (!kept<F>) kept<F> = new F(f);
  const std::string type = type_name<T>(), values = " " + type + (is_exchange ? " " + type : "");
  table().push_back({"atom." + name, "=" + type + " address" + values, &atomic<true, T, F>});
  table().push_back({"red." + name, "address" + values, &atomic<false, T, F>});
}

void define_atomics() {
  const auto add = [](auto old, auto value, auto) { return decltype(old)(old + value); };
  const auto least = [](auto old, auto value, auto) { return std::min(old, value); };
  const auto most = [](auto old, auto value, auto) { return std::max(old, value); };
  define_atomic<uint32_t>("add.u32", add), define_atomic<int32_t>("add.s32", add),
      define_atomic<uint64_t>("add.u64", add);
  define_atomic<float>("add.f32", add), define_atomic<double>("add.f64", add);
  define_atomic<uint16_t>("add.f16", [](uint16_t old, uint16_t value, uint16_t) {
    return to_f16(from_f16(old) + from_f16(value));
  });
  define_atomic<uint16_t>("add.bf16", [](uint16_t old, uint16_t value, uint16_t) {
    return to_bf16(from_bf16(old) + from_bf16(value));
  });
  define_atomic<uint32_t>("min.u32", least), define_atomic<int32_t>("min.s32", least),
      define_atomic<uint64_t>("min.u64", least), define_atomic<int64_t>("min.s64", least);
  define_atomic<uint32_t>("max.u32", most), define_atomic<int32_t>("max.s32", most),
      define_atomic<uint64_t>("max.u64", most), define_atomic<int64_t>("max.s64", most);
  const auto bitwise = [](auto type) {
    using T = decltype(type);
    const std::string name = type_name<T>();
    define_atomic<T>("and." + name, [](T old, T value, T) { return T(old & value); });
    define_atomic<T>("or." + name, [](T old, T value, T) { return T(old | value); });
    define_atomic<T>("xor." + name, [](T old, T value, T) { return T(old ^ value); });
    define_atomic<T>("exch." + name, [](T, T value, T) { return value; });
    define_atomic<T>(
        "cas." + name, [](T old, T expected, T value) { return old == expected ? value : old; },
        true);
  };
  bitwise(uint32_t()), bitwise(uint64_t());
  define_atomic<uint32_t>(
      "inc.u32", [](uint32_t old, uint32_t limit, uint32_t) { return old >= limit ? 0 : old + 1; });
  define_atomic<uint32_t>("dec.u32", [](uint32_t old, uint32_t limit, uint32_t) {
    return old == 0 || old > limit ? limit : old - 1;
  });
}

// ---- cp.async: until its group is waited for, the destination is in flight and nobody may read it

void finish(Warp& warp, const AsyncCopy& copy) {
  std::byte values[16] = {};
  if (copy.source_bytes) std::memcpy(values, copy.source, copy.source_bytes);
  std::byte* memory = shared_memory(Actor(warp, copy.lane), Access::kWrite, copy.destination,
                                    copy.num_bytes, copy.num_bytes, values);
  std::memcpy(memory, values, copy.num_bytes);
}

// destination, source, number of bytes, number of them that are read: the rest is zero
void async_copy(Warp& warp, const Instruction& i, Mask lanes) {
  Block& block = *warp.block;
  const Launch& launch = *block.launch;
  for_lanes(lanes, [&](int lane) {
    const Actor actor(warp, lane);
    const uint32_t destination = warp.reg<uint32_t>(i.operands[0])[lane];
    const uint64_t source = warp.reg<uint64_t>(i.operands[1])[lane] + i.immediate;
    const uint32_t num_bytes = warp.reg<uint32_t>(i.operands[2])[lane];
    const uint32_t source_bytes = std::min(warp.reg<uint32_t>(i.operands[3])[lane], num_bytes);
    const std::byte* memory_from =
        source_bytes ? global_memory(actor, Access::kRead, source, source_bytes, 1, nullptr)
                     : nullptr;
    if (source_bytes && source % num_bytes)
      fault(warp, lane,
            "misaligned global read of a cp.async of " + std::to_string(num_bytes) + " bytes");
    const AsyncCopy copy{lane,        warp.copy_group[lane],       destination,
                         memory_from, static_cast<int>(num_bytes), static_cast<int>(source_bytes)};
    if (launch.options.early_async) return finish(warp, copy);
    std::byte* memory =
        shared_memory(actor, Access::kWrite, destination, num_bytes, num_bytes, nullptr);
    std::memset(memory, 0xFF, num_bytes);
    const int granule = launch.program.shared_granule;
    std::fill_n(&block.granules[destination >> granule], num_bytes >> granule, Block::kInFlight);
    warp.copies.push_back(copy);
  });
}

void async_commit(Warp& warp, const Instruction&, Mask lanes) {
  for_lanes(lanes, [&](int lane) { ++warp.copy_group[lane]; });
}

// the number of groups that may stay in flight
void async_wait(Warp& warp, const Instruction& i, Mask lanes) {
  const auto is_done = [&](const AsyncCopy& copy) {
    if (!(lanes >> copy.lane & 1)) return false;
    return copy.group + warp.reg<uint32_t>(i.operands[0])[copy.lane] < warp.copy_group[copy.lane];
  };
  for (const AsyncCopy& copy : warp.copies)
    if (is_done(copy)) finish(warp, copy);
  warp.copies.erase(std::remove_if(warp.copies.begin(), warp.copies.end(), is_done),
                    warp.copies.end());
}

void async_wait_all(Warp& warp, const Instruction& i, Mask lanes) {
  async_commit(warp, i, lanes);
  for (const AsyncCopy& copy : warp.copies)
    if (lanes >> copy.lane & 1) finish(warp, copy);
  warp.copies.erase(std::remove_if(warp.copies.begin(), warp.copies.end(),
                                   [&](const AsyncCopy& copy) { return lanes >> copy.lane & 1; }),
                    warp.copies.end());
}

// ---- generic addresses

template <bool to_generic>
void convert_shared(Warp& warp, const Instruction& i, Mask lanes) {
  const uint64_t base = reinterpret_cast<uintptr_t>(warp.block->shared);
  for_lanes(lanes, [&](int lane) {
    warp.reg<uint64_t>(i.operands[0])[lane] =
        warp.reg<uint64_t>(i.operands[1])[lane] + (to_generic ? base : -base);
  });
}

template <bool to_generic>
void convert_local(Warp& warp, const Instruction& i, Mask lanes) {
  const size_t size = warp.block->launch->program.local_bytes;
  for_lanes(lanes, [&](int lane) {
    const uint64_t base = reinterpret_cast<uintptr_t>(warp.local.data()) + lane * size;
    warp.reg<uint64_t>(i.operands[0])[lane] =
        warp.reg<uint64_t>(i.operands[1])[lane] + (to_generic ? base : -base);
  });
}

template <class T>
void define_type() {
  const std::string type = type_name<T>();
  table().push_back({"ld." + type, "=" + type + "* address", &load<T>});
  table().push_back({"st." + type, "address " + type + "*", &store<T>});
}

}  // namespace

void define_memory() {
  define_type<uint8_t>(), define_type<uint16_t>(), define_type<uint32_t>(), define_type<uint64_t>();
  define_atomics();
  table().push_back({"fence", "", [](Warp& warp, const Instruction&, Mask lanes) {
                       for_lanes(lanes, [&](int lane) { fence(warp, lane); });
                     }});
  table().push_back({"cp.async", "b32 address b32 b32", &async_copy});
  table().push_back({"cp.async.commit_group", "", &async_commit});
  table().push_back({"cp.async.wait_group", "b32", &async_wait});
  table().push_back({"cp.async.wait_all", "", &async_wait_all});
  table().push_back({"cvta.shared", "=b64 b64", &convert_shared<true>});
  table().push_back({"cvta.to.shared", "=b64 b64", &convert_shared<false>});
  table().push_back({"cvta.local", "=b64 b64", &convert_local<true>});
  table().push_back({"cvta.to.local", "=b64 b64", &convert_local<false>});
}

}  // namespace simt
