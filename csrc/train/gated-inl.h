// The gated activation of an MLP.

// From h to a, or with the gradient of a to a and the gradient of h.
static void gated(const Gated& gated, int64_t first, int64_t last) {
  with_type(gated.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t n = gated.width;
    const Vec one = broadcast(1.0f);
    for (int64_t r = first; r < last; ++r) {
      const T* gate = static_cast<const T*>(gated.h) + r * 2 * n;
      const T* up = gate + n;
      T* a = static_cast<T*>(gated.a) + r * n;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t left = n - i;
        const Vec x = load_first(gate + i, left), y = load_first(up + i, left);
        const Vec s = one / (one + exp(zero() - x)), silu = x * s;
        store_first_elements(a + i, silu * y, left);
        if (gated.da) {
          const Vec da = load_first(static_cast<const T*>(gated.da) + r * n + i, left);
          T* dgate = static_cast<T*>(gated.dh) + r * 2 * n;
          // silu' = s + x s (1 - s)
          store_first_elements(dgate + i, da * y * fma(silu, one - s, s), left);
          store_first_elements(dgate + n + i, da * silu, left);
        }
      }
    }
  });
}
