// CPU tensors as device memory: while it is on, what PyTorch allocates on the CPU is memory that
// kernels may access, each storage with its bounds.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>

extern "C" void emulator_register(void* memory, size_t num_bytes, const char* name);
extern "C" void emulator_unregister(const void* memory);

namespace {

class DeviceMemory : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    constexpr size_t kAlignment = 256;
    void* const memory = std::aligned_alloc(kAlignment, (num_bytes / kAlignment + 1) * kAlignment);
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0xFF, num_bytes);  // NaN
    emulator_register(memory, num_bytes, "a tensor");
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override {
    std::memcpy(to, from, num_bytes);
  }

 private:
  static void release(void* memory) {
    emulator_unregister(memory);
    std::free(memory);
  }
};

}  // namespace

extern "C" void emulator_use_tensors(bool is_on) {
  static DeviceMemory device_memory;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(is_on ? &device_memory : usual, 255);
}
