// Runs a packed model over growing sequences on one GPU: the interface of cpu/decoder.h.
//
// The results of a sequence have the same bits whatever else is in the batch, and however its
// tokens were cut into steps: every sum runs in an order that depends on the sequence alone (see
// the kernels).
//
// A step's inputs go to the device in one copy, and tokens are drawn there. Steps that append one
// token to each sequence are captured in CUDA graphs, of which a few serve all (see StepShape).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "../batch.h"
#include "../model.h"
#include "kernels.h"
#include "memory.h"
#include "step.h"

namespace leangpt::cuda {

// A library's product, queued on a stream: products (num_rows, stride) float32 = bfloat16 rows
// (num_rows, row_stride) times w^T. The matrices w of a layer are numbers 4 * layer + 0 to 3: qkv,
// attn_out, mlp_in, mlp_out. Returns 0 where that could be done.
using LibraryProduct = int (*)(int matrix, const void* rows, int64_t row_stride, int num_rows,
                               float* products, int64_t stride, cudaStream_t stream);

// Throws std::invalid_argument or std::runtime_error unless the kernels run on a device.
void check_device(int device);
int64_t free_memory(int device);  // bytes

class Decoder {
 public:
  // Copies the model to the device, and takes all of the cache's memory. Throws
  // std::invalid_argument for a model, cache or device that the kernels do not know.
  Decoder(const Model& model, KvKind kv_kind, int32_t num_blocks, int device, bool has_graphs);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // As those of cpu::Decoder, but for the adapter's matrices, which are copied.
  int32_t add_adapter(const LayerDeltas* layers);
  int64_t add_sequence(const float* keys, const float* values, int64_t prefix, int32_t adapter);

  KvBlocks& blocks() { return blocks_; }
  int num_graphs() const;  // that were captured, and are kept

  // As those of cpu::Decoder. Throw std::runtime_error where the device fails.
  void hidden(const Batch& batch, float* out);
  void logits(const Batch& batch, float* out);
  void logprobs(const Batch& batch, const int64_t* targets, float* out);
  void sample(const Batch& batch, const DrawSettings* settings, Drawn* out);

  // `sample` in two parts. The next step may start before the draws of this one are taken, and
  // token -1 - i of its batch is what draw i of this one will be. Draws are taken in the order of
  // the steps, with the settings of each.
  void start_sample(const Batch& batch, const DrawSettings* settings);
  void take_draws(const DrawSettings* settings, Drawn* out) { step_.take_draws(settings, out); }

  // Have a library make the products of steps of more than kMaxPaddedRows rows with the matrices
  // of layers. Bits depend on the rows of a step from then on.
  void use_library(LibraryProduct product) { library_ = product; }

 private:
  void upload();
  void upload(Matrix* w);
  void finish_upload();
  void write_prefix(int64_t sequence, const float* keys, const float* values, int64_t length);
  template <class T>
  void upload(const T** data, int64_t count);

  // Start to append a batch and to compute an output, and to copy its results; rows of hidden
  // states and logits go to `out`. `admitted` is the batch with known tokens alone.
  void run(const Batch& batch, const Batch& admitted, Output output, const int64_t* targets,
           const DrawSettings* settings, float* out);
  void run_and_wait(const Batch& batch, Output output, const int64_t* targets,
                    const DrawSettings* settings, float* out);
  void reserve();
  void launch_blocks();
  bool uses_library() const { return library_ && step_.shape().num_rows > kMaxPaddedRows; }
  void multiply(const Matrix& w, int layer, Delta LayerDeltas::* of, LinearInput in,
                const LinearOutput& out);
  void norm_and_multiply(const float* weight, const float* bias, const Matrix& w, int layer,
                         Delta LayerDeltas::* of, LinearOutput out);
  void add_product(const uint16_t* in, int64_t stride, const Matrix& w, int layer,
                   Delta LayerDeltas::* of);
  void add_low_rank(const uint16_t* in, int64_t stride, const Matrix& w, int layer,
                    Delta LayerDeltas::* of, LinearOutput* out);
  bool has_delta(int layer, Delta LayerDeltas::* of, bool is_bottleneck) const;
  MatrixDeltas deltas(int layer, Delta LayerDeltas::* of, bool is_bottleneck,
                      const Matrix& w) const;
  void launch_output(int first, int count);
  void copy_output(int first, int count, float* out);
  void launch_graph();
  cudaGraphExec_t capture();
  void forget_graphs();

  // Rows of the buffers are padded, see kernels.h.
  static int64_t stride_of(int64_t width) { return round_up(width, kLanes); }
  int64_t qkv_stride() const {
    return stride_of((config_.n_head + 2 * config_.n_kv_head) * config_.head_dim);
  }
  int64_t attended_stride() const { return stride_of(config_.n_head * config_.head_dim); }
  HeadShape heads() const { return {config_.n_head, config_.n_kv_head, config_.head_dim}; }
  Norm norm(const float* weight, const float* bias) const;
  KvLayer kv_layer(int layer) const;

  const int device_;
  const bool has_graphs_;
  const ModelConfig config_;
  Model model_;  // its pointers, and those of `layers_`, are the device's
  std::vector<Layer> layers_;
  std::vector<DeviceBuffer> weights_;
  std::unordered_map<const void*, const void*> uploaded_;  // tied weights are there once

  std::vector<LayerDeltas> adapters_;  // the layers of an adapter after those of the one before
  DeviceBuffer device_adapters_;       // the same
  int32_t most_ranks_ = 0;             // of any delta

  KvBlocks blocks_;
  const KvKind kv_kind_;
  const int64_t block_bytes_, layer_bytes_;
  DeviceBuffer cache_;

  Stream stream_;
  Step step_;
  DeviceBuffer stream_rows_, normed_, rotations_, first_values_, qkv_, queries_, attended_, inner_,
      outputs_, scratch_;
  DeviceBuffer narrow_, addends_, branch_;  // of rows with adapters
  LibraryProduct library_ = nullptr;
  DeviceBuffer products_;                        // of the library
  std::map<StepShape, cudaGraphExec_t> graphs_;  // null: met once, and not captured yet
};

}  // namespace leangpt::cuda
