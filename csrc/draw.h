// How a token is to be drawn from a row of logits, and what was drawn. Plain structs that Python
// fills in (kernels/decode.py has their twins).
#pragma once

#include <cstdint>

namespace leangpt {

struct DrawSettings {
  double temperature, top_p, min_p, repetition_penalty, presence_penalty;
  uint64_t seed;
  int64_t sample_index, position;
  int64_t top_k;           // 0: all
  int64_t vocab_limit;     // tokens from here on are never drawn
  const int64_t* context;  // tokens that the repetition penalty meets
  int64_t context_length;
  const int64_t* text;  // tokens that the presence penalty meets
  int64_t text_length;
  int64_t num_logprobs;  // -1: none; 0: of the drawn token; k: of the k most probable ones too
  int64_t* top_tokens;   // (num_logprobs,), the most probable first
  double* top_logprobs;
};

struct Drawn {
  int64_t token;  // -1: the logits are NaN
  double logprob;
};

}  // namespace leangpt
