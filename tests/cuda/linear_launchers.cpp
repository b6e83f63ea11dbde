// The launchers of products, norms and the embedding, for ctypes: what they throw is returned.
#include "../../csrc/cuda/kernels.h"
#include "message_of.h"

using namespace leangpt;
using namespace leangpt::cuda;

extern "C" {

const char* call_linear_decode(const Matrix* w, const LinearInput* in, const LinearOutput* out,
                               int num_rows) {
  return message_of([&] { linear_decode(*w, *in, *out, num_rows, nullptr); });
}

const char* call_finish_products(const Matrix* w, const float* products, int64_t stride,
                                 const LinearOutput* out, int num_rows) {
  return message_of([&] { finish_products(*w, products, stride, *out, num_rows, nullptr); });
}

const char* call_multiply_deltas(const MatrixDeltas* deltas, const DeltaRows* rows, const void* x,
                                 int is_bf16, int64_t stride, float* narrow, float* addends) {
  return message_of([&] {
    if (is_bf16) {
      multiply_deltas(*deltas, *rows, static_cast<const uint16_t*>(x), stride, narrow, addends,
                      nullptr);
    } else {
      multiply_deltas(*deltas, *rows, static_cast<const float*>(x), stride, narrow, addends,
                      nullptr);
    }
  });
}

const char* call_add_branch(const float* branch, const float* addends, const int32_t* addend_of,
                            int outputs, float* stream, int64_t stride, int num_rows) {
  return message_of(
      [&] { add_branch(branch, addends, addend_of, outputs, stream, stride, num_rows, nullptr); });
}

const char* call_normalize(const float* x, int64_t stride, const int32_t* row_of, const Norm* norm,
                           int width, void* out, int is_bf16, int64_t out_stride, int num_rows) {
  return message_of([&] {
    if (is_bf16) {
      normalize(x, stride, row_of, *norm, width, static_cast<uint16_t*>(out), out_stride, num_rows,
                nullptr);
    } else {
      normalize(x, stride, row_of, *norm, width, static_cast<float*>(out), out_stride, num_rows,
                nullptr);
    }
  });
}

const char* call_embed(const Matrix* embedding, const float* learned, int64_t learned_stride,
                       const int32_t* tokens, const Drawn* drawn, const int32_t* positions,
                       float* stream, int64_t stride, int num_rows) {
  return message_of([&] {
    embed(*embedding, learned, learned_stride, tokens, drawn, positions, stream, stride, num_rows,
          nullptr);
  });
}
}
