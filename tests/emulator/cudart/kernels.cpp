// Kernels: the modules that nvcc's host code registers, and launches.
//
// A module is a fat binary with PTX in it. A kernel of it is translated, by Python, when it is
// launched first.
#include <algorithm>
#include <cstring>
#include <map>

#include "runtime.h"

namespace cudart {

Loader loader;

namespace {

constexpr uint32_t kSharedBytes = 48 << 10;  // without asking
constexpr uint32_t kMostSharedBytes = 163 << 10;
constexpr uint32_t kMultiprocessorBytes = 164 << 10, kBlockBytes = 1 << 10;  // reserved for a block
constexpr uint32_t kThreads = 1024, kMultiprocessorThreads = 2048, kBlocks = 32;

struct Module {
  uint64_t id;
  std::string ptx;
};

struct Function {
  const Module* module;
  std::string name;
  bool is_loaded = false;
  Kernel kernel = {};
  uint32_t most_dynamic_bytes = 0;  // of shared memory; 0: as many as without asking
};

std::map<void**, Module*> modules;
std::map<const void*, Function> functions;  // by the address of their host stub

// The layout of a fat binary, as far as it is needed.
struct Wrapper {
  int32_t magic, version;
  const std::byte* data;
  const void* unused;
};
struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t num_bytes;
};
struct Image {
  uint16_t kind, unused;
  uint32_t header_bytes;
  uint64_t num_bytes;
  uint32_t compressed_bytes;
};
constexpr uint16_t kPtx = 1;

std::string ptx_of(const Wrapper& wrapper) {
  Header header;
  std::memcpy(&header, wrapper.data, sizeof header);
  const std::byte* at = wrapper.data + header.header_bytes;
  for (const std::byte* const end = at + header.num_bytes; at < end;) {
    Image image;
    std::memcpy(&image, at, sizeof image);
    if (image.kind == kPtx && image.compressed_bytes == 0) {
      const char* const text = reinterpret_cast<const char*>(at + image.header_bytes);
      return std::string(text, strnlen(text, image.num_bytes));
    }
    at += image.header_bytes + image.num_bytes;
  }
  return "";
}

Function& find(const void* stub, const char* caller) {
  const auto found = functions.find(stub);
  if (found == functions.end())
    throw Refused(cudaErrorInvalidDeviceFunction, std::string(caller) + ": not a kernel");
  return found->second;
}

const Kernel& load(Function& function) {
  if (!function.is_loaded) {
    if (function.module->ptx.empty())
      throw Refused(cudaErrorNoKernelImageForDevice,
                    function.name + ": no PTX that the emulator can read was linked in");
    if (!loader(function.module->id, function.module->ptx.c_str(), function.name.c_str(),
                &function.kernel))
      throw Refused(cudaErrorInvalidPtx, function.name + ": " + errors.reason);
    function.is_loaded = true;
  }
  return function.kernel;
}

uint64_t resident_blocks(const Function& function, uint32_t threads, size_t dynamic_bytes) {
  const uint32_t shared = function.kernel.shared_bytes + static_cast<uint32_t>(dynamic_bytes);
  const uint32_t warps = (threads + simt::kWarpSize - 1) / simt::kWarpSize;
  return std::min({kBlocks, kMultiprocessorThreads / (warps * simt::kWarpSize),
                   kMultiprocessorBytes / (shared + kBlockBytes)});
}

void launch(Function& function, dim3 grid, dim3 block, void** args, size_t dynamic_bytes,
            cudaStream_t stream, bool is_cooperative) {
  const Kernel& kernel = load(function);
  const auto refuse = [&](cudaError_t code, const std::string& reason) {
    throw Refused(code, "launch of " + kernel.program->name + ": " + reason);
  };
  const simt::Dim3 g{grid.x, grid.y, grid.z}, b{block.x, block.y, block.z};
  if (!g.count() || g.x > 0x7FFFFFFF || g.y > 0xFFFF || g.z > 0xFFFF)
    refuse(cudaErrorInvalidConfiguration, "a grid of " + g.text());
  if (!b.count() || b.count() > kThreads || b.z > 64)
    refuse(cudaErrorInvalidConfiguration, "blocks of " + b.text() + " threads");
  if (b.count() > kernel.max_threads)
    refuse(cudaErrorInvalidValue, "blocks of " + std::to_string(b.count()) +
                                      " threads, its __launch_bounds__ allow " +
                                      std::to_string(kernel.max_threads));
  const size_t shared_bytes = kernel.shared_bytes + dynamic_bytes;
  const size_t allowed = std::max(kSharedBytes, kernel.shared_bytes + function.most_dynamic_bytes);
  if (shared_bytes > allowed)
    refuse(
        cudaErrorInvalidValue,
        std::to_string(shared_bytes) + " bytes of shared memory, allowed are " +
            std::to_string(allowed) +
            (function.most_dynamic_bytes ? ""
                                         : " without cudaFuncAttributeMaxDynamicSharedMemorySize"));
  if (is_cooperative && g.count() > resident_blocks(function, b.count(), dynamic_bytes) *
                                        settings.num_multiprocessors)
    refuse(cudaErrorCooperativeLaunchTooLarge, "more blocks than can run at the same time");
  std::vector<std::byte> params(kernel.param_bytes);
  for (uint32_t i = 0; i < kernel.num_params; ++i)
    std::memcpy(params.data() + kernel.param_offsets[i], args[i], kernel.param_sizes[i]);
  enqueue(stream, "cudaLaunchKernel", [=, &kernel, params = std::move(params)] {
    simt::Options options = settings.options;
    if (is_cooperative) options.resident = static_cast<int32_t>(g.count());
    const size_t layout_bytes = kernel.shared_layout_bytes + dynamic_bytes;
    simt::Launch(*kernel.program, options, params.data(), params.size(), g, b,
                 static_cast<uint32_t>(layout_bytes), buffers())
        .run();
  });
}

struct Configuration {
  dim3 grid, block;
  size_t dynamic_bytes;
  void* stream;
};
thread_local Configuration configuration;

}  // namespace

void forget_attributes() {
  for (auto& [stub, function] : functions) function.most_dynamic_bytes = 0;
}

}  // namespace cudart

using namespace cudart;

extern "C" {

void** __cudaRegisterFatBinary(void* binary) {
  static uint64_t next_id = 0;
  Module* const module = new Module{next_id++, ptx_of(*static_cast<const Wrapper*>(binary))};
  void** const handle = reinterpret_cast<void**>(module);
  modules[handle] = module;
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}  // at the end of the process
void __cudaRegisterFunction(void** module, const char* stub, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  functions[stub] = {modules.at(module), name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic_bytes,
                                     CUstream_st* stream) {
  configuration = {grid, block, dynamic_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic_bytes,
                                       void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *dynamic_bytes = configuration.dynamic_bytes;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** args,
                             size_t dynamic_bytes, cudaStream_t stream) {
  const cudaError_t error = api([&] {
    launch(find(stub, "cudaLaunchKernel"), grid, block, args, dynamic_bytes, stream, false);
  });
  errors.is_unseen |= error != cudaSuccess;  // <<<>>> drops it: it must be asked for
  return error;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t dynamic_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, args, dynamic_bytes,
                          stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block, void** args,
                                        size_t dynamic_bytes, cudaStream_t stream) {
  return api([&] {
    launch(find(stub, "cudaLaunchCooperativeKernel"), grid, block, args, dynamic_bytes, stream,
           true);
  });
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** args) {
  return api([&] {
    bool is_cooperative = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
      const cudaLaunchAttribute& attribute = config->attrs[i];
      if (attribute.id == cudaLaunchAttributeCooperative)
        is_cooperative = attribute.val.cooperative;
      if (attribute.id == cudaLaunchAttributeClusterDimension)
        throw Refused(cudaErrorNotSupported,
                      "cudaLaunchKernelExC: the emulated device has no clusters");
    }
    launch(find(stub, "cudaLaunchKernelExC"), config->gridDim, config->blockDim, args,
           config->dynamicSmemBytes, config->stream, is_cooperative);
  });
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  return api([&] {
    Function& function = find(stub, "cudaFuncSetAttribute");
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return;  // hints
    if (value < 0 || load(function).shared_bytes + value > kMostSharedBytes)
      throw Refused(cudaErrorInvalidValue, function.name + ": " + std::to_string(value) +
                                               " bytes of dynamic shared memory");
    function.most_dynamic_bytes = value;
  });
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  return api([&] {
    Function& function = find(stub, "cudaFuncGetAttributes");
    const Kernel& kernel = load(function);
    *attributes = {};
    attributes->sharedSizeBytes = kernel.shared_bytes;
    attributes->localSizeBytes = kernel.local_bytes;
    attributes->maxThreadsPerBlock = static_cast<int>(kernel.max_threads);
    attributes->maxDynamicSharedSizeBytes =
        static_cast<int>(std::max(kSharedBytes - kernel.shared_bytes, function.most_dynamic_bytes));
    attributes->ptxVersion = attributes->binaryVersion = 80;
  });
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* num_blocks,
                                                                   const void* stub, int threads,
                                                                   size_t dynamic_bytes, unsigned) {
  return api([&] {
    Function& function = find(stub, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    load(function);
    if (threads < 1) throw Refused(cudaErrorInvalidValue, "occupancy of blocks without threads");
    *num_blocks = static_cast<int>(resident_blocks(function, threads, dynamic_bytes));
  });
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, const void* stub,
                                                          int threads, size_t dynamic_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(num_blocks, stub, threads,
                                                                dynamic_bytes, 0);
}

}  // extern "C"
