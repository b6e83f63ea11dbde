// Steps of optimizers over all tensors of a model at once, on all threads. Their bits do not depend
// on the number of threads.
#pragma once

#include <vector>

#include "kernels.h"

namespace leangpt::train {

void adamw(const AdamW& step, const std::vector<AdamWPart>& tensors);

// Elements that lie behind each other.
struct Elements {
  const void* data;
  Dtype dtype;
  int64_t size;
};

double sum_squares(const std::vector<Elements>& tensors);

// A step of Muon; `momentum` of the buffer is kept.
struct Muon {
  float grad_scale, momentum;
  float learning_rate, weight_decay;
};

// Row-major matrices; `param` and `buffer` change.
struct MuonMatrix {
  float* param;
  const float* grad;
  float* buffer;
  int64_t rows, columns;
};

void muon(const Muon& step, std::vector<MuonMatrix> matrices);

}  // namespace leangpt::train
