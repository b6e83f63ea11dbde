// A packed GPT: its shape, and where its weights lie. Plain structs that Python fills in
// (kernels/decode.py has their twins).
#pragma once

#include <cstdint>

#include "matrix.h"

namespace leangpt {

struct ModelConfig {
  int32_t n_layer, n_head, n_kv_head, head_dim, n_embd, n_inner, vocab_size, max_seq_len;
  int32_t is_rms_norm;
  int32_t sliding_window;  // 0: none
  Activation activation;
  float norm_eps;
  int32_t value_residual;  // whether the first layer's values are added to those of all others
};

// Vectors are padded with zeros to a multiple of 16 floats; null ones are absent.
struct Layer {
  const float *norm_1_weight, *norm_1_bias, *norm_2_weight, *norm_2_bias;
  const float *q_norm, *k_norm;
  Matrix qkv, attn_out;
  Matrix mlp_in;  // gated: 16 rows of gate and 16 of up alternate
  Matrix mlp_out;
};

struct Model {
  ModelConfig config;
  const Layer* layers;
  const float *norm_f_weight, *norm_f_bias;
  const float* positions;    // learned: (max_seq_len, round_up(n_embd, 16)), or null
  const float* frequencies;  // rotary: radians per position of each pair, (head_dim / 2), or null
  float rope_magnitude;      // factor on cos and sin
  Matrix embedding;
  Matrix head;  // the same as `embedding` where they are tied
  // An int8 copy of the head to find the rows that can still win, or null data; and what bounds its
  // error: for a hidden state x, a screened logit is within |x| times `screen_errors` of the
  // head's, the rounding of both products included.
  Matrix screen;
  const float* screen_errors;  // (round_up(vocab_size, 64))
};

}  // namespace leangpt
