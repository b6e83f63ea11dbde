// mov and cvt: copies, vectors of registers, and every conversion between number formats.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "define.h"
#include "half.h"

namespace simt {

namespace {

// A float becomes an integer: out of range saturates, NaN is 0.
template <class To, class From>
To saturate(From value) {
  constexpr From kLimit = static_cast<From>(std::numeric_limits<To>::max());
  if (value != value) return 0;
  if (value >= kLimit) return std::numeric_limits<To>::max();
  if (value <= static_cast<From>(std::numeric_limits<To>::min()))
    return std::numeric_limits<To>::min();
  return static_cast<To>(value);
}

// An integer becomes the nearest one of another type.
template <class To, class From>
To clamp(From value) {
  using Limits = std::numeric_limits<To>;
  const __int128 wide = value;
  return static_cast<To>(
      std::min<__int128>(std::max<__int128>(wide, Limits::min()), Limits::max()));
}

template <class To, class From>
void integer_to_integer() {
  const std::string types = suffix<To>() + "." + suffix<From>();
  define<To(From)>("cvt." + types, [](From a) { return static_cast<To>(a); });
  define<To(From)>("cvt.sat." + types, [](From a) { return clamp<To>(a); });
}

template <class Integer, class Float>
void float_and_integer() {
  define<Float(Integer)>("cvt." + suffix<Float>() + "." + suffix<Integer>(),
                         [](Integer a) { return static_cast<Float>(a); });
  // they saturate without being told to; not so those to 8 bits, whose other cases are undefined
  const std::string types =
      (sizeof(Integer) == 1 ? "sat." : "") + suffix<Integer>() + "." + suffix<Float>();
  define<Integer(Float)>("cvt.rni." + types,
                         [](Float a) { return saturate<Integer>(std::nearbyint(a)); });
  define<Integer(Float)>("cvt.rzi." + types,
                         [](Float a) { return saturate<Integer>(std::trunc(a)); });
  define<Integer(Float)>("cvt.rmi." + types,
                         [](Float a) { return saturate<Integer>(std::floor(a)); });
  define<Integer(Float)>("cvt.rpi." + types,
                         [](Float a) { return saturate<Integer>(std::ceil(a)); });
}

template <class Integer>
void conversions_of() {
  integer_to_integer<Integer, int8_t>(), integer_to_integer<Integer, uint8_t>();
  integer_to_integer<Integer, int16_t>(), integer_to_integer<Integer, uint16_t>();
  integer_to_integer<Integer, int32_t>(), integer_to_integer<Integer, uint32_t>();
  integer_to_integer<Integer, int64_t>(), integer_to_integer<Integer, uint64_t>();
  float_and_integer<Integer, float>();
  float_and_integer<Integer, double>();
  if constexpr (sizeof(Integer) <= 2) {  // wider ones would be rounded twice
    define<uint16_t(Integer)>("cvt.f16." + suffix<Integer>(), [](Integer a) { return to_f16(a); });
    define<uint16_t(Integer)>("cvt.bf16." + suffix<Integer>(),
                              [](Integer a) { return to_bf16(a); });
  }
  define<Integer(uint16_t)>("cvt.rzi." + suffix<Integer>() + ".f16",
                            [](uint16_t a) { return saturate<Integer>(std::trunc(from_f16(a))); });
}

void floats() {
  define<float(double)>("cvt.f32.f64", [](double a) { return static_cast<float>(a); });
  define<double(float)>("cvt.f64.f32", [](float a) { return double{a}; });
  define<float(float)>("cvt.f32.f32", [](float a) { return a; });
  define<float(float)>("cvt.sat.f32.f32",
                       [](float a) { return std::fmin(std::fmax(a, 0.0f), 1.0f); });
  define<float(float)>("cvt.rni.f32.f32", [](float a) { return std::nearbyint(a); });
  define<float(float)>("cvt.rzi.f32.f32", [](float a) { return std::trunc(a); });
  define<float(float)>("cvt.rmi.f32.f32", [](float a) { return std::floor(a); });
  define<float(float)>("cvt.rpi.f32.f32", [](float a) { return std::ceil(a); });
  define<double(double)>("cvt.rni.f64.f64", [](double a) { return std::nearbyint(a); });
  define<double(double)>("cvt.rzi.f64.f64", [](double a) { return std::trunc(a); });
  define<double(double)>("cvt.rmi.f64.f64", [](double a) { return std::floor(a); });
  define<uint16_t(float)>("cvt.rz.bf16.f32", [](float a) {
    return a != a ? to_bf16(a) : static_cast<uint16_t>(bit_cast<uint32_t>(a) >> 16);
  });
  define<uint32_t(float, float)>("cvt.relu.bf16x2.f32", [](float a, float b) {
    const auto positive = [](float x) { return uint32_t{to_bf16(x > 0 || x != x ? x : 0.0f)}; };
    return positive(a) << 16 | positive(b);
  });
  define<uint32_t(float)>("cvt.rna.tf32.f32", [](float a) { return to_tf32(a); });
  define<float(uint16_t)>("cvt.f32.f16", [](uint16_t a) { return from_f16(a); });
  define<float(uint16_t)>("cvt.f32.bf16", [](uint16_t a) { return from_bf16(a); });
  define<double(uint16_t)>("cvt.f64.f16", [](uint16_t a) { return double{from_f16(a)}; });
  define<double(uint16_t)>("cvt.f64.bf16", [](uint16_t a) { return double{from_bf16(a)}; });
  define<uint16_t(float)>("cvt.f16.f32", [](float a) { return to_f16(a); });
  define<uint16_t(float)>("cvt.bf16.f32", [](float a) { return to_bf16(a); });
  // the first operand goes to the upper half
  define<uint32_t(float, float)>(
      "cvt.f16x2.f32", [](float a, float b) { return uint32_t{to_f16(a)} << 16 | to_f16(b); });
  define<uint32_t(float, float)>(
      "cvt.bf16x2.f32", [](float a, float b) { return uint32_t{to_bf16(a)} << 16 | to_bf16(b); });
}

// mov between a register and a vector of narrower ones

template <class Whole, class Part>
constexpr int kParts = sizeof(Whole) / sizeof(Part);

template <class Whole, class Part>
void pack(Warp& warp, const Instruction& i, Mask lanes) {
  for (; lanes; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    Part parts[kParts<Whole, Part>];
    for (int p = 0; p < kParts<Whole, Part>; ++p) parts[p] = warp.reg<Part>(i.operands[p + 1])[l];
    std::memcpy(&warp.reg<Whole>(i.operands[0])[l], parts, sizeof parts);
  }
}

template <class Whole, class Part>
void unpack(Warp& warp, const Instruction& i, Mask lanes) {
  for (; lanes; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    Part parts[kParts<Whole, Part>];
    std::memcpy(parts, &warp.reg<Whole>(i.operands[kParts<Whole, Part>])[l], sizeof parts);
    for (int p = 0; p < kParts<Whole, Part>; ++p) warp.reg<Part>(i.operands[p])[l] = parts[p];
  }
}

template <class Whole, class Part>
void vectors() {
  const std::string whole = type_name<Whole>(), part = type_name<Part>();
  table().push_back(
      {"pack." + whole + "." + part, "=" + whole + " " + part + "*", &pack<Whole, Part>});
  table().push_back(
      {"unpack." + whole + "." + part, "=" + part + "* " + whole, &unpack<Whole, Part>});
}

}  // namespace

void define_conversions() {
  define<bool(bool)>("mov.pred", [](bool a) { return a; });
  define<uint16_t(uint16_t)>("mov.b16", [](uint16_t a) { return a; });
  define<uint32_t(uint32_t)>("mov.b32", [](uint32_t a) { return a; });
  define<uint64_t(uint64_t)>("mov.b64", [](uint64_t a) { return a; });
  vectors<uint16_t, uint8_t>();
  vectors<uint32_t, uint8_t>(), vectors<uint32_t, uint16_t>();
  vectors<uint64_t, uint8_t>(), vectors<uint64_t, uint16_t>(), vectors<uint64_t, uint32_t>();
  conversions_of<int8_t>(), conversions_of<int16_t>(), conversions_of<int32_t>(),
      conversions_of<int64_t>();
  conversions_of<uint8_t>(), conversions_of<uint16_t>(), conversions_of<uint32_t>(),
      conversions_of<uint64_t>();
  floats();
}

}  // namespace simt
