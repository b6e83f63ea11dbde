// The launchers of sampling, for ctypes: what they throw is returned.
#include "../../csrc/cuda/kernels.h"
#include "message_of.h"

using namespace leangpt;
using namespace leangpt::cuda;

extern "C" {

const char* call_sample(const float* logits, int64_t stride, int vocab_size,
                        const DrawSettings* settings, Drawn* out, void* scratch, int num_rows) {
  return message_of(
      [&] { sample(logits, stride, vocab_size, settings, out, scratch, num_rows, nullptr); });
}

int64_t call_sample_scratch_bytes(int vocab_size, int num_rows) {
  return sample_scratch_bytes(vocab_size, num_rows);
}

const char* call_log_probs(const float* logits, int64_t stride, int vocab_size,
                           const int64_t* targets, float* logprobs, int num_rows) {
  return message_of(
      [&] { log_probs(logits, stride, vocab_size, targets, logprobs, num_rows, nullptr); });
}
}
