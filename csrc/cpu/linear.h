// Products of rows of activations with packed matrices, on all threads: first the rows take the
// form that the matrix multiplies, then tiles of the product are shared out.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "threads.h"

namespace leangpt::cpu {

class Linear {
 public:
  // Room for rows that `w` will multiply; `f(row, activations)` puts each there with
  // kernels().convert_row.
  template <class F>
  void convert(const Matrix& w, int64_t rows, const F& f);

  // What `epilogue` says of rows w^T + bias.
  void multiply(const Matrix& w, int64_t rows, const Epilogue& epilogue);
  // Only the given panels of out = rows w^T + bias.
  void multiply_panels(const Matrix& w, int64_t rows, const std::vector<int32_t>& panels,
                       float* out, int64_t stride);

 private:
  void make_room(const Matrix& w, int64_t rows);
  // `panel_of(i)` for each of some panels.
  template <class F>
  void multiply_some(const Matrix& w, int64_t rows, int64_t panels, const F& panel_of,
                     const Epilogue& epilogue);

  Activations activations_;
  Buffer<uint8_t> rows_;
  Buffer<float> scales_, sums_, tiles_;
  Buffer<int32_t> offsets_;
};

template <class F>
void Linear::convert(const Matrix& w, int64_t rows, const F& f) {
  make_room(w, rows);
  Team::get().run(rows, [&](int64_t row, int) { f(row, activations_); });
}

}  // namespace leangpt::cpu
