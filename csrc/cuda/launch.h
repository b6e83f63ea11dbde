// What every launcher does around a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace leangpt::cuda {

// Throws std::runtime_error where the launch before it failed.
inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(status));
  }
}

// Let a kernel use more than the 48 KB of dynamic shared memory that it may without asking.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, const char* name, int bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next launch would be blamed for it
    throw std::runtime_error(std::string(name) + " needs " + std::to_string(bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(status));
  }
}

}  // namespace leangpt::cuda
