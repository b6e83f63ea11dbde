// Matrix products on all threads.
#pragma once

#include "kernels.h"

namespace leangpt::train {

enum class Product { kFull, kSymmetric };

// The product of a (m, k) and b (k, n), in float32 or in bf16 with float32 sums; what becomes of it
// says the epilogue. Its bits do not depend on the number of threads. Of a symmetric product, in
// float32 and without an epilogue, one half is computed and copied to the other.
void gemm(const Operand& a, const Operand& b, int64_t m, int64_t n, int64_t k, Dtype compute,
          const Epilogue& epilogue, Product product = Product::kFull);

// out[j] = sum over i of x[i][j], x a row-major (rows, n) matrix.
void sum_rows(const void* x, Dtype dtype, int64_t rows, int64_t n, float* out);

}  // namespace leangpt::train
