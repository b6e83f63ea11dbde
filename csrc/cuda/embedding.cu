// Rows of a packed embedding, and of learned positions.
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launch.h"
#include "weights.cuh"

namespace leangpt::cuda {
namespace {

constexpr int kThreads = 256;

struct Arguments {
  Weights w;
  WeightKind kind;
  const float* learned;
  int64_t learned_stride;
  const int32_t *tokens, *positions;
  const Drawn* drawn;
  float* stream;
  int64_t stride;
};

__device__ float float_of(uint16_t half) { return __half2float(reinterpret_cast<__half&>(half)); }

// The weight of an output for an input.
__device__ float unpack(const Weights& w, WeightKind kind, int output, int column) {
  const int panel = output / kPanelWidth, lane = output % kPanelWidth;
  const uint8_t* words = w.data + panel * w.panel_bytes + lane * 4;
  constexpr int64_t kStepBytes = kPanelWidth * 4;
  int q = 0;
  switch (kind) {
    case WeightKind::kBf16: {
      const auto* pair = reinterpret_cast<const uint16_t*>(words + column / 2 * kStepBytes);
      return __uint_as_float(static_cast<uint32_t>(pair[column % 2]) << 16);
    }
    case WeightKind::kInt8:
      q = words[column / 4 * kStepBytes + column % 4] - 128;
      break;
    default: {
      const int both = words[column / 8 * kStepBytes + column % 4];
      q = (column % 8 < 4 ? both & 15 : both >> 4) - 8;
    }
  }
  if (w.output_scales) return w.output_scales[output] * static_cast<float>(q);
  const int group = column / kBlockInputs >> w.group_shift;
  const int64_t at = (int64_t{panel} * w.groups + group) * kPanelWidth + lane;
  const float minimum = w.minimums ? float_of(w.minimums[at]) : 0.0f;
  return fmaf(float_of(w.scales[at]), static_cast<float>(q), minimum);
}

__global__ void __launch_bounds__(kThreads) embed_kernel(const Arguments args) {
  const int64_t row = blockIdx.x;
  int token = args.tokens[row];
  if (token < 0) token = max(static_cast<int>(args.drawn[-1 - token].token), 0);  // -1: NaN
  const float* learned =
      args.learned ? args.learned + args.positions[row] * args.learned_stride : nullptr;
  for (int column = static_cast<int>(threadIdx.x); column < args.w.k; column += kThreads) {
    const float x = unpack(args.w, args.kind, token, column);
    args.stream[row * args.stride + column] = learned ? x + learned[column] : x;
  }
}

}  // namespace

void embed(const Matrix& embedding, const float* learned, int64_t learned_stride,
           const int32_t* tokens, const Drawn* drawn, const int32_t* positions, float* stream_out,
           int64_t stride, int num_rows, cudaStream_t stream) {
  const Weights w = as_weights(embedding, "embed");
  if (stride < w.k) {
    throw std::invalid_argument("embed: the stream's stride must be at least " +
                                std::to_string(w.k) + ", got " + std::to_string(stride));
  }
  if (num_rows == 0) return;
  embed_kernel<<<num_rows, kThreads, 0, stream>>>(
      {w, embedding.kind, learned, learned_stride, tokens, positions, drawn, stream_out, stride});
  check_launch("embed");
}

}  // namespace leangpt::cuda
