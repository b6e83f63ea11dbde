#include "attention.h"

#include "../cpu/buffer.h"
#include "parallel.h"

namespace leangpt::train {

void attention(const Attention& a) {
  const Kernels& kernel = kernels();
  const int64_t floats = kernel.attention_scratch(a);
  parallel_for(a.num_sequences * a.num_kv_heads, [&](int64_t begin, int64_t end) {
    static thread_local cpu::Buffer<float> buffer;
    float* scratch = buffer.get(floats);
    const auto run = a.dout ? kernel.attention_backward : kernel.attention_forward;
    for (int64_t i = begin; i < end; ++i) {
      run(a, i / a.num_kv_heads, i % a.num_kv_heads, scratch);
    }
  });
}

}  // namespace leangpt::train
