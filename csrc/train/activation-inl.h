// Activations of an MLP and their derivatives.

struct Activated {
  Vec value, slope;
};

static inline Activated gelu_tanh(Vec x) {
  // x s with s = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)); ds/dx = 2 s (1 - s) u'
  const Vec one = broadcast(1.0f), square = x * x;
  const Vec twice_u = x * fma(square, broadcast(0.044715f), one) * broadcast(1.5957691216057308f);
  const Vec s = one / (one + exp(zero() - twice_u));
  const Vec twice_slope =
      fma(square, broadcast(3 * 0.044715f), one) * broadcast(1.5957691216057308f);
  return {x * s, fma(x * s * (one - s), twice_slope, s)};
}

static inline Activated gelu(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (float& lane : lanes) lane = 0.5f * std::erfc(-0.70710678118654752f * lane);
  const Vec cdf = load(lanes);
  const Vec density = exp(x * x * broadcast(-0.5f)) * broadcast(0.3989422804014327f);
  return {x * cdf, fma(x, density, cdf)};
}

static inline Activated relu2(Vec x) {
  const Vec positive = max(zero(), x);
  return {positive * positive, positive + positive};
}

template <Activation kActivation>
static inline Activated activate(Vec x) {
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == Activation::kGelu) return gelu(x);
  if constexpr (kActivation == Activation::kRelu2) return relu2(x);
}
