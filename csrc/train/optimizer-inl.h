// A step of AdamW on some elements, and sums of squares.
//
//   g = grad_scale grad
//   m += (1 - beta1) (g - m)        v += (1 - beta2) (g^2 - v)
//   p -= lr weight_decay p          p -= step_size m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

template <class Param, class Grad>
static void adamw_part(const AdamW& step, const AdamWPart& part) {
  auto* param = static_cast<Param*>(part.param);
  const auto* grads = static_cast<const Grad*>(part.grad);
  const Vec grad_scale = broadcast(step.grad_scale), eps = broadcast(step.eps);
  const Vec minus_decay = broadcast(-step.decay), minus_size = broadcast(-step.step_size);
  const Vec one_minus_beta1 = broadcast(step.one_minus_beta1);
  const Vec one_minus_beta2 = broadcast(step.one_minus_beta2);
  const Vec second_correction = broadcast(step.second_correction);
  for (int64_t i = 0; i < part.size; i += kLanes) {
    const int64_t left = part.size - i;
    const Vec grad = load_first(grads + i, left) * grad_scale;
    Vec m = load_first(part.exp_avg + i, left), v = load_first(part.exp_avg_sq + i, left);
    Vec p = part.master ? load_first(part.master + i, left) : load_first(param + i, left);
    m = fma(one_minus_beta1, grad - m, m);
    v = fma(one_minus_beta2, grad * grad - v, v);
    p = fma(minus_decay, p, p);  // p (1 - decay) would round a small decay away
    p = fma(minus_size, m / fma(sqrt(v), second_correction, eps), p);
    store_first_elements(part.exp_avg + i, m, left);
    store_first_elements(part.exp_avg_sq + i, v, left);
    store_first_elements(param + i, p, left);
    if (part.master) store_first_elements(part.master + i, p, left);
  }
}

static void adamw(const AdamW& step, const AdamWPart& part) {
  with_type(part.dtype, [&](auto param) {
    with_type(part.grad_dtype,
              [&](auto grad) { adamw_part<decltype(param), decltype(grad)>(step, part); });
  });
}

// In double: squares of float32 are exact in it, and neither they nor their sum leave its range.
static double sum_squares(const void* x, Dtype dtype, int64_t n) {
  return with_type(dtype, [&](auto type) {
    const auto* elements = static_cast<const decltype(type)*>(x);
    double sums[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      float lanes[kLanes];
      store(lanes, load_first(elements + i, n - i));
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[lane] += static_cast<double>(lanes[lane]) * lanes[lane];
      }
    }
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
  });
}
