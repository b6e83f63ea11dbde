// What this CPU can do at most, for benchmarks to compare with: reading memory, and multiplying
// what is in registers.

// Reads every byte; the sum keeps the compiler from leaving it out.
static float read_memory(const uint8_t* p, int64_t bytes) {
  Vec sums[8];
  for (Vec& sum : sums) sum = zero();
  for (int64_t i = 0; i + 512 <= bytes; i += 512) {
    for (int v = 0; v < 8; ++v) {
      const uint8_t* at = p + i + v * 64;
      prefetch_weights(at);
      sums[v] = sums[v] + load(reinterpret_cast<const float*>(at));
    }
  }
  Vec total = zero();
  for (const Vec& sum : sums) total = total + sum;
  return reduce_add(total);
}

// On those ISAs that have tiles.
template <WeightKind kKind>
static int multiply_tiles(int64_t rounds);

// `rounds` times some products of a Vec of outputs; returns the multiplications and additions of
// one round.
static int multiply_registers(WeightKind kind, int64_t rounds) {
  if constexpr (kHasTiles) {
    if (kind == WeightKind::kBf16) return multiply_tiles<WeightKind::kBf16>(rounds);
    if (kind != WeightKind::kFp32) return multiply_tiles<WeightKind::kInt8>(rounds);
  }
  alignas(64) uint8_t bytes[64] = {};
  alignas(64) float floats[kLanes] = {};
  asm volatile("" : "+m"(bytes), "+m"(floats));  // unknown to the compiler
  if (kind == WeightKind::kFp32 || kind == WeightKind::kBf16) {
    Vec sums[kCeilingSums];
    for (Vec& sum : sums) sum = zero();
    const Vec weights = load(floats);
    const Bf16Weights pairs = load_bf16_weights(bytes);
    const auto* a = reinterpret_cast<const Bf16Activation*>(floats);
    for (int64_t i = 0; i < rounds; ++i) {
      for (int v = 0; v < kCeilingSums; ++v) {
        sums[v] = kind == WeightKind::kFp32 ? fma(weights, weights, sums[v])
                                            : dot_bf16(sums[v], pairs, a);
      }
    }
    for (const Vec& sum : sums) store(floats, load(floats) + sum);
  } else {
    IVec sums[kCeilingSums];
    for (IVec& sum : sums) sum = broadcast_i32(0);
    const Int8Weights weights = load_int8_weights(bytes);
    const auto* inputs = reinterpret_cast<const int8_t*>(floats);
    for (int64_t i = 0; i < rounds; ++i) {
      asm volatile("" : "+r"(inputs));  // or the products of one round would do for all
      for (int v = 0; v < kCeilingSums; ++v) sums[v] = dot_int8(sums[v], weights, inputs + 4 * v);
    }
    for (const IVec& sum : sums) store(floats, load(floats) + to_float(sum));
  }
  asm volatile("" : "+m"(floats));
  constexpr int kInputs[] = {1, 2, 4, 4};
  return kCeilingSums * kLanes * kInputs[static_cast<int>(kind)] * 2;
}
