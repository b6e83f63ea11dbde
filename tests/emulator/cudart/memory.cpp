// Memory: allocations, copies, what of them was written, and what was freed.
//
// A device address lies in a range that is reserved and never mapped, and is never given out twice,
// so that the host cannot use it by mistake and one that was freed is known for ever.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>

#include "runtime.h"

namespace cudart {

namespace {

constexpr size_t kReserved = size_t{1} << 42;
constexpr size_t kAlignment = 512;
constexpr size_t kGap = 4096;  // between allocations

struct Allocation {
  std::string name;
  std::unique_ptr<std::byte[], decltype(&std::free)> memory{nullptr, &std::free};
  std::unique_ptr<uint8_t[], decltype(&std::free)> initialised{nullptr, &std::free};
};

std::vector<simt::Buffer> all;  // sorted; the device's, pinned ones, and what Python registered
std::map<uintptr_t, Allocation> allocations;  // on the device, freed ones included
std::map<uintptr_t, size_t> pinned;           // on the host
size_t used_bytes = 0;

uintptr_t new_address(size_t num_bytes) {
  static uintptr_t next = [] {
    void* const reserved =
        mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) throw std::bad_alloc();
    return reinterpret_cast<uintptr_t>(reserved);
  }();
  const uintptr_t address = next;
  next += (num_bytes + kGap + kAlignment - 1) / kAlignment * kAlignment;
  return address;
}

simt::Buffer* find(const void* address) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(address);
  auto found = std::upper_bound(all.begin(), all.end(), a,
                                [](uintptr_t x, const simt::Buffer& b) { return x < b.begin; });
  if (found == all.begin()) return nullptr;
  --found;
  return a < found->end || a == found->begin ? &*found : nullptr;
}

bool is_device(const void* address) {
  const simt::Buffer* buffer = find(address);
  return buffer && allocations.count(buffer->begin);
}

bool is_pinned(const void* address) {
  const simt::Buffer* buffer = find(address);
  return buffer && pinned.count(buffer->begin);
}

// The memory behind either end of a copy.
const std::byte* readable(const void* address, size_t num_bytes, const char* caller) {
  return is_device(address) ? device_memory(address, num_bytes, caller, false)
                            : static_cast<const std::byte*>(address);
}
std::byte* writable(void* address, size_t num_bytes, const char* caller) {
  return is_device(address) ? device_memory(address, num_bytes, caller, true)
                            : static_cast<std::byte*>(address);
}

// A copy from device to device carries what was not written.
void copy(void* to, const void* from, size_t num_bytes, const char* caller) {
  if (!num_bytes) return;
  const std::byte* source = readable(from, num_bytes, caller);
  std::memmove(writable(to, num_bytes, caller), source, num_bytes);
  if (is_device(to) && is_device(from)) {
    const simt::Buffer &a = *find(from), &b = *find(to);
    std::memmove(b.initialised + (reinterpret_cast<uintptr_t>(to) - b.begin),
                 a.initialised + (reinterpret_cast<uintptr_t>(from) - a.begin), num_bytes);
  }
}

void check_kind(const void* to, const void* from, cudaMemcpyKind kind, const char* caller) {
  if (kind == cudaMemcpyDefault) return;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  for (const auto& [address, wanted, role] :
       {std::tuple(to, to_device, "destination"), std::tuple(from, from_device, "source")})
    if (is_device(address) != wanted)
      throw Refused(cudaErrorInvalidValue, std::string(caller) + ": the " + role +
                                               (wanted ? " is no device memory"
                                                       : " is device memory, the kind says host"));
}

struct Rows {  // of a copy
  void* to;
  size_t to_pitch;
  const void* from;
  size_t from_pitch, width, height;
};

void copy_rows(const Rows& rows, const char* caller) {
  for (size_t i = 0; i < rows.height; ++i)
    copy(static_cast<std::byte*>(rows.to) + i * rows.to_pitch,
         static_cast<const std::byte*>(rows.from) + i * rows.from_pitch, rows.width, caller);
}

void copy_async(const Rows& rows, cudaMemcpyKind kind, cudaStream_t stream, const char* caller) {
  if (!rows.width || !rows.height) return;
  check_kind(rows.to, rows.from, kind, caller);
  for (size_t i : {size_t{0}, rows.height - 1}) {  // what is out of bounds is told at once
    readable(static_cast<const std::byte*>(rows.from) + i * rows.from_pitch, rows.width, caller);
    if (is_device(rows.to))
      device_memory(static_cast<std::byte*>(rows.to) + i * rows.to_pitch, rows.width, caller,
                    false);
  }
  const bool is_pageable_source = !is_device(rows.from) && !is_pinned(rows.from);
  if (is_pageable_source && !is_capturing(stream)) {  // the real one copies it aside, too
    const size_t size = (rows.height - 1) * rows.from_pitch + rows.width;
    const auto* from = static_cast<const std::byte*>(rows.from);
    const auto staged = std::make_shared<std::vector<std::byte>>(from, from + size);
    enqueue(stream, caller, [rows, staged, caller] {
      Rows from_staged = rows;
      from_staged.from = staged->data();
      copy_rows(from_staged, caller);
    });
  } else {
    enqueue(stream, caller, [rows, caller] { copy_rows(rows, caller); });
  }
  // into memory that may be paged out, the real one copies before it returns
  if (!is_device(rows.to) && !is_pinned(rows.to) && !is_capturing(stream)) synchronize(stream);
}

void fill(void* device, int value, size_t num_bytes, cudaStream_t stream, const char* caller) {
  if (!num_bytes) return;
  device_memory(device, num_bytes, caller, false);
  enqueue(stream, caller,
          [=] { std::memset(device_memory(device, num_bytes, caller, true), value, num_bytes); });
}

void* allocate_pinned(size_t num_bytes) {
  void* const memory = std::aligned_alloc(4096, (num_bytes + 4095) / 4096 * 4096);
  if (!memory) throw std::bad_alloc();
  std::memset(memory, 0xFF, num_bytes);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  pinned[begin] = num_bytes;
  add_buffer({begin, begin + num_bytes, "pinned", static_cast<std::byte*>(memory), nullptr});
  return memory;
}

}  // namespace

const std::vector<simt::Buffer>& buffers() { return all; }

void add_buffer(const simt::Buffer& buffer) {
  all.insert(std::upper_bound(all.begin(), all.end(), buffer.begin,
                              [](uintptr_t a, const simt::Buffer& b) { return a < b.begin; }),
             buffer);
}

void remove_buffer(const void* address) {
  simt::Buffer* const buffer = find(address);
  if (buffer && buffer->begin == reinterpret_cast<uintptr_t>(address))
    all.erase(all.begin() + (buffer - all.data()));
}

void name_buffer(const void* device, const char* name) {
  Allocation& allocation = allocations.at(reinterpret_cast<uintptr_t>(device));
  allocation.name = name;
  find(device)->name = allocation.name.c_str();
}

// None where the settings leave less than is in use.
size_t free_bytes() {
  return settings.memory_bytes > used_bytes ? settings.memory_bytes - used_bytes : 0;
}

void* allocate(size_t num_bytes) {
  if (num_bytes > free_bytes())
    throw Refused(cudaErrorMemoryAllocation, "out of memory: " + std::to_string(num_bytes) +
                                                 " bytes asked for, " +
                                                 std::to_string(free_bytes()) + " left");
  const uintptr_t begin = new_address(num_bytes);
  Allocation& allocation = allocations[begin];
  allocation.name = "allocation " + std::to_string(allocations.size() - 1);
  allocation.memory.reset(static_cast<std::byte*>(std::aligned_alloc(
      kAlignment, (num_bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment)));
  allocation.initialised.reset(static_cast<uint8_t*>(std::calloc(num_bytes + 1, 1)));
  if (!allocation.memory || !allocation.initialised) throw std::bad_alloc();
  std::memset(allocation.memory.get(), 0xFF, num_bytes);  // NaN
  add_buffer({begin, begin + num_bytes, allocation.name.c_str(), allocation.memory.get(),
              allocation.initialised.get()});
  used_bytes += num_bytes;
  return reinterpret_cast<void*>(begin);
}

void release(const void* device, const char* caller) {
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(device));
  if (found == allocations.end())
    throw Refused(cudaErrorInvalidValue,
                  std::string(caller) + ": no allocation starts at this address");
  if (!found->second.memory)
    throw Refused(cudaErrorInvalidValue,
                  std::string(caller) + ": '" + found->second.name + "' was freed already");
  simt::Buffer& buffer = *find(device);
  used_bytes -= buffer.end - buffer.begin;
  buffer.memory = nullptr;
  found->second.memory.reset();
  found->second.initialised.reset();
}

std::byte* device_memory(const void* device, size_t num_bytes, const char* caller, bool is_write) {
  simt::Buffer* buffer = find(device);
  if (!buffer)
    throw Refused(cudaErrorInvalidValue, std::string(caller) + ": the address is in no allocation");
  const uintptr_t offset = reinterpret_cast<uintptr_t>(device) - buffer->begin;
  if (!buffer->memory)
    throw Refused(cudaErrorInvalidValue,
                  std::string(caller) + ": use of '" + buffer->name + "' after it was freed");
  const size_t size = buffer->end - buffer->begin;
  if (num_bytes > size - offset)
    throw Refused(cudaErrorInvalidValue, std::string(caller) + ": " + std::to_string(num_bytes) +
                                             " bytes from byte " + std::to_string(offset) +
                                             " of '" + buffer->name + "' on, which has " +
                                             std::to_string(size));
  if (is_write && buffer->initialised) std::memset(buffer->initialised + offset, 1, num_bytes);
  return buffer->memory + offset;
}

std::string live_memory() {
  std::string text;
  for (const auto& [begin, allocation] : allocations)
    if (allocation.memory) {
      const simt::Buffer& buffer = *find(reinterpret_cast<void*>(begin));
      text += allocation.name + ", " + std::to_string(buffer.end - buffer.begin) + " bytes\n";
    }
  for (const auto& [begin, num_bytes] : pinned)
    text += "pinned memory, " + std::to_string(num_bytes) + " bytes\n";
  return text;
}

void release_all() {
  for (const auto& [begin, allocation] : allocations) {
    if (allocation.memory) release(reinterpret_cast<void*>(begin), "reset");
    remove_buffer(reinterpret_cast<void*>(begin));
  }
  allocations.clear();
  while (!pinned.empty()) {
    void* const memory = reinterpret_cast<void*>(pinned.begin()->first);
    remove_buffer(memory);
    pinned.erase(pinned.begin());
    std::free(memory);
  }
}

}  // namespace cudart

using namespace cudart;

extern "C" {

cudaError_t cudaMalloc(void** device, size_t num_bytes) {
  return api([&] {
    refuse_in_capture("cudaMalloc");
    *device = num_bytes ? allocate(num_bytes) : nullptr;
  });
}
cudaError_t cudaFree(void* device) {
  return api([&] {
    refuse_in_capture("cudaFree");
    synchronize_all();
    if (device) release(device, "cudaFree");
  });
}
cudaError_t cudaMallocAsync(void** device, size_t num_bytes, cudaStream_t) {
  return api([&] {
    refuse_in_capture("cudaMallocAsync");
    *device = num_bytes ? allocate(num_bytes) : nullptr;
  });
}
cudaError_t cudaFreeAsync(void* device, cudaStream_t stream) {
  return api([&] {
    refuse_in_capture("cudaFreeAsync");
    if (device) enqueue(stream, "cudaFreeAsync", [=] { release(device, "cudaFreeAsync"); });
  });
}
cudaError_t cudaMallocHost(void** host, size_t num_bytes) {
  return api([&] {
    refuse_in_capture("cudaMallocHost");
    *host = allocate_pinned(num_bytes);
  });
}
cudaError_t cudaHostAlloc(void** host, size_t num_bytes, unsigned) {
  return api([&] {
    refuse_in_capture("cudaHostAlloc");
    *host = allocate_pinned(num_bytes);
  });
}
cudaError_t cudaFreeHost(void* host) {
  return api([&] {
    refuse_in_capture("cudaFreeHost");
    synchronize_all();
    if (!host) return;
    if (!pinned.erase(reinterpret_cast<uintptr_t>(host)))
      throw Refused(cudaErrorInvalidValue, "cudaFreeHost: no pinned memory starts at this address");
    remove_buffer(host);
    std::free(host);
  });
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  return api([&] {
    if (!is_pinned(host))
      throw Refused(cudaErrorInvalidValue, "cudaHostGetDevicePointer: the memory is not pinned");
    *device = host;
  });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  return api([&] {
    *attributes = {};
    const bool on_device = is_device(address), on_host = is_pinned(address);
    attributes->type = on_device ? cudaMemoryTypeDevice
                       : on_host ? cudaMemoryTypeHost
                                 : cudaMemoryTypeUnregistered;
    attributes->device = on_device ? 0 : -1;
    attributes->devicePointer = on_device || on_host ? const_cast<void*>(address) : nullptr;
    attributes->hostPointer = on_device ? nullptr : const_cast<void*>(address);
  });
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return api([&] {
    *total = settings.memory_bytes;
    *free = free_bytes();
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind) {
  return api([&] {
    refuse_in_capture("cudaMemcpy");
    copy_async({to, num_bytes, from, num_bytes, num_bytes, 1}, kind, nullptr, "cudaMemcpy");
    synchronize(nullptr);
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return api([&] {
    copy_async({to, num_bytes, from, num_bytes, num_bytes, 1}, kind, stream, "cudaMemcpyAsync");
  });
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind kind) {
  return api([&] {
    refuse_in_capture("cudaMemcpy2D");
    copy_async({to, to_pitch, from, from_pitch, width, height}, kind, nullptr, "cudaMemcpy2D");
    synchronize(nullptr);
  });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  return api([&] {
    copy_async({to, to_pitch, from, from_pitch, width, height}, kind, stream, "cudaMemcpy2DAsync");
  });
}
cudaError_t cudaMemset(void* device, int value, size_t num_bytes) {
  return api([&] {
    refuse_in_capture("cudaMemset");
    fill(device, value, num_bytes, nullptr, "cudaMemset");
  });
}
cudaError_t cudaMemsetAsync(void* device, int value, size_t num_bytes, cudaStream_t stream) {
  return api([&] { fill(device, value, num_bytes, stream, "cudaMemsetAsync"); });
}

}  // extern "C"
