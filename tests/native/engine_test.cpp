// The decode engine without Python and torch, for the sanitizers (`make sanitize`): small random
// models in several formats are run by random steps, some sequences with a prefix or an adapter,
// and every result has the same bits as that of a sequence that is read alone, token by token, on
// one thread.
//
//   engine_test [seeds]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "decoder.h"
#include "isa.h"
#include "threads.h"

using namespace leangpt;
using namespace leangpt::cpu;

namespace {

using Random = std::mt19937_64;
using Tokens = std::vector<int64_t>;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

int64_t below(Random& random, int64_t end) {
  return std::uniform_int_distribution<int64_t>(0, end - 1)(random);
}

struct Format {
  const char* name;
  WeightKind kind;
  int group, digits;
  bool is_asymmetric;
};

constexpr Format kFormats[] = {
    {"fp32", WeightKind::kFp32, 0, 3, false},
    {"bf16", WeightKind::kBf16, 0, 3, false},
    {"int8", WeightKind::kInt8, 0, 3, false},
    {"int8_g64_dynamic", WeightKind::kInt8, 64, 1, false},
    {"int4", WeightKind::kInt4, 32, 3, false},
    {"int4_asym_g128_dynamic", WeightKind::kInt4, 128, 1, true},
};

// Memory of exactly the size that the engine is told, so that a sanitizer sees a byte too much.
class Memory {
 public:
  template <class T>
  T* take(int64_t count) {
    pieces_.push_back(std::make_unique<uint8_t[]>(count * sizeof(T)));
    return reinterpret_cast<T*>(pieces_.back().get());
  }

 private:
  std::vector<std::unique_ptr<uint8_t[]>> pieces_;
};

constexpr int kPrefix = 19;
#ifdef __SANITIZE_THREAD__
constexpr int kTurns = 20;  // threads meet alike in every turn, and each takes long
#else
constexpr int kTurns = 40;
#endif

// What fine-tuning adds to a sequence.
struct Additions {
  int64_t prefix = 0;  // or kPrefix
  int32_t adapter = -1;
};

class RandomModel {
 public:
  RandomModel(const Format& format, bool is_llama, uint64_t seed) : random_(seed), format_(format) {
    ModelConfig& c = model.config;
    c = {};
    c.n_layer = 2;
    c.n_head = is_llama ? 4 : 3;
    c.n_kv_head = is_llama ? 2 : 3;
    c.head_dim = is_llama ? 10 : 17;
    c.n_embd = is_llama ? 40 : 51;
    c.n_inner = is_llama ? 37 : 70;
    c.vocab_size = 101;
    c.max_seq_len = 600;
    c.is_rms_norm = is_llama;
    c.sliding_window = is_llama ? 290 : 0;
    c.activation = is_llama ? Activation::kSwiglu : Activation::kGelu;
    c.norm_eps = 1e-5f;
    c.value_residual = 1;
    Layer* layers = memory_.take<Layer>(c.n_layer);
    const int q_width = c.n_head * c.head_dim, kv_width = c.n_kv_head * c.head_dim;
    for (int i = 0; i < c.n_layer; ++i) {
      Layer& l = layers[i];
      l.norm_1_weight = vector(c.n_embd, 1);
      l.norm_2_weight = vector(c.n_embd, 1);
      l.norm_1_bias = is_llama ? nullptr : vector(c.n_embd);
      l.norm_2_bias = is_llama ? nullptr : vector(c.n_embd);
      l.q_norm = is_llama ? vector(c.head_dim, 1) : nullptr;
      l.k_norm = is_llama ? vector(c.head_dim, 1) : nullptr;
      l.qkv = matrix(q_width + 2 * kv_width, c.n_embd, !is_llama);
      l.attn_out = matrix(c.n_embd, q_width, !is_llama);
      const int inner = is_llama ? 2 * static_cast<int>(round_up(c.n_inner, kLanes)) : c.n_inner;
      l.mlp_in = matrix(inner, c.n_embd, !is_llama);
      l.mlp_out = matrix(c.n_embd, c.n_inner, !is_llama);
    }
    model.layers = layers;
    model.norm_f_weight = vector(c.n_embd, 1);
    model.norm_f_bias = is_llama ? nullptr : vector(c.n_embd);
    model.positions = nullptr;
    model.frequencies = nullptr;
    model.rope_magnitude = 1;
    if (is_llama) {
      float* frequencies = memory_.take<float>(c.head_dim / 2);
      for (int i = 0; i < c.head_dim / 2; ++i) frequencies[i] = std::pow(10000.0f, -0.2f * i);
      model.frequencies = frequencies;
    } else {
      const int64_t width = round_up(c.n_embd, kLanes);
      float* positions = memory_.take<float>(c.max_seq_len * width);
      for (int64_t i = 0; i < c.max_seq_len * width; ++i) {
        positions[i] = i % width < c.n_embd ? normal() : 0;
      }
      model.positions = positions;
    }
    model.embedding = matrix(c.vocab_size, c.n_embd, false);
    model.head = model.embedding;
    model.screen = {};
    model.screen_errors = nullptr;
    for (const bool is_bottleneck : {false, true}) {
      std::vector<LayerDeltas> deltas(c.n_layer);
      for (int i = 0; i < c.n_layer; ++i) {
        deltas[i].attn_out = delta(layers[i].attn_out, is_bottleneck);
        deltas[i].mlp_out = delta(layers[i].mlp_out, is_bottleneck);
        if (is_bottleneck) continue;
        deltas[i].qkv = delta(layers[i].qkv, false);
        if (i > 0) deltas[i].mlp_in = delta(layers[i].mlp_in, false);
      }
      adapters.push_back(deltas);
    }
    const int64_t numbers = int64_t{c.n_layer} * kPrefix * kv_width;
    for (float*& array : prefix) {
      array = memory_.take<float>(numbers);
      for (int64_t i = 0; i < numbers; ++i) array[i] = normal();
    }
  }

  void add_adapters(Decoder& decoder) const {
    for (const auto& deltas : adapters) decoder.add_adapter(deltas.data());
  }
  int64_t add_sequence(Decoder& decoder, const Additions& a) const {
    return decoder.add_sequence(prefix[0], prefix[1], a.prefix, a.adapter);
  }

  Model model;
  std::vector<std::vector<LayerDeltas>> adapters;
  float* prefix[2];  // keys, values

 private:
  float normal() { return std::normal_distribution<float>()(random_) * 0.3f; }

  const float* vector(int n, float mean = 0, int64_t multiple = kLanes) {
    float* v = memory_.take<float>(round_up(n, multiple));
    for (int i = 0; i < n; ++i) v[i] = mean + normal();
    return v;
  }

  Delta delta(const Matrix& w, bool is_bottleneck) {
    const int rank = is_bottleneck ? 21 : 5;
    Delta d = {};
    d.down = matrix(rank, is_bottleneck ? w.n : w.k, is_bottleneck, kFormats[0]);
    d.up = matrix(w.n, rank, is_bottleneck, kFormats[0]);
    d.is_bottleneck = is_bottleneck;
    return d;
  }

  Matrix matrix(int n, int k, bool has_bias) { return matrix(n, k, has_bias, format_); }

  Matrix matrix(int n, int k, bool has_bias, const Format& format) {
    Matrix w = {};
    w.kind = format.kind;
    w.n = n;
    w.k = k;
    w.group = format.group;
    w.digits = format.digits;
    const int64_t scales = w.panels() * w.groups() * kPanelWidth;
    auto* data = memory_.take<uint8_t>(w.panels() * w.panel_bytes());
    auto* scale_bytes = memory_.take<uint8_t>(scales * (w.group == 0 ? 4 : 2));
    auto* minimums = format.is_asymmetric ? memory_.take<uint16_t>(scales) : nullptr;
    w.data = data;
    w.scales = scale_bytes;
    w.minimums = minimums;
    w.bias = has_bias ? vector(n, 0, kPanelWidth) : nullptr;
    for (int panel = 0; panel < w.panels(); ++panel) {
      std::vector<float> weights(kPanelWidth * w.padded_k(), 0.0f);
      const float* rows[kPanelWidth];
      for (int lane = 0; lane < kPanelWidth; ++lane) {
        float* row = weights.data() + lane * w.padded_k();
        rows[lane] = row;
        for (int i = 0; i < k && panel * kPanelWidth + lane < n; ++i) row[i] = normal();
      }
      const int64_t at = panel * w.groups() * kPanelWidth;
      kernels().pack_panel(w, rows, data + panel * w.panel_bytes(),
                           scale_bytes + at * (w.group == 0 ? 4 : 2),
                           minimums ? minimums + at : nullptr);
    }
    return w;
  }

  Random random_;
  Format format_;
  Memory memory_;
};

struct Piece {
  int64_t sequence, start;
  Tokens tokens;
};

// A batch in memory of exactly its size.
struct Step {
  explicit Step(const std::vector<Piece>& pieces, bool has_outputs = true) {
    for (const Piece& piece : pieces) {
      for (size_t i = 0; i < piece.tokens.size(); ++i) {
        if (has_outputs) rows.push_back(static_cast<int64_t>(tokens.size()));
        tokens.push_back(piece.tokens[i]);
        sequences.push_back(piece.sequence);
        positions.push_back(piece.start + static_cast<int64_t>(i));
      }
    }
    tokens.shrink_to_fit();
    sequences.shrink_to_fit();
    positions.shrink_to_fit();
    rows.shrink_to_fit();
  }
  Batch batch() const {
    return {tokens.data(),    sequences.data(),
            positions.data(), static_cast<int64_t>(tokens.size()),
            rows.data(),      static_cast<int64_t>(rows.size())};
  }
  Tokens tokens, sequences, positions, rows;
};

std::vector<float> logits_of(Decoder& decoder, int64_t vocab_size, const Step& step) {
  std::vector<float> out(step.rows.size() * vocab_size);
  decoder.logits(step.batch(), out.data());
  return out;
}

// Logits of a text that is read one by one.
class OneByOne {
 public:
  OneByOne(const RandomModel& made, KvKind kind)
      : made_(made), decoder_(made.model, kind, 60), vocab_(made.model.config.vocab_size) {
    made.add_adapters(decoder_);
  }

  // Rows [start, end) of a text.
  std::vector<float> operator()(const Tokens& text, int64_t start, const Additions& additions) {
    const int64_t sequence = made_.add_sequence(decoder_, additions);
    std::vector<float> all;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto position = static_cast<int64_t>(i);
      const Step step({{sequence, position, {text[i]}}}, position >= start);
      const auto row = logits_of(decoder_, vocab_, step);
      all.insert(all.end(), row.begin(), row.end());
    }
    decoder_.blocks().drop(sequence);
    return all;
  }

 private:
  const RandomModel& made_;
  Decoder decoder_;
  int64_t vocab_;
};

bool have_same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <class Error, class F>
void check_throws(const F& f) {
  try {
    f();
  } catch (const Error&) {
    return;
  }
  CHECK(!"should have thrown");
}

DrawSettings random_settings(Random& random, int64_t vocab_size, const Tokens& text,
                             std::vector<int64_t>& top, std::vector<double>& top_logprobs) {
  DrawSettings s = {};
  s.temperature = below(random, 3) * 0.7;
  s.top_p = below(random, 2) ? 1 : 0.8;
  s.min_p = below(random, 2) ? 0 : 0.1;
  s.repetition_penalty = below(random, 2) ? 1 : 1.3;
  s.presence_penalty = below(random, 2) ? 0 : 0.5;
  s.seed = random();
  s.position = below(random, 1000);
  s.top_k = below(random, vocab_size + 5);
  s.vocab_limit = 1 + below(random, vocab_size);
  s.context = s.text = text.data();
  s.context_length = s.text_length = static_cast<int64_t>(text.size());
  s.num_logprobs = below(random, 5) - 1;
  s.top_tokens = top.data();
  s.top_logprobs = top_logprobs.data();
  return s;
}

// Adds, forks, truncates, drops, appends and draws at random; `texts` is what the sequences hold.
void run_randomly(const Format& format, bool is_llama, uint64_t seed) {
  Random random(seed);
  Team::get().set_num_threads(1);
  RandomModel made(format, is_llama, seed);
  const Model& model = made.model;
  const int64_t vocab = model.config.vocab_size;
  const auto kind = static_cast<KvKind>(below(random, 3));
  OneByOne one_by_one(made, kind);
  Decoder decoder(model, kind, static_cast<int32_t>(4 + below(random, 40)));
  made.add_adapters(decoder);
  KvBlocks& cache = decoder.blocks();
  std::map<int64_t, Tokens> texts;
  std::map<int64_t, Additions> additions;  // of every sequence there ever was
  const auto any = [&] {
    return std::next(texts.begin(), below(random, static_cast<int64_t>(texts.size())));
  };

  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t action = below(random, 10);
    if (texts.empty() || action == 0) {
      const Additions a = {below(random, 2) ? 0 : kPrefix,
                           static_cast<int32_t>(below(random, 3)) - 1};
      const int32_t free_blocks = cache.free_blocks();
      try {
        const int64_t sequence = made.add_sequence(decoder, a);
        texts[sequence];
        additions[sequence] = a;
      } catch (const CacheFull&) {
        CHECK(cache.free_blocks() == free_blocks);
      }
    } else if (action == 1) {
      const auto chosen = any();
      const int64_t fork = cache.fork(chosen->first);
      texts[fork] = Tokens(chosen->second);
      additions[fork] = additions[chosen->first];
    } else if (action == 2) {
      const auto chosen = any();
      const int64_t length = below(random, static_cast<int64_t>(chosen->second.size()) + 1);
      cache.truncate(chosen->first, length);
      chosen->second.resize(length);
    } else if (action == 3) {
      const auto chosen = any();
      cache.drop(chosen->first);
      texts.erase(chosen);
    } else {
      std::vector<Piece> pieces;
      const int64_t most = action == 4 ? 300 : 20;
      for (const auto& [sequence, text] : texts) {
        const int64_t room = model.config.max_seq_len - static_cast<int64_t>(text.size());
        if (room == 0 || below(random, 2)) continue;
        Tokens tokens(1 + below(random, std::min(room, most)));
        for (int64_t& token : tokens) token = below(random, vocab);
        pieces.push_back({sequence, static_cast<int64_t>(text.size()), tokens});
      }
      if (pieces.empty()) continue;
      const Step step(pieces);
      const int32_t free_blocks = cache.free_blocks();
      const bool draws = below(random, 4) == 0;
      std::vector<float> out;
      Team::get().set_num_threads(static_cast<int>(1 + below(random, 3)));
      try {
        if (draws) {
          std::vector<DrawSettings> settings;
          std::vector<std::vector<int64_t>> top(step.rows.size(), std::vector<int64_t>(4));
          std::vector<std::vector<double>> top_logprobs(step.rows.size(), std::vector<double>(4));
          for (size_t i = 0; i < step.rows.size(); ++i) {
            settings.push_back(
                random_settings(random, vocab, step.tokens, top[i], top_logprobs[i]));
          }
          std::vector<Drawn> drawn(step.rows.size());
          decoder.sample(step.batch(), settings.data(), drawn.data());
          for (size_t i = 0; i < drawn.size(); ++i) {
            CHECK(drawn[i].token >= 0 && drawn[i].token < settings[i].vocab_limit);
          }
        } else {
          out = logits_of(decoder, vocab, step);
        }
      } catch (const CacheFull&) {
        CHECK(cache.free_blocks() == free_blocks);
        continue;
      }
      Team::get().set_num_threads(1);
      auto row = out.begin();
      for (const Piece& piece : pieces) {
        Tokens& text = texts[piece.sequence];
        text.insert(text.end(), piece.tokens.begin(), piece.tokens.end());
        if (draws) continue;
        const auto expected = one_by_one(text, piece.start, additions[piece.sequence]);
        CHECK(have_same_bits(expected, std::vector<float>(row, row + expected.size())));
        row += expected.size();
      }
    }
  }
  check_throws<std::invalid_argument>([&] { cache.drop(12345); });
  check_throws<std::invalid_argument>([&] { made.add_sequence(decoder, {0, 2}); });
  for (const auto& [sequence, text] : texts) cache.drop(sequence);
  CHECK(cache.free_blocks() == cache.num_blocks());
}

// Decoders of several threads take turns at the team.
void run_from_several_threads() {
  Team::get().set_num_threads(3);
  RandomModel made(kFormats[2], true, 1);
  const Tokens text = {1, 2, 3, 50, 100, 7, 7, 7, 0, 9};
  const auto expected = [&] {
    const auto turn = Team::get().turn();
    return OneByOne(made, KvKind::kFp32)(text, 0, {});
  }();
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 5; ++repeat) {
        const auto turn = Team::get().turn();
        CHECK(have_same_bits(OneByOne(made, KvKind::kFp32)(text, 0, {}), expected));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Many phases of a few items: each item is done once, and before `run` returns.
void run_many_phases() {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    Team& team = Team::get();
    team.set_num_threads(num_threads);
    for (int64_t phase = 0; phase < 3000; ++phase) {
      std::vector<int64_t> counts(phase % 37, 0);
      team.run(static_cast<int64_t>(counts.size()), [&](int64_t item, int thread) {
        CHECK(thread >= 0 && thread < num_threads);
        counts[item] += phase + 1;
      });
      for (const int64_t count : counts) CHECK(count == phase + 1);
      if (phase % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 1;
  try {
    active_isa();
  } catch (const std::runtime_error& e) {
    std::printf("skipped: %s\n", e.what());
    return std::strstr(e.what(), "not supported by this CPU") == nullptr;
  }
  run_many_phases();
  run_from_several_threads();
  for (const Format& format : kFormats) {
    for (int seed = 0; seed < seeds; ++seed) {
      for (const bool is_llama : {false, true}) run_randomly(format, is_llama, seed);
    }
  }
  Team::get().set_num_threads(1);
  std::printf("ok: %s\n", isa_name(active_isa()));
}
