// Drawing a token from logits by the keyed rule of kernels/reference.py: argmax of logits /
// temperature - log(noise) over the tokens that the filters keep, with noise that is a function of
// (seed, sample, position, token) alone.
#pragma once

#include <cstdint>

namespace leangpt::cpu {

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

Drawn draw(const float* logits, int64_t vocab_size, const DrawSettings& settings);

}  // namespace leangpt::cpu
