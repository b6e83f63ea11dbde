// Causal attention on all threads: one takes the query heads of one key head of one sequence.
#pragma once

#include "kernels.h"

namespace leangpt::train {

// Where there is a `dout`, the gradients, else the output.
void attention(const Attention& a);

}  // namespace leangpt::train
