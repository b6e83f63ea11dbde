#include "gemm.h"

#include <algorithm>

#include "../cpu/buffer.h"
#include "parallel.h"

namespace leangpt::train {
namespace {

using cpu::Buffer;

// All inputs at once.
void multiply_all(const Operand& a, const Operand& b, int64_t m, int64_t n, int64_t k,
                  Dtype compute, const Epilogue& epilogue, Product product) {
  const Kernels& kernel = kernels();
  const int64_t width = kernel.panel_width;
  const auto [tile_rows, max_rows, max_inputs] = kernel.block_sizes(compute);
  const int64_t units = kernel.units(k, compute), panels = (n + width - 1) / width;

  static thread_local Buffer<float> panel_buffer;
  float* packed = panel_buffer.get(panels * units * width);
  const Operand columns = b.transposed();
  parallel_for(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      kernel.pack_panel(columns, compute, p * width, n, k, packed + p * units * width);
    }
  });

  // as many blocks as the threads can share evenly
  const int64_t threads = num_threads();
  const int64_t wanted = round_up((m + max_rows - 1) / max_rows, threads);
  const int64_t block_rows = round_up((m + wanted - 1) / wanted, tile_rows);
  const int64_t blocks = (m + block_rows - 1) / block_rows;
  const int64_t group_rows =
      kernel.multiplies_whole_blocks(units, compute) ? block_rows : tile_rows;
  parallel_for(blocks, [&](int64_t begin, int64_t end) {
    static thread_local Buffer<float> row_buffer, tile_buffer;
    float* scratch = row_buffer.get(block_rows * (units + kLanes));
    float* tile = tile_buffer.get(group_rows * width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * block_rows, count = std::min(block_rows, m - row);
      const Rows rows = kernel.pack_rows(a, compute, row, count, m, k, scratch);
      const int64_t first_panel = product == Product::kSymmetric ? row / width : 0;
      for (int64_t p = first_panel; p < panels; ++p) {
        const int64_t column = p * width, left = std::min(width, n - column);
        const float* panel = packed + p * units * width;
        const int64_t wanted_rows =
            product == Product::kSymmetric ? std::min(count, column + left - row) : count;
        for (int64_t r = 0; r < wanted_rows; r += group_rows) {
          Rows group = rows;
          group.units += r / tile_rows * rows.tile_stride;
          const int64_t group_count = std::min(group_rows, wanted_rows - r);
          kernel.multiply(group, panel, compute, group_count, left, k, tile);
          kernel.finish(tile, row + r, group_count, column, left, epilogue);
        }
      }
    }
  });
}

// Copies what is above the diagonal of a square matrix to below it, in blocks that stay in the L1
// cache.
void mirror(float* x, int64_t m) {
  constexpr int64_t kBlock = 16;
  parallel_for((m + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < std::min(m, end * kBlock); i += kBlock) {
      for (int64_t j = 0; j <= i; j += kBlock) {
        for (int64_t row = i; row < std::min(m, i + kBlock); ++row) {
          const int64_t last = std::min({m, j + kBlock, row});
          for (int64_t column = j; column < last; ++column) {
            x[row * m + column] = x[column * m + row];
          }
        }
      }
    }
  });
}

}  // namespace

void gemm(const Operand& a, const Operand& b, int64_t m, int64_t n, int64_t k, Dtype compute,
          const Epilogue& epilogue, Product product) {
  if (m == 0 || n == 0) return;
  const bool can_add = epilogue.dtype == Dtype::kFp32 && epilogue.activation == Activation::kNone;
  const int64_t inputs = can_add ? kernels().block_sizes(compute).inputs : std::max<int64_t>(k, 1);
  Epilogue part = epilogue;
  const auto from = [](const Operand& x, int64_t offset) {
    const auto* data = static_cast<const uint8_t*>(x.data) + offset * size_of(x.dtype);
    return Operand{data, x.dtype, x.row_stride, x.column_stride};
  };
  for (int64_t first = 0; first == 0 || first < k; first += inputs) {
    multiply_all(from(a, first * a.column_stride), from(b, first * b.row_stride), m, n,
                 std::min(inputs, k - first), compute, part, product);
    part.bias = nullptr;  // what follows is added
    part.addend = part.out;
    part.addend_dtype = part.dtype;
  }
  if (product == Product::kSymmetric) mirror(static_cast<float*>(epilogue.out), m);
}

void sum_rows(const void* x, Dtype dtype, int64_t rows, int64_t n, float* out) {
  constexpr int64_t kColumns = 64;
  parallel_for((n + kColumns - 1) / kColumns, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, last = std::min(n, end * kColumns);
    kernels().sum_rows(x, dtype, rows, n, first, last - first, out);
  });
}

}  // namespace leangpt::train
