// Instructions that compute, lane by lane: integers, floats, comparisons, bits.
//
// What PTX calls approximate is computed exactly, except where the hardware's error is so large
// that it would show: tanh.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "define.h"
#include "half.h"

namespace simt {

namespace {

template <class T, class F>
void unary(const std::string& name, const F& f) {
  define<T(T)>(name + "." + suffix<T>(), f);
}
template <class T, class F>
void binary(const std::string& name, const F& f) {
  define<T(T, T)>(name + "." + suffix<T>(), f);
}

template <class F>
void unary_integers(const std::string& name, const F& f) {
  unary<int16_t>(name, f), unary<int32_t>(name, f), unary<int64_t>(name, f);
}
template <class F>
void binary_integers(const std::string& name, const F& f) {
  binary<int16_t>(name, f), binary<int32_t>(name, f), binary<int64_t>(name, f);
  binary<uint16_t>(name, f), binary<uint32_t>(name, f), binary<uint64_t>(name, f);
}
template <class F>
void binary_floats(const std::string& name, const F& f) {
  binary<float>(name, f), binary<double>(name, f);
}
template <class F>
void unary_floats(const std::string& name, const F& f) {
  unary<float>(name, f), unary<double>(name, f);
}

// Wrapping arithmetic: signed overflow is defined in PTX.
template <class T>
using Wrapping = std::make_unsigned_t<std::common_type_t<T, int>>;
template <class T, class F>
T wrap(F f, T a, T b) {
  return static_cast<T>(f(static_cast<Wrapping<T>>(a), static_cast<Wrapping<T>>(b)));
}

template <class T>
using Wide =
    std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                       std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>, Wide<T>>;

template <class T>
void products() {
  const auto wide = [](T a, T b) { return static_cast<Wide<T>>(Wide<T>{a} * Wide<T>{b}); };
  if constexpr (sizeof(T) < 8) {
    define<Wide<T>(T, T)>("mul.wide." + suffix<T>(), wide);
    define<Wide<T>(T, T, Wide<T>)>("mad.wide." + suffix<T>(), [](T a, T b, Wide<T> c) {
      return static_cast<Wide<T>>(Wrapping<Wide<T>>(Wide<T>{a} * Wide<T>{b}) +
                                  Wrapping<Wide<T>>(c));
    });
  }
  const auto low = [](T a, T b) { return wrap<T>([](auto x, auto y) { return x * y; }, a, b); };
  const auto high = [](T a, T b) {
    return static_cast<T>(Twice<T>{a} * Twice<T>{b} >> 8 * sizeof(T));
  };
  const auto plus = [](T a, T b) { return wrap<T>([](auto x, auto y) { return x + y; }, a, b); };
  binary<T>("mul.lo", low);
  binary<T>("mul.hi", high);
  define<T(T, T, T)>("mad.lo." + suffix<T>(), [=](T a, T b, T c) { return plus(low(a, b), c); });
  define<T(T, T, T)>("mad.hi." + suffix<T>(), [=](T a, T b, T c) { return plus(high(a, b), c); });
}

void integers() {
  binary_integers("add",
                  [](auto a, auto b) { return wrap([](auto x, auto y) { return x + y; }, a, b); });
  binary_integers("sub",
                  [](auto a, auto b) { return wrap([](auto x, auto y) { return x - y; }, a, b); });
  binary_integers("min", [](auto a, auto b) { return std::min(a, b); });
  binary_integers("max", [](auto a, auto b) { return std::max(a, b); });
  // division by zero and of the least by -1 must not trap here; PTX leaves the former undefined
  binary_integers("div", [](auto a, auto b) {
    using T = decltype(a);
    return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(-Wrapping<T>(a)) : T(a / b);
  });
  binary_integers("rem", [](auto a, auto b) {
    using T = decltype(a);
    return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
  });
  unary_integers("neg", [](auto a) { return decltype(a)(-Wrapping<decltype(a)>(a)); });
  unary_integers("abs", [](auto a) { return decltype(a)(a < 0 ? -Wrapping<decltype(a)>(a) : a); });
  products<int16_t>(), products<int32_t>(), products<int64_t>();
  products<uint16_t>(), products<uint32_t>(), products<uint64_t>();
}

template <class T>
void bits_of(const std::string& type) {
  define<T(T, T)>("and." + type, [](T a, T b) { return T(a & b); });
  define<T(T, T)>("or." + type, [](T a, T b) { return T(a | b); });
  define<T(T, T)>("xor." + type, [](T a, T b) { return T(a ^ b); });
  if constexpr (std::is_same_v<T, bool>) {
    define<T(T)>("not." + type, [](T a) { return !a; });
  } else {
    define<T(T)>("not." + type, [](T a) { return T(~a); });
    define<T(T)>("cnot." + type, [](T a) { return T(a == 0); });
    define<T(T, uint32_t)>("shl." + type,
                           [](T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); });
  }
}

template <class T>
void shift_right(const std::string& type) {
  define<T(T, uint32_t)>("shr." + type, [](T a, uint32_t n) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    return std::is_signed_v<T> ? T(a >> std::min(n, kBits - 1)) : n < kBits ? T(a >> n) : T(0);
  });
}

template <class T>
void bit_fields() {
  define<T(T, uint32_t, uint32_t)>("bfe." + suffix<T>(), [](T a, uint32_t position,
                                                            uint32_t length) {
    using U = std::make_unsigned_t<T>;
    constexpr uint32_t kBits = 8 * sizeof(T);
    position &= 255, length &= 255;
    const uint32_t num_bits = std::min(length, kBits - std::min(position, kBits));
    const U mask = num_bits < kBits ? (U(1) << num_bits) - 1 : ~U(0);
    const bool is_negative =
        std::is_signed_v<T> && length && U(a) >> std::min(position + length - 1, kBits - 1) & 1;
    return T((position < kBits ? U(a) >> position & mask : U(0)) | (is_negative ? ~mask : U(0)));
  });
}

// a's four bytes times b's, and c
template <class A, class B>
void dot_product() {
  using Sum = std::conditional_t<std::is_signed_v<A> || std::is_signed_v<B>, int32_t, uint32_t>;
  const auto suffix_of = [](auto type) {
    return std::is_signed_v<decltype(type)> ? std::string(".s32") : std::string(".u32");
  };
  define<Sum(uint32_t, uint32_t, Sum)>(
      "dp4a" + suffix_of(A()) + suffix_of(B()), [](uint32_t a, uint32_t b, Sum c) {
        uint32_t sum = static_cast<uint32_t>(c);
        for (int i = 0; i < 4; ++i)
          sum += int32_t{static_cast<A>(a >> 8 * i)} * int32_t{static_cast<B>(b >> 8 * i)};
        return static_cast<Sum>(sum);
      });
}

// The place of the highest bit that is not the sign's; -1: there is none.
template <class T>
void find_bit() {
  using U = std::make_unsigned_t<T>;
  const auto highest = [](T a) {
    const U bits = a < 0 ? ~U(a) : U(a);
    return bits ? uint32_t(63 - __builtin_clzll(bits)) : ~0u;
  };
  define<uint32_t(T)>("bfind." + suffix<T>(), highest);
  define<uint32_t(T)>("bfind.shiftamt." + suffix<T>(), [=](T a) {
    return highest(a) == ~0u ? ~0u : uint32_t(8 * sizeof(T) - 1) - highest(a);
  });
}

uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;  // its sign, replicated
    result |= byte << 8 * i;
  }
  return result;
}

void bits() {
  bits_of<bool>("pred"), bits_of<uint16_t>("b16"), bits_of<uint32_t>("b32"),
      bits_of<uint64_t>("b64");
  for (const char* kind : {"u", "b"}) {
    shift_right<uint16_t>(kind + std::string("16"));
    shift_right<uint32_t>(kind + std::string("32"));
    shift_right<uint64_t>(kind + std::string("64"));
  }
  shift_right<int16_t>("s16"), shift_right<int32_t>("s32"), shift_right<int64_t>("s64");
  bit_fields<int32_t>(), bit_fields<uint32_t>(), bit_fields<int64_t>(), bit_fields<uint64_t>();
  const auto insert = [](auto a, auto b, uint32_t position, uint32_t length) {
    using T = decltype(a);
    constexpr uint32_t kBits = 8 * sizeof(T);
    position &= 255, length &= 255;
    const T mask = (length < kBits ? (T(1) << length) - 1 : ~T(0));
    return position < kBits ? T((b & ~(mask << position)) | (a & mask) << position) : b;
  };
  define<uint32_t(uint32_t, uint32_t, uint32_t, uint32_t)>("bfi.b32", insert);
  define<uint64_t(uint64_t, uint64_t, uint32_t, uint32_t)>("bfi.b64", insert);
  define<uint32_t(uint32_t)>("popc.b32",
                             [](uint32_t a) { return uint32_t(__builtin_popcount(a)); });
  define<uint32_t(uint64_t)>("popc.b64",
                             [](uint64_t a) { return uint32_t(__builtin_popcountll(a)); });
  define<uint32_t(uint32_t)>("clz.b32",
                             [](uint32_t a) { return a ? uint32_t(__builtin_clz(a)) : 32; });
  define<uint32_t(uint64_t)>("clz.b64",
                             [](uint64_t a) { return a ? uint32_t(__builtin_clzll(a)) : 64; });
  define<uint32_t(uint32_t)>("brev.b32", [](uint32_t a) {
    uint32_t reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
    return reversed;
  });
  define<uint32_t(uint32_t, uint32_t, uint32_t)>(
      "prmt.b32",
      [](uint32_t a, uint32_t b, uint32_t selector) { return permute_bytes(a, b, selector); });
  dot_product<int8_t, int8_t>(), dot_product<int8_t, uint8_t>();
  dot_product<uint8_t, int8_t>(), dot_product<uint8_t, uint8_t>();
  find_bit<int32_t>(), find_bit<uint32_t>(), find_bit<int64_t>(), find_bit<uint64_t>();
  define<uint32_t(uint32_t, uint32_t, uint32_t, uint32_t)>(
      "lop3.b32", [](uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
        uint32_t result = 0;
        for (int i = 0; i < 8; ++i)
          if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return result;
      });
  const auto funnel_left = [](uint32_t a, uint32_t b, uint32_t n) {
    return uint32_t((uint64_t{b} << 32 | a) << n >> 32);
  };
  const auto funnel_right = [](uint32_t a, uint32_t b, uint32_t n) {
    return uint32_t((uint64_t{b} << 32 | a) >> n);
  };
  using Funnel = uint32_t(uint32_t, uint32_t, uint32_t);
  define<Funnel>("shf.l.wrap.b32",
                 [=](uint32_t a, uint32_t b, uint32_t n) { return funnel_left(a, b, n & 31); });
  define<Funnel>("shf.r.wrap.b32",
                 [=](uint32_t a, uint32_t b, uint32_t n) { return funnel_right(a, b, n & 31); });
  define<Funnel>("shf.l.clamp.b32", [=](uint32_t a, uint32_t b, uint32_t n) {
    return funnel_left(a, b, std::min(n, 32u));
  });
  define<Funnel>("shf.r.clamp.b32", [=](uint32_t a, uint32_t b, uint32_t n) {
    return funnel_right(a, b, std::min(n, 32u));
  });
}

// add.cc, madc.hi.cc and their like: the carry out is an operand behind the result, the carry in
// the last one
template <bool gives, bool takes, int num_args, class F>
void with_carry(Warp& warp, const Instruction& i, Mask lanes) {
  const uint32_t* arg = i.operands + 1 + gives;
  for (; lanes; lanes &= lanes - 1) {
    const int l = __builtin_ctz(lanes);
    uint32_t values[3] = {};
    for (int n = 0; n < num_args; ++n) values[n] = warp.reg<uint32_t>(arg[n])[l];
    const uint64_t carry = takes ? warp.reg<bool>(arg[num_args])[l] : 0;
    const uint64_t result = (*kept<F>)(values[0], values[1], values[2], carry);
    warp.reg<uint32_t>(i.operands[0])[l] = static_cast<uint32_t>(result);
    if (gives) warp.reg<bool>(i.operands[1])[l] = result >> 32 & 1;
  }
}

template <int num_args, class F>
void define_with_carry(const std::string& opcode, const std::string& part, const F& f) {
  if (!kept<F>) kept<F> = new F(f);
  const std::string args = num_args == 3 ? " b32 b32 b32" : " b32 b32";
  table().push_back(
      {opcode + part + ".cc.u32", "=b32 =pred" + args, &with_carry<true, false, num_args, F>});
  table().push_back({opcode + "c" + part + ".cc.u32", "=b32 =pred" + args + " pred",
                     &with_carry<true, true, num_args, F>});
  table().push_back({opcode + "c" + part + ".u32", "=b32" + args + " pred",
                     &with_carry<false, true, num_args, F>});
}

void carries() {
  define_with_carry<2>(
      "add", "", [](uint64_t a, uint64_t b, uint64_t, uint64_t carry) { return a + b + carry; });
  define_with_carry<2>(
      "sub", "", [](uint64_t a, uint64_t b, uint64_t, uint64_t carry) { return a - b - carry; });
  define_with_carry<3>("mad", ".lo", [](uint64_t a, uint64_t b, uint64_t c, uint64_t carry) {
    return (a * b & 0xFFFFFFFF) + c + carry;
  });
  define_with_carry<3>("mad", ".hi", [](uint64_t a, uint64_t b, uint64_t c, uint64_t carry) {
    return (a * b >> 32) + c + carry;
  });
}

// min and max of PTX: the operand that is a number; with .NaN, NaN
template <class T>
T propagate_nan(T a, T b, T result) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : result;
}

float approximate_tanh(float x) {  // to eleven bits, as the hardware does
  return bit_cast<float>((bit_cast<uint32_t>(std::tanh(x)) + 0x1000u) & 0xFFFFE000u);
}

// a * b + c, rounded once, downwards.
float fma_down(float a, float b, float c) {
  const double product = double{a} * b, sum = product + c;  // the product is exact
  const double of_c = sum - product, error = (product - (sum - of_c)) + (c - of_c);
  const auto rounded = static_cast<float>(sum);
  const bool is_above = rounded > sum || (rounded == sum && error < 0);
  return is_above ? std::nextafter(rounded, -INFINITY) : rounded;
}

void floats() {
  binary_floats("add", [](auto a, auto b) { return a + b; });
  binary_floats("sub", [](auto a, auto b) { return a - b; });
  binary_floats("mul", [](auto a, auto b) { return a * b; });
  binary_floats("div", [](auto a, auto b) { return a / b; });
  binary_floats("min", [](auto a, auto b) { return std::fmin(a, b); });
  binary_floats("max", [](auto a, auto b) { return std::fmax(a, b); });
  const auto unit = [](float a) { return std::fmin(std::fmax(a, 0.0f), 1.0f); };  // NaN is 0
  binary<float>("add.sat", [=](float a, float b) { return unit(a + b); });
  binary<float>("mul.sat", [=](float a, float b) { return unit(a * b); });
  binary_floats("copysign", [](auto a, auto b) { return std::copysign(b, a); });
  define<float(float, float)>(
      "min.NaN.f32", [](float a, float b) { return propagate_nan(a, b, std::fmin(a, b)); });
  define<float(float, float)>(
      "max.NaN.f32", [](float a, float b) { return propagate_nan(a, b, std::fmax(a, b)); });
  const auto fused = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
  for (const char* name : {"fma.", "mad."}) {
    define<float(float, float, float)>(name + std::string("f32"), fused);
    define<double(double, double, double)>(name + std::string("f64"), fused);
  }
  define<float(float, float, float)>("fma.rm.f32",
                                     [](float a, float b, float c) { return fma_down(a, b, c); });
  unary_floats("neg", [](auto a) { return -a; });
  unary_floats("abs", [](auto a) { return std::fabs(a); });
  unary_floats("sqrt", [](auto a) { return std::sqrt(a); });
  unary_floats("rsqrt", [](auto a) { return decltype(a)(1) / std::sqrt(a); });
  unary_floats("rcp", [](auto a) { return decltype(a)(1) / a; });
  unary<float>("ex2", [](float a) { return std::exp2(a); });
  unary<float>("lg2", [](float a) { return std::log2(a); });
  unary<float>("sin", [](float a) { return std::sin(a); });
  unary<float>("cos", [](float a) { return std::cos(a); });
  unary<float>("tanh", [](float a) { return approximate_tanh(a); });
}

template <float (*from)(uint16_t), uint16_t (*to)(float)>
void halves(const std::string& type) {
  // an instruction on one value, and one on the two halves of a word
  const auto define_unary = [&](const std::string& name, auto f) {
    const auto one = [f](uint16_t a) { return to(f(from(a))); };
    define<uint16_t(uint16_t)>(name + "." + type, one);
    define<uint32_t(uint32_t)>(name + "." + type + "x2", [one](uint32_t a) {
      return uint32_t{one(uint16_t(a))} | uint32_t{one(uint16_t(a >> 16))} << 16;
    });
  };
  const auto define_binary = [&](const std::string& name, auto f) {
    const auto one = [f](uint16_t a, uint16_t b) { return to(f(from(a), from(b))); };
    define<uint16_t(uint16_t, uint16_t)>(name + "." + type, one);
    define<uint32_t(uint32_t, uint32_t)>(name + "." + type + "x2", [one](uint32_t a, uint32_t b) {
      return uint32_t{one(uint16_t(a), uint16_t(b))} |
             uint32_t{one(uint16_t(a >> 16), uint16_t(b >> 16))} << 16;
    });
  };
  // rounding to float first does not change the result: a float has more than twice the bits
  define_binary("add", [](float a, float b) { return a + b; });
  define_binary("sub", [](float a, float b) { return a - b; });
  define_binary("mul", [](float a, float b) { return a * b; });
  define_binary("min", [](float a, float b) { return std::fmin(a, b); });
  define_binary("max", [](float a, float b) { return std::fmax(a, b); });
  define_binary("min.NaN", [](float a, float b) { return propagate_nan(a, b, std::fmin(a, b)); });
  define_binary("max.NaN", [](float a, float b) { return propagate_nan(a, b, std::fmax(a, b)); });
  define_unary("neg", [](float a) { return -a; });
  define_unary("abs", [](float a) { return std::fabs(a); });
  define_unary("ex2", [](float a) { return std::exp2(a); });
  define_unary("tanh", [](float a) { return approximate_tanh(a); });
  const auto fused = [](uint16_t a, uint16_t b, uint16_t c) {
    // the product is exact; a sum that a float rounds to a tie is put on its side of the tie
    const double sum = double{from(a)} * double{from(b)} + double{from(c)};
    const float rounded = static_cast<float>(sum);
    if (rounded == sum || !std::isfinite(rounded)) return to(rounded);
    const uint32_t bits = bit_cast<uint32_t>(rounded);
    return to(bits & 1 ? rounded : std::nextafterf(rounded, sum > rounded ? INFINITY : -INFINITY));
  };
  define<uint16_t(uint16_t, uint16_t, uint16_t)>("fma." + type, fused);
  define<uint32_t(uint32_t, uint32_t, uint32_t)>(
      "fma." + type + "x2", [fused](uint32_t a, uint32_t b, uint32_t c) {
        return uint32_t{fused(uint16_t(a), uint16_t(b), uint16_t(c))} |
               uint32_t{fused(uint16_t(a >> 16), uint16_t(b >> 16), uint16_t(c >> 16))} << 16;
      });
}

// setp and its comparisons of floats: plain ones are false for NaN, those with a `u` true
template <class T, class F>
void ordered(const std::string& type, const F& value) {
  const auto compare = [&](const std::string& name, auto f) {
    define<bool(T, T)>("setp." + name + "." + type,
                       [=](T a, T b) { return f(value(a), value(b)); });
  };
  compare("eq", [](auto a, auto b) { return a == b; });
  compare("ne", [](auto a, auto b) { return a < b || a > b; });
  compare("lt", [](auto a, auto b) { return a < b; });
  compare("le", [](auto a, auto b) { return a <= b; });
  compare("gt", [](auto a, auto b) { return a > b; });
  compare("ge", [](auto a, auto b) { return a >= b; });
  compare("equ", [](auto a, auto b) { return !(a < b || a > b); });
  compare("neu", [](auto a, auto b) { return a != b; });
  compare("ltu", [](auto a, auto b) { return !(a >= b); });
  compare("leu", [](auto a, auto b) { return !(a > b); });
  compare("gtu", [](auto a, auto b) { return !(a <= b); });
  compare("geu", [](auto a, auto b) { return !(a < b); });
  compare("num", [](auto a, auto b) { return a == a && b == b; });
  compare("nan", [](auto a, auto b) { return a != a || b != b; });
}

template <class T>
void compare_integers(const std::string& type) {
  define<bool(T, T)>("setp.eq." + type, [](T a, T b) { return a == b; });
  define<bool(T, T)>("setp.ne." + type, [](T a, T b) { return a != b; });
  define<bool(T, T)>("setp.lt." + type, [](T a, T b) { return a < b; });
  define<bool(T, T)>("setp.le." + type, [](T a, T b) { return a <= b; });
  define<bool(T, T)>("setp.gt." + type, [](T a, T b) { return a > b; });
  define<bool(T, T)>("setp.ge." + type, [](T a, T b) { return a >= b; });
}

void comparisons() {
  compare_integers<int16_t>("s16"), compare_integers<int32_t>("s32"),
      compare_integers<int64_t>("s64");
  compare_integers<uint16_t>("u16"), compare_integers<uint32_t>("u32"),
      compare_integers<uint64_t>("u64");
  compare_integers<uint16_t>("b16"), compare_integers<uint32_t>("b32"),
      compare_integers<uint64_t>("b64");
  ordered<float>("f32", [](float a) { return a; });
  ordered<double>("f64", [](double a) { return a; });
  ordered<uint16_t>("f16", [](uint16_t a) { return from_f16(a); });
  ordered<uint16_t>("bf16", [](uint16_t a) { return from_bf16(a); });
  const auto select = [](auto a, auto b, bool c) { return c ? a : b; };
  define<bool(bool, bool, bool)>("selp.pred", select);
  define<uint16_t(uint16_t, uint16_t, bool)>("selp.b16", select);
  define<uint32_t(uint32_t, uint32_t, bool)>("selp.b32", select);
  define<uint64_t(uint64_t, uint64_t, bool)>("selp.b64", select);
}

}  // namespace

void define_arithmetic() {
  integers();
  carries();
  bits();
  floats();
  halves<from_f16, to_f16>("f16");
  halves<from_bf16, to_bf16>("bf16");
  comparisons();
}

}  // namespace simt
