// The loss of a row of logits, and its gradient in their place.

static float cross_entropy(const CrossEntropy& loss, float* logits, int64_t n, int64_t target,
                           bool with_gradient) {
  const auto each_vec = [&](const auto& f) {
    for (int64_t i = 0; i < n; i += kLanes) f(i, load_first(logits + i, n - i));
  };
  Vec largest = broadcast(-3.4e38f);
  each_vec([&](int64_t i, Vec l) {
    const Vec seen = n - i >= kLanes ? l : keep_lanes(l, 0, static_cast<int>(n - i), -3.4e38f);
    largest = max(largest, seen);
  });
  const float top = reduce_max(largest), target_logit = logits[target];
  double total = 0, sum = 0;
  constexpr int64_t kBlock = 1024;  // short sums, so that they lose little
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = n - first < kBlock ? n : first + kBlock;
    Vec exponentials = zero(), plain = zero();
    for (int64_t i = first; i < last; i += kLanes) {
      const Vec l = load_first(logits + i, n - i);
      const Vec e = keep_first(exp(l - broadcast(top)), n - i);
      exponentials = exponentials + e;
      plain = plain + l;
      if (with_gradient) store_first_elements(logits + i, e, n - i);
    }
    total += reduce_add(exponentials);
    sum += reduce_add(plain);
  }
  const double lse = top + std::log(total), smoothing = loss.label_smoothing;
  const double value = lse - (1 - smoothing) * target_logit -
                       smoothing * sum / static_cast<double>(n) + loss.z_loss * lse * lse;
  if (with_gradient) {
    // (softmax (1 + 2 z lse) - (1 - s) [target] - s / n) factor
    const double factor = loss.factor;
    const Vec share = broadcast(static_cast<float>((1 + 2 * loss.z_loss * lse) * factor / total));
    const Vec spread = broadcast(static_cast<float>(smoothing / static_cast<double>(n) * factor));
    each_vec(
        [&](int64_t i, Vec e) { store_first_elements(logits + i, e * share - spread, n - i); });
    logits[target] -= static_cast<float>((1 - smoothing) * factor);
  }
  return static_cast<float>(value * loss.factor);
}
