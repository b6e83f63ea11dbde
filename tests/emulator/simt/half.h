// Conversions between float and the 16-bit formats, to nearest even, as PTX `cvt` does them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float from_bf16(uint16_t bits) { return bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FFF : rounded);
}

inline float from_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} << 16 & 0x80000000u,
                 rest = uint32_t{bits} << 13 & 0x0FFFE000u;
  // a float whose exponent is too small by 112, which the product corrects, subnormals included
  const float value = bit_cast<float>(rest) * 0x1p112f;
  const uint32_t special = rest >= 0x0F800000u ? 0x7F800000u : 0;  // infinity, NaN
  return bit_cast<float>(bit_cast<uint32_t>(value) | special | sign);
}

inline uint16_t to_f16(float value) {
  const uint32_t sign = bit_cast<uint32_t>(value) >> 16 & 0x8000;
  const uint32_t bits = bit_cast<uint32_t>(value) & 0x7FFFFFFF;
  const uint32_t normal = (bits + 0xFFF + (bits >> 13 & 1) - 0x38000000u) >> 13;
  // adding 0.5 leaves the subnormal, rounded, in the low bits
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - 0x3F000000u;
  const uint32_t rounded = bits > 0x7F800000u    ? 0x7FFF
                           : bits >= 0x477FF000u ? sign | 0x7C00  // too large
                           : bits < 0x38800000u  ? sign | subnormal
                                                 : sign | normal;
  return static_cast<uint16_t>(rounded);
}

// A tensor core reads no more of a tf32 operand than its upper 19 bits.
inline float truncate_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xFFFFE000u); }

inline uint32_t to_tf32(float value) {  // to nearest, ties away from zero
  const uint32_t bits = bit_cast<uint32_t>(value);
  return std::isfinite(value) ? (bits + 0x1000u) & 0xFFFFE000u : bits;
}

}  // namespace simt
