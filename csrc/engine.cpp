// The C interface of the CPU decode engine, for kernels/decode.py: a decoder's functions
// (engine-inl.h), and those of packing. It knows no torch: text is generated from a packed file
// without loading it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace leangpt {

using Decoder = cpu::Decoder;

// With the team of threads.
struct Turn {
  const std::unique_lock<std::mutex> turn = cpu::Team::get().turn();
};

}  // namespace leangpt

#include "engine-inl.h"

LEANGPT_EXPORT int leangpt_isa(const char** name) {
  return guarded([&] { *name = cpu::isa_name(cpu::active_isa()); });
}

LEANGPT_EXPORT int leangpt_set_threads(int count) {
  return guarded([&] { cpu::Team::get().set_num_threads(count); });
}

LEANGPT_EXPORT int leangpt_num_threads() { return cpu::Team::get().num_threads(); }

// Bytes of the packed data, scales and minimums of a matrix whose kind, n, k and group are filled
// in.
LEANGPT_EXPORT void leangpt_packed_bytes(const Matrix* w, int64_t bytes[3]) {
  const bool is_integer = w->kind == WeightKind::kInt8 || w->kind == WeightKind::kInt4;
  bytes[0] = w->panels() * w->panel_bytes();
  bytes[1] = is_integer ? w->scale_bytes() : 0;
  bytes[2] = is_integer && w->group != 0 ? w->num_scales() * 2 : 0;
}

// Pack rows of float32 (or bfloat16) into the memory that `w` points to. Row i of the matrix is
// source[row_of[i]], a zero row where that is negative; row_of has round_up(n, 64) entries.
LEANGPT_EXPORT int leangpt_pack(const Matrix* w, const void* source, int is_bf16,
                                const int64_t* row_of) {
  return guarded_work([&] {
    using namespace leangpt::cpu;
    const int64_t k = w->k, padded_k = w->padded_k(), groups = w->groups();
    Team& team = Team::get();
    const int64_t room_floats = kPanelWidth * padded_k;
    std::vector<float> rooms(team.num_threads() * room_floats, 0.0f);
    team.run(w->panels(), [&](int64_t panel, int thread) {
      float* room = rooms.data() + thread * room_floats;
      const float* rows[kPanelWidth];
      for (int lane = 0; lane < kPanelWidth; ++lane) {
        const int64_t row = row_of[panel * kPanelWidth + lane];
        float* copy = room + lane * padded_k;
        rows[lane] = copy;
        if (row < 0) {
          std::fill_n(copy, padded_k, 0.0f);
        } else if (is_bf16) {
          const uint16_t* from = static_cast<const uint16_t*>(source) + row * k;
          for (int64_t i = 0; i < k; ++i) {
            const uint32_t bits = uint32_t{from[i]} << 16;
            std::memcpy(copy + i, &bits, 4);
          }
        } else {
          std::memcpy(copy, static_cast<const float*>(source) + row * k, k * sizeof(float));
        }
      }
      const int64_t at = panel * groups * kPanelWidth;
      auto* scales = static_cast<uint8_t*>(const_cast<void*>(w->scales));
      kernels().pack_panel(*w, rows, const_cast<uint8_t*>(w->data) + panel * w->panel_bytes(),
                           scales ? scales + at * (w->group == 0 ? 4 : 2) : nullptr,
                           w->minimums ? const_cast<uint16_t*>(w->minimums) + at : nullptr);
    });
  });
}

// For each row of the head the length of what its int8 copy lacks, and of what rounding can add to
// either product, both for a hidden state of length 1: see Model::screen_errors.
LEANGPT_EXPORT int leangpt_screen_errors(const Matrix* head, const Matrix* screen, float* errors) {
  return guarded_work([&] {
    using namespace leangpt::cpu;
    const int64_t width = round_up(head->k, kLanes);
    // float32: k roundings to 2^-24 of it, with room; bfloat16: of the activations too
    const double rounding =
        head->kind == WeightKind::kBf16 ? 0x1p-8 + head->k * 0x1p-22 : head->k * 0x1p-22;
    Team::get().run(head->n, [&](int64_t row, int) {
      std::vector<float> exact(width), coarse(width);
      kernels().unpack_row(*head, static_cast<int>(row), exact.data());
      kernels().unpack_row(*screen, static_cast<int>(row), coarse.data());
      double lost = 0, squares = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double difference = double{exact[i]} - coarse[i];
        lost += difference * difference;
        squares += double{exact[i]} * exact[i] + double{coarse[i]} * coarse[i];
      }
      errors[row] = static_cast<float>(1.001 * std::sqrt(lost) + rounding * std::sqrt(squares));
    });
  });
}

// One row of a packed matrix as the products see it: round_up(k, 16) floats.
LEANGPT_EXPORT void leangpt_unpack_row(const Matrix* w, int row, float* out) {
  cpu::kernels().unpack_row(*w, row, out);
}

// The product of (rows, round_up(k, 16)) activations with a packed matrix, for tests and benchmarks
// of that alone.
LEANGPT_EXPORT int leangpt_linear(const Matrix* w, const float* x, int64_t rows, float* out) {
  return guarded_work([&] {
    const int64_t stride = round_up(w->k, kLanes);
    cpu::Linear linear;
    linear.convert(*w, rows, [&](int64_t row, const cpu::Activations& a) {
      cpu::kernels().convert_row(x + row * stride, *w, a, row);
    });
    linear.multiply(*w, rows, {out, w->n, false, Activation::kNone});
  });
}

LEANGPT_EXPORT int leangpt_decoder_new(const Model* model, int kv_kind, int32_t num_blocks,
                                       Decoder** decoder) {
  return guarded(
      [&] { *decoder = new Decoder(*model, static_cast<cpu::KvKind>(kv_kind), num_blocks); });
}

LEANGPT_EXPORT int leangpt_draw(const float* logits, int64_t vocab_size,
                                const DrawSettings* settings, Drawn* out) {
  return guarded([&] { *out = cpu::draw(logits, vocab_size, *settings); });
}

// Read memory on all threads, as products read their weights: for benchmarks to time.
LEANGPT_EXPORT float leangpt_read_memory(const uint8_t* p, int64_t bytes) {
  using namespace leangpt::cpu;
  constexpr int64_t kPiece = int64_t{1} << 17;
  std::vector<float> sums(bytes / kPiece);
  Team::get().run(static_cast<int64_t>(sums.size()),
                  [&](int64_t i, int) { sums[i] = kernels().read_memory(p + i * kPiece, kPiece); });
  return sums.empty() ? 0 : sums[0];
}

// Multiply what is in registers on all threads; returns the operations.
LEANGPT_EXPORT double leangpt_multiply_registers(int kind, int64_t rounds) {
  using namespace leangpt::cpu;
  const int threads = Team::get().num_threads();
  double operations = 0;
  Team::get().run(threads, [&](int64_t item, int) {
    const int of_a_round = kernels().multiply_registers(static_cast<WeightKind>(kind), rounds);
    if (item == 0) operations = static_cast<double>(of_a_round) * rounds * threads;
  });
  return operations;
}
