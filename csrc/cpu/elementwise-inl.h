// Functions of one row: exponential, norms, rotation. Rows are padded with zeros to a multiple of
// 16 floats.

// e^x, relative error below 2^-22; saturates beyond e^-87 and e^88; NaN stays NaN.
static inline Vec exp(Vec x) {
  x = min(broadcast(88.0f), max(broadcast(-87.0f), x));
  const Vec n = round(x * broadcast(1.4426950408889634f));
  // x - n ln 2, with ln 2 in two parts so that the first product is exact
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec series = broadcast(1.0f / 5040);
  for (const float coefficient : kTaylor) series = fma(series, r, broadcast(coefficient));
  return scale_by_power_of_2(series, n);
}

static void layer_norm(const float* x, const float* weight, const float* bias, float eps, int n,
                       float* out) {
  Vec sum = zero();
  for (int i = 0; i < n; i += kLanes) sum = sum + load(x + i);
  const Vec mean = broadcast(reduce_add(sum) / static_cast<float>(n));
  Vec squares = zero();
  for (int i = 0; i < n; i += kLanes) {
    const Vec centered = keep_lanes(load(x + i) - mean, 0, n - i, 0.0f);
    squares = fma(centered, centered, squares);
  }
  const float variance = reduce_add(squares) / static_cast<float>(n);
  const Vec rstd = broadcast(1.0f / std::sqrt(variance + eps));
  for (int i = 0; i < n; i += kLanes) {
    const Vec normed = (load(x + i) - mean) * rstd;
    const Vec shift = bias ? load(bias + i) : zero();
    store(out + i, keep_lanes(fma(normed, load(weight + i), shift), 0, n - i, 0.0f));
  }
}

static void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  Vec squares = zero();
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
  if (i < n) {
    const Vec tail = keep_lanes(load(x + i), 0, n - i, 0.0f);
    squares = fma(tail, tail, squares);
  }
  const Vec rstd = broadcast(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(n) + eps));
  for (i = 0; i < n; i += kLanes) {
    store(out + i, keep_lanes(load(x + i) * rstd * load(weight + i), 0, n - i, 0.0f));
  }
}

static void rotate(float* x, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

static void scale(const float* x, float factor, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = x[i] * factor;
}

// The largest of n floats; NaN where one of them is NaN or infinite.
static float max_or_nan(const float* x, int n) {
  Vec largest = broadcast(x[0]), probe = zero();
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    largest = max(largest, load(x + i));
    probe = fma(load(x + i), zero(), probe);
  }
  float top = reduce_max(largest), tail = reduce_add(probe);
  bool is_nan = tail != tail;
  for (; i < n; ++i) {
    top = x[i] > top ? x[i] : top;
    is_nan |= !(x[i] - x[i] == 0);
  }
  return is_nan ? std::nanf("") : top;
}

static float log_sum_exp(const float* x, int n) {
  Vec largest = broadcast(-3.4e38f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = max(largest, load(x + i));
  float top = reduce_max(largest);
  for (int j = i; j < n; ++j) top = x[j] > top ? x[j] : top;
  double total = 0;
  for (int j = i; j < n; ++j) total += std::exp(static_cast<double>(x[j]) - top);
  for (int first = 0; first < i; first += 1024) {  // short sums, so that they lose little
    Vec sum = zero();
    for (int j = first; j < i && j < first + 1024; j += kLanes) {
      sum = sum + exp(load(x + j) - broadcast(top));
    }
    total += reduce_add(sum);
  }
  return static_cast<float>(top + std::log(total));
}
