// What a step needs on the device, gathered on the host and copied there at once; and its results,
// on their way back. While a step that draws tokens is on its way, the next one may be gathered, in
// other memory of the host, with tokens in it that are not known here yet.
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

  // Take in a batch whose rows were admitted; steps are in the work of `stream`. `targets` and
  // `settings` are for the output that needs them. Returns whether device memory has moved, which
  // graphs hold addresses of. Token -1 - i is that of draw i of the last step that drew any, whose
  // draws are kept.
  bool gather(const Batch& batch, const std::vector<Row>& rows,
              const std::vector<BlockCopy>& copies, Output output, const int64_t* targets,
              const DrawSettings* settings, bool may_pad, cudaStream_t stream);
  // Throws std::invalid_argument where a token below 0 stands for no draw.
  void check_draws(const Batch& batch) const;
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
  Drawn* drawn() const { return drawn_.at<Drawn>(); }

  // Have the results copied to the host, behind what is in the stream. What waits for them waits
  // for nothing else.
  void receive(cudaStream_t stream);
  void wait() const { slots_[last_].is_done.wait(); }
  void copy_logprobs(float* out) const;
  void copy_draws(const DrawSettings* settings, Drawn* out) const;
  // Keep the draws until they are taken, in the order of the steps; two steps may be kept.
  void keep_draws() { slots_[last_].is_kept = true; }
  void take_draws(const DrawSettings* settings, Drawn* out);

 private:
  // The host's memory of a step that is on its way.
  struct Slot {
    PinnedBuffer inputs, results;  // draws, then the rest
    Event is_done;
    bool is_kept = false;
    int64_t num_outputs, num_draws;
    int64_t rest, top_tokens, top_logprobs, result_bytes;  // where things lie in the results
  };

  void copy_draws(const Slot& slot, const DrawSettings* settings, Drawn* out) const;
  void set_shape(const Batch& batch, const std::vector<Row>& rows, Output output, bool may_pad);
  void gather_adapters(const std::vector<Row>& rows);
  bool place(const Batch& batch, const DrawSettings* settings, cudaStream_t stream);
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

  Slot slots_[2];
  int last_ = 0;           // the slot of the last step
  int64_t num_draws_ = 0;  // that tokens may stand for
  DeviceBuffer inputs_, results_, drawn_;
  // where things lie in the inputs, in bytes
  int64_t tokens_, positions_, places_, table_of_at_, block_tables_, output_rows_, tiles_,
      delta_rows_, delta_tiles_, addend_of_, targets_, settings_, copies_, context_, input_bytes_;
  int64_t table_stride_;
};

}  // namespace leangpt::cuda
