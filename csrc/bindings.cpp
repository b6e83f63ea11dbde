// The schemas of the decode step's ops (kernels/decode_ops.py says what they do), which
// bindings_cuda.cpp implements.
#include <torch/library.h>
#include <torch/version.h>

#include <string>

TORCH_LIBRARY(leangpt, m) {
  m.def("built_for() -> str", []() -> std::string { return TORCH_VERSION; });

  // of a decode step, on CUDA
  m.def(
      "linear_decode(Tensor x, Tensor weight, Tensor? scales, Tensor? minimums, Tensor? bias, "
      "int num_outputs, int group, str activation) -> Tensor");
  m.def(
      "append_kv(Tensor qkv, Tensor(a!) kv_cache, Tensor positions, Tensor block_tables, "
      "Tensor? q_norm, Tensor? k_norm, Tensor? frequencies, int n_head, int n_kv_head, "
      "float norm_eps, float rope_magnitude, str kv_dtype) -> Tensor");
  m.def(
      "attention_decode(Tensor q, Tensor kv_cache, Tensor positions, Tensor block_tables, "
      "int n_kv_head, int max_keys, int sliding_window, str kv_dtype) -> Tensor");
  m.def(
      "sample_decode(Tensor logits, float temperature, int top_k, float top_p, float min_p, "
      "int seed, int position) -> Tensor");
  m.def("log_probs(Tensor logits, Tensor targets) -> Tensor");
}
