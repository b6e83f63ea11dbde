// Vec: 16 floats, IVec: 16 int32, in four 128-bit vectors of the compiler each (SSE2, NEON, or
// whatever there is); the same names as vec_avx512.h.

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  Float4 a, b, c, d;
};
struct IVec {
  Int4 a, b, c, d;
};

template <class F>
static inline Vec each(Vec x, F f) {
  return {f(x.a), f(x.b), f(x.c), f(x.d)};
}
template <class F>
static inline IVec each(IVec x, F f) {
  return {f(x.a), f(x.b), f(x.c), f(x.d)};
}

static inline Vec broadcast(float x) {
  const Float4 v = {x, x, x, x};
  return {v, v, v, v};
}
static inline Vec zero() { return broadcast(0); }
static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline void store_first(float* p, Vec v, int n) { std::memcpy(p, &v, n * sizeof(float)); }
static inline Vec operator+(Vec x, Vec y) { return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d}; }
static inline Vec operator-(Vec x, Vec y) { return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d}; }
static inline Vec operator*(Vec x, Vec y) { return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d}; }
static inline Vec operator/(Vec x, Vec y) { return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d}; }
#if defined(__ARM_NEON)
static inline Vec fma(Vec x, Vec y, Vec z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c),
          vfmaq_f32(z.d, x.d, y.d)};
}
#else
static inline Vec fma(Vec x, Vec y, Vec z) { return x * y + z; }  // in two roundings
#endif
static inline Vec max(Vec x, Vec y) {
  return {x.a > y.a ? x.a : y.a, x.b > y.b ? x.b : y.b, x.c > y.c ? x.c : y.c,
          x.d > y.d ? x.d : y.d};
}
static inline Vec min(Vec x, Vec y) {
  return {x.a < y.a ? x.a : y.a, x.b < y.b ? x.b : y.b, x.c < y.c ? x.c : y.c,
          x.d < y.d ? x.d : y.d};
}
static inline Vec abs(Vec x) { return max(x, zero() - x); }
static inline Vec sqrt(Vec x) {
  float lanes[16];
  store(lanes, x);
  for (float& lane : lanes) lane = std::sqrt(lane);
  return load(lanes);
}
static inline float reduce_add(Vec x) {
  const Float4 s = (x.a + x.c) + (x.b + x.d);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
static inline float reduce_max(Vec x) {
  float lanes[16], best;
  store(lanes, x);
  best = lanes[0];
  for (int i = 1; i < 16; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}
static inline Vec keep_lanes(Vec x, int first, int last, float other) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) lanes[i] = i >= first && i < last ? lanes[i] : other;
  return load(lanes);
}

static inline IVec broadcast_i32(int32_t x) {
  const Int4 v = {x, x, x, x};
  return {v, v, v, v};
}
static inline IVec operator+(IVec x, IVec y) {
  return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d};
}
static inline IVec operator-(IVec x, IVec y) {
  return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d};
}
template <int kBits>
static inline IVec shift_left(IVec x) {
  return each(x, [](Int4 v) { return v << kBits; });
}
template <int kBits>
static inline IVec shift_right(IVec x) {
  return each(x, [](Int4 v) { return v >> kBits; });
}
static inline int32_t reduce_add(IVec x) {
  const Int4 s = (x.a + x.c) + (x.b + x.d);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
static inline Vec to_float(IVec x) {
  return {__builtin_convertvector(x.a, Float4), __builtin_convertvector(x.b, Float4),
          __builtin_convertvector(x.c, Float4), __builtin_convertvector(x.d, Float4)};
}
// Adding 1.5 * 2^23 leaves no bits for a fraction, so the sum is rounded to nearest, even; for |x|
// <= 2^22.
static inline Vec round_small(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  return (x + magic) - magic;
}
static inline IVec round_to_int(Vec x) {
  // in two parts, so that integers up to 2^23 are met exactly
  const Vec coarse = round_small(x * broadcast(1.0f / 256)) * broadcast(256);
  const Vec fine = round_small(x - coarse);
  const auto to_int = [](Vec v) {
    return IVec{__builtin_convertvector(v.a, Int4), __builtin_convertvector(v.b, Int4),
                __builtin_convertvector(v.c, Int4), __builtin_convertvector(v.d, Int4)};
  };
  return to_int(coarse) + to_int(fine);
}
static inline void store_i8(int8_t* p, IVec x) {
  int32_t lanes[16];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

static inline Vec load_bf16(const uint16_t* p) {
  uint32_t bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = static_cast<uint32_t>(p[i]) << 16;
  Vec v;
  std::memcpy(&v, bits, sizeof v);
  return v;
}
static inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) {  // infinite or NaN
    const uint32_t bits = sign | 0x7F800000 | (magnitude & 0x3FF) << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const uint32_t bits = magnitude << 13;  // the exponent is 112 too small; subnormal numbers too
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  return sign ? -value : value;
}
static inline Vec load_f16(const uint16_t* p) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = f16_to_float(p[i]);
  return load(lanes);
}
static inline void store_bf16(uint16_t* p, Vec v) {
  uint32_t bits[16];
  std::memcpy(bits, &v, sizeof bits);
  for (int i = 0; i < 16; ++i) {
    const bool is_nan = (bits[i] & 0x7FFFFFFF) > 0x7F800000;
    const uint32_t rounded =
        is_nan ? bits[i] | 0x00400000 : bits[i] + 0x7FFF + ((bits[i] >> 16) & 1);
    p[i] = static_cast<uint16_t>(rounded >> 16);
  }
}

static inline void store_in_pairs(uint16_t* pairs, const uint16_t* elements, int which) {
  for (int i = 0; i < 16; ++i) pairs[2 * i + which] = elements[i];
}

static inline Vec round(Vec x) { return round_small(x); }
static inline Vec scale_by_power_of_2(Vec x, Vec n) {
  const IVec bits = shift_left<23>(round_to_int(n) + broadcast_i32(127));
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x * power;
}

static inline Vec combine_digits(IVec high, IVec middle, IVec low) {
  int32_t h[16], m[16], l[16];
  float lanes[16];
  std::memcpy(h, &high, sizeof h);
  std::memcpy(m, &middle, sizeof m);
  std::memcpy(l, &low, sizeof l);
  for (int i = 0; i < 16; ++i) {
    lanes[i] = static_cast<float>(h[i] * 65536.0 + (m[i] * 256.0 + l[i]));
  }
  return load(lanes);
}

using Bf16Activation = float;

struct Bf16Weights {
  Vec even, odd;  // 16 outputs: the first and the second of 2 inputs
};
static inline Bf16Weights load_bf16_weights(const uint8_t* p) {
  IVec pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  const IVec even = shift_left<16>(pairs);
  const IVec odd = shift_left<16>(shift_right<16>(pairs));
  Bf16Weights w;
  std::memcpy(&w.even, &even, sizeof even);
  std::memcpy(&w.odd, &odd, sizeof odd);
  return w;
}
static inline Vec dot_bf16(Vec sum, Bf16Weights w, const float* a) {
  return fma(w.odd, broadcast(a[1]), fma(w.even, broadcast(a[0]), sum));
}

// 16 outputs with 4 inputs each, widened to int32: inputs 0, 1, 2 and 3 of all outputs.
struct Int8Weights {
  IVec input[4];
};
static inline Int8Weights widen(IVec bytes) {
  const auto byte = [](IVec x) { return each(x, [](Int4 v) { return v & 0xFF; }); };
  return {{byte(bytes), byte(shift_right<8>(bytes)), byte(shift_right<16>(bytes)),
           byte(shift_right<24>(bytes))}};
}
static inline Int8Weights load_int8_weights(const uint8_t* p) {
  IVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return widen(bytes);
}
static inline void load_int4_weights(const uint8_t* p, Int8Weights& low, Int8Weights& high) {
  IVec both;
  std::memcpy(&both, p, sizeof both);
  const auto nibble = [](IVec x) { return each(x, [](Int4 v) { return v & 0x0F0F0F0F; }); };
  low = widen(nibble(both));
  high = widen(nibble(shift_right<4>(both)));
}
static inline IVec dot_int8(IVec sum, Int8Weights w, const int8_t* a) {
  for (int i = 0; i < 4; ++i) {
    const Int4 x = {a[i], a[i], a[i], a[i]};
    sum = sum + each(w.input[i], [&](Int4 v) { return v * x; });
  }
  return sum;
}

// How many rows of a product are in registers at a time, and how many Vecs of outputs for that many
// rows, so that the sums fit the registers: 12 of the 16 of SSE2, four for each Vec. Few rows take
// the whole panel, and so read it as one stream.
constexpr int kTileRows = 3;
constexpr int kMostSharingRows = 0;
constexpr int tile_vecs(int rows) { return rows == 1 ? 2 : 1; }
constexpr int grouped_tile_vecs(int tokens) { return tokens <= kTileRows ? 1 : 0; }
constexpr int kMaxQueries = 4;
constexpr int kAttentionSums = 4;
