// What adapters add to products of some rows: thin float32 matrices, each for rows of its own.
//
// The rows of an adapter are taken a few at a time, so that its matrices are read once for them. A
// row is summed in an order that its adapter alone decides: over the inputs of `down` in stripes,
// which are merged as a tree, and over the ranks one after the other.
//
// Reference: Hu et al., 2021, https://arxiv.org/abs/2106.09685;
// Houlsby et al., 2019, https://arxiv.org/abs/1902.00751
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launch.h"

namespace leangpt::cuda {
namespace {

constexpr int kRows = kDeltaTileRows;
constexpr int kNarrowThreads = 256;
constexpr int kWideThreads = 128;  // of 4 outputs each

struct Arguments {
  MatrixDeltas deltas;
  DeltaRows rows;
  float *narrow, *addends;
  int narrow_stride, addend_stride;
};

// The delta that an adapter has for the matrix, or null.
__device__ const Delta* find_delta(const Arguments& args, int adapter) {
  const Delta* delta = args.deltas.deltas + adapter * args.deltas.stride;
  const bool is_there = delta->down.data && delta->is_bottleneck == args.deltas.is_bottleneck;
  return is_there ? delta : nullptr;
}

// The 4 outputs from `output` on, a multiple of 4, for the first input; those for the next one are
// kPanelWidth floats on.
__device__ const float* weights_of(const Matrix& w, int output) {
  const int64_t inputs = (w.k + kLanes - 1) / kLanes * kLanes;
  const auto* panels = reinterpret_cast<const float*>(w.data);
  return panels + output / kPanelWidth * inputs * kPanelWidth + output % kPanelWidth;
}

__device__ float float_of(float x) { return x; }
__device__ float float_of(uint16_t bf16) { return __uint_as_float(uint32_t{bf16} << 16); }

__device__ float4 add(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

__device__ float gelu_tanh(float x) {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
  const float u = x * fmaf(0.044715f * x, x, 1.0f);
  return x / (1.0f + expf(-1.5957691216057308f * u));
}

__device__ void add_product(float4& sum, float x, const float4& w) {
  sum.x = fmaf(x, w.x, sum.x);
  sum.y = fmaf(x, w.y, sum.y);
  sum.z = fmaf(x, w.z, sum.z);
  sum.w = fmaf(x, w.w, sum.w);
}

// narrow = x down^T, of a bottleneck its activation. A block has a tile and a panel of outputs; as
// many threads side by side as have them by fours, and the rest of the block in stripes of inputs.
template <class T>
__global__ void __launch_bounds__(kNarrowThreads)
    narrow_kernel(const Arguments args, const T* x, int64_t stride) {
  __shared__ float4 room[kRows][kNarrowThreads];
  const DeltaTile tile = args.rows.tiles[blockIdx.x];
  if (tile.num_rows == 0) return;
  const Delta* delta = find_delta(args, tile.adapter);
  const int first_output = static_cast<int>(blockIdx.y) * kPanelWidth;
  if (delta == nullptr || first_output >= delta->down.n) return;
  const Matrix& w = delta->down;
  const int outputs = min(w.n - first_output, kPanelWidth);
  int width = 1;
  while (width * 4 < outputs) width *= 2;
  const int thread = static_cast<int>(threadIdx.x), stripes = kNarrowThreads / width;
  const int stripe = thread / width, output = first_output + thread % width * 4;
  const float* weights = weights_of(w, output);
  const T* rows[kRows];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const int row = args.rows.rows[tile.first + min(m, tile.num_rows - 1)];
    rows[m] = x + row * stride;
  }

  float4 sums[kRows] = {};
#pragma unroll 4
  for (int k = stripe; k < w.k; k += stripes) {
    const auto four = *reinterpret_cast<const float4*>(weights + int64_t{k} * kPanelWidth);
#pragma unroll
    for (int m = 0; m < kRows; ++m) add_product(sums[m], float_of(rows[m][k]), four);
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) room[m][thread] = sums[m];
  for (int left = stripes / 2; left > 0; left /= 2) {
    __syncthreads();
    if (stripe < left) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        room[m][thread] = add(room[m][thread], room[m][thread + left * width]);
      }
    }
  }

  if (stripe > 0) return;
  float4 bias = {};
  if (w.bias) bias = *reinterpret_cast<const float4*>(w.bias + output);
  const auto activate = [&](float y) { return delta->is_bottleneck ? gelu_tanh(y) : y; };
  for (int m = 0; m < tile.num_rows; ++m) {
    const float4 sum = add(room[m][thread], bias);
    float* to = args.narrow + int64_t{tile.first + m} * args.narrow_stride + output;
    *reinterpret_cast<float4*>(to) = {activate(sum.x), activate(sum.y), activate(sum.z),
                                      activate(sum.w)};
  }
}

// addends = narrow up^T
__global__ void __launch_bounds__(kWideThreads, 1) wide_kernel(const Arguments args) {
  const DeltaTile tile = args.rows.tiles[blockIdx.x];
  const int output =
      (static_cast<int>(blockIdx.y) * kWideThreads + static_cast<int>(threadIdx.x)) * 4;
  const int stride = args.addend_stride;
  if (tile.num_rows == 0 || output >= stride) return;
  float* to = args.addends + int64_t{tile.first} * stride + output;
  const Delta* delta = find_delta(args, tile.adapter);
  if (delta == nullptr) {
    for (int m = 0; m < tile.num_rows; ++m) {
      *reinterpret_cast<float4*>(to + m * stride) = {-0.0f, -0.0f, -0.0f, -0.0f};
    }
    return;
  }
  const Matrix& w = delta->up;
  const float* weights = weights_of(w, output);
  const float* narrow = args.narrow + int64_t{tile.first} * args.narrow_stride;
  float4 sums[kRows] = {};
  // ranks behind the last have weights of zero
  for (int rank = 0; rank < w.k; rank += 4) {
    float4 fours[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      fours[i] = *reinterpret_cast<const float4*>(weights + int64_t{rank + i} * kPanelWidth);
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const int row = min(m, tile.num_rows - 1);
      const auto x = *reinterpret_cast<const float4*>(narrow + row * args.narrow_stride + rank);
      add_product(sums[m], x.x, fours[0]);
      add_product(sums[m], x.y, fours[1]);
      add_product(sums[m], x.z, fours[2]);
      add_product(sums[m], x.w, fours[3]);
    }
  }
  float4 bias = {};
  if (w.bias) bias = *reinterpret_cast<const float4*>(w.bias + output);
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    if (m < tile.num_rows) *reinterpret_cast<float4*>(to + m * stride) = add(sums[m], bias);
  }
}

__global__ void __launch_bounds__(kNarrowThreads)
    branch_kernel(const float* __restrict__ branch, const float* __restrict__ addends,
                  const int32_t* __restrict__ addend_of, int64_t addend_stride,
                  float* __restrict__ stream, int64_t stride, int64_t fours) {
  const int64_t item = int64_t{blockIdx.x} * kNarrowThreads + threadIdx.x;
  if (item >= fours) return;
  const int64_t row = item / (stride / 4), column = item % (stride / 4) * 4;
  float4 x = reinterpret_cast<const float4*>(branch)[item];
  const int64_t addend = addend_of[row];
  if (addend >= 0) {
    const float* more = addends + addend * addend_stride + column;
    x = add(x, *reinterpret_cast<const float4*>(more));
  }
  auto* to = reinterpret_cast<float4*>(stream) + item;
  *to = add(*to, x);
}

unsigned blocks_for(int64_t items, int of_block) {
  return static_cast<unsigned>((items + of_block - 1) / of_block);
}

template <class T>
void launch(const MatrixDeltas& deltas, const DeltaRows& rows, const T* x, int64_t stride,
            float* narrow, float* addends, cudaStream_t stream) {
  if (rows.num_tiles == 0) return;
  if (deltas.outputs < 1 || deltas.most_ranks < 1) {
    throw std::invalid_argument("multiply_deltas: outputs and most_ranks must be positive, got " +
                                std::to_string(deltas.outputs) + " and " +
                                std::to_string(deltas.most_ranks));
  }
  const unsigned tiles = static_cast<unsigned>(rows.num_tiles);
  const Arguments args = {deltas,
                          rows,
                          narrow,
                          addends,
                          static_cast<int>(round_up(deltas.most_ranks, kPanelWidth)),
                          static_cast<int>(round_up(deltas.outputs, kPanelWidth))};
  const dim3 narrow_grid(tiles, blocks_for(deltas.most_ranks, kPanelWidth));
  narrow_kernel<<<narrow_grid, kNarrowThreads, 0, stream>>>(args, x, stride);
  check_launch("multiply_deltas");
  const dim3 wide_grid(tiles, blocks_for(args.addend_stride, kWideThreads * 4));
  wide_kernel<<<wide_grid, kWideThreads, 0, stream>>>(args);
  check_launch("multiply_deltas");
}

}  // namespace

void multiply_deltas(const MatrixDeltas& deltas, const DeltaRows& rows, const uint16_t* x,
                     int64_t stride, float* narrow, float* addends, cudaStream_t stream) {
  launch(deltas, rows, x, stride, narrow, addends, stream);
}

void multiply_deltas(const MatrixDeltas& deltas, const DeltaRows& rows, const float* x,
                     int64_t stride, float* narrow, float* addends, cudaStream_t stream) {
  launch(deltas, rows, x, stride, narrow, addends, stream);
}

void add_branch(const float* branch, const float* addends, const int32_t* addend_of, int outputs,
                float* stream_out, int64_t stride, int num_rows, cudaStream_t stream) {
  const int64_t addend_stride = round_up(outputs, kPanelWidth);
  if (stride % 4 || stride > addend_stride) {
    throw std::invalid_argument("add_branch: stride must be a multiple of 4 and at most " +
                                std::to_string(addend_stride) + ", got " + std::to_string(stride));
  }
  const int64_t fours = num_rows * stride / 4;
  if (fours == 0) return;
  branch_kernel<<<blocks_for(fours, kNarrowThreads), kNarrowThreads, 0, stream>>>(
      branch, addends, addend_of, addend_stride, stream_out, stride, fours);
  check_launch("add_branch");
}

}  // namespace leangpt::cuda
