// Products with packed weights on tensor cores, epilogue(norm(x) w^T + bias), for 1 to thousands of
// rows.
//
// The order of a sum depends on the inputs alone: they are cut into kParts parts, each is summed in
// blocks of 32, one after the other, and the parts are added in their order. So a row has the same
// bits in both kernels:
//
// split_k_kernel, for few rows, is bound by reading the weights. A block of threads has few
// outputs, so that all SMs have some, and each of its warps one part of the inputs, with many
// copies on their way at once that no other warp waits for.
//
// tile_kernel, for as many rows as give every SM its tile, has 128 rows by 128 outputs and takes
// the parts in turn: its warps share rows and weights in shared memory.
#include <stdexcept>
#include <string>

#include "launch.h"
#include "normalize.cuh"
#include "weights.cuh"

namespace leangpt::cuda {
namespace {

constexpr int kParts = 8;  // of the inputs
constexpr int kThreads = 32 * kParts;

// Up to 8 rows of the stream are normed by each block of threads of a split-K product, a warp a
// row. More would be more to read than the block's bfloat16 weights, and are normed once before it.
constexpr int kFusedRows = kParts;
constexpr int kFusedBytes = 32 * 1024;  // of the normed rows in shared memory at most

constexpr int kTileRows = 128, kTileOutputs = 128;
constexpr int kTileStages = 4;

// About the SMs of a large GPU: fewer blocks of threads are made smaller.
constexpr int kEnoughBlocks = 128;

struct Arguments {
  Weights w;
  LinearInput in;
  LinearOutput out;
  int num_rows;
  int part_blocks;  // blocks of 32 inputs of a part
  int64_t addend_stride;
};

// sums += rows times weights, for a block of inputs and 8 rows; a thread gives 8 inputs of one row.
template <WeightKind kKind, int kTiles>
__device__ __forceinline__ void multiply(const uint4& row, const WeightTile<kKind, kTiles>& weights,
                                         bool has_minimums, float (&sums)[kTiles][4]) {
  const auto add_products = [&](float (&to)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) mma_bf16(to[i], weights.words[i][0], row.x, row.y);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) mma_bf16(to[i], weights.words[i][1], row.z, row.w);
  };
  if constexpr (kKind == WeightKind::kBf16) {
    add_products(sums);
  } else {
    float of_block[kTiles][4] = {};
    add_products(of_block);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[i][j] = fmaf(of_block[i][j], weights.scales[2 * i + j / 2], sums[i][j]);
      }
    }
    if (has_minimums) {
      const uint32_t ones[4] = {0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80};
      float row_sums[4] = {};  // ones times the rows: the same for all outputs
      mma_bf16(row_sums, ones, row.x, row.y);
      mma_bf16(row_sums, ones, row.z, row.w);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = fmaf(row_sums[j], weights.minimums[2 * i + j / 2], sums[i][j]);
        }
      }
    }
  }
}

// Write a thread's sums of 8 rows to rows of `pitch` floats in shared memory.
template <int kTiles>
__device__ __forceinline__ void store_sums(const float (&sums)[kTiles][4], float* to, int pitch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* row = to + (lane % 4 * 2 + i) * pitch + lane / 4 * 2;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      *reinterpret_cast<float2*>(row + 16 * tile) = {sums[tile][i], sums[tile][2 + i]};
    }
  }
}

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kGeluTanh: {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
      const float u = x * fmaf(0.044715f * x, x, 1.0f);
      return __fdividef(x, 1.0f + __expf(-1.5957691216057308f * u));
    }
    case Activation::kGelu:
      return 0.5f * x * erfcf(-0.70710678118654752f * x);
    case Activation::kRelu2: {
      const float positive = fmaxf(x, 0.0f);
      return positive * positive;
    }
    default:
      return x;
  }
}

__device__ __forceinline__ void load_8(const float* p, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void store_8(float* p, const float (&x)[8]) {
  reinterpret_cast<float4*>(p)[0] = {x[0], x[1], x[2], x[3]};
  reinterpret_cast<float4*>(p)[1] = {x[4], x[5], x[6], x[7]};
}

// Epilogue of 8 outputs of a row, by all lanes of a warp; 4 lanes have 32 outputs of one row.
__device__ __forceinline__ void finish(const Arguments& args, int row, int column, float (&x)[8]) {
  const Weights& w = args.w;
  const LinearOutput& out = args.out;
  // vectors are padded to whole panels
  float scales[8], bias[8];
  const bool is_in_panel = column < w.n;
  if (w.output_scales && is_in_panel) load_8(w.output_scales + column, scales);
  if (w.bias && is_in_panel) load_8(w.bias + column, bias);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = fmaf(x[i], w.output_scales && is_in_panel ? scales[i] : 1.0f,
                w.bias && is_in_panel ? bias[i] : 0.0f);
  }
  if (out.addends && is_in_panel && row < args.num_rows) {
    const int64_t addend = out.addend_of[row];
    if (addend >= 0) {
      float more[8];
      load_8(out.addends + addend * args.addend_stride + column, more);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += more[i];
    }
  }
  int count = w.n - column;
  if (out.activation == Activation::kSwiglu) {  // lanes 2 and 3 of 4 have the outputs of up
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float up = __shfl_xor_sync(0xFFFFFFFF, x[i], 2);
      x[i] = __fdividef(x[i], 1.0f + __expf(-x[i])) * up;
    }
    if (column % 32 >= 16) return;
    column = column / 32 * 16 + column % 32;
    count = w.n / 2 - column;
  } else if (out.activation != Activation::kNone) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = activate(x[i], out.activation);
  }
  if (row >= args.num_rows || count <= 0) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = i < count ? x[i] : 0.0f;
  const int64_t at = row * out.stride + column;
  if (out.bf16) {
    *reinterpret_cast<uint4*>(out.bf16 + at) = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]),
                                                pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
    return;
  }
  float* to = (out.stream ? out.stream : out.out) + at;
  if (out.stream) {
    float before[8];
    load_8(to, before);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += before[i];
  }
  store_8(to, x);
}

// The warp of a thread, so that the compiler knows it to be the same for all lanes.
__device__ __forceinline__ int this_warp() {
  return __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);
}

// The column of a block of inputs that a thread's 16 bytes begin at.
__device__ __forceinline__ int first_column(int block) {
  return block * kBlockInputs + static_cast<int>(threadIdx.x) % 4 * 8;
}

template <WeightKind kKind, int kRowTiles, int kTiles>
struct SplitK {
  using Tile = WeightTile<kKind, kTiles>;
  static constexpr int kRows = 8 * kRowTiles, kOutputs = Tile::kOutputs;
  static constexpr int kStages = 8192 / Tile::kBytes < 8 ? 8192 / Tile::kBytes : 8;
  static constexpr int kStageBytes = kParts * kStages * Tile::kBytes;
  static constexpr int kPitch = kOutputs + 4;  // floats of a row of a part: all banks for 8 lanes
  static constexpr int kPartsBytes = kParts * kRows * kPitch * 4;
  static constexpr int kSharedBytes = kStageBytes > kPartsBytes ? kStageBytes : kPartsBytes;
};

// Shared memory: stages of weights for each warp, later the sums of its part; and normed rows,
// [block of inputs][row][32] bfloat16.
template <WeightKind kKind, int kRowTiles, int kTiles, bool kHasNorm>
__global__ void __launch_bounds__(kThreads, kRowTiles <= 2 ? 2 : 1)
    split_k_kernel(const Arguments args) {
  using Shape = SplitK<kKind, kRowTiles, kTiles>;
  using Tile = typename Shape::Tile;
  extern __shared__ __align__(16) uint8_t shared[];
  uint8_t* normed = shared + Shape::kSharedBytes;
  const Weights& w = args.w;
  const int warp = this_warp(), lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = static_cast<int>(blockIdx.x) * Shape::kRows;
  const int num_rows = min(args.num_rows - first_row, Shape::kRows);
  const int first_output = static_cast<int>(blockIdx.y) * Shape::kOutputs;
  const int first_block = warp * args.part_blocks;
  const int end_block = min(first_block + args.part_blocks, w.blocks);
  uint8_t* stages = shared + warp * Shape::kStages * Tile::kBytes;

  typename Tile::template Copies<32> copies(w, first_output, first_block, lane);
  const auto copy = [&](int block, int stage) {
    if (block < end_block) copies.start(w, stages + stage * Tile::kBytes);
    cp_async_commit();
  };
  for (int i = 0; i < Shape::kStages - 1; ++i) copy(first_block + i, i);

  if constexpr (kHasNorm) {
    if (warp < num_rows) {
      const int64_t source = args.in.row_of ? args.in.row_of[warp] : warp;
      normalize_row(args.in.stream + source * args.in.stride, args.in.norm, w.k,
                    [&](int column, const Four& v) {
                      const int block = column / kBlockInputs;
                      uint8_t* to = normed + (block * num_rows + warp) * (kBlockInputs * 2) +
                                    column % kBlockInputs * 2;
                      *reinterpret_cast<uint2*>(to) = round_four(v);
                    });
    }
    __syncthreads();
  }

  const int end_column = min(w.k, end_block * kBlockInputs);
  const uint16_t* first_inputs =
      args.in.rows + (first_row + lane / 4) * args.in.stride + lane % 4 * 8;
  const auto load_row = [&](int block, int tile) {
    const int row = 8 * tile + lane / 4;
    uint4 inputs = {};
    if (row < num_rows && first_column(block) < end_column) {
      if constexpr (kHasNorm) {
        const uint8_t* from = normed + (block * num_rows + row) * (kBlockInputs * 2);
        inputs = reinterpret_cast<const uint4*>(from)[lane % 4];
      } else {
        const uint16_t* from = first_inputs + tile * 8 * args.in.stride + block * kBlockInputs;
        inputs = __ldg(reinterpret_cast<const uint4*>(from));
      }
    }
    return inputs;
  };

  float sums[kRowTiles][kTiles][4] = {};
  uint4 rows[kRowTiles];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) rows[m] = load_row(first_block, m);
  int stage = 0;
  for (int block = first_block; block < end_block; ++block) {
    cp_async_wait<Shape::kStages - 2>();
    __syncwarp();  // all lanes have their copies, and have read what the next ones overwrite
    copy(block + Shape::kStages - 1, stage == 0 ? Shape::kStages - 1 : stage - 1);
    Tile weights;
    weights.load(w, stages + stage * Tile::kBytes);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (8 * m >= num_rows) break;
      multiply(rows[m], weights, w.minimums != nullptr, sums[m]);
      rows[m] = load_row(block + 1, m);
    }
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }

  __syncthreads();  // the stages are read, and become room for the parts
  auto* parts = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    store_sums(sums[m], parts + (warp * Shape::kRows + 8 * m) * Shape::kPitch, Shape::kPitch);
  }
  __syncthreads();

  constexpr int kRowThreads = Shape::kOutputs / 8;
  const int item = static_cast<int>(threadIdx.x);
  if (item >= Shape::kRows * kRowThreads) return;
  const int row = item / kRowThreads, column = item % kRowThreads * 8;
  float x[8] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float of_part[8];
    load_8(parts + (part * Shape::kRows + row) * Shape::kPitch + column, of_part);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += of_part[i];
  }
  finish(args, first_row + row, first_output + column, x);
}

template <WeightKind kKind>
struct TileShape {
  using Tile = WeightTile<kKind, 2>;
  static constexpr int kRowBytes = kTileRows * kBlockInputs * 2;
  static constexpr int kStageBytes = kRowBytes + kTileOutputs / Tile::kOutputs * Tile::kBytes;
  static constexpr int kPitch = kTileOutputs + 4;  // floats of a row of sums
  static constexpr int kSumsBytes = kTileRows * kPitch * 4;
  static constexpr int kSharedBytes =
      kTileStages * kStageBytes > kSumsBytes ? kTileStages * kStageBytes : kSumsBytes;
};

// 8 warps, 2 of 64 rows by 4 of 32 outputs. Shared memory: stages of rows, [row][32] bfloat16, and
// weights; later all sums.
template <WeightKind kKind>
__global__ void __launch_bounds__(kThreads) tile_kernel(const Arguments args) {
  using Shape = TileShape<kKind>;
  using Tile = typename Shape::Tile;
  constexpr int kRowTiles = 8, kTiles = 2;
  extern __shared__ __align__(16) uint8_t shared[];
  const Weights& w = args.w;
  const int warp = this_warp(), lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = warp / 4, warp_column = warp % 4;
  const int first_row = static_cast<int>(blockIdx.x) * kTileRows;
  const int num_rows = min(args.num_rows - first_row, kTileRows);
  const int first_output =
      static_cast<int>(blockIdx.y) * kTileOutputs + warp_column * Tile::kOutputs;
  const bool has_outputs = first_output < w.n;
  typename Tile::template Copies<64> copies(w, first_output, 0, warp_row * 32 + lane);

  const auto copy = [&](int block, int stage) {
    if (block < w.blocks) {
      uint8_t* to = shared + stage * Shape::kStageBytes;
#pragma unroll
      for (int first = 0; first < kTileRows * 4; first += kThreads) {
        const int i = first + static_cast<int>(threadIdx.x);
        const int row = i / 4, column = first_column(block);
        cp_async_16(to + i * 16, args.in.rows + (first_row + row) * args.in.stride + column,
                    row < num_rows && column < w.k);
      }
      if (has_outputs) copies.start(w, to + Shape::kRowBytes + warp_column * Tile::kBytes);
    }
    cp_async_commit();
  };
  for (int i = 0; i < kTileStages - 1; ++i) copy(i, i);

  float totals[kRowTiles][kTiles][4] = {}, sums[kRowTiles][kTiles][4] = {};
  int stage = 0, end_of_part = args.part_blocks;
  for (int block = 0; block < w.blocks; ++block) {
    cp_async_wait<kTileStages - 2>();
    __syncthreads();  // all have their copies, and have read what the next ones overwrite
    copy(block + kTileStages - 1, stage == 0 ? kTileStages - 1 : stage - 1);
    const uint8_t* from = shared + stage * Shape::kStageBytes;
    if (has_outputs) {
      Tile weights;
      weights.load(w, from + Shape::kRowBytes + warp_column * Tile::kBytes);
      const uint4* rows = reinterpret_cast<const uint4*>(from) + warp_row * 64 * 4 + lane;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply(rows[m * 8 * 4], weights, w.minimums != nullptr, sums[m]);
      }
    }
    if (block + 1 == end_of_part || block + 1 == w.blocks) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            totals[m][i][j] += sums[m][i][j];
            sums[m][i][j] = 0;
          }
        }
      }
      end_of_part += args.part_blocks;
    }
    stage = stage + 1 == kTileStages ? 0 : stage + 1;
  }

  __syncthreads();  // the stages are read, and become room for the sums
  auto* all_sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int row = warp_row * 64 + 8 * m, column = warp_column * Tile::kOutputs;
    store_sums(totals[m], all_sums + row * Shape::kPitch + column, Shape::kPitch);
  }
  __syncthreads();

  constexpr int kRowThreads = kTileOutputs / 8;
#pragma unroll 1
  for (int first = 0; first < kTileRows * kRowThreads; first += kThreads) {
    const int item = first + static_cast<int>(threadIdx.x);
    const int row = item / kRowThreads, column = item % kRowThreads * 8;
    float x[8];
    load_8(all_sums + row * Shape::kPitch + column, x);
    finish(args, first_row + row, static_cast<int>(blockIdx.y) * kTileOutputs + column, x);
  }
}

// The epilogue alone; a thread has 8 outputs of a row.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Arguments args, const float* products, int64_t stride) {
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int row_threads = static_cast<int>(args.addend_stride) / 8;
  const int row = static_cast<int>(item / row_threads);
  const int column = static_cast<int>(item % row_threads) * 8;
  float x[8] = {};
  if (row < args.num_rows && column < args.w.n) load_8(products + row * stride + column, x);
  finish(args, row, column, x);
}

int ceil_div(int n, int size) { return (n + size - 1) / size; }

template <WeightKind kKind, int kRowTiles, int kTiles, bool kHasNorm>
void launch_split_k(const Arguments& args, cudaStream_t stream) {
  using Shape = SplitK<kKind, kRowTiles, kTiles>;
  const int normed_bytes = kHasNorm ? args.num_rows * args.w.blocks * kBlockInputs * 2 : 0;
  const int shared_bytes = Shape::kSharedBytes + normed_bytes;
  const auto kernel = split_k_kernel<kKind, kRowTiles, kTiles, kHasNorm>;
  allow_shared_memory(kernel, "linear_decode", shared_bytes);
  const dim3 grid(ceil_div(args.num_rows, Shape::kRows), ceil_div(args.w.n, Shape::kOutputs));
  kernel<<<grid, kThreads, shared_bytes, stream>>>(args);
  check_launch("linear_decode");
}

template <WeightKind kKind, int kRowTiles, bool kHasNorm>
void launch_split_k(const Arguments& args, cudaStream_t stream) {
  using Shape = SplitK<kKind, kRowTiles, 2>;
  const int blocks = ceil_div(args.num_rows, Shape::kRows) * ceil_div(args.w.n, Shape::kOutputs);
  // a block must have both the gate and the up of an output
  if (blocks < kEnoughBlocks && args.out.activation != Activation::kSwiglu) {
    launch_split_k<kKind, kRowTiles, 1, kHasNorm>(args, stream);
  } else {
    launch_split_k<kKind, kRowTiles, 2, kHasNorm>(args, stream);
  }
}

template <WeightKind kKind>
void launch(Arguments args, cudaStream_t stream) {
  const int rows = args.num_rows;
  if (args.in.stream) {
    if (rows <= kFusedRows && rows * args.w.blocks * kBlockInputs * 2 <= kFusedBytes) {
      return launch_split_k<kKind, 1, true>(args, stream);
    }
    normalize(args.in.stream, args.in.stride, args.in.row_of, args.in.norm, args.w.k,
              args.in.normed, args.in.stride, rows, stream);
    args.in.rows = args.in.normed;
  }
  const dim3 tiles(ceil_div(rows, kTileRows), ceil_div(args.w.n, kTileOutputs));
  if (rows <= 16) {
    launch_split_k<kKind, 2, false>(args, stream);
  } else if (rows <= 64 || int64_t{tiles.x} * tiles.y < kEnoughBlocks) {
    launch_split_k<kKind, 8, false>(args, stream);
  } else {
    constexpr int kSharedBytes = TileShape<kKind>::kSharedBytes;
    allow_shared_memory(tile_kernel<kKind>, "linear_decode", kSharedBytes);
    tile_kernel<kKind><<<tiles, kThreads, kSharedBytes, stream>>>(args);
    check_launch("linear_decode");
  }
}

[[noreturn]] void fail(const std::string& what) {
  throw std::invalid_argument("linear_decode: " + what);
}

void check_stride(const char* name, int64_t stride, int width) {
  if (stride % kLanes != 0 || stride < width) {
    fail(std::string(name) + " must have a stride that is a multiple of 16 and at least " +
         std::to_string(width) + ", got " + std::to_string(stride));
  }
}

void check_input(const Matrix& w, const LinearInput& in) {
  if ((in.stream == nullptr) == (in.rows == nullptr)) {
    fail("the input must be either float32 rows of the stream or bfloat16 rows");
  }
  if (in.stream && (in.norm.weight == nullptr || in.normed == nullptr)) {
    fail("rows of the stream need a norm, and room for what it gives");
  }
  check_stride("the input", in.stride, w.k);
}

void check_output(const Matrix& w, const LinearOutput& out) {
  if ((out.out != nullptr) + (out.stream != nullptr) + (out.bf16 != nullptr) != 1) {
    fail("the output must be one of float32 rows, the stream and bfloat16 rows");
  }
  if (out.addends && out.addend_of == nullptr) fail("addends need addend_of");
  if (out.activation != Activation::kNone && out.bf16 == nullptr) {
    fail("what an activation gives is bfloat16");
  }
  const bool is_gated = out.activation == Activation::kSwiglu;
  if (is_gated && w.n % 32 != 0) {
    fail("a gated matrix must have 16 outputs of gate and 16 of up in turn, got " +
         std::to_string(w.n) + " outputs");
  }
  check_stride("the output", out.stride, is_gated ? w.n / 2 : w.n);
}

}  // namespace

void linear_decode(const Matrix& w, const LinearInput& in, const LinearOutput& out, int num_rows,
                   cudaStream_t stream) {
  if (num_rows == 0) return;
  check_input(w, in);
  check_output(w, out);
  Arguments args = {as_weights(w, "linear_decode"), in, out, num_rows};
  args.part_blocks = ceil_div(args.w.blocks, kParts);
  args.addend_stride = round_up(w.n, kPanelWidth);
  switch (w.kind) {
    case WeightKind::kBf16:
      return launch<WeightKind::kBf16>(args, stream);
    case WeightKind::kInt8:
      return launch<WeightKind::kInt8>(args, stream);
    default:
      return launch<WeightKind::kInt4>(args, stream);
  }
}

void finish_products(const Matrix& w, const float* products, int64_t stride,
                     const LinearOutput& out, int num_rows, cudaStream_t stream) {
  if (num_rows == 0) return;
  check_output(w, out);
  check_stride("the products", stride, w.n);
  Arguments args = {as_weights(w, "linear_decode"), {}, out, num_rows};
  args.w.output_scales = nullptr;  // the library's weights are scaled
  args.addend_stride = round_up(w.n, kPanelWidth);
  const int64_t items = num_rows * args.addend_stride / 8;
  const auto blocks = static_cast<unsigned>((items + kThreads - 1) / kThreads);
  finish_kernel<<<blocks, kThreads, 0, stream>>>(args, products, stride);
  check_launch("finish_products");
}

}  // namespace leangpt::cuda
