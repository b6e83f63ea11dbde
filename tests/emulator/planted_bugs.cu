// Kernels, and launches, with a bug to plant: f(false, ..) is right, f(true, ..) has it.
//
// All of them get x, 256 integers from 0 on; out, 256 integers; and a counter that is zero.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

using Kernel = void (*)(const int* x, int* out, int* counter);

// Launch the twin that is asked for.
void launch(Kernel right, Kernel wrong, bool is_planted, const int* x, int* out, int* counter,
            int num_blocks = 1, int num_threads = 64, int shared_bytes = 0) {
  (is_planted ? wrong : right)<<<num_blocks, num_threads, shared_bytes>>>(x, out, counter);
}

template <bool planted>
__global__ void missing_syncthreads(const int* x, int* out, int*) {
  __shared__ int values[64];
  values[threadIdx.x] = x[threadIdx.x];
  if (!planted) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 32];
}

template <bool planted>
__global__ void missing_syncthreads_before_reuse(const int* x, int* out, int*) {
  __shared__ int values[64];
  for (int i = 0; i < 3; ++i) {
    if (!planted) __syncthreads();
    values[threadIdx.x] = x[64 * i + threadIdx.x];
    __syncthreads();
    out[64 * i + threadIdx.x] = values[threadIdx.x ^ 32];
  }
}

template <bool planted>
__global__ void missing_syncwarp(const int* x, int* out, int*) {
  __shared__ int values[64];
  values[threadIdx.x] = x[threadIdx.x];
  if (!planted) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Each block leaves a number; the last one that comes adds them up.
template <bool planted>
__global__ void missing_fence(const int* x, int* out, int* counter) {
  if (threadIdx.x != 0) return;
  out[blockIdx.x] = x[blockIdx.x];
  if (!planted) __threadfence();
  if (atomicAdd(counter, 1) + 1 < static_cast<int>(gridDim.x)) return;
  __threadfence();
  int sum = 0;
  for (int i = 0; i < static_cast<int>(gridDim.x); ++i) sum += *const_cast<volatile int*>(&out[i]);
  out[100] = sum;
}

template <bool planted>
__global__ void wrong_shuffle_mask(const int* x, int* out, int*) {
  const unsigned mask = planted ? 0xffffu : 0xffffffffu;
  out[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);
}

template <bool planted>
__global__ void shuffle_in_a_branch(const int* x, int* out, int*) {
  if (threadIdx.x % 32 < 16)
    out[threadIdx.x] = __shfl_xor_sync(planted ? 0xffffffffu : 0xffffu, x[threadIdx.x], 1);
}

template <bool planted>
__global__ void barrier_in_a_divergent_branch(const int* x, int* out, int*) {
  __shared__ int values[64];
  values[threadIdx.x] = x[threadIdx.x];
  if (planted) {
    if (threadIdx.x < 40) __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

template <bool planted>
__global__ void return_before_a_barrier(const int* x, int* out, int*) {
  __shared__ int values[64];
  if (planted && threadIdx.x > 50) return;
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x > 50) return;
  out[threadIdx.x] = values[threadIdx.x / 2];
}

template <bool planted>
__global__ void warps_at_different_barriers(const int* x, int* out, int*) {
  __shared__ int values[64];
  if (planted && threadIdx.x < 32) {
    values[threadIdx.x] = 2 * x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x + 32];
  } else {
    values[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x ^ 32];
  }
}

// Warp 0 produces, warp 1 consumes; each waits at a barrier of its own number.
template <bool planted>
__global__ void named_barriers(const int* x, int* out, int*) {
  __shared__ int values[32];
  if (threadIdx.x < 32) {
    values[threadIdx.x] = x[threadIdx.x];
    asm volatile("bar.arrive 1, 64;" ::: "memory");
  } else {
    if (planted)
      asm volatile("bar.sync 2, 32;" ::: "memory");
    else
      asm volatile("bar.sync 1, 64;" ::: "memory");
    out[threadIdx.x] = values[threadIdx.x - 32];
  }
}

// x is a table of the pages of a sequence of 8 values; what is behind its pages is no page.
template <bool planted>
__global__ void page_index_off_by_one(const int* x, int* out, int*) {
  __shared__ int table[3];
  if (threadIdx.x < 3) table[threadIdx.x] = threadIdx.x < 2 ? threadIdx.x : 1 << 20;
  __syncthreads();
  const int position = threadIdx.x % 8, page = (position + (planted ? 1 : 0)) / 4;
  out[threadIdx.x] = x[table[page] * 4 + position % 4];
}

template <bool planted>
__global__ void async_copy_read_too_early(const int* x, int* out, int*) {
  __shared__ int4 values[2][64];
  for (int i = 0; i < 2; ++i) {
    __pipeline_memcpy_async(&values[i][threadIdx.x],
                            reinterpret_cast<const int4*>(x) + (threadIdx.x + 32 * i) % 64, 16);
    __pipeline_commit();
  }
  if (planted)
    __pipeline_wait_prior(1);
  else
    __pipeline_wait_prior(0);
  out[threadIdx.x] = values[1][threadIdx.x].y;
}

template <bool planted>
__global__ void async_copy_without_barrier(const int* x, int* out, int*) {
  __shared__ int4 values[64];
  __pipeline_memcpy_async(&values[threadIdx.x], reinterpret_cast<const int4*>(x) + threadIdx.x, 16);
  __pipeline_commit();
  if (planted) __syncthreads();
  __pipeline_wait_prior(0);
  if (!planted) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 32].z;
}

template <bool planted>
__global__ void missing_syncwarp_before_ldmatrix(const int* x, int* out, int*) {
  __shared__ int4 rows[64];
  rows[threadIdx.x] = reinterpret_cast<const int4*>(x)[threadIdx.x];
  if (!planted) __syncwarp();
  const uint32_t row = static_cast<uint32_t>(__cvta_generic_to_shared(&rows[threadIdx.x]));
  int a, b, c, d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(row)
               : "memory");
  out[threadIdx.x] = a + b + c + d;
}

template <bool planted>
__global__ void tensor_core_in_a_branch(const int* x, int* out, int*) {
  float d[4] = {};
  const int a = x[threadIdx.x];
  if (!planted || threadIdx.x % 32 < 16)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a), "r"(a), "r"(a));
  out[threadIdx.x] = static_cast<int>(d[0] + d[3]);
}

template <bool planted>
__global__ void uninitialised_shared_memory(const int* x, int* out, int*) {
  extern __shared__ int sums[];
  if (threadIdx.x < (planted ? 31 : 32)) sums[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&sums[threadIdx.x % 32], x[threadIdx.x]);
  __syncthreads();
  out[threadIdx.x] = sums[threadIdx.x % 32];
}

template <bool planted>
__global__ void misaligned_load(const int* x, int* out, int*) {
  const int first = planted ? 2 : 4;
  const int4 v = reinterpret_cast<const int4*>(x + first)[threadIdx.x % 8];
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

template <bool planted>
__global__ void misaligned_shared_store(const int* x, int* out, int*) {
  extern __shared__ int values[];
  if (threadIdx.x == 0)
    *reinterpret_cast<int2*>(values + x[planted ? 1 : 2]) = make_int2(x[3], x[4]);
  __syncthreads();
  out[threadIdx.x] = values[2];
}

template <bool planted>
__global__ void shared_index_out_of_bounds(const int* x, int* out, int*) {
  extern __shared__ int values[];
  values[threadIdx.x + (planted ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x ^ 1 | 1];
}

// An index that leaves one shared array for the next.
template <bool planted>
__global__ void shared_index_into_another_array(const int* x, int* out, int*) {
  __shared__ int a[64], b[64];
  a[threadIdx.x] = b[threadIdx.x] = 0;
  __syncthreads();
  a[x[threadIdx.x] + (planted ? 1 : 0)] = 1;
  __syncthreads();
  out[threadIdx.x] = a[63 - threadIdx.x] + b[63 - threadIdx.x];
}

template <bool planted>
__global__ void local_index_out_of_bounds(const int* x, int* out, int*) {
  int values[8];
  for (int i = 0; i < 8; ++i) values[i] = x[i];
  out[threadIdx.x] = values[x[threadIdx.x % 8] + (planted ? 1 : 0)];
}

template <bool planted>
__global__ void global_index_out_of_bounds(const int* x, int* out, int*) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (planted ? i <= 256 : i < 256) out[i] = x[i];
}

template <bool planted>
__global__ void blocks_write_one_place(const int* x, int* out, int*) {
  out[planted ? threadIdx.x : blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x];
}

template <bool planted>
__global__ void read_what_another_block_wrote(const int* x, int* out, int*) {
  out[blockIdx.x] += x[blockIdx.x];
  out[128 + blockIdx.x] = out[planted ? blockIdx.x ^ 1 : blockIdx.x];
}

__global__ void double_values(const int* x, int* out, int) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = 2 * x[blockIdx.x * blockDim.x + threadIdx.x];
}

template <int num_threads>
__global__ void __launch_bounds__(num_threads) bounded(const int* x, int* out) {
  extern __shared__ int values[];
  values[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x];
}

}  // namespace

// By their names; the numbers are blocks, threads, and bytes of dynamic shared memory.
#define KERNEL(name, ...)                                                          \
  extern "C" void name##_(bool is_planted, const int* x, int* out, int* counter) { \
    launch(name<false>, name<true>, is_planted, x, out, counter, __VA_ARGS__);     \
  }

KERNEL(missing_syncthreads, 1)
KERNEL(missing_syncthreads_before_reuse, 1)
KERNEL(missing_syncwarp, 2)
KERNEL(missing_fence, 4)
KERNEL(wrong_shuffle_mask, 1)
KERNEL(shuffle_in_a_branch, 1)
KERNEL(barrier_in_a_divergent_branch, 1)
KERNEL(return_before_a_barrier, 2)
KERNEL(warps_at_different_barriers, 1)
KERNEL(named_barriers, 2)
KERNEL(page_index_off_by_one, 1)
KERNEL(async_copy_read_too_early, 1)
KERNEL(async_copy_without_barrier, 1)
KERNEL(missing_syncwarp_before_ldmatrix, 1)
KERNEL(tensor_core_in_a_branch, 1)
KERNEL(uninitialised_shared_memory, 1, 64, 128)
KERNEL(misaligned_load, 1)
KERNEL(misaligned_shared_store, 1, 64, 64)
KERNEL(shared_index_out_of_bounds, 1, 64, 256)
KERNEL(shared_index_into_another_array, 1)
KERNEL(local_index_out_of_bounds, 1)
KERNEL(global_index_out_of_bounds, 5)
KERNEL(blocks_write_one_place, 4)

extern "C" void read_what_another_block_wrote_(bool is_planted, const int* x, int* out,
                                               int* counter) {
  cudaMemset(out, 0, 1024);
  launch(read_what_another_block_wrote<false>, read_what_another_block_wrote<true>, is_planted, x,
         out, counter, 4, 1);
}

// ---- bugs of the host's code

extern "C" {

void use_after_free_(bool is_planted, const int*, int* out, int*) {
  int* memory;
  cudaMalloc(&memory, 1024);
  cudaMemset(memory, 0, 1024);
  if (is_planted) cudaFree(memory);
  double_values<<<4, 64>>>(memory, out, 0);
  if (!is_planted) cudaFree(memory);
}

void read_of_fresh_memory_(bool is_planted, const int*, int* out, int*) {
  int* memory;
  cudaMalloc(&memory, 1024);
  cudaMemset(memory, 0, is_planted ? 1020 : 1024);
  double_values<<<4, 64>>>(memory, out, 0);
  cudaFree(memory);
}

void too_many_threads_(bool is_planted, const int* x, int* out, int*) {
  double_values<<<1, is_planted ? 1025 : 256>>>(x, out, 0);
}

void more_threads_than_bounds_(bool is_planted, const int* x, int* out, int*) {
  bounded<128><<<1, is_planted ? 160 : 128, 1024>>>(x, out);
}

void more_shared_memory_than_allowed_(bool is_planted, const int* x, int* out, int*) {
  cudaFuncSetAttribute(bounded<128>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       is_planted ? 0 : 100 << 10);
  bounded<128><<<1, 128, 100 << 10>>>(x, out);
}

void more_shared_memory_than_there_is_(bool is_planted, const int* x, int* out, int*) {
  const int num_bytes = (is_planted ? 164 : 163) << 10;
  cudaFuncSetAttribute(bounded<128>, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
  bounded<128><<<1, 128, num_bytes>>>(x, out);
}

void empty_grid_(bool is_planted, const int* x, int* out, int*) {
  double_values<<<is_planted ? 0 : 1, 64>>>(x, out, 0);
}

}  // extern "C"
