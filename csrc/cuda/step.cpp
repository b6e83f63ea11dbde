#include "step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace leangpt::cuda {
namespace {

constexpr int64_t kRoomBytes = 1 << 20;

// Arrays that follow each other in a buffer.
class Layout {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

int power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

int64_t num_top(const DrawSettings& s, int64_t vocab_size) {
  return std::clamp<int64_t>(s.num_logprobs, 0, vocab_size);
}

// Tokens that the penalties of a row meet.
int64_t context_length(const DrawSettings& s) {
  return s.repetition_penalty != 1 ? s.context_length : 0;
}
int64_t text_length(const DrawSettings& s) { return s.presence_penalty != 0 ? s.text_length : 0; }

}  // namespace

Step::Step(const ModelConfig& config, int32_t first_spare_page)
    : config_(config),
      tile_rows_(attention_tile_rows({config.n_head, config.n_kv_head, config.head_dim})),
      spare_tokens_(std::min(config.max_seq_len, kPageSize)),
      first_spare_page_(first_spare_page) {}

int Step::num_spare_pages(const ModelConfig& config) {
  const int tokens = std::min(config.max_seq_len, kPageSize);
  return (kMaxPaddedRows / 2 + tokens - 1) / tokens;
}

bool Step::gather(const Batch& batch, const std::vector<Row>& rows,
                  const std::vector<BlockCopy>& copies, Output output, const int64_t* targets,
                  const DrawSettings* settings, bool may_pad, cudaStream_t stream) {
  if (slots_[last_].is_kept) last_ = 1 - last_;
  if (slots_[last_].is_kept) throw std::runtime_error("two steps have draws that nobody took");
  num_copies_ = static_cast<int>(copies.size());
  set_shape(batch, rows, output, may_pad);
  const bool has_moved = place(batch, settings, stream);
  write_rows(batch, rows);
  static_assert(sizeof(BlockCopy) == 2 * sizeof(int32_t));
  const PinnedBuffer& inputs = slots_[last_].inputs;
  std::copy(copies.begin(), copies.end(), inputs.at<BlockCopy>(copies_));
  if (targets) {
    auto* copies = inputs.at<int64_t>(targets_);
    std::fill(std::copy_n(targets, batch.num_outputs, copies), copies + shape_.num_outputs, 0);
  }
  if (settings) write_settings(settings, batch.num_outputs);
  if (output == Output::kSample) num_draws_ = batch.num_outputs;
  return has_moved;
}

void Step::check_draws(const Batch& batch) const {
  for (int64_t i = 0; i < batch.num_tokens; ++i) {
    if (-1 - batch.tokens[i] >= num_draws_) {
      throw std::invalid_argument("token " + std::to_string(batch.tokens[i]) +
                                  " stands for a draw of the step before, which drew " +
                                  std::to_string(num_draws_));
    }
  }
}

void Step::set_shape(const Batch& batch, const std::vector<Row>& rows, Output output,
                     bool may_pad) {
  const int num_rows = static_cast<int>(rows.size());
  std::unordered_map<const Sequence*, int32_t> table_of;
  int64_t max_keys = 0, longest_prefix = 0;
  table_of_.clear();
  tables_.clear();
  all_tiles_.clear();
  for (int i = 0; i < num_rows; ++i) {
    const Sequence* sequence = rows[i].sequence;
    const auto [found, is_new] = table_of.try_emplace(sequence, tables_.size());
    if (is_new) tables_.push_back(sequence);
    table_of_.push_back(found->second);
    if (i > 0 && sequence == rows[i - 1].sequence && all_tiles_.back().num_rows < tile_rows_) {
      ++all_tiles_.back().num_rows;
    } else {
      all_tiles_.push_back({i, 1});
    }
    max_keys = std::max(max_keys, rows[i].place + 1);
    longest_prefix = std::max(longest_prefix, sequence->prefix);
  }
  const int num_outputs = static_cast<int>(batch.num_outputs);
  const int num_tables = static_cast<int>(tables_.size());
  shape_ = {num_rows,
            num_outputs,
            static_cast<int>(all_tiles_.size()),
            num_tables,
            static_cast<int>(max_keys),
            0,
            0,
            output,
            false};
  gather_adapters(rows);
  const bool has_own_sequences = num_tables == num_rows;
  if (may_pad && has_own_sequences && num_rows <= kMaxPaddedRows && num_outputs > 0 &&
      num_outputs <= num_rows) {
    const int padded = power_of_two(num_rows);
    const int keys =
        std::min(power_of_two(std::max<int64_t>(max_keys, kSplitKeys)),
                 static_cast<int>(round_up(config_.max_seq_len + longest_prefix, kPageSize)));
    const int num_adapted = shape_.num_delta_rows ? padded : 0;
    shape_ = {padded, padded, padded, padded, keys, num_adapted, num_adapted, output, true};
  }
}

void Step::gather_adapters(const std::vector<Row>& rows) {
  adapted_.clear();
  for (size_t i = 0; i < rows.size(); ++i) {
    const int32_t adapter = rows[i].sequence->adapter;
    if (adapter >= 0) adapted_[adapter].push_back(static_cast<int32_t>(i));
  }
  for (const auto& [adapter, of_adapter] : adapted_) {
    const int count = static_cast<int>(of_adapter.size());
    shape_.num_delta_rows += count;
    shape_.num_delta_tiles += (count + kDeltaTileRows - 1) / kDeltaTileRows;
  }
}

// Lay out inputs and results, in buffers that are large enough; whether one of the device's moved.
bool Step::place(const Batch& batch, const DrawSettings* settings, cudaStream_t stream) {
  table_stride_ = round_up(shape_.max_keys, kPageSize) / kPageSize;
  int64_t num_tops = 0, num_context_tokens = 0;
  for (int64_t i = 0; settings && i < batch.num_outputs; ++i) {
    num_tops += num_top(settings[i], config_.vocab_size);
    num_context_tokens += context_length(settings[i]) + text_length(settings[i]);
  }
  Layout inputs;
  tokens_ = inputs.add<int32_t>(shape_.num_rows);
  positions_ = inputs.add<int32_t>(shape_.num_rows);
  places_ = inputs.add<int32_t>(shape_.num_rows);
  table_of_at_ = inputs.add<int32_t>(shape_.num_rows);
  block_tables_ = inputs.add<int32_t>(shape_.num_tables * table_stride_);
  output_rows_ = inputs.add<int32_t>(shape_.num_outputs);
  tiles_ = inputs.add<AttentionTile>(shape_.num_tiles);
  delta_rows_ = inputs.add<int32_t>(shape_.num_delta_rows);
  delta_tiles_ = inputs.add<DeltaTile>(shape_.num_delta_tiles);
  addend_of_ = inputs.add<int32_t>(shape_.num_delta_rows ? shape_.num_rows : 0);
  targets_ = inputs.add<int64_t>(shape_.output == Output::kLogprobs ? shape_.num_outputs : 0);
  settings_ = inputs.add<DrawSettings>(settings ? shape_.num_outputs : 0);
  // last, since their number is no part of the shape
  copies_ = inputs.add<BlockCopy>(num_copies_);
  context_ = inputs.add<int64_t>(num_context_tokens);
  input_bytes_ = inputs.bytes();

  Slot& slot = slots_[last_];
  slot.num_outputs = batch.num_outputs;
  slot.num_draws = shape_.output == Output::kSample ? batch.num_outputs : 0;
  Layout results;
  if (shape_.output == Output::kLogprobs) results.add<float>(shape_.num_outputs);
  slot.top_tokens = results.add<int64_t>(num_tops);
  slot.top_logprobs = results.add<double>(num_tops);
  slot.result_bytes = results.bytes();
  slot.rest = round_up(slot.num_draws * static_cast<int64_t>(sizeof(Drawn)), 64);

  // in large pieces, so that they seldom move
  const int64_t input_room = round_up(input_bytes_, kRoomBytes);
  const int64_t result_room = round_up(slot.result_bytes, kRoomBytes);
  slot.inputs.reserve(input_room);
  slot.results.reserve(round_up(slot.rest + slot.result_bytes, kRoomBytes));
  bool has_moved = inputs_.reserve(input_room);
  has_moved |= results_.reserve(result_room);
  if (slot.num_draws) {
    has_moved |= drawn_.extend(shape_.num_outputs * static_cast<int64_t>(sizeof(Drawn)), stream);
  }
  return has_moved;
}

void Step::write_rows(const Batch& batch, const std::vector<Row>& rows) {
  const PinnedBuffer& inputs = slots_[last_].inputs;
  auto* tokens = inputs.at<int32_t>(tokens_);
  auto* positions = inputs.at<int32_t>(positions_);
  auto* places = inputs.at<int32_t>(places_);
  auto* table_of = inputs.at<int32_t>(table_of_at_);
  auto* block_tables = inputs.at<int32_t>(block_tables_);
  auto* output_rows = inputs.at<int32_t>(output_rows_);
  auto* tiles = inputs.at<AttentionTile>(tiles_);
  const int num_rows = static_cast<int>(rows.size());
  for (int i = 0; i < num_rows; ++i) {
    tokens[i] = static_cast<int32_t>(batch.tokens[i]);
    positions[i] = static_cast<int32_t>(rows[i].position);
    places[i] = static_cast<int32_t>(rows[i].place);
    table_of[i] = table_of_[i];
  }
  for (size_t i = 0; i < tables_.size(); ++i) {
    const auto& pages = tables_[i]->block_table;
    const int64_t count = std::min<int64_t>(pages.size(), table_stride_);
    std::copy_n(pages.begin(), count, block_tables + i * table_stride_);
  }
  std::copy(all_tiles_.begin(), all_tiles_.end(), tiles);
  std::copy_n(batch.output_rows, batch.num_outputs, output_rows);

  for (int i = num_rows; i < shape_.num_rows; ++i) {
    // the tokens of a spare page are all written by this step before one is read
    const int spare = i - num_rows;
    tokens[i] = 0;
    positions[i] = places[i] = spare % spare_tokens_;
    table_of[i] = i;
    block_tables[i * table_stride_] = first_spare_page_ + spare / spare_tokens_;
    tiles[i] = {i, 1};
  }
  std::fill(output_rows + batch.num_outputs, output_rows + shape_.num_outputs, 0);
  if (shape_.num_delta_rows) write_adapters();
}

void Step::write_adapters() {
  const PinnedBuffer& inputs = slots_[last_].inputs;
  auto* rows = inputs.at<int32_t>(delta_rows_);
  auto* tiles = inputs.at<DeltaTile>(delta_tiles_);
  auto* addend_of = inputs.at<int32_t>(addend_of_);
  std::fill_n(addend_of, shape_.num_rows, -1);
  std::fill_n(tiles, shape_.num_delta_tiles, DeltaTile{});
  int32_t first = 0;
  for (const auto& [adapter, of_adapter] : adapted_) {
    const int32_t end = first + static_cast<int32_t>(of_adapter.size());
    for (int32_t i = first; i < end; ++i) {
      rows[i] = of_adapter[i - first];
      addend_of[rows[i]] = i;
    }
    for (; first < end; first += kDeltaTileRows) {
      *tiles++ = {adapter, first, std::min(kDeltaTileRows, end - first)};
    }
    first = end;
  }
  std::fill(rows + first, rows + shape_.num_delta_rows, 0);
}

void Step::write_settings(const DrawSettings* settings, int64_t count) {
  const Slot& slot = slots_[last_];
  auto* copies = slot.inputs.at<DrawSettings>(settings_);
  int64_t context = context_, top_tokens = slot.top_tokens, top_logprobs = slot.top_logprobs;
  const auto add_context = [&](const int64_t* tokens, int64_t length) {
    std::copy_n(tokens, length, slot.inputs.at<int64_t>(context));
    const auto* on_device = inputs_.at<int64_t>(context);
    context += length * static_cast<int64_t>(sizeof(int64_t));
    return on_device;
  };
  for (int64_t i = 0; i < count; ++i) {
    DrawSettings& copy = copies[i] = settings[i];
    copy.context_length = context_length(copy);
    copy.context = add_context(copy.context, copy.context_length);
    copy.text_length = text_length(copy);
    copy.text = add_context(copy.text, copy.text_length);
    const int64_t num_tops = num_top(copy, config_.vocab_size);
    copy.num_logprobs = std::min<int64_t>(copy.num_logprobs, config_.vocab_size);
    copy.top_tokens = results_.at<int64_t>(top_tokens);
    copy.top_logprobs = results_.at<double>(top_logprobs);
    top_tokens += num_tops * static_cast<int64_t>(sizeof(int64_t));
    top_logprobs += num_tops * static_cast<int64_t>(sizeof(double));
  }
  DrawSettings greedy = {};
  greedy.top_p = greedy.repetition_penalty = 1;
  greedy.vocab_limit = config_.vocab_size;
  greedy.num_logprobs = -1;
  std::fill(copies + count, copies + shape_.num_outputs, greedy);
}

void Step::send(cudaStream_t stream) {
  check(cudaMemcpyAsync(inputs_.at(), slots_[last_].inputs.at(), input_bytes_,
                        cudaMemcpyHostToDevice, stream),
        "copying a step's inputs");
}

StepRows Step::rows() const {
  return {inputs_.at<int32_t>(places_), inputs_.at<int32_t>(table_of_at_),
          inputs_.at<int32_t>(block_tables_), table_stride_, shape_.num_rows};
}

DeltaRows Step::delta_rows() const {
  return {inputs_.at<int32_t>(delta_rows_), inputs_.at<DeltaTile>(delta_tiles_),
          shape_.num_delta_tiles};
}

void Step::receive(cudaStream_t stream) {
  Slot& slot = slots_[last_];
  const auto copy = [&](int64_t to, const DeviceBuffer& from, int64_t bytes) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(slot.results.at(to), from.at(), bytes, cudaMemcpyDeviceToHost, stream),
          "copying a step's results");
  };
  copy(0, drawn_, slot.num_draws * static_cast<int64_t>(sizeof(Drawn)));
  copy(slot.rest, results_, slot.result_bytes);
  slot.is_done.record(stream);
}

void Step::copy_logprobs(float* out) const {
  const Slot& slot = slots_[last_];
  std::copy_n(slot.results.at<float>(slot.rest), slot.num_outputs, out);
}

void Step::copy_draws(const DrawSettings* settings, Drawn* out) const {
  copy_draws(slots_[last_], settings, out);
}

void Step::take_draws(const DrawSettings* settings, Drawn* out) {
  Slot& slot = slots_[slots_[1 - last_].is_kept ? 1 - last_ : last_];
  if (!slot.is_kept) throw std::runtime_error("there are no draws to take");
  slot.is_kept = false;
  slot.is_done.wait();
  copy_draws(slot, settings, out);
}

void Step::copy_draws(const Slot& slot, const DrawSettings* settings, Drawn* out) const {
  std::copy_n(slot.results.at<Drawn>(), slot.num_draws, out);
  const auto* tokens = slot.results.at<int64_t>(slot.rest + slot.top_tokens);
  const auto* logprobs = slot.results.at<double>(slot.rest + slot.top_logprobs);
  for (int64_t i = 0; i < slot.num_draws; ++i) {
    const int64_t num_tops = num_top(settings[i], config_.vocab_size);
    std::copy_n(tokens, num_tops, settings[i].top_tokens);
    std::copy_n(logprobs, num_tops, settings[i].top_logprobs);
    tokens += num_tops;
    logprobs += num_tops;
  }
}

}  // namespace leangpt::cuda
