// Ops of training on a CPU: schemas, argument checks, and from tensors to pointers. What the ops do
// stands in kernels/ops.py; kernels/native_ops.py has their fake implementations and gradients.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "train/attention.h"
#include "train/gemm.h"
#include "train/parallel.h"

namespace leangpt::train {

int num_threads() { return at::get_num_threads(); }

void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& f) {
  at::parallel_for(0, n, 1, f);
}

namespace {

using at::Tensor;
using std::optional;

Dtype dtype_of(at::ScalarType type) {
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16,
              "leangpt: tensors must be float32 or bfloat16, got ", type);
  return type == at::kFloat ? Dtype::kFp32 : Dtype::kBf16;
}

Dtype dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

Operand operand(const Tensor& x) {  // (rows, columns), contiguous
  return {x.const_data_ptr(), dtype_of(x), x.size(1), 1};
}

Tensor as_rows(const Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

Tensor as_floats(const optional<Tensor>& x) {
  return x ? x->to(at::kFloat).contiguous() : Tensor();
}

at::DimVector with_last(const Tensor& x, int64_t size) {
  at::DimVector shape(x.sizes());
  shape.back() = size;
  return shape;
}

Tensor empty_of(at::IntArrayRef shape, const Tensor& like, at::ScalarType dtype) {
  return at::empty(shape, like.options().dtype(dtype));
}

Tensor empty_of(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

Activation activation_of(c10::string_view name) {
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu2") return Activation::kRelu2;
  TORCH_CHECK(false, "leangpt: activation must be gelu_tanh, gelu or relu2, got ", name);
}

// out (m, n) = a (m, k) b (k, n), and what the epilogue adds.
void multiply(const Operand& a, const Operand& b, int64_t k, at::ScalarType compute,
              const Tensor& out, Epilogue epilogue = {}) {
  epilogue.out = out.mutable_data_ptr();
  epilogue.dtype = dtype_of(out);
  epilogue.stride = out.size(-1);
  gemm(a, b, out.numel() / out.size(-1), out.size(-1), k, dtype_of(compute), epilogue);
}

Tensor column_sums(const Tensor& x, at::ScalarType dtype) {
  Tensor out = empty_of({x.size(1)}, x, at::kFloat);
  sum_rows(x.const_data_ptr(), dtype_of(x), x.size(0), x.size(1), out.mutable_data_ptr<float>());
  return out.to(dtype);
}

Tensor linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
              at::ScalarType compute) {
  const Tensor rows = as_rows(x), w = weight.contiguous(), b = as_floats(bias);
  Tensor out = empty_of(with_last(x, w.size(0)), x, compute);
  Epilogue epilogue;
  if (bias) epilogue.bias = b.const_data_ptr<float>();
  multiply(operand(rows), operand(w).transposed(), rows.size(1), compute, out, epilogue);
  return out;
}

// Gradients of x, weight and bias; those that are not wanted are empty.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& weight, at::ScalarType compute,
                                                   std::array<bool, 3> wanted) {
  const Tensor g = as_rows(grad), rows = as_rows(x), w = weight.contiguous();
  Tensor dx = nothing(x), dw = nothing(w), db = nothing(w);
  if (wanted[0]) {
    dx = empty_of(x);
    multiply(operand(g), operand(w), g.size(1), compute, dx);
  }
  if (wanted[1]) {
    dw = empty_of(w);
    multiply(operand(g).transposed(), operand(rows), g.size(0), compute, dw);
  }
  if (wanted[2]) db = column_sums(g, w.scalar_type());
  return {dx, dw, db};
}

// The output, and h = x w_in^T + b_in for backward.
std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& w_in, const optional<Tensor>& b_in,
                               const Tensor& w_out, const optional<Tensor>& b_out,
                               const optional<Tensor>& residual, c10::string_view activation,
                               at::ScalarType compute) {
  const Tensor rows = as_rows(x), in = w_in.contiguous(), out = w_out.contiguous();
  const Tensor bias_in = as_floats(b_in), bias_out = as_floats(b_out);
  Tensor h = empty_of({rows.size(0), in.size(0)}, x, compute), a = empty_of(h);
  Epilogue inner;
  inner.activation = activation_of(activation);
  inner.activated = a.mutable_data_ptr();
  if (b_in) inner.bias = bias_in.const_data_ptr<float>();
  multiply(operand(rows), operand(in).transposed(), rows.size(1), compute, h, inner);

  const Tensor addend = residual ? residual->contiguous() : Tensor();
  const auto dtype = residual ? at::promote_types(compute, addend.scalar_type()) : compute;
  Tensor result = empty_of(with_last(x, out.size(0)), x, dtype);
  Epilogue outer;
  if (b_out) outer.bias = bias_out.const_data_ptr<float>();
  if (residual) {
    outer.addend = addend.const_data_ptr();
    outer.addend_dtype = dtype_of(addend);
  }
  multiply(operand(a), operand(out).transposed(), a.size(1), compute, result, outer);
  return {result, h};
}

// Gradients of x, w_in, b_in, w_out and b_out; those that are not wanted are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& w_in, const Tensor& w_out,
    c10::string_view activation, at::ScalarType compute, std::array<bool, 5> wanted) {
  const Tensor g = as_rows(grad), rows = as_rows(x);
  const Tensor in = w_in.contiguous(), out = w_out.contiguous();
  Tensor dx = nothing(x), dw_in = nothing(in), db_in = nothing(in);
  Tensor dw_out = nothing(out), db_out = nothing(out);
  Tensor dh = empty_of(h), a = empty_of(h);
  Epilogue inner;
  inner.activation = activation_of(activation);
  inner.inner = h.const_data_ptr();
  inner.activated = a.mutable_data_ptr();
  multiply(operand(g), operand(out), g.size(1), compute, dh, inner);
  if (wanted[0]) {
    dx = empty_of(x);
    multiply(operand(dh), operand(in), dh.size(1), compute, dx);
  }
  if (wanted[1]) {
    dw_in = empty_of(in);
    multiply(operand(dh).transposed(), operand(rows), dh.size(0), compute, dw_in);
  }
  if (wanted[2]) db_in = column_sums(dh, in.scalar_type());
  if (wanted[3]) {
    dw_out = empty_of(out);
    multiply(operand(g).transposed(), operand(a), g.size(0), compute, dw_out);
  }
  if (wanted[4]) db_out = column_sums(g, out.scalar_type());
  return {dx, dw_in, db_in, dw_out, db_out};
}

// Heads whose elements lie side by side, whatever the strides between them.
Tensor with_adjacent_elements(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window,
                       double scale) {
  Attention a = {};
  a.dtype = dtype_of(q);
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  for (int i = 0; i < 3; ++i) {
    a.q_strides[i] = q.stride(i);
    a.k_strides[i] = k.stride(i);
    a.v_strides[i] = v.stride(i);
  }
  a.num_sequences = q.size(0);
  a.num_queries = q.size(1);
  a.num_keys = k.size(1);
  a.num_heads = q.size(2);
  a.num_kv_heads = k.size(2);
  a.head_dim = q.size(3);
  a.window = window;
  a.scale = static_cast<float>(scale);
  return a;
}

// The output, and the log-sum-exp of the scores (B, H, T) for backward.
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             int64_t window, double scale) {
  const Tensor q_ = with_adjacent_elements(q), k_ = with_adjacent_elements(k);
  const Tensor v_ = with_adjacent_elements(v);
  Tensor out = empty_of(q), lse = empty_of({q.size(0), q.size(2), q.size(1)}, q, at::kFloat);
  Attention a = attention_of(q_, k_, v_, window, scale);
  a.out = out.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<float>();
  attention(a);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q,
                                                      const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse,
                                                      int64_t window, double scale) {
  const Tensor q_ = with_adjacent_elements(q), k_ = with_adjacent_elements(k);
  const Tensor v_ = with_adjacent_elements(v), g = grad.contiguous();
  Tensor dq = empty_of(q), dk = empty_of(k), dv = empty_of(v);
  Attention a = attention_of(q_, k_, v_, window, scale);
  a.out = out.data_ptr();
  a.lse = lse.data_ptr<float>();
  a.dout = g.const_data_ptr();
  a.dq = dq.mutable_data_ptr();
  a.dk = dk.mutable_data_ptr();
  a.dv = dv.mutable_data_ptr();
  attention(a);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace leangpt::train

TORCH_LIBRARY_FRAGMENT(leangpt, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, ScalarType compute) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, ScalarType compute, bool[3] wanted) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "mlp(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, Tensor? residual, "
      "str activation, ScalarType compute) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor grad, Tensor x, Tensor h, Tensor w_in, Tensor w_out, str activation, "
      "ScalarType compute, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("attention(Tensor q, Tensor k, Tensor v, int window, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "int window, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(leangpt, CPU, m) {
  m.impl("linear", &leangpt::train::linear);
  m.impl("linear_backward", &leangpt::train::linear_backward);
  m.impl("mlp", &leangpt::train::mlp);
  m.impl("mlp_backward", &leangpt::train::mlp_backward);
  m.impl("attention", &leangpt::train::attention_forward);
  m.impl("attention_backward", &leangpt::train::attention_backward);
}
