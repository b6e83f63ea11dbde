// Kernels and launches for the tests of the fake runtime.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__constant__ float table[4] = {0.5f, 1.5f, -2.0f, 8.0f};
__device__ int counter;
__device__ unsigned num_waiting;

struct Step {
  float factor;
  int64_t offset;
  int n;
};

__global__ void scale(const float* x, float* y, Step step) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < step.n) y[i] = x[i + step.offset] * step.factor;
}

__global__ void look_up(float* y) { y[threadIdx.x] = table[threadIdx.x % 4]; }
__global__ void count() { atomicAdd(&counter, 1); }
__global__ void get_count(int* out) { *out = atomicExch(&counter, 0); }

// All blocks wait for each other, then each reads what the next one wrote.
__global__ void meet(int* out) {
  if (threadIdx.x == 0) {
    out[blockIdx.x] = blockIdx.x;
    __threadfence();
    atomicAdd(&num_waiting, 1);
    while (atomicAdd(&num_waiting, 0) < gridDim.x) {
    }
    __threadfence();
    out[gridDim.x + blockIdx.x] = out[(blockIdx.x + 1) % gridDim.x];
  }
}

__global__ void __launch_bounds__(96) with_shared_memory(int* out) {
  __shared__ int values[96];
  extern __shared__ int more[];
  values[threadIdx.x] = more[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[95 - threadIdx.x] + more[threadIdx.x];
}

}  // namespace

extern "C" {

cudaError_t launch_scale(const float* x, float* y, float factor, int64_t offset, int n,
                         cudaStream_t stream) {
  scale<<<(n + 63) / 64, 64, 0, stream>>>(x, y, {factor, offset, n});
  return cudaGetLastError();
}

cudaError_t launch_look_up(float* y) {
  look_up<<<1, 32>>>(y);
  return cudaGetLastError();
}

cudaError_t launch_counts(int num_blocks, int* out) {
  count<<<num_blocks, 32>>>();
  get_count<<<1, 1>>>(out);
  return cudaGetLastError();
}

cudaError_t launch_meet(int num_blocks, int* out) {
  void* args[] = {&out};
  return cudaLaunchCooperativeKernel(meet, num_blocks, 32, args, 0, nullptr);
}

cudaError_t launch_extended(int* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 96;
  config.dynamicSmemBytes = 96 * sizeof(int);
  return cudaLaunchKernelEx(&config, with_shared_memory, out);
}

cudaError_t describe(cudaFuncAttributes* attributes, int* num_blocks) {
  const cudaError_t error = cudaFuncGetAttributes(attributes, with_shared_memory);
  if (error) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(num_blocks, with_shared_memory, 96,
                                                       40 << 10);
}

}  // extern "C"
