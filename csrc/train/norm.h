// Normalization of rows on all threads.
#pragma once

#include "kernels.h"

namespace leangpt::train {

void norm_forward(const Norm& norm, int64_t rows);

// dweight and dbias get num_columns sums over the rows.
void norm_backward(const Norm& norm, int64_t rows, float* dweight, float* dbias);

}  // namespace leangpt::train
