// A CUDA runtime without a GPU: what nvcc's host code, and ours, call of libcudart. A launch runs
// the kernel's PTX in the emulator; device memory lies at addresses that the host cannot touch.
//
// It is as strict as the real one, or stricter. What an API function refuses it returns, as the
// real one does, and remembers the reason; a fault of a kernel is an error that stays.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../simt/machine.h"

namespace cudart {

// How launches are run, and the device that there seems to be. Its twin is `_Settings` of cuda.py.
struct Settings {
  simt::Options options;
  int32_t is_deferred;   // streams do nothing before the host waits for them
  int32_t major, minor;  // compute capability; 0: there is no device and no driver
  int32_t num_multiprocessors;
  uint64_t memory_bytes;
};
extern Settings settings;

struct Refused : std::runtime_error {
  cudaError_t code;
  Refused(cudaError_t code, const std::string& message) : std::runtime_error(message), code(code) {}
};

// The errors so far.
struct Errors {
  cudaError_t last = cudaSuccess;    // cudaGetLastError
  cudaError_t sticky = cudaSuccess;  // of a kernel's fault: the device does nothing more
  bool is_unseen = false;            // nobody asked for the last error of a launch
  std::string reason;                // in words
};
extern Errors errors;

extern std::recursive_mutex mutex;

// An API function's body: what it throws becomes its error code.
template <class F>
cudaError_t api(const F& body) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (errors.sticky) return errors.sticky;
  try {
    body();
    return cudaSuccess;
  } catch (const Refused& refused) {
    errors.last = refused.code;
    errors.reason = refused.what();
  } catch (const simt::Fault& fault) {
    errors.last = errors.sticky = cudaErrorLaunchFailure;
    errors.reason = fault.what();
  }
  return errors.last;
}

// ---- memory.cpp

// All memory that kernels may access, in the order of the addresses.
const std::vector<simt::Buffer>& buffers();
void* allocate(size_t num_bytes);
void release(const void* device, const char* caller);
// The host's memory behind a range of device memory, after checks; what is written becomes
// initialised.
std::byte* device_memory(const void* device, size_t num_bytes, const char* caller, bool is_write);
std::string live_memory();  // a line for each allocation that was not freed
void release_all();
void add_buffer(const simt::Buffer& buffer);
void name_buffer(const void* device, const char* name);
void remove_buffer(const void* address);

// ---- streams.cpp

using Operation = std::function<void()>;
// Have the stream do it in its turn; `caller` is for reports.
void enqueue(cudaStream_t stream, const char* caller, Operation operation);
void synchronize(cudaStream_t stream);
void synchronize_all();
// What must not be called while a stream is captured.
void refuse_in_capture(const char* caller);
bool is_capturing(cudaStream_t stream);
std::string live_handles();
void forget_streams();

// ---- kernels.cpp

// What Python tells of a kernel. Its twin is `_Kernel` of cuda.py.
struct Kernel {
  const simt::Program* program;
  uint32_t num_params, param_bytes;
  uint32_t shared_bytes;         // of static variables
  uint32_t shared_layout_bytes;  // of them with gaps between them
  uint32_t local_bytes, max_threads;
  const uint32_t *param_offsets, *param_sizes;
};
// Fill in a kernel of a module, whose PTX it is; false: errors.reason tells why not.
using Loader = bool (*)(uint64_t module, const char* ptx, const char* name, Kernel* kernel);
extern Loader loader;
void forget_attributes();

}  // namespace cudart
