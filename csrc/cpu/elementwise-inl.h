// Functions of one row: norms, rotation. Rows are padded with zeros to a multiple of
// 16 floats.

#include "exp-inl.h"

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
