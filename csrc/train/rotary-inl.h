// Heads normalized and turned, forward and backward. With n = x rstd w of a head, its halves n1,
// n2:
//
//   y1 = n1 cos - n2 sin         y2 = n2 cos + n1 sin
//   dn1 = dy1 cos + dy2 sin      dn2 = dy2 cos - dy1 sin
//   dx = (w dn - x rstd mean(w dn x rstd)) rstd                 dw += dn x rstd

template <class T>
struct RotaryHeads {
  const RotaryQkv& rotary;
  const int64_t D = rotary.head_dim, half = D / 2;
  const int64_t num_packed = rotary.num_heads + 2 * rotary.num_kv_heads;

  // Of the mean square of a head.
  float rstd(const T* x) const {
    Vec squares = zero();
    for (int64_t i = 0; i < D; i += kLanes) {
      const Vec value = load_first(x + i, D - i);
      squares = fma(value, value, squares);
    }
    return 1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(D) + rotary.eps);
  }

  void turn(const T* x, const float* weight, const float* cos, const float* sin, T* y) const {
    const Vec factor = broadcast(weight ? rstd(x) : 1.0f);
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t left = half - i;
      Vec x1 = load_first(x + i, left), x2 = load_first(x + half + i, left);
      if (weight) {
        x1 = x1 * factor * load_first(weight + i, left);
        x2 = x2 * factor * load_first(weight + half + i, left);
      }
      const Vec c = load_first(cos + i, left), s = load_first(sin + i, left);
      store_first_elements(y + i, x1 * c - x2 * s, left);
      store_first_elements(y + half + i, fma(x2, c, x1 * s), left);
    }
  }

  void turn_back(const T* dy, const T* x, const float* weight, const float* cos, const float* sin,
                 T* dx, float* dweight) const {
    const auto each_half = [&](const auto& f) {
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t left = half - i;
        const Vec dy1 = load_first(dy + i, left), dy2 = load_first(dy + half + i, left);
        const Vec c = load_first(cos + i, left), s = load_first(sin + i, left);
        f(i, fma(dy1, c, dy2 * s), left);
        f(half + i, dy2 * c - dy1 * s, left);
      }
    };
    if (weight == nullptr) {
      each_half([&](int64_t i, Vec dn, int64_t left) { store_first_elements(dx + i, dn, left); });
      return;
    }
    const Vec factor = broadcast(rstd(x));
    Vec sum = zero();
    each_half([&](int64_t i, Vec dn, int64_t left) {
      const Vec scaled = load_first(x + i, left) * factor;  // 0 behind the half
      sum = fma(dn * scaled, load_first(weight + i, left), sum);
      store_first_elements(dweight + i, fma(dn, scaled, load_first(dweight + i, left)), left);
    });
    const Vec mean = broadcast(reduce_add(sum) / static_cast<float>(D));
    each_half([&](int64_t i, Vec dn, int64_t left) {
      const Vec scaled = load_first(x + i, left) * factor;
      const Vec weighted = dn * load_first(weight + i, left);
      store_first_elements(dx + i, (weighted - scaled * mean) * factor, left);
    });
  }

  // f(packed, head, weight, dweight, cos, sin) for each head of a token: where it is among the
  // packed ones, and its own tensor. Values have no angles.
  template <class F>
  void each_head(int64_t token, const F& f) const {
    const int64_t sequence = token / rotary.seq_len, position = token % rotary.seq_len;
    const int64_t at = sequence * rotary.table_stride + position * half;
    const int64_t H = rotary.num_heads, H_kv = rotary.num_kv_heads;
    const auto part = [&](void* x, int64_t heads, int64_t first, const float* weight,
                          float* dweight, const float* cos) {
      for (int64_t h = 0; h < heads; ++h) {
        f((token * num_packed + first + h) * D, static_cast<T*>(x) + (token * heads + h) * D,
          weight, dweight, cos, rotary.sin + at);
      }
    };
    part(rotary.q, H, 0, rotary.q_weight, rotary.dq_weight, rotary.cos + at);
    part(rotary.k, H_kv, H, rotary.k_weight, rotary.dk_weight, rotary.cos + at);
    part(rotary.v, H_kv, H + H_kv, nullptr, nullptr, nullptr);
  }

  void forward(int64_t token) const {
    each_head(token, [&](int64_t packed, T* head, const float* weight, float*, const float* cos,
                         const float* sin) {
      const T* x = static_cast<const T*>(rotary.qkv) + packed;
      if (cos) {
        turn(x, weight, cos, sin, head);
      } else {
        std::memcpy(head, x, D * sizeof(T));
      }
    });
  }

  void backward(int64_t token) const {
    each_head(token, [&](int64_t packed, const T* head, const float* weight, float* dweight,
                         const float* cos, const float* sin) {
      const T* x = static_cast<const T*>(rotary.qkv) + packed;
      T* dx = static_cast<T*>(rotary.dqkv) + packed;
      if (cos) {
        turn_back(head, x, weight, cos, sin, dx, dweight);
      } else {
        std::memcpy(dx, head, D * sizeof(T));
      }
    });
  }
};

static void rotary_forward(const RotaryQkv& rotary, int64_t first, int64_t last) {
  with_type(rotary.dtype, [&](auto type) {
    const RotaryHeads<decltype(type)> heads = {rotary};
    for (int64_t token = first; token < last; ++token) heads.forward(token);
  });
}

static void rotary_backward(const RotaryQkv& rotary, int64_t first, int64_t last) {
  with_type(rotary.dtype, [&](auto type) {
    const RotaryHeads<decltype(type)> heads = {rotary};
    for (int64_t token = first; token < last; ++token) heads.backward(token);
  });
}
