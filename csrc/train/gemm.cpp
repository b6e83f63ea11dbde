#include "gemm.h"

#include <algorithm>
#include <vector>

#include "../cpu/buffer.h"
#include "parallel.h"

namespace leangpt::train {
namespace {

using cpu::Buffer;

// A product of all its inputs at once. Threads share the blocks of rows, and all panels are packed
// before; or they share the panels, which each thread packs for itself and multiplies while they
// are in its L2 cache: whichever way reads less twice.
class MultiplyAll {
 public:
  MultiplyAll(const Operand& a, const Operand& b, int64_t m, int64_t n, int64_t k, Dtype compute,
              const Epilogue& epilogue, Product product)
      : a_(a),
        columns_(b.transposed()),
        m_(m),
        n_(n),
        k_(k),
        compute_(compute),
        epilogue_(epilogue),
        product_(product) {
    const auto [tile_rows, max_rows, max_inputs] = kernel_.block_sizes(compute);
    // as many blocks as the threads can share evenly
    const int64_t wanted = round_up((m + max_rows - 1) / max_rows, num_threads());
    tile_rows_ = tile_rows;
    block_rows_ = round_up((m + wanted - 1) / wanted, tile_rows);
    blocks_ = (m + block_rows_ - 1) / block_rows_;
    group_rows_ = kernel_.multiplies_whole_blocks(units_, compute) ? block_rows_ : tile_rows;
  }

  void run() {
    // panels of less than kShared bytes stay in the cache anyway; a thread takes kGroup at a time
    constexpr int64_t kShared = int64_t{1} << 20, kGroup = int64_t{1} << 19;
    const int64_t panel_bytes = panel_units_ * sizeof(float);
    const int64_t group =
        std::max<int64_t>(1, std::min(kGroup / panel_bytes, panels_ / (2 * num_threads())));
    const int64_t groups = (panels_ + group - 1) / group;
    const int64_t row_bytes = m_ * units_ * sizeof(float);
    if (product_ == Product::kFull && panels_ * panel_bytes > kShared && groups >= num_threads() &&
        groups * row_bytes < blocks_ * panels_ * panel_bytes) {
      by_panels(group, groups);
    } else {
      by_rows();
    }
  }

 private:
  int64_t block_count(int64_t block) const {
    return std::min(block_rows_, m_ - block * block_rows_);
  }
  Rows pack_rows(int64_t block, float* scratch) const {
    return kernel_.pack_rows(a_, compute_, block * block_rows_, block_count(block), m_, k_,
                             scratch);
  }
  void pack_panel(int64_t p, float* out) const {
    kernel_.pack_panel(columns_, compute_, p * width_, n_, k_, out);
  }
  float* tile() const {
    static thread_local Buffer<float> buffer;
    return buffer.get(group_rows_ * width_);
  }

  void by_rows() const {
    static thread_local Buffer<float> panel_buffer;
    float* packed = panel_buffer.get(panels_ * panel_units_);
    parallel_for(panels_, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) pack_panel(p, packed + p * panel_units_);
    });
    parallel_for(blocks_, [&](int64_t begin, int64_t end) {
      static thread_local Buffer<float> row_buffer;
      float* scratch = row_buffer.get(block_rows_ * (units_ + kLanes));
      for (int64_t block = begin; block < end; ++block) {
        const Rows rows = pack_rows(block, scratch);
        const int64_t first_panel =
            product_ == Product::kSymmetric ? block * block_rows_ / width_ : 0;
        for (int64_t p = first_panel; p < panels_; ++p) {
          multiply_block(rows, block, p, packed + p * panel_units_);
        }
      }
    });
  }

  void by_panels(int64_t group, int64_t groups) const {
    static thread_local Buffer<float> row_buffer;
    const int64_t stride = block_rows_ * (units_ + kLanes);
    float* packed = row_buffer.get(blocks_ * stride);
    std::vector<Rows> rows(blocks_);
    parallel_for(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        rows[block] = pack_rows(block, packed + block * stride);
      }
    });
    parallel_for(groups, [&](int64_t begin, int64_t end) {
      static thread_local Buffer<float> panel_buffer;
      float* panels = panel_buffer.get(group * panel_units_);
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * group, last = std::min(panels_, first + group);
        for (int64_t p = first; p < last; ++p) pack_panel(p, panels + (p - first) * panel_units_);
        for (int64_t block = 0; block < blocks_; ++block) {
          for (int64_t p = first; p < last; ++p) {
            multiply_block(rows[block], block, p, panels + (p - first) * panel_units_);
          }
        }
      }
    });
  }

  void multiply_block(const Rows& rows, int64_t block, int64_t p, const float* panel) const {
    const int64_t row = block * block_rows_, count = block_count(block);
    const int64_t column = p * width_, left = std::min(width_, n_ - column);
    const int64_t wanted_rows =
        product_ == Product::kSymmetric ? std::min(count, column + left - row) : count;
    float* sums = tile();
    for (int64_t r = 0; r < wanted_rows; r += group_rows_) {
      Rows group = rows;
      group.units += r / tile_rows_ * rows.tile_stride;
      const Region region = {row + r, std::min(group_rows_, wanted_rows - r), column, left};
      kernel_.multiply(group, panel, compute_, k_, region, epilogue_, sums);
    }
  }

  const Kernels& kernel_ = kernels();
  const Operand a_, columns_;
  const int64_t m_, n_, k_;
  const Dtype compute_;
  const Epilogue epilogue_;
  const Product product_;
  const int64_t width_ = kernel_.panel_width, units_ = kernel_.units(k_, compute_);
  const int64_t panels_ = (n_ + width_ - 1) / width_, panel_units_ = units_ * width_;
  int64_t tile_rows_, block_rows_, blocks_, group_rows_;
};

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
  if (k == 0) {  // sums of nothing are those of a zero
    const std::vector<float> zeros(std::max(m, n));
    const Operand column = {zeros.data(), Dtype::kFp32, 1, m},
                  row = {zeros.data(), Dtype::kFp32, n, 1};
    return gemm(column, row, m, n, 1, compute, epilogue, product);
  }
  const bool can_add = epilogue.dtype == Dtype::kFp32 && epilogue.activation == Activation::kNone;
  const int64_t inputs = can_add ? kernels().block_sizes(compute).inputs : k;
  Epilogue part = epilogue;
  const auto from = [](const Operand& x, int64_t offset) {
    const auto* data = static_cast<const uint8_t*>(x.data) + offset * size_of(x.dtype);
    return Operand{data, x.dtype, x.row_stride, x.column_stride};
  };
  for (int64_t first = 0; first < k; first += inputs) {
    MultiplyAll(from(a, first * a.column_stride), from(b, first * b.row_stride), m, n,
                std::min(inputs, k - first), compute, part, product)
        .run();
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
