// Drawing a token from logits by the keyed rule of kernels/reference.py: argmax of logits /
// temperature - log(noise) over the tokens that the filters keep, with noise that is a function of
// (seed, sample, position, token) alone.
#pragma once

#include <cstdint>

#include "../draw.h"

namespace leangpt::cpu {

Drawn draw(const float* logits, int64_t vocab_size, const DrawSettings& settings);

}  // namespace leangpt::cpu
