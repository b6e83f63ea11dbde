// What Python calls: cuda.py.
#include "runtime.h"

using namespace cudart;

extern "C" {

void emulator_configure(const Settings* to) { settings = *to; }
void emulator_set_loader(Loader to) { loader = to; }
// What the loader could not do.
void emulator_refuse(const char* reason) { errors.reason = reason; }
// The fault that stopped the device, or the error of a launch that nobody asked for; null: none.
const char* emulator_fault() {
  return errors.sticky || errors.is_unseen ? errors.reason.c_str() : nullptr;
}
// What was not freed or destroyed, one a line.
const char* emulator_leaks() {
  static std::string text;
  text = live_memory() + live_handles();
  return text.c_str();
}
// As in a new process.
void emulator_reset() {
  forget_streams();
  release_all();
  forget_attributes();
  errors = {};
}
void emulator_name(const void* device, const char* name) { name_buffer(device, name); }
// Memory of the host that kernels may access, such as a CPU tensor; `name` must stay.
void emulator_register(void* memory, size_t num_bytes, const char* name) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  add_buffer({begin, begin + num_bytes, name, static_cast<std::byte*>(memory), nullptr});
}
void emulator_unregister(const void* memory) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  remove_buffer(memory);
}

}  // extern "C"
