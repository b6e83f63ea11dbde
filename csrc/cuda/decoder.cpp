#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace leangpt::cuda {
namespace {

constexpr int kOutputRows = kMaxPaddedRows;  // hidden states or logits that are held at a time

std::string text(int64_t n) { return std::to_string(n); }

// The number of the matrix of a layer that these deltas are for, see LibraryProduct.
int matrix_number(int layer, Delta LayerDeltas::* of) {
  constexpr Delta LayerDeltas::* kOrder[] = {&LayerDeltas::qkv, &LayerDeltas::attn_out,
                                             &LayerDeltas::mlp_in, &LayerDeltas::mlp_out};
  return 4 * layer + static_cast<int>(std::find(kOrder, kOrder + 4, of) - kOrder);
}

// The config of a model that the kernels know.
const ModelConfig& checked(const Model& model, int device) {
  if (model.config.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim must be at most " + text(kMaxHeadDim) + " on CUDA, got " +
                                text(model.config.head_dim));
  }
  if (model.embedding.kind == WeightKind::kFp32) {
    throw std::invalid_argument(
        "the model's weights are packed as fp32: the CUDA decode engine multiplies bf16, int8 and "
        "int4; pack it as bf16");
  }
  check_device(device);
  return model.config;
}

}  // namespace

void check_device(int device) {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
    throw std::runtime_error("there is no GPU to decode on: no NVIDIA driver is installed");
  }
  check(cudaGetDeviceCount(&count), "there is no GPU to decode on");
  if (device < 0 || device >= count) {
    throw std::invalid_argument("there is no device cuda:" + text(device) + ", of " + text(count));
  }
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  if (major < 8) {
    throw std::invalid_argument(
        "the CUDA decode engine needs compute capability 8.0 or higher (A100, RTX 30 and later), "
        "cuda:" +
        text(device) + " has " + text(major) + ".x");
  }
}

int64_t free_memory(int device) {
  const DeviceGuard guard(device);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(free);
}

Decoder::Decoder(const Model& model, KvKind kv_kind, int32_t num_blocks, int device,
                 bool has_graphs)
    : device_(device),
      has_graphs_(has_graphs),
      config_(checked(model, device)),
      model_(model),
      layers_(model.layers, model.layers + model.config.n_layer),
      blocks_(num_blocks),
      kv_kind_(kv_kind),
      block_bytes_(kv_block_bytes(config_.n_kv_head, config_.head_dim, kv_kind)),
      layer_bytes_(block_bytes_ * (int64_t{num_blocks} + Step::num_spare_pages(config_))),
      step_(config_, num_blocks) {
  const DeviceGuard guard(device_);
  stream_.create();
  upload();
  const int64_t cache_bytes = layer_bytes_ * config_.n_layer, free = free_memory(device_);
  if (cache_bytes > free) {
    throw std::runtime_error("the key/value cache of " + text(num_blocks) + " pages needs " +
                             text(cache_bytes >> 20) + " MiB of GPU memory, and " +
                             text(free >> 20) +
                             " MiB are free beside the weights: lower num_blocks");
  }
  cache_.reserve(cache_bytes);
}

Decoder::~Decoder() {
  cudaStreamSynchronize(stream_);
  forget_graphs();
}

// Copy all weights, and point to the copies.
void Decoder::upload() {
  const int64_t C = round_up(config_.n_embd, kLanes), D = round_up(config_.head_dim, kLanes);
  for (Layer& l : layers_) {
    for (const float** vector :
         {&l.norm_1_weight, &l.norm_1_bias, &l.norm_2_weight, &l.norm_2_bias}) {
      upload(vector, C);
    }
    for (const float** vector : {&l.q_norm, &l.k_norm}) upload(vector, D);
    for (Matrix* w : {&l.qkv, &l.attn_out, &l.mlp_in, &l.mlp_out}) upload(w);
  }
  model_.layers = layers_.data();
  upload(&model_.norm_f_weight, C);
  upload(&model_.norm_f_bias, C);
  upload(&model_.positions, config_.max_seq_len * C);
  upload(&model_.frequencies, config_.head_dim / 2);
  upload(&model_.embedding);
  upload(&model_.head);
  model_.screen = {};  // for few rows on a CPU
  model_.screen_errors = nullptr;
  finish_upload();
}

void Decoder::finish_upload() {
  // the last copies may still be on their way, and `stream_` does not wait for them
  check(cudaDeviceSynchronize(), "copying the weights");
  uploaded_.clear();
}

void Decoder::upload(Matrix* w) {
  upload(&w->data, w->panels() * w->panel_bytes());
  if (w->scales) {
    const auto* scales = static_cast<const uint8_t*>(w->scales);
    upload(&scales, w->scale_bytes());
    w->scales = scales;
  }
  upload(&w->minimums, w->num_scales());
  upload(&w->bias, w->panels() * kPanelWidth);
}

template <class T>
void Decoder::upload(const T** data, int64_t count) {
  if (*data == nullptr) return;
  const void*& copy = uploaded_[*data];
  if (copy == nullptr) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    DeviceBuffer buffer;
    buffer.reserve(bytes);
    check(cudaMemcpy(buffer.at(), *data, bytes, cudaMemcpyHostToDevice), "copying the weights");
    copy = buffer.at();
    weights_.push_back(std::move(buffer));
  }
  *data = static_cast<const T*>(copy);
}

int32_t Decoder::add_adapter(const LayerDeltas* layers) {
  const DeviceGuard guard(device_);
  const size_t num_buffers = weights_.size(), num_layers = adapters_.size();
  try {
    for (int i = 0; i < config_.n_layer; ++i) {
      LayerDeltas layer = layers[i];
      for (Delta* delta : {&layer.qkv, &layer.attn_out, &layer.mlp_in, &layer.mlp_out}) {
        if (delta->down.data == nullptr) continue;
        most_ranks_ = std::max(most_ranks_, delta->down.n);
        upload(&delta->down);
        upload(&delta->up);
      }
      adapters_.push_back(layer);
    }
    const int64_t bytes = static_cast<int64_t>(adapters_.size() * sizeof(LayerDeltas));
    device_adapters_.reserve(bytes);
    check(cudaMemcpy(device_adapters_.at(), adapters_.data(), bytes, cudaMemcpyHostToDevice),
          "copying the adapters");
    finish_upload();
  } catch (...) {  // as if it had not been
    adapters_.resize(num_layers);
    while (weights_.size() > num_buffers) weights_.pop_back();
    uploaded_.clear();
    throw;
  }
  forget_graphs();  // they know which matrices any adapter has a delta for, and where
  return static_cast<int32_t>(adapters_.size()) / config_.n_layer - 1;
}

int64_t Decoder::add_sequence(const float* keys, const float* values, int64_t prefix,
                              int32_t adapter) {
  const auto num_adapters = static_cast<int64_t>(adapters_.size()) / config_.n_layer;
  if (adapter < -1 || adapter >= num_adapters) {
    throw std::invalid_argument("there is no adapter " + text(adapter) +
                                ": add_adapter gives its number");
  }
  const int64_t number = blocks_.add();
  try {
    if (prefix > 0) write_prefix(number, keys, values, prefix);
  } catch (...) {
    blocks_.drop(number);
    throw;
  }
  Sequence& sequence = blocks_.at(number);
  sequence.length = sequence.prefix = prefix;
  sequence.adapter = adapter;
  return number;
}

void Decoder::write_prefix(int64_t sequence, const float* keys, const float* values,
                           int64_t length) {
  const DeviceGuard guard(device_);
  std::vector<BlockCopy> copies;  // none: it shares no page
  blocks_.reserve({{sequence, length}}, &copies);
  const std::vector<int32_t>& pages = blocks_.at(sequence).block_table;
  DeviceBuffer memory[3];
  const auto copy = [&](int i, const void* from, int64_t bytes) {
    memory[i].reserve(bytes);
    check(cudaMemcpyAsync(memory[i].at(), from, bytes, cudaMemcpyHostToDevice, stream_),
          "copying a prefix");
  };
  const int64_t bytes = config_.n_layer * length * config_.n_kv_head * config_.head_dim *
                        static_cast<int64_t>(sizeof(float));
  copy(0, keys, bytes);
  copy(1, values, bytes);
  copy(2, pages.data(), static_cast<int64_t>(pages.size() * sizeof(int32_t)));
  cuda::write_prefix(
      {memory[0].at<float>(), memory[1].at<float>(), static_cast<int>(length), config_.n_layer},
      heads(), memory[2].at<int32_t>(), kv_layer(0), layer_bytes_, stream_);
  check(cudaStreamSynchronize(stream_), "writing a prefix");
}

Norm Decoder::norm(const float* weight, const float* bias) const {
  return {weight, bias, config_.norm_eps, config_.is_rms_norm != 0};
}

KvLayer Decoder::kv_layer(int layer) const {
  return {cache_.at(layer * layer_bytes_), block_bytes_, kv_kind_};
}

// Room for what the step's kernels write; graphs are forgotten where it moves.
void Decoder::reserve() {
  const StepShape& shape = step_.shape();
  const int64_t N = shape.num_rows, outputs = std::min(shape.num_outputs, kOutputRows);
  const int64_t floats = sizeof(float), halves = sizeof(uint16_t);
  const int64_t widths[] = {stride_of(config_.n_embd), stride_of(config_.vocab_size)};
  const int64_t scratch_bytes =
      std::max(attention_scratch_floats(heads(), shape.num_rows, shape.max_keys) * floats,
               sample_scratch_bytes(config_.vocab_size, static_cast<int>(outputs)));
  bool has_moved = stream_rows_.reserve(N * widths[0] * floats);
  has_moved |= qkv_.reserve(N * qkv_stride() * floats);
  has_moved |= queries_.reserve(N * attended_stride() * halves);
  has_moved |= attended_.reserve(N * attended_stride() * halves);
  has_moved |= rotations_.reserve(model_.frequencies ? N * config_.head_dim * floats : 0);
  has_moved |= first_values_.reserve(
      config_.value_residual ? N * config_.n_kv_head * config_.head_dim * floats : 0);
  has_moved |= normed_.reserve(std::max(N, outputs) * widths[0] * halves);
  has_moved |= inner_.reserve(N * stride_of(config_.n_inner) * halves);
  has_moved |= outputs_.reserve(outputs * std::max(widths[0], widths[1]) * floats);
  has_moved |= scratch_.reserve(scratch_bytes);
  const int64_t widest = std::max({layers_[0].qkv.n, layers_[0].attn_out.n, layers_[0].mlp_in.n});
  if (shape.num_delta_rows) {
    const int64_t rows = shape.num_delta_rows * floats;
    has_moved |= narrow_.reserve(rows * round_up(most_ranks_, kPanelWidth));
    has_moved |= addends_.reserve(rows * round_up(widest, kPanelWidth));
    has_moved |= branch_.reserve(N * widths[0] * floats);
  }
  if (uses_library()) products_.reserve(N * stride_of(widest) * floats);
  if (has_moved) forget_graphs();
}

bool Decoder::has_delta(int layer, Delta LayerDeltas::* of, bool is_bottleneck) const {
  for (size_t i = layer; i < adapters_.size(); i += config_.n_layer) {
    const Delta& delta = adapters_[i].*of;
    if (delta.down.data && (delta.is_bottleneck != 0) == is_bottleneck) return true;
  }
  return false;
}

MatrixDeltas Decoder::deltas(int layer, Delta LayerDeltas::* of, bool is_bottleneck,
                             const Matrix& w) const {
  static_assert(sizeof(LayerDeltas) % sizeof(Delta) == 0);
  constexpr int64_t kOfALayer = sizeof(LayerDeltas) / sizeof(Delta);
  const LayerDeltas* first = device_adapters_.at<LayerDeltas>() + layer;
  return {&(first->*of), config_.n_layer * kOfALayer, is_bottleneck, w.n, most_ranks_};
}

// What low-rank deltas add to a product of these rows goes to its output.
void Decoder::add_low_rank(const uint16_t* in, int64_t stride, const Matrix& w, int layer,
                           Delta LayerDeltas::* of, LinearOutput* out) {
  if (!has_delta(layer, of, false)) return;
  multiply_deltas(deltas(layer, of, false, w), step_.delta_rows(), in, stride, narrow_.at<float>(),
                  addends_.at<float>(), stream_);
  out->addends = addends_.at<float>();
  out->addend_of = step_.addend_of();
}

// out = product with the matrix of a layer that deltas `of` are for.
void Decoder::multiply(const Matrix& w, int layer, Delta LayerDeltas::* of, LinearInput in,
                       const LinearOutput& out) {
  const int N = step_.shape().num_rows;
  if (!uses_library()) return linear_decode(w, in, out, N, stream_);
  if (in.stream) {
    normalize(in.stream, in.stride, nullptr, in.norm, w.k, in.normed, in.stride, N, stream_);
    in.rows = in.normed;
  }
  auto* products = products_.at<float>();
  const int64_t stride = stride_of(w.n);
  if (library_(matrix_number(layer, of), in.rows, in.stride, N, products, stride, stream_) != 0) {
    throw std::runtime_error("the library could not multiply");
  }
  finish_products(w, products, stride, out, N, stream_);
}

// out = product of the normed stream, with the deltas of the rows that have some
void Decoder::norm_and_multiply(const float* weight, const float* bias, const Matrix& w, int layer,
                                Delta LayerDeltas::* of, LinearOutput out) {
  const int N = step_.shape().num_rows;
  const int64_t C = stride_of(config_.n_embd);
  const auto* x = stream_rows_.at<float>();
  auto* normed = normed_.at<uint16_t>();
  LinearInput in = {x, nullptr, C, nullptr, norm(weight, bias), normed};
  if (step_.shape().num_delta_rows) {  // deltas read what the matrix reads
    normalize(x, C, nullptr, in.norm, config_.n_embd, normed, C, N, stream_);
    in = {nullptr, normed, C, nullptr, {}, nullptr};
    add_low_rank(normed, C, w, layer, of, &out);
  }
  multiply(w, layer, of, in, out);
}

// stream += product, with the deltas of the rows that have some
void Decoder::add_product(const uint16_t* in, int64_t stride, const Matrix& w, int layer,
                          Delta LayerDeltas::* of) {
  const int N = step_.shape().num_rows;
  const int64_t C = stride_of(config_.n_embd);
  auto* x = stream_rows_.at<float>();
  LinearOutput out = {nullptr, x, nullptr, C, Activation::kNone};
  const bool has_deltas = step_.shape().num_delta_rows > 0;
  const bool has_bottleneck = has_deltas && has_delta(layer, of, true);
  if (has_deltas) add_low_rank(in, stride, w, layer, of, &out);
  auto* branch = branch_.at<float>();
  if (has_bottleneck) {  // which reads the product before it is in the stream
    out.stream = nullptr;
    out.out = branch;
  }
  multiply(w, layer, of, {nullptr, in, stride, nullptr, {}, nullptr}, out);
  if (!has_bottleneck) return;
  multiply_deltas(deltas(layer, of, true, w), step_.delta_rows(), branch, C, narrow_.at<float>(),
                  addends_.at<float>(), stream_);
  add_branch(branch, addends_.at<float>(), step_.addend_of(), w.n, x, C, N, stream_);
}

void Decoder::launch_blocks() {
  const int N = step_.shape().num_rows;
  const int64_t C = stride_of(config_.n_embd), inner_stride = stride_of(config_.n_inner);
  auto* x = stream_rows_.at<float>();
  auto* qkv = qkv_.at<float>();
  auto* attended = attended_.at<uint16_t>();
  auto* inner = inner_.at<uint16_t>();
  const StepRows rows = step_.rows();

  embed(model_.embedding, model_.positions, round_up(config_.n_embd, kLanes), step_.tokens(),
        step_.drawn(), step_.positions(), x, C, N, stream_);
  const float* rotations = model_.frequencies ? rotations_.at<float>() : nullptr;
  if (rotations) {
    rotary_angles(step_.positions(), model_.frequencies, model_.rope_magnitude, config_.head_dim,
                  rotations_.at<float>(), N, stream_);
  }
  auto* first_values = config_.value_residual ? first_values_.at<float>() : nullptr;
  for (int layer = 0; layer < config_.n_layer; ++layer) {
    const Layer& l = layers_[layer];
    const KvLayer pages = kv_layer(layer);
    norm_and_multiply(l.norm_1_weight, l.norm_1_bias, l.qkv, layer, &LayerDeltas::qkv,
                      {qkv, nullptr, nullptr, qkv_stride(), Activation::kNone});
    append_kv({qkv, qkv_stride(), l.q_norm, l.k_norm, config_.norm_eps, rotations,
               queries_.at<uint16_t>(), attended_stride(), first_values, layer == 0},
              heads(), rows, pages, stream_);
    attention_decode({queries_.at<uint16_t>(), attended, attended_stride(), step_.tiles(),
                      step_.shape().num_tiles, step_.shape().max_keys, config_.sliding_window,
                      scratch_.at<float>()},
                     heads(), rows, pages, stream_);
    add_product(attended, attended_stride(), l.attn_out, layer, &LayerDeltas::attn_out);
    norm_and_multiply(l.norm_2_weight, l.norm_2_bias, l.mlp_in, layer, &LayerDeltas::mlp_in,
                      {nullptr, nullptr, inner, inner_stride, config_.activation});
    add_product(inner, inner_stride, l.mlp_out, layer, &LayerDeltas::mlp_out);
  }
}

// Hidden states or logits of some of the output rows, and what is made of logits.
void Decoder::launch_output(int first, int count) {
  const int64_t C = stride_of(config_.n_embd), V = stride_of(config_.vocab_size);
  const int32_t* rows = step_.output_rows() + first;
  const Norm norm_f = norm(model_.norm_f_weight, model_.norm_f_bias);
  const auto* x = stream_rows_.at<float>();
  auto* out = outputs_.at<float>();
  const Output output = step_.shape().output;
  if (output == Output::kHidden) {
    normalize(x, C, rows, norm_f, config_.n_embd, out, C, count, stream_);
    return;
  }
  linear_decode(model_.head, {x, nullptr, C, rows, norm_f, normed_.at<uint16_t>()},
                {out, nullptr, nullptr, V, Activation::kNone}, count, stream_);
  if (output == Output::kLogprobs) {
    log_probs(out, V, config_.vocab_size, step_.targets() + first, step_.logprobs() + first, count,
              stream_);
  } else if (output == Output::kSample) {
    cuda::sample(out, V, config_.vocab_size, step_.settings() + first, step_.drawn() + first,
                 scratch_.at(), count, stream_);
  }
}

void Decoder::copy_output(int first, int count, float* out) {
  const int64_t width =
      step_.shape().output == Output::kHidden ? config_.n_embd : config_.vocab_size;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(float));
  check(cudaMemcpy2DAsync(out + first * width, row_bytes, outputs_.at(),
                          stride_of(width) * sizeof(float), row_bytes, count,
                          cudaMemcpyDeviceToHost, stream_),
        "copying logits");
}

void Decoder::launch_graph() {
  const auto [found, is_new] = graphs_.try_emplace(step_.shape(), nullptr);
  if (is_new) {  // its kernels are loaded by this, which a capture could not do
    launch_blocks();
    launch_output(0, step_.shape().num_outputs);
    return;
  }
  if (found->second == nullptr) found->second = capture();
  check(cudaGraphLaunch(found->second, stream_), "cudaGraphLaunch");
}

cudaGraphExec_t Decoder::capture() {
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capturing a step");
  cudaGraph_t graph = nullptr;
  try {
    launch_blocks();
    launch_output(0, step_.shape().num_outputs);
  } catch (...) {
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  check(cudaStreamEndCapture(stream_, &graph), "capturing a step");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiateWithFlags(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
  return executable;
}

int Decoder::num_graphs() const {
  return static_cast<int>(std::count_if(graphs_.begin(), graphs_.end(),
                                        [](const auto& entry) { return entry.second != nullptr; }));
}

void Decoder::forget_graphs() {
  if (!graphs_.empty()) cudaStreamSynchronize(stream_);  // one may be on its way
  for (const auto& [shape, graph] : graphs_) {
    if (graph) cudaGraphExecDestroy(graph);
  }
  graphs_.clear();
}

void Decoder::run(const Batch& batch, const Batch& admitted, Output output, const int64_t* targets,
                  const DrawSettings* settings, float* out) {
  const DeviceGuard guard(device_);
  std::vector<BlockCopy> copies;
  const std::vector<Row> rows = admit(admitted, config_, blocks_, &copies);
  if (step_.gather(batch, rows, copies, output, targets, settings, has_graphs_, stream_)) {
    forget_graphs();
  }
  step_.send(stream_);
  if (!copies.empty()) {  // first of all: sequences have these pages now, even if the step fails
    copy_pages(cache_.at(), layer_bytes_, config_.n_layer, block_bytes_, step_.copies(),
               step_.num_copies(), stream_);
  }
  reserve();
  const int num_outputs = static_cast<int>(batch.num_outputs);
  if (step_.shape().is_padded) {
    launch_graph();
    if (out) copy_output(0, num_outputs, out);
  } else {
    launch_blocks();
    for (int first = 0; first < num_outputs; first += kOutputRows) {
      const int count = std::min(kOutputRows, num_outputs - first);
      launch_output(first, count);
      if (out) copy_output(first, count, out);
    }
  }
  step_.receive(stream_);
  for (const Row& row : rows) ++row.sequence->length;
}

void Decoder::run_and_wait(const Batch& batch, Output output, const int64_t* targets,
                           const DrawSettings* settings, float* out) {
  run(batch, batch, output, targets, settings, out);
  step_.wait();
}

void Decoder::hidden(const Batch& batch, float* out) {
  run_and_wait(batch, Output::kHidden, nullptr, nullptr, out);
}

void Decoder::logits(const Batch& batch, float* out) {
  run_and_wait(batch, Output::kLogits, nullptr, nullptr, out);
}

void Decoder::logprobs(const Batch& batch, const int64_t* targets, float* out) {
  check_targets(batch, targets, config_.vocab_size);
  run_and_wait(batch, Output::kLogprobs, targets, nullptr, nullptr);
  step_.copy_logprobs(out);
}

void Decoder::sample(const Batch& batch, const DrawSettings* settings, Drawn* out) {
  run_and_wait(batch, Output::kSample, nullptr, settings, nullptr);
  step_.copy_draws(settings, out);
}

void Decoder::start_sample(const Batch& batch, const DrawSettings* settings) {
  step_.check_draws(batch);
  std::vector<int64_t> known(batch.tokens, batch.tokens + batch.num_tokens);
  for (int64_t& token : known) token = std::max<int64_t>(token, 0);
  Batch admitted = batch;
  admitted.tokens = known.data();
  run(batch, admitted, Output::kSample, nullptr, settings, nullptr);
  step_.keep_draws();
}

}  // namespace leangpt::cuda
