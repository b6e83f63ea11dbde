// The device that there seems to be, and the last error.
#include <cstring>

#include "runtime.h"

namespace cudart {

Settings settings = {};
Errors errors;
std::recursive_mutex mutex;

namespace {

constexpr int kVersion = CUDART_VERSION;

void require_driver(const char* caller) {
  if (!settings.major)
    throw Refused(cudaErrorInsufficientDriver, std::string(caller) + ": there is no CUDA driver");
}

void require_device(int device, const char* caller) {
  require_driver(caller);
  if (device) throw Refused(cudaErrorInvalidDevice, std::string(caller) + ": no such device");
}

cudaDeviceProp properties() {
  cudaDeviceProp p = {};
  std::strcpy(p.name, "emulator");
  p.major = settings.major;
  p.minor = settings.minor;
  p.multiProcessorCount = settings.num_multiprocessors;
  p.totalGlobalMem = settings.memory_bytes;
  p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerBlockOptin = 163 << 10;
  p.sharedMemPerMultiprocessor = 164 << 10;
  p.reservedSharedMemPerBlock = 1 << 10;
  p.regsPerBlock = p.regsPerMultiprocessor = 1 << 16;
  p.warpSize = simt::kWarpSize;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiProcessor = 2048;
  p.maxBlocksPerMultiProcessor = 32;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
  p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 0x7FFFFFFF;
  p.maxGridSize[1] = p.maxGridSize[2] = 0xFFFF;
  p.totalConstMem = 64 << 10;
  p.l2CacheSize = 40 << 20;
  p.memoryBusWidth = 5120;
  p.asyncEngineCount = 2;
  p.concurrentKernels = p.cooperativeLaunch = p.unifiedAddressing = p.canMapHostMemory = 1;
  p.memoryPoolsSupported = 1;
  return p;
}

int attribute_of(cudaDeviceAttr attribute) {
  const cudaDeviceProp p = properties();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return p.major;
    case cudaDevAttrComputeCapabilityMinor:
      return p.minor;
    case cudaDevAttrMultiProcessorCount:
      return p.multiProcessorCount;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return static_cast<int>(p.sharedMemPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return static_cast<int>(p.sharedMemPerBlockOptin);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return static_cast<int>(p.sharedMemPerMultiprocessor);
    case cudaDevAttrMaxThreadsPerBlock:
      return p.maxThreadsPerBlock;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return p.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return p.maxBlocksPerMultiProcessor;
    case cudaDevAttrMaxRegistersPerBlock:
      return p.regsPerBlock;
    case cudaDevAttrWarpSize:
      return p.warpSize;
    case cudaDevAttrMaxGridDimX:
      return p.maxGridSize[0];
    case cudaDevAttrMaxGridDimY:
      return p.maxGridSize[1];
    case cudaDevAttrL2CacheSize:
      return p.l2CacheSize;
    case cudaDevAttrGlobalMemoryBusWidth:
      return p.memoryBusWidth;
    case cudaDevAttrMemoryClockRate:
      return 1215000;
    case cudaDevAttrClockRate:
      return 1410000;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrUnifiedAddressing:
      return 1;
    default:
      throw Refused(cudaErrorNotSupported,
                    "cudaDeviceGetAttribute: the emulator does not know attribute " +
                        std::to_string(attribute));
  }
}

}  // namespace
}  // namespace cudart

using namespace cudart;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  return api([&] {
    *count = 0;
    require_driver("cudaGetDeviceCount");
    *count = 1;
  });
}
cudaError_t cudaGetDevice(int* device) {
  return api([&] {
    require_driver("cudaGetDevice");
    *device = 0;
  });
}
cudaError_t cudaSetDevice(int device) {
  return api([&] { require_device(device, "cudaSetDevice"); });
}
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  return api([&] {
    require_device(device, "cudaGetDeviceProperties");
    *out = properties();
  });
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return api([&] {
    require_device(device, "cudaDeviceGetAttribute");
    *value = attribute_of(attribute);
  });
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return api([&] { *least = *greatest = 0; });
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = settings.major ? kVersion : 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  errors.is_unseen = false;
  return errors.last;
}
cudaError_t cudaGetLastError() {
  const cudaError_t last = cudaPeekAtLastError();
  errors.last = errors.sticky;
  return last;
}
// The reason of the last error, which tells more than the code.
const char* cudaGetErrorString(cudaError_t error) {
  if (!error) return "no error";
  static thread_local std::string text;
  text = errors.reason.empty() ? cudaGetErrorName(error) : errors.reason;
  return text.c_str();
}
const char* cudaGetErrorName(cudaError_t error) {
  static thread_local std::string name;
  name = "CUDA error " + std::to_string(error);
  return name.c_str();
}

}  // extern "C"
