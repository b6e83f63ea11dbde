// Layer norm and RMS norm of rows of the stream, a warp a row.
#include <stdexcept>

#include "launch.h"
#include "normalize.cuh"

namespace leangpt::cuda {
namespace {

constexpr int kWarps = 8;

__device__ void store(float* out, const Four& v) { *reinterpret_cast<Four*>(out) = v; }

__device__ void store(uint16_t* out, const Four& v) {
  *reinterpret_cast<uint2*>(out) = round_four(v);
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    normalize_kernel(const float* __restrict__ x, int64_t stride,
                     const int32_t* __restrict__ row_of, Norm norm, int width, T* __restrict__ out,
                     int64_t out_stride, int num_rows) {
  const int row = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
  if (row >= num_rows) return;
  const int64_t source = row_of ? row_of[row] : row;
  normalize_row(x + source * stride, norm, width,
                [&](int column, const Four& v) { store(out + row * out_stride + column, v); });
}

template <class T>
void launch(const float* x, int64_t stride, const int32_t* row_of, const Norm& norm, int width,
            T* out, int64_t out_stride, int num_rows, cudaStream_t stream) {
  if (num_rows == 0) return;
  if (norm.weight == nullptr) throw std::invalid_argument("normalize: there is no weight");
  normalize_kernel<<<(num_rows + kWarps - 1) / kWarps, kWarps * 32, 0, stream>>>(
      x, stride, row_of, norm, width, out, out_stride, num_rows);
  check_launch("normalize");
}

}  // namespace

void normalize(const float* x, int64_t stride, const int32_t* row_of, const Norm& norm, int width,
               float* out, int64_t out_stride, int num_rows, cudaStream_t stream) {
  launch(x, stride, row_of, norm, width, out, out_stride, num_rows, stream);
}

void normalize(const float* x, int64_t stride, const int32_t* row_of, const Norm& norm, int width,
               uint16_t* out, int64_t out_stride, int num_rows, cudaStream_t stream) {
  launch(x, stride, row_of, norm, width, out, out_stride, num_rows, stream);
}

}  // namespace leangpt::cuda
