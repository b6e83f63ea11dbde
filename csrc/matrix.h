// A weight matrix of a packed file, as both decode engines read it.
#pragma once

#include <cstdint>

namespace leangpt {

constexpr int kLanes = 16;       // vectors are padded to a multiple of it; keys of a page
constexpr int kPanelWidth = 64;  // outputs of a panel

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

enum class WeightKind : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

// A weight matrix (n outputs, k inputs), packed in panels of 64 outputs, one after the other, so
// that a product reads its weights as one stream. A step of a panel is 4 times 64 bytes, for 16
// outputs each:
//   fp32  1 input  x 16 outputs
//   bf16  2 inputs x 16 outputs, those of an output side by side
//   int8  4 inputs x 16 outputs, likewise; a byte is the weight plus 128
//   int4  8 inputs x 16 outputs: low halves of the bytes as the 4 first inputs, high halves as
//         the 4 next; the weight plus 8
// Integers q stand for the weight scale * q (+ minimum). Scales are float32 per output where group
// is 0; otherwise there is a float16 scale, and a float16 minimum if the format is asymmetric, for
// each `group` inputs: [panel][group][64].
struct Matrix {
  const uint8_t* data;
  const void* scales;
  const uint16_t* minimums;  // null: symmetric
  const float* bias;         // round_up(n, 64) floats, or null
  WeightKind kind;
  int32_t n, k;
  int32_t group;   // 0: one scale an output
  int32_t digits;  // bytes of the integers that the CPU rounds activations to: 3 or 1

  int panels() const { return static_cast<int>(round_up(n, kPanelWidth) / kPanelWidth); }
  int64_t padded_k() const { return round_up(k, group > kLanes ? group : kLanes); }
  int64_t groups() const { return group == 0 ? 1 : padded_k() / group; }
  int64_t steps() const {
    constexpr int kInputs[] = {1, 2, 4, 8};
    return padded_k() / kInputs[static_cast<int>(kind)];
  }
  int64_t num_scales() const { return panels() * groups() * kPanelWidth; }
  int64_t scale_bytes() const { return num_scales() * (group == 0 ? 4 : 2); }
  int64_t panel_bytes() const { return steps() * kPanelWidth * 4; }
};

enum class Activation : int32_t { kNone = 0, kGeluTanh = 1, kGelu = 2, kRelu2 = 3, kSwiglu = 4 };

}  // namespace leangpt
