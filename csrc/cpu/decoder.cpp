#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace leangpt::cpu {
namespace {

constexpr int64_t kLogitRows = 64;  // logits that are held at a time
// With more rows the head is bound by its products, not by reading it, and screening saves nothing.
constexpr int64_t kScreenedRows = 4;
constexpr int64_t kScreenedTopK = 256;

}  // namespace

Decoder::Decoder(const Model& model, KvKind kv_kind, int32_t num_blocks)
    : model_(model),
      blocks_(num_blocks),
      cache_(model.config.n_layer, model.config.n_kv_head, model.config.head_dim, kv_kind,
             num_blocks) {
  if (model.config.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim must be at most " + std::to_string(kMaxHeadDim) +
                                ", got " + std::to_string(model.config.head_dim));
  }
}

int32_t Decoder::add_adapter(const LayerDeltas* layers) {
  adapters_.emplace_back(layers, layers + model_.config.n_layer);
  return static_cast<int32_t>(adapters_.size()) - 1;
}

int64_t Decoder::add_sequence(const float* keys, const float* values, int64_t prefix,
                              int32_t adapter) {
  if (adapter < -1 || adapter >= static_cast<int64_t>(adapters_.size())) {
    throw std::invalid_argument("there is no adapter " + std::to_string(adapter) +
                                ": add_adapter gives its number");
  }
  const int64_t number = blocks_.add();
  std::vector<BlockCopy> copies;  // none: it shares no page
  try {
    blocks_.reserve({{number, prefix}}, &copies);
  } catch (const CacheFull&) {
    blocks_.drop(number);
    throw;
  }
  Sequence& sequence = blocks_.at(number);
  const int D = model_.config.head_dim, H_kv = model_.config.n_kv_head;
  Team::get().run(model_.config.n_layer * H_kv, [&](int64_t item, int) {
    const int layer = static_cast<int>(item / H_kv), head = static_cast<int>(item % H_kv);
    alignas(64) float key[kMaxHeadDim] = {}, value[kMaxHeadDim] = {};
    for (int64_t i = 0; i < prefix; ++i) {
      const int64_t first = ((layer * prefix + i) * H_kv + head) * D;
      std::copy_n(keys + first, D, key);
      std::copy_n(values + first, D, value);
      kernels().append_kv(key, value, D, cache_.kind(),
                          cache_.page(layer, head, sequence.block_table[i / kLanes]),
                          cache_.value_offset(), static_cast<int>(i % kLanes), i == prefix - 1);
    }
  });
  sequence.length = sequence.prefix = prefix;
  sequence.adapter = adapter;
  return number;
}

void Decoder::prepare(const Batch& batch) {
  const ModelConfig& config = model_.config;
  std::vector<BlockCopy> copies;
  rows_ = admit(batch, config, blocks_, &copies);
  cache_.copy(copies);

  const int heads_per_kv = config.n_head / config.n_kv_head;
  const int64_t tile_rows = std::max(1, kernels().max_queries / heads_per_kv);
  tiles_.clear();
  for (int64_t i = 0; i < batch.num_tokens; ++i) {
    if (!tiles_.empty() && rows_[i].sequence == rows_[i - 1].sequence &&
        tiles_.back().rows < tile_rows) {
      ++tiles_.back().rows;
    } else {
      tiles_.push_back({i, 1});
    }
  }

  adapted_.clear();
  for (int64_t i = 0; i < batch.num_tokens; ++i) {
    const int32_t adapter = rows_[i].sequence->adapter;
    if (adapter < 0) continue;
    const auto found =
        std::find_if(adapted_.begin(), adapted_.end(),
                     [&](const AdaptedRows& group) { return group.adapter == adapter; });
    if (found != adapted_.end()) {
      found->rows.push_back(i);
    } else {
      adapted_.push_back({adapter, {i}});
    }
  }
}

void Decoder::normalize(const float* x, const float* weight, const float* bias, float* out) const {
  const ModelConfig& config = model_.config;
  if (config.is_rms_norm) {
    kernels().rms_norm(x, weight, config.norm_eps, config.n_embd, out);
  } else {
    kernels().layer_norm(x, weight, bias, config.norm_eps, config.n_embd, out);
  }
}

// out (rows, round_up(n, 64)) = activation(x down^T) up^T for some rows of x.
void Decoder::multiply_delta(const Delta& delta, const std::vector<int64_t>& rows, const float* x,
                             int64_t stride, float* out) {
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t rank = round_up(delta.down.n, kLanes);
  float* narrow = narrow_.get(count * rank);
  linear_.convert(delta.down, count, [&](int64_t i, const Activations& a) {
    kernels().convert_row(x + rows[i] * stride, delta.down, a, i);
  });
  linear_.multiply(
      delta.down, count,
      {narrow, rank, false, delta.is_bottleneck ? Activation::kGeluTanh : Activation::kNone});
  linear_.convert(delta.up, count, [&](int64_t i, const Activations& a) {
    kernels().convert_row(narrow + i * rank, delta.up, a, i);
  });
  linear_.multiply(delta.up, count,
                   {out, round_up(delta.up.n, kPanelWidth), false, Activation::kNone});
}

// What low-rank deltas add to the product of each row of x; null where they add nothing to any.
const float* const* Decoder::low_rank_products(int layer, Delta LayerDeltas::* of, const float* x,
                                               int64_t stride) {
  const auto low_rank = [&](const AdaptedRows& group) -> const Delta* {
    const Delta& delta = adapters_[group.adapter][layer].*of;
    return delta.down.data && !delta.is_bottleneck ? &delta : nullptr;
  };
  int64_t floats = 0;
  for (const AdaptedRows& group : adapted_) {
    const Delta* delta = low_rank(group);
    if (delta)
      floats += round_up(delta->up.n, kPanelWidth) * static_cast<int64_t>(group.rows.size());
  }
  if (floats == 0) return nullptr;
  float* out = products_.get(floats);
  addends_.assign(rows_.size(), nullptr);
  for (const AdaptedRows& group : adapted_) {
    const Delta* delta = low_rank(group);
    if (delta == nullptr) continue;
    multiply_delta(*delta, group.rows, x, stride, out);
    for (int64_t row : group.rows) {
      addends_[row] = out;
      out += round_up(delta->up.n, kPanelWidth);
    }
  }
  return addends_.data();
}

// out = activation(norm(stream) w^T + bias), with the deltas of the rows that have some
void Decoder::norm_and_multiply(const float* weight, const float* bias, const Matrix& w, int layer,
                                Delta LayerDeltas::* of, float* out, int64_t stride,
                                Activation activation) {
  const int64_t N = static_cast<int64_t>(rows_.size()), C = round_up(model_.config.n_embd, kLanes);
  const float* x = stream_.get(0);
  float* normed = normed_.get(N * C);
  const bool has_deltas = !adapted_.empty();
  const float* const* addends = nullptr;
  if (has_deltas) {  // they read all rows before the matrix does
    Team::get().run(
        N, [&](int64_t row, int) { normalize(x + row * C, weight, bias, normed + row * C); });
    addends = low_rank_products(layer, of, normed, C);
  }
  linear_.convert(w, N, [&](int64_t row, const Activations& a) {
    if (!has_deltas) normalize(x + row * C, weight, bias, normed + row * C);
    kernels().convert_row(normed + row * C, w, a, row);
  });
  linear_.multiply(w, N, {out, stride, false, activation, addends});
}

// stream += x w^T + bias, with the deltas of the rows that have some
void Decoder::add_product(const float* x, int64_t stride, const Matrix& w, int layer,
                          Delta LayerDeltas::* of) {
  const int64_t N = static_cast<int64_t>(rows_.size()), C = round_up(model_.config.n_embd, kLanes);
  float* stream = stream_.get(0);
  const float* const* addends = low_rank_products(layer, of, x, stride);
  linear_.convert(w, N, [&](int64_t row, const Activations& a) {
    kernels().convert_row(x + row * stride, w, a, row);
  });
  const auto bottleneck = [&](const AdaptedRows& group) -> const Delta* {
    const Delta& delta = adapters_[group.adapter][layer].*of;
    return delta.down.data && delta.is_bottleneck ? &delta : nullptr;
  };
  if (std::none_of(adapted_.begin(), adapted_.end(), bottleneck)) {
    linear_.multiply(w, N, {stream, C, true, Activation::kNone, addends});
    return;
  }
  // a bottleneck reads the product before it is in the stream
  Team& team = Team::get();
  float* branch = branch_.get(N * C);
  linear_.multiply(w, N, {branch, C, false, Activation::kNone, addends});
  for (const AdaptedRows& group : adapted_) {
    const Delta* delta = bottleneck(group);
    if (delta == nullptr) continue;
    const int64_t count = static_cast<int64_t>(group.rows.size());
    const int64_t width = round_up(delta->up.n, kPanelWidth);
    float* products = products_.get(count * width);
    multiply_delta(*delta, group.rows, branch, C, products);
    team.run(count, [&](int64_t i, int) {
      float* y = branch + group.rows[i] * C;
      for (int64_t c = 0; c < C; ++c) y[c] += products[i * width + c];
    });
  }
  team.run(N, [&](int64_t row, int) {
    for (int64_t c = row * C; c < (row + 1) * C; ++c) stream[c] += branch[c];
  });
}

void Decoder::run_blocks(const Batch& batch) {
  const ModelConfig& config = model_.config;
  const Kernels& k = kernels();
  Team& team = Team::get();
  const int64_t N = batch.num_tokens, C = round_up(config.n_embd, kLanes);
  const int H = config.n_head, H_kv = config.n_kv_head, D = config.head_dim;
  const int64_t qkv_width = round_up((H + 2 * H_kv) * D, kLanes);
  const int64_t attended_width = round_up(H * D, kLanes);
  const int64_t inner_width = round_up(config.n_inner, kLanes);
  float* stream = stream_.get(N * C);
  float* qkv = qkv_.get(N * qkv_width);
  float* attended = attended_.get(N * attended_width);
  float* inner = inner_.get(N * inner_width);
  float* rotations = model_.frequencies ? rotations_.get(N * D) : nullptr;
  float* first_values = config.value_residual ? first_values_.get(N * H_kv * D) : nullptr;

  team.run(N, [&](int64_t row, int) {
    float* x = stream + row * C;
    const int64_t position = rows_[row].position;
    k.unpack_row(model_.embedding, static_cast<int>(batch.tokens[row]), x);
    if (model_.positions) {
      const float* p = model_.positions + position * C;
      for (int64_t i = 0; i < C; ++i) x[i] += p[i];
    }
    for (int i = 0; rotations && i < D / 2; ++i) {
      // the angle in float32, as the models were trained with
      const double angle = static_cast<float>(position) * model_.frequencies[i];
      rotations[row * D + i] = static_cast<float>(std::cos(angle)) * model_.rope_magnitude;
      rotations[row * D + D / 2 + i] = static_cast<float>(std::sin(angle)) * model_.rope_magnitude;
    }
  });

  const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(D));
  for (int layer = 0; layer < config.n_layer; ++layer) {
    const Layer& l = model_.layers[layer];
    norm_and_multiply(l.norm_1_weight, l.norm_1_bias, l.qkv, layer, &LayerDeltas::qkv, qkv,
                      qkv_width, Activation::kNone);
    team.run(N, [&](int64_t row, int) {
      float* q = qkv + row * qkv_width;
      float* keys = q + H * D;
      float* values = keys + H_kv * D;
      if (first_values) {
        float* first = first_values + row * H_kv * D;
        if (layer == 0) std::copy_n(values, H_kv * D, first);
        for (int i = 0; layer > 0 && i < H_kv * D; ++i) values[i] += first[i];
      }
      for (int head = 0; head < H + H_kv; ++head) {
        float* x = q + head * D;
        const float* norm = head < H ? l.q_norm : l.k_norm;
        if (norm) {
          alignas(64) float room[kMaxHeadDim] = {};
          k.rms_norm(x, norm, config.norm_eps, D, room);
          std::copy_n(room, D, x);
        }
        if (rotations) k.rotate(x, rotations + row * D, rotations + row * D + D / 2, D);
        if (head < H) k.scale(x, softmax_scale, D, x);
      }
      const int64_t place = rows_[row].place;
      const int32_t block = rows_[row].sequence->block_table[place / kLanes];
      for (int head = 0; head < H_kv; ++head) {
        k.append_kv(keys + head * D, values + head * D, D, cache_.kind(),
                    cache_.page(layer, head, block), cache_.value_offset(),
                    static_cast<int>(place % kLanes), rows_[row].is_last);
      }
    });
    attend(layer, qkv, attended);
    add_product(attended, attended_width, l.attn_out, layer, &LayerDeltas::attn_out);
    norm_and_multiply(l.norm_2_weight, l.norm_2_bias, l.mlp_in, layer, &LayerDeltas::mlp_in, inner,
                      inner_width, config.activation);
    add_product(inner, inner_width, l.mlp_out, layer, &LayerDeltas::mlp_out);
  }
  for (int64_t i = 0; i < N; ++i) ++rows_[i].sequence->length;
}

void Decoder::attend(int layer, const float* qkv, float* out) {
  const ModelConfig& config = model_.config;
  const Kernels& k = kernels();
  Team& team = Team::get();
  const int H = config.n_head, H_kv = config.n_kv_head, D = config.head_dim;
  const int64_t qkv_width = round_up((H + 2 * H_kv) * D, kLanes);
  const int64_t attended_width = round_up(H * D, kLanes);
  const int64_t state_floats = attention_state_floats(D);
  // query heads of one key head that attend together, and how many times until all have
  const int heads_per_kv = H / H_kv, together = std::min(heads_per_kv, k.max_queries);
  const int turns = (heads_per_kv + together - 1) / together;
  const auto first_key = [&](int64_t place) {
    return config.sliding_window ? std::max<int64_t>(0, place + 1 - config.sliding_window) : 0;
  };
  const auto first_chunk = [&](const Tile& tile) {
    return static_cast<int>(first_key(rows_[tile.first_row].place) / kChunkKeys);
  };
  const auto last_chunk = [&](const Tile& tile) {
    return static_cast<int>(rows_[tile.first_row + tile.rows - 1].place / kChunkKeys) + 1;
  };

  // `f(query, row, head)` for the queries of an item.
  const auto make_tile = [&](const Tile& tile, int kv_head, int turn, const auto& f) {
    const Sequence& sequence = *rows_[tile.first_row].sequence;
    AttentionTile a = {cache_.pages(layer, kv_head, sequence), {}, {}, {}, 0, D};
    const int first_head = kv_head * heads_per_kv + turn * together;
    const int end_head = std::min(first_head + together, (kv_head + 1) * heads_per_kv);
    for (int64_t row = tile.first_row; row < tile.first_row + tile.rows; ++row) {
      for (int head = first_head; head < end_head; ++head) {
        const int query = a.num_queries++;
        a.queries[query] = qkv + row * qkv_width + head * D;
        a.first_key[query] = static_cast<int32_t>(first_key(rows_[row].place));
        a.last_key[query] = static_cast<int32_t>(rows_[row].place + 1);
        f(query, row, head);
      }
    }
    return a;
  };

  const int64_t parts = static_cast<int64_t>(tiles_.size()) * H_kv * turns;
  int chunks = 1;
  for (const Tile& tile : tiles_) chunks = std::max(chunks, last_chunk(tile) - first_chunk(tile));
  if (chunks == 1 || parts >= 4 * team.num_threads()) {
    team.run(parts, [&](int64_t item, int) {
      const Tile& tile = tiles_[item / (H_kv * turns)];
      alignas(64) float room[kMaxTileQueries][kLanes + kMaxHeadDim];
      float* states[kMaxTileQueries];
      float* outs[kMaxTileQueries];
      const AttentionTile a =
          make_tile(tile, static_cast<int>(item / turns % H_kv), static_cast<int>(item % turns),
                    [&](int query, int64_t row, int head) {
                      states[query] = room[query];
                      room[query][1] = 0;
                      outs[query] = out + row * attended_width + head * D;
                    });
      for (int c = first_chunk(tile); c < last_chunk(tile); ++c) k.attend_chunk(a, c, states);
      for (int q = 0; q < a.num_queries; ++q) k.finish_state(states[q], D, outs[q]);
    });
    return;
  }
  // Few queries with many keys: the chunks of a query are spread over the threads, and merged in
  // their order after that.
  const int64_t num_rows = static_cast<int64_t>(rows_.size());
  float* all_states = states_.get(num_rows * H * chunks * state_floats);
  const auto state_of = [&](int64_t row, int head, int chunk) {
    return all_states + ((row * H + head) * chunks + chunk) * state_floats;
  };
  team.run(parts * chunks, [&](int64_t item, int) {
    const int64_t part = item / chunks;
    const int chunk = static_cast<int>(item % chunks);
    const Tile& tile = tiles_[part / (H_kv * turns)];
    float* states[kMaxTileQueries];
    const AttentionTile a =
        make_tile(tile, static_cast<int>(part / turns % H_kv), static_cast<int>(part % turns),
                  [&](int query, int64_t row, int head) {
                    states[query] = state_of(row, head, chunk);
                    states[query][1] = 0;
                  });
    const int c = first_chunk(tile) + chunk;
    if (c < last_chunk(tile)) k.attend_chunk(a, c, states);
  });
  team.run(num_rows * H, [&](int64_t item, int) {
    const int64_t row = item / H;
    const int head = static_cast<int>(item % H);
    float* state = state_of(row, head, 0);
    for (int c = 1; c < chunks; ++c) k.merge_states(state, state_of(row, head, c), D);
    k.finish_state(state, D, out + row * attended_width + head * D);
  });
}

// Whether what these rows draw depends on the largest logits alone.
bool Decoder::can_screen(const DrawSettings* settings, int64_t count) const {
  if (model_.screen.data == nullptr || settings == nullptr || count > kScreenedRows) return false;
  return std::all_of(settings, settings + count, [](const DrawSettings& s) {
    const bool has_few = s.temperature == 0 || (s.top_k > 0 && s.top_k <= kScreenedTopK) ||
                         (s.min_p > 0 && s.top_p == 1);
    return has_few && s.num_logprobs < 0 && s.repetition_penalty == 1 && s.presence_penalty == 0;
  });
}

// Exact logits for all tokens that can be drawn: those whose screened logit, plus its error,
// reaches what enough others have for certain. The panels that hold one are computed whole.
void Decoder::screened_logits(int64_t count, const DrawSettings* settings, float* logits) {
  const int64_t V = model_.config.vocab_size, C = round_up(model_.config.n_embd, kLanes);
  const float* normed = normed_.get(0);
  const auto convert = [&](const Matrix& w) {
    linear_.convert(w, count, [&](int64_t i, const Activations& a) {
      kernels().convert_row(normed + i * C, w, a, i);
    });
  };
  convert(model_.screen);
  linear_.multiply(model_.screen, count, {logits, V, false, Activation::kNone});

  std::vector<char> is_needed(model_.head.panels(), 0);
  for (int64_t i = 0; i < count; ++i) {
    const DrawSettings& s = settings[i];
    const float* screened = logits + i * V;
    const int64_t limit = std::min(V, s.vocab_limit);
    double squares = 0;
    for (int64_t c = 0; c < C; ++c) squares += double{normed[i * C + c]} * normed[i * C + c];
    const float length = static_cast<float>(std::sqrt(squares) * 1.000001);
    const auto lower = [&](int64_t v) { return screened[v] - length * model_.screen_errors[v]; };
    // the largest lower bounds, as many as tokens are kept, the smallest of them on top
    const size_t kept = s.temperature != 0 && s.top_k > 0 ? std::min(s.top_k, limit) : 1;
    std::priority_queue<float, std::vector<float>, std::greater<float>> largest;
    for (int64_t v = 0; v < limit; ++v) {
      const float bound = lower(v);
      if (largest.size() < kept) {
        largest.push(bound);
      } else if (bound > largest.top()) {
        largest.pop();
        largest.push(bound);
      }
    }
    float certain = largest.top();
    if (s.temperature != 0 && s.top_k == 0) {  // min_p
      certain += static_cast<float>(s.temperature * std::log(s.min_p)) * 1.000001f;
    }
    for (int64_t v = 0; v < limit; ++v) {
      // so that NaN counts as needed
      if (!(screened[v] + length * model_.screen_errors[v] < certain))
        is_needed[v / kPanelWidth] = 1;
    }
  }
  std::vector<int32_t> panels;
  for (size_t p = 0; p < is_needed.size(); ++p) {
    if (is_needed[p]) panels.push_back(static_cast<int32_t>(p));
  }
  std::fill_n(logits, count * V, std::numeric_limits<float>::lowest());
  convert(model_.head);
  linear_.multiply_panels(model_.head, count, panels, logits, V);
}

template <class F>
void Decoder::for_logits(const Batch& batch, float* out, const DrawSettings* settings, const F& f) {
  const int64_t V = model_.config.vocab_size, C = round_up(model_.config.n_embd, kLanes);
  const float* stream = stream_.get(0);
  float* normed = normed_.get(std::min(kLogitRows, batch.num_outputs) * C);
  for (int64_t first = 0; first < batch.num_outputs; first += kLogitRows) {
    const int64_t count = std::min(kLogitRows, batch.num_outputs - first);
    float* logits = out ? out + first * V : logits_.get(count * V);
    Team::get().run(count, [&](int64_t i, int) {
      normalize(stream + batch.output_rows[first + i] * C, model_.norm_f_weight, model_.norm_f_bias,
                normed + i * C);
    });
    if (can_screen(settings, batch.num_outputs)) {
      screened_logits(count, settings, logits);
    } else {
      linear_.convert(model_.head, count, [&](int64_t i, const Activations& a) {
        kernels().convert_row(normed + i * C, model_.head, a, i);
      });
      linear_.multiply(model_.head, count, {logits, V, false, Activation::kNone});
    }
    Team::get().run(count, [&](int64_t i, int) { f(first + i, logits + i * V); });
  }
}

void Decoder::hidden(const Batch& batch, float* out) {
  prepare(batch);
  run_blocks(batch);
  const int64_t C = round_up(model_.config.n_embd, kLanes), width = model_.config.n_embd;
  const float* stream = stream_.get(0);
  float* normed = normed_.get(batch.num_outputs * C);
  Team::get().run(batch.num_outputs, [&](int64_t i, int) {
    float* row = normed + i * C;
    normalize(stream + batch.output_rows[i] * C, model_.norm_f_weight, model_.norm_f_bias, row);
    std::copy_n(row, width, out + i * width);
  });
}

void Decoder::logits(const Batch& batch, float* out) {
  prepare(batch);
  run_blocks(batch);
  for_logits(batch, out, nullptr, [](int64_t, const float*) {});
}

void Decoder::logprobs(const Batch& batch, const int64_t* targets, float* out) {
  const int64_t V = model_.config.vocab_size;
  check_targets(batch, targets, V);
  prepare(batch);
  run_blocks(batch);
  for_logits(batch, nullptr, nullptr, [&](int64_t i, const float* logits) {
    out[i] = logits[targets[i]] - kernels().log_sum_exp(logits, static_cast<int>(V));
  });
}

void Decoder::sample(const Batch& batch, const DrawSettings* settings, Drawn* out) {
  prepare(batch);
  run_blocks(batch);
  for_logits(batch, nullptr, settings, [&](int64_t i, const float* logits) {
    out[i] = draw(logits, model_.config.vocab_size, settings[i]);
  });
}

}  // namespace leangpt::cpu
