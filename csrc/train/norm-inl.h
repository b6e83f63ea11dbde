// Layer and RMS normalization of rows, with the add to the residual stream in front of them,
// forward and backward. In normalized units y = x^ weight + bias, x^ = (total - mean) rstd, and
// backward, with g = dy weight:
//   dtotal = rstd (g - mean(g) - x^ mean(g x^))    dweight = sum over rows of dy x^    dbias = of
//   dy
// RMS normalization is the same without means of total and g.

template <class X, class Total, class Y>
struct NormRows {
  const Norm& norm;
  const int64_t n = norm.num_columns;

  Vec total_at(const Total* row, int64_t i) const { return load_first(row + i, n - i); }
  float mean_of(Vec sum) const { return reduce_add(sum) / static_cast<float>(n); }

  void forward(int64_t r) const {
    const X* x = static_cast<const X*>(norm.x) + r * n;
    auto* total = static_cast<Total*>(norm.total) + r * n;
    Vec sum = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec value = load_first(x + i, n - i);
      if (norm.residual) {
        value = value + load_first(static_cast<const Total*>(norm.residual) + r * n + i, n - i);
        value = rounded<Total>(value);
        store_first_elements(total + i, value, n - i);
      }
      sum = sum + value;
    }
    const float mean = norm.is_rms ? 0.0f : mean_of(sum);
    Vec squares = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec centered = keep_first(total_at(total, i) - broadcast(mean), n - i);
      squares = fma(centered, centered, squares);
    }
    const float rstd = 1.0f / std::sqrt(mean_of(squares) + norm.eps);
    norm.mean[r] = mean;
    norm.rstd[r] = rstd;
    Y* y = static_cast<Y*>(norm.y) + r * n;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec normed = (total_at(total, i) - broadcast(mean)) * broadcast(rstd);
      const Vec shift = norm.bias ? load_first(norm.bias + i, n - i) : zero();
      store_first_elements(y + i, fma(normed, load_first(norm.weight + i, n - i), shift), n - i);
    }
  }

  // `dweight` and `dbias` have room for whole Vecs.
  void backward(int64_t r, float* dweight, float* dbias) const {
    const Total* total = static_cast<const Total*>(norm.total) + r * n;
    const Y* dy = static_cast<const Y*>(norm.dy) + r * n;
    const Vec mean = broadcast(norm.mean[r]), rstd = broadcast(norm.rstd[r]);
    Vec sum = zero(), sum_normed = zero();
    for (int64_t i = 0; i < n; i += kLanes) {  // behind the row, dy and weight are 0
      const Vec grad = load_first(dy + i, n - i), normed = (total_at(total, i) - mean) * rstd;
      const Vec weighted = grad * load_first(norm.weight + i, n - i);
      sum = sum + weighted;
      sum_normed = fma(weighted, normed, sum_normed);
      store(dweight + i, fma(grad, normed, load(dweight + i)));
      store(dbias + i, load(dbias + i) + grad);
    }
    const Vec mean_grad = broadcast(norm.is_rms ? 0.0f : mean_of(sum));
    const Vec mean_normed = broadcast(mean_of(sum_normed));
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec normed = (total_at(total, i) - mean) * rstd;
      const Vec weighted = load_first(dy + i, n - i) * load_first(norm.weight + i, n - i);
      Vec dtotal = (weighted - mean_grad - normed * mean_normed) * rstd;
      if (norm.dstream) {
        dtotal = dtotal + load_first(static_cast<const Total*>(norm.dstream) + r * n + i, n - i);
      }
      store_first_elements(static_cast<Total*>(norm.dtotal) + r * n + i, dtotal, n - i);
      if (norm.dx) store_first_elements(static_cast<X*>(norm.dx) + r * n + i, dtotal, n - i);
    }
  }
};

template <class F>
static void with_norm(const Norm& norm, const F& f) {
  with_type(norm.dtype, [&](auto x) {
    with_type(norm.total_dtype, [&](auto total) {
      with_type(norm.y_dtype,
                [&](auto y) { f(NormRows<decltype(x), decltype(total), decltype(y)>{norm}); });
    });
  });
}

static void norm_forward(const Norm& norm, int64_t begin, int64_t end) {
  with_norm(norm, [&](const auto& rows) {
    for (int64_t r = begin; r < end; ++r) rows.forward(r);
  });
}

static void norm_backward(const Norm& norm, int64_t begin, int64_t end, float* dweight,
                          float* dbias) {
  with_norm(norm, [&](const auto& rows) {
    for (int64_t r = begin; r < end; ++r) rows.backward(r, dweight, dbias);
  });
}
