// What fine-tuning adds to a model for some sequences: thin matrices beside or behind its own.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace leangpt {

// To the product y = x w^T + bias of a matrix (n, k); the thin matrices are float32, and their data
// is null where there is no delta.
struct Delta {
  Matrix down, up;  // low rank: (r, k) and (n, r); bottleneck: (r, n) and (n, r)
  // 0: y + (x down^T) up^T; 1: y + gelu_tanh(y down^T) up^T, with the biases of both
  int32_t is_bottleneck;
};

// A twin of it is in kernels/decode.py.
struct LayerDeltas {
  Delta qkv, attn_out, mlp_in, mlp_out;  // bottlenecks: attn_out and mlp_out alone
};

}  // namespace leangpt
