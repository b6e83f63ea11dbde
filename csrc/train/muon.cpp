// Muon: momentum, orthogonalized by five Newton-Schulz steps, as the update of a matrix.
//
//   b += (1 - momentum) (g - b)      x = g + momentum (b - g), divided by its Frobenius norm
//   five times: x = p(x x^T) x, with p(s) = 3.4445 - 4.7750 s + 2.0315 s^2
//   w -= lr weight_decay w           w -= 0.2 lr sqrt(max(rows, columns)) x
//
// With x the shorter side first, all five steps are one product with a small matrix: x = q x_0,
// where q is the product of all p(s) and s, which becomes p(s) s p(s), starts as x_0 x_0^T. These
// are symmetric and commute, so half of each is computed: for a square matrix as many products as
// with x x^T alone halved, for a long one a third. It takes float32: below, the small eigenvalues
// of s would drown in roundings. References: Jordan et al., 2024,
// https://kellerjordan.github.io/posts/muon/; Liu et al., 2025, https://arxiv.org/abs/2502.16982
// (learning rate); Amsel et al., 2025, https://arxiv.org/abs/2505.16932, appendix F (products with
// the small matrix)
#include <algorithm>
#include <atomic>
#include <cmath>

#include "../cpu/buffer.h"
#include "gemm.h"
#include "optimizer.h"
#include "parallel.h"

namespace leangpt::train {
namespace {

constexpr int kSteps = 5;
constexpr float kConstant = 3.4445f, kLinear = -4.7750f, kQuadratic = 2.0315f;
constexpr float kMinNorm = 1e-7f;

Operand row_major(const float* x, int64_t columns) { return {x, Dtype::kFp32, columns, 1}; }

// A symmetric product (m, m) of a (m, k) and b (k, m).
void multiply_symmetric(const Operand& a, const Operand& b, int64_t m, int64_t k, float* out) {
  Epilogue epilogue;
  epilogue.out = out;
  epilogue.stride = m;
  gemm(a, b, m, m, k, Dtype::kFp32, epilogue, Product::kSymmetric);
}

void add_to_diagonal(float* x, int64_t m, float value) {
  for (int64_t i = 0; i < m; ++i) x[i * m + i] += value;
}

// Decays the parameter, and leaves the momentum in x, divided by its norm.
void begin(const Muon& step, const MuonMatrix& matrix, float* x) {
  const int64_t size = matrix.rows * matrix.columns;
  const float decay = step.learning_rate * step.weight_decay;
  for (int64_t i = 0; i < size; ++i) {
    const float grad = matrix.grad[i] * step.grad_scale;
    const float kept = matrix.buffer[i] + (1 - step.momentum) * (grad - matrix.buffer[i]);
    matrix.buffer[i] = kept;
    x[i] = grad + step.momentum * (kept - grad);
    matrix.param[i] -= decay * matrix.param[i];
  }
  const double norm = std::sqrt(sum_squares({{x, Dtype::kFp32, size}}));
  const float inverse = static_cast<float>(1 / std::max<double>(norm, kMinNorm));
  for (int64_t i = 0; i < size; ++i) x[i] *= inverse;
}

void step_matrix(const Muon& step, const MuonMatrix& matrix) {
  const int64_t rows = matrix.rows, columns = matrix.columns;
  const bool is_tall = rows > columns;
  const int64_t m = std::min(rows, columns), n = std::max(rows, columns), square = m * m;
  static thread_local cpu::Buffer<float> buffer;
  float* x = buffer.get(rows * columns + 5 * square);
  float* s = x + rows * columns;
  float *p = s + square, *q = p + square, *product = q + square, *shifted = product + square;
  begin(step, matrix, x);

  const Operand update = row_major(x, columns), wide = is_tall ? update.transposed() : update;
  multiply_symmetric(wide, wide.transposed(), m, n, s);
  for (int i = 0; i < kSteps; ++i) {
    for (int64_t j = 0; j < square; ++j) shifted[j] = kQuadratic * s[j];
    add_to_diagonal(shifted, m, kLinear);
    multiply_symmetric(row_major(s, m), row_major(shifted, m), m, m, p);
    add_to_diagonal(p, m, kConstant);
    if (i == 0) {
      std::copy(p, p + square, q);
    } else {
      multiply_symmetric(row_major(p, m), row_major(q, m), m, m, product);
      std::swap(q, product);
    }
    if (i + 1 < kSteps) {
      multiply_symmetric(row_major(p, m), row_major(s, m), m, m, product);
      multiply_symmetric(row_major(product, m), row_major(p, m), m, m, s);
    }
  }

  const float rate = 0.2f * std::sqrt(static_cast<float>(n)) * step.learning_rate;
  for (int64_t j = 0; j < square; ++j) q[j] *= -rate;
  Epilogue epilogue;
  epilogue.out = matrix.param;
  epilogue.stride = columns;
  epilogue.addend = matrix.param;
  const Operand small = row_major(q, m);
  if (is_tall) {
    gemm(update, small, rows, columns, m, Dtype::kFp32, epilogue);
  } else {
    gemm(small, update, rows, columns, m, Dtype::kFp32, epilogue);
  }
}

}  // namespace

void muon(const Muon& step, std::vector<MuonMatrix> matrices) {
  // each matrix on one thread, the one that is free; the largest first, so that all end together
  const auto cost = [](const MuonMatrix& matrix) {
    const int64_t m = std::min(matrix.rows, matrix.columns);
    return m * m * (17 * m + 3 * std::max(matrix.rows, matrix.columns));
  };
  std::stable_sort(matrices.begin(), matrices.end(),
                   [&](const MuonMatrix& a, const MuonMatrix& b) { return cost(a) > cost(b); });
  std::atomic<size_t> next{0};
  parallel_for(num_threads(), [&](int64_t, int64_t) {
    for (size_t i = next++; i < matrices.size(); i = next++) {
      if (matrices[i].rows * matrices[i].columns > 0) step_matrix(step, matrices[i]);
    }
  });
}

}  // namespace leangpt::train
