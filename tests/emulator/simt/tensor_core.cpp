// mma.sync.aligned.m16n8kK: D = A B + C over the registers of a warp. A is 16 x K, B is K x 8,
// C and D are 16 x 8.
//
// With g = lane / 4, t = lane % 4 and e values in a register:
// - register r of A holds row g + 8 (r % 2), columns t e + 4 e (r / 2) and the next;
// - register r of B holds column g, rows t e + 4 e r and the next;
// - values 2 r and 2 r + 1 of C and D are in row g + 8 r, columns 2 t and 2 t + 1.
// K follows from the number of registers. Sums are taken in the order of k.
#include "define.h"
#include "half.h"

namespace simt {

namespace {

constexpr int kRows = 16, kColumns = 8, kMostK = 64;

struct Bf16 {
  using Sum = float;
  static constexpr int kValues = 2;
  static float value(uint32_t word, int e) {
    return from_bf16(static_cast<uint16_t>(word >> 16 * e));
  }
};
struct F16 {
  using Sum = float;
  static constexpr int kValues = 2;
  static float value(uint32_t word, int e) {
    return from_f16(static_cast<uint16_t>(word >> 16 * e));
  }
};
struct Tf32 {
  using Sum = float;
  static constexpr int kValues = 1;
  static float value(uint32_t word, int) { return truncate_tf32(word); }
};
struct S8 {
  using Sum = int32_t;
  static constexpr int kValues = 4;
  static int32_t value(uint32_t word, int e) { return static_cast<int8_t>(word >> 8 * e); }
};
struct U8 {
  using Sum = int32_t;
  static constexpr int kValues = 4;
  static int32_t value(uint32_t word, int e) { return static_cast<uint8_t>(word >> 8 * e); }
};

// D and C in registers: 32-bit values, or two of f16
struct Words {
  static constexpr int kRegisters = 4;
  template <class Sum>
  static Sum get(Warp& warp, const uint32_t* registers, int lane, int value) {
    return warp.reg<Sum>(registers[value])[lane];
  }
  template <class Sum>
  static void set(Warp& warp, const uint32_t* registers, int lane, int value, Sum sum) {
    warp.reg<Sum>(registers[value])[lane] = sum;
  }
};
struct HalfWords {
  static constexpr int kRegisters = 2;
  template <class Sum>
  static Sum get(Warp& warp, const uint32_t* registers, int lane, int value) {
    return from_f16(warp.reg<uint16_t>(registers[value / 2])[2 * lane + value % 2]);
  }
  template <class Sum>
  static void set(Warp& warp, const uint32_t* registers, int lane, int value, Sum sum) {
    warp.reg<uint16_t>(registers[value / 2])[2 * lane + value % 2] = to_f16(sum);
  }
};

template <class A, class B, class Accumulator, int num_a>
void multiply(Warp& warp, const Instruction& i, Mask) {
  using Sum = typename A::Sum;
  constexpr int e = A::kValues, k = 2 * e * num_a;
  static_assert(k <= kMostK);
  Sum a[kRows][kMostK], b[kMostK][kColumns], sums[kRows][kColumns];
  const uint32_t* const registers_d = i.operands;
  const uint32_t* const registers_a = registers_d + Accumulator::kRegisters;
  const uint32_t* const registers_b = registers_a + num_a;
  const uint32_t* const registers_c = registers_b + num_a / 2;
  for (int r = 0; r < num_a; ++r)
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int n = 0; n < e; ++n)
        a[lane / 4 + 8 * (r % 2)][lane % 4 * e + 4 * e * (r / 2) + n] =
            A::value(warp.reg<uint32_t>(registers_a[r])[lane], n);
  for (int r = 0; r < num_a / 2; ++r)
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int n = 0; n < e; ++n)
        b[lane % 4 * e + 4 * e * r + n][lane / 4] =
            B::value(warp.reg<uint32_t>(registers_b[r])[lane], n);
  const auto for_values = [](auto f) {
    for (int value = 0; value < 4; ++value)
      for (int lane = 0; lane < kWarpSize; ++lane)
        f(lane, value, lane / 4 + 8 * (value / 2), lane % 4 * 2 + value % 2);
  };
  for_values([&](int lane, int value, int row, int column) {
    sums[row][column] = Accumulator::template get<Sum>(warp, registers_c, lane, value);
  });
  for (int row = 0; row < kRows; ++row)
    for (int n = 0; n < k; ++n)
      for (int column = 0; column < kColumns; ++column)
        sums[row][column] += a[row][n] * b[n][column];
  for_values([&](int lane, int value, int row, int column) {
    Accumulator::template set<Sum>(warp, registers_d, lane, value, sums[row][column]);
  });
}

template <class A, class B, class Accumulator, int num_a>
void add(const std::string& types) {
  std::string signature;
  for (int n = 0; n < Accumulator::kRegisters; ++n) signature += "=b32 ";
  for (int n = 0; n < num_a + num_a / 2 + Accumulator::kRegisters; ++n) signature += "b32 ";
  const int k = 2 * A::kValues * num_a;
  table().push_back({"mma.m16n8k" + std::to_string(k) + ".row.col." + types, signature,
                     &multiply<A, B, Accumulator, num_a>, Control::kCollective});
}

}  // namespace

void define_tensor_cores() {
  add<Bf16, Bf16, Words, 4>("f32.bf16.bf16.f32"), add<Bf16, Bf16, Words, 2>("f32.bf16.bf16.f32");
  add<F16, F16, Words, 4>("f32.f16.f16.f32"), add<F16, F16, Words, 2>("f32.f16.f16.f32");
  add<F16, F16, HalfWords, 4>("f16.f16.f16.f16"), add<F16, F16, HalfWords, 2>("f16.f16.f16.f16");
  add<Tf32, Tf32, Words, 4>("f32.tf32.tf32.f32"), add<Tf32, Tf32, Words, 2>("f32.tf32.tf32.f32");
  add<S8, S8, Words, 4>("s32.s8.s8.s32"), add<S8, S8, Words, 2>("s32.s8.s8.s32");
  add<U8, S8, Words, 4>("s32.u8.s8.s32"), add<S8, U8, Words, 4>("s32.s8.u8.s32"),
      add<U8, U8, Words, 4>("s32.u8.u8.s32");
}

}  // namespace simt
