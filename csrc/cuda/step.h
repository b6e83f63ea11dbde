// What a step needs on the device, gathered on the host and copied there at once; and its results,
// on their way back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "../batch.h"
#include "../draw.h"
#include "kernels.h"
#include "memory.h"

namespace leangpt::cuda {

enum class Output { kHidden, kLogits, kLogprobs, kSample };

// What a step's kernels are launched with; all else they read from device memory.
struct StepShape {
  int num_rows, num_outputs, num_tiles, num_tables;
  int max_keys;  // of any row
  // Rows of sequences with adapters, and tiles of them; 0: there are none.
  int num_delta_rows, num_delta_tiles;
  Output output;
  // Rows, outputs and keys are raised to powers of two, so that few shapes, and a graph of each,
  // serve all steps that append one token to each sequence.
  bool is_padded;

  bool operator<(const StepShape& other) const { return key() < other.key(); }

 private:
  std::tuple<int, int, int, Output> key() const {
    return {num_rows, max_keys, num_delta_tiles, output};
  }
};

constexpr int kMaxPaddedRows = 256;

class Step {
 public:
  // Rows that are added write to pages from `first_spare_page` on, of which there are
  // num_spare_pages().
  Step(const ModelConfig& config, int32_t first_spare_page);
  static int num_spare_pages(const ModelConfig& config);

  // Take in a batch whose rows were admitted. `targets` and `settings` are for the output that
  // needs them. Returns whether device memory has moved, which graphs hold addresses of.
  bool gather(const Batch& batch, const std::vector<Row>& rows,
              const std::vector<BlockCopy>& copies, Output output, const int64_t* targets,
              const DrawSettings* settings, bool may_pad);
  void send(cudaStream_t stream);

  const StepShape& shape() const { return shape_; }
  StepRows rows() const;
  DeltaRows delta_rows() const;
  // Device memory.
  const int32_t* tokens() const { return inputs_.at<int32_t>(tokens_); }
  const int32_t* positions() const { return inputs_.at<int32_t>(positions_); }
  const int32_t* output_rows() const { return inputs_.at<int32_t>(output_rows_); }
  const AttentionTile* tiles() const { return inputs_.at<AttentionTile>(tiles_); }
  const int32_t* copies() const { return inputs_.at<int32_t>(copies_); }
  int num_copies() const { return num_copies_; }
  const int32_t* addend_of() const { return inputs_.at<int32_t>(addend_of_); }
  const int64_t* targets() const { return inputs_.at<int64_t>(targets_); }
  const DrawSettings* settings() const { return inputs_.at<DrawSettings>(settings_); }
  float* logprobs() const { return results_.at<float>(); }
  Drawn* drawn() const { return results_.at<Drawn>(); }

  // Log-probabilities or draws, for once the stream is done.
  void receive(cudaStream_t stream);
  void copy_logprobs(int64_t count, float* out) const;
  void copy_draws(const DrawSettings* settings, int64_t count, Drawn* out) const;

 private:
  void set_shape(const Batch& batch, const std::vector<Row>& rows, Output output, bool may_pad);
  void gather_adapters(const std::vector<Row>& rows);
  bool place(const Batch& batch, const DrawSettings* settings);
  void write_rows(const Batch& batch, const std::vector<Row>& rows);
  void write_adapters();
  void write_settings(const DrawSettings* settings, int64_t count);

  const ModelConfig config_;
  const int tile_rows_, spare_tokens_;  // tokens of a spare page
  const int32_t first_spare_page_;
  StepShape shape_;
  std::vector<int32_t> table_of_;
  std::vector<const Sequence*> tables_;
  std::vector<AttentionTile> all_tiles_;
  std::map<int32_t, std::vector<int32_t>> adapted_;  // rows by adapter
  int num_copies_;

  PinnedBuffer host_inputs_, host_results_;
  DeviceBuffer inputs_, results_;
  // where things lie in them, in bytes
  int64_t tokens_, positions_, places_, table_of_at_, block_tables_, output_rows_, tiles_,
      delta_rows_, delta_tiles_, addend_of_, targets_, settings_, copies_, context_, input_bytes_;
  int64_t table_stride_;
  int64_t top_tokens_, top_logprobs_, result_bytes_;
};

}  // namespace leangpt::cuda
