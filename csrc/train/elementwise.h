// Ops on single rows, on all threads. Their bits do not depend on the number of threads.
#pragma once

#include "kernels.h"

namespace leangpt::train {

void gated(const Gated& gated, int64_t rows);

void rotary_forward(const RotaryQkv& rotary, int64_t num_tokens);

// dq_weight and dk_weight get head_dim sums over the tokens.
void rotary_backward(const RotaryQkv& rotary, int64_t num_tokens);

// A table of rows, and which of them are taken.
struct Lookup {
  const void* table;  // (num_rows, width)
  const int64_t* index;
  int64_t num_rows;
};

// out[i] = table[index[i]], plus that of a second lookup if it has a table.
void embedding(const Lookup& lookup, const Lookup& second, Dtype dtype, int64_t count,
               int64_t width, void* out);

// out[r] (num_rows, width) = the sum of the rows i of grad with index[i] = r, in their order.
void embedding_backward(const void* grad, const int64_t* index, Dtype dtype, int64_t count,
                        int64_t num_rows, int64_t width, void* out);

}  // namespace leangpt::train
