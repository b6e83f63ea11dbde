// Ops of training on a CPU: schemas, argument checks, and from tensors to pointers. What the ops do
// stands in kernels/ops.py; bindings_autograd.cpp has their gradients, kernels/native_ops.py their
// fake implementations.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/buffer.h"
#include "train/attention.h"
#include "train/elementwise.h"
#include "train/gemm.h"
#include "train/heap.h"
#include "train/norm.h"
#include "train/optimizer.h"
#include "train/parallel.h"

namespace leangpt::train {

int num_threads() { return at::get_num_threads(); }

void run_threads(int64_t count, const std::function<void(int64_t)>& f) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
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

// Large ones lie in a heap of their own.
Tensor empty_of(at::IntArrayRef shape, const Tensor& like, at::ScalarType dtype) {
  constexpr size_t kLarge = size_t{1} << 20;
  static auto& heap = *new Heap;  // tensors may outlive all that is static
  const auto options = like.options().dtype(dtype);
  const size_t bytes = c10::multiply_integers(shape) * c10::elementSize(dtype);
  void* memory = bytes >= kLarge ? heap.take(bytes) : nullptr;
  if (memory == nullptr) return at::empty(shape, options);
  return at::from_blob(
      memory, shape, [bytes](void* given) { heap.give_back(given, bytes); }, options);
}

Tensor empty_of(const Tensor& x) { return empty_of(x.sizes(), x, x.scalar_type()); }

Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

// Memory that is kept from call to call, as it is needed only within one: no page of it has to be
// fetched again, and one is enough for all layers.
Tensor scratch_of(at::IntArrayRef shape, const Tensor& like, int which) {
  static thread_local std::array<cpu::Buffer<uint8_t>, 3> buffers;
  const size_t bytes = c10::multiply_integers(shape) * like.element_size();
  return at::from_blob(buffers[which].get(bytes), shape, like.options());
}

Tensor scratch_like(const Tensor& x, int which) { return scratch_of(x.sizes(), x, which); }

Activation activation_of(c10::string_view name) {
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu2") return Activation::kRelu2;
  TORCH_CHECK(false, "leangpt: activation must be gelu_tanh, gelu, relu2 or swiglu, got ", name);
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

Gated gated_of(const Tensor& h, const Tensor& a) {
  Gated gated = {};
  gated.dtype = dtype_of(h);
  gated.width = a.size(1);
  gated.h = h.const_data_ptr();
  gated.a = a.mutable_data_ptr();
  return gated;
}

// The output, and h = x w_in^T + b_in for backward.
std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& w_in, const optional<Tensor>& b_in,
                               const Tensor& w_out, const optional<Tensor>& b_out,
                               const optional<Tensor>& residual, c10::string_view activation,
                               at::ScalarType compute) {
  const Tensor rows = as_rows(x), in = w_in.contiguous(), out = w_out.contiguous();
  const Tensor bias_in = as_floats(b_in), bias_out = as_floats(b_out);
  Tensor h = empty_of({rows.size(0), in.size(0)}, x, compute);
  const Tensor a = scratch_of({rows.size(0), out.size(1)}, h, 0);
  const bool is_gated = activation == "swiglu";
  Epilogue inner;
  if (!is_gated) {
    inner.activation = activation_of(activation);
    inner.activated = a.mutable_data_ptr();
  }
  if (b_in) inner.bias = bias_in.const_data_ptr<float>();
  multiply(operand(rows), operand(in).transposed(), rows.size(1), compute, h, inner);
  if (is_gated) gated(gated_of(h, a), h.size(0));

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
  const Tensor dh = scratch_like(h, 0), a = scratch_of({h.size(0), out.size(1)}, h, 1);
  if (activation == "swiglu") {
    const Tensor da = scratch_like(a, 2);
    multiply(operand(g), operand(out), g.size(1), compute, da);
    Gated gradient = gated_of(h, a);
    gradient.da = da.const_data_ptr();
    gradient.dh = dh.mutable_data_ptr();
    gated(gradient, h.size(0));
  } else {
    Epilogue inner;
    inner.activation = activation_of(activation);
    inner.inner = h.const_data_ptr();
    inner.activated = a.mutable_data_ptr();
    multiply(operand(g), operand(out), g.size(1), compute, dh, inner);
  }
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

// y, total, and mean and rstd of each row for backward; without a residual, total is empty: it is
// x.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(const Tensor& x,
                                                     const optional<Tensor>& residual,
                                                     const Tensor& weight,
                                                     const optional<Tensor>& bias, double eps,
                                                     bool is_rms, at::ScalarType y_dtype) {
  const Tensor rows = x.contiguous(), stream = residual ? residual->contiguous() : rows;
  const Tensor w = as_floats(weight), b = as_floats(bias);
  TORCH_CHECK(at::promote_types(x.scalar_type(), stream.scalar_type()) == stream.scalar_type(),
              "leangpt: residual must be as wide as x");
  const int64_t num_rows = x.numel() / x.size(-1);
  Tensor y = empty_of(x.sizes(), x, y_dtype), total = residual ? empty_of(stream) : nothing(x);
  Tensor mean = empty_of({num_rows}, x, at::kFloat), rstd = empty_of(mean);
  Norm norm = {};
  norm.dtype = dtype_of(rows);
  norm.total_dtype = dtype_of(stream);
  norm.y_dtype = dtype_of(y);
  norm.num_columns = x.size(-1);
  norm.is_rms = is_rms;
  norm.eps = static_cast<float>(eps);
  norm.x = rows.const_data_ptr();
  norm.residual = residual ? stream.const_data_ptr() : nullptr;
  norm.total = residual ? total.mutable_data_ptr() : const_cast<void*>(norm.x);
  norm.y = y.mutable_data_ptr();
  norm.weight = w.const_data_ptr<float>();
  norm.bias = bias ? b.const_data_ptr<float>() : nullptr;
  norm.mean = mean.mutable_data_ptr<float>();
  norm.rstd = rstd.mutable_data_ptr<float>();
  norm_forward(norm, num_rows);
  return {y, total, mean, rstd};
}

// Gradients of total, of x where that has another dtype (else empty), of weight and of bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const optional<Tensor>& grad_total, const Tensor& total, const Tensor& mean,
    const Tensor& rstd, const Tensor& weight, at::ScalarType x_dtype, bool is_rms) {
  const Tensor dy = grad.contiguous(), stream = grad_total ? grad_total->contiguous() : dy;
  const Tensor rows = total.contiguous(), w = as_floats(weight);
  Tensor dtotal = empty_of(total.sizes(), rows, rows.scalar_type()), dx = nothing(total);
  if (x_dtype != rows.scalar_type()) dx = empty_of(total.sizes(), rows, x_dtype);
  Tensor dweight = empty_of(w), dbias = empty_of(w);
  Norm norm = {};
  norm.dtype = dtype_of(x_dtype);
  norm.total_dtype = dtype_of(rows);
  norm.y_dtype = dtype_of(dy);
  norm.num_columns = rows.size(-1);
  norm.is_rms = is_rms;
  norm.total = const_cast<void*>(rows.const_data_ptr());
  norm.weight = w.const_data_ptr<float>();
  norm.mean = const_cast<float*>(mean.const_data_ptr<float>());
  norm.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  norm.dy = dy.const_data_ptr();
  norm.dstream = grad_total ? stream.const_data_ptr() : nullptr;
  norm.dtotal = dtotal.mutable_data_ptr();
  norm.dx = dx.numel() ? dx.mutable_data_ptr() : nullptr;
  norm_backward(norm, mean.numel(), dweight.mutable_data_ptr<float>(),
                dbias.mutable_data_ptr<float>());
  return {dtotal, dx, dweight.to(weight.scalar_type()), dbias.to(weight.scalar_type())};
}

// The loss ("mean", "sum", or "none": of each row), and as far as they are wanted the gradients
// of hidden and weight for a gradient of 1, else empty. Logits are formed for some rows at a time.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& hidden, const Tensor& weight,
                                                        const Tensor& targets, int64_t ignore_index,
                                                        c10::string_view reduction,
                                                        double label_smoothing, double z_loss,
                                                        at::ScalarType compute,
                                                        std::array<bool, 2> wanted) {
  // Logits that stay in the L2 cache until their gradients are multiplied; but more where these
  // would be few rows, for each of which all weights are packed.
  constexpr int64_t kLogits = int64_t{1} << 19, kRows = 256, kMostLogits = int64_t{1} << 24;
  const Tensor rows = as_rows(hidden), w = weight.contiguous(), labels = targets.contiguous();
  const int64_t num_rows = rows.size(0), vocab_size = w.size(0), width = w.size(1);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  int64_t num_counted = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    if (label[r] == ignore_index) continue;
    TORCH_CHECK_INDEX(label[r] >= 0 && label[r] < vocab_size, "linear_cross_entropy: target ",
                      label[r], " is out of range [0, ", vocab_size, ")");
    ++num_counted;
  }
  const CrossEntropy loss = {label_smoothing, z_loss,
                             reduction == "mean" ? 1.0 / num_counted : 1.0};

  Tensor losses = at::zeros({num_rows}, rows.options().dtype(at::kFloat));
  const bool with_gradients = wanted[0] || wanted[1];
  Tensor dhidden = wanted[0] ? empty_of(hidden) : nothing(hidden);
  Tensor dweight = wanted[1] ? empty_of(w.sizes(), w, at::kFloat) : nothing(w);
  if (num_rows == 0) dweight.zero_();
  const int64_t few = std::min(kRows, kMostLogits / vocab_size);
  const int64_t chunk =
      std::max<int64_t>(1, std::min(num_rows, std::max(few, kLogits / vocab_size)));
  Tensor logits = empty_of({chunk, vocab_size}, rows, at::kFloat);
  const Tensor dx_sums = wanted[0] ? empty_of({chunk, width}, rows, at::kFloat) : nothing(rows);
  float* row_loss = losses.mutable_data_ptr<float>();
  for (int64_t first = 0; first < num_rows; first += chunk) {
    const int64_t count = std::min(chunk, num_rows - first);
    const Tensor part = logits.narrow(0, 0, count), x = rows.narrow(0, first, count);
    multiply(operand(x), operand(w).transposed(), width, compute, part);
    float* logit = part.mutable_data_ptr<float>();
    parallel_for(count, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* row = logit + r * vocab_size;
        if (label[first + r] != ignore_index) {
          row_loss[first + r] =
              kernels().cross_entropy(loss, row, vocab_size, label[first + r], with_gradients);
        } else if (with_gradients) {
          std::fill(row, row + vocab_size, 0.0f);
        }
      }
    });
    if (wanted[0]) {
      // in float32, so that the inputs, as many as the vocabulary, are taken some at a time
      const Tensor dx = dx_sums.narrow(0, 0, count);
      multiply(operand(part), operand(w), vocab_size, compute, dx);
      dhidden.view({num_rows, width}).narrow(0, first, count).copy_(dx);
    }
    if (wanted[1]) {
      Epilogue sum;
      if (first > 0) sum.addend = dweight.const_data_ptr();
      multiply(operand(part).transposed(), operand(x), count, compute, dweight, sum);
    }
  }
  Tensor result = losses;
  if (reduction != "none") {
    // the mean over no rows is NaN, as PyTorch's
    result = losses.sum(at::kDouble).to(at::kFloat);
    if (reduction == "mean" && num_counted == 0) result.fill_(NAN);
  } else {
    result = losses.view(targets.sizes());
  }
  return {result, dhidden, dweight.to(w.scalar_type())};
}

RotaryQkv rotary_of(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t num_kv_heads,
                    const Tensor& q_weight, const Tensor& k_weight, double eps) {
  RotaryQkv rotary = {};
  rotary.dtype = dtype_of(qkv);
  rotary.seq_len = qkv.size(1);
  rotary.num_heads = qkv.size(2) - 2 * num_kv_heads;
  rotary.num_kv_heads = num_kv_heads;
  rotary.head_dim = qkv.size(3);
  rotary.cos = cos.const_data_ptr<float>();
  rotary.sin = sin.const_data_ptr<float>();
  rotary.table_stride = cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(2);
  rotary.eps = static_cast<float>(eps);
  if (q_weight.defined()) {
    rotary.q_weight = q_weight.const_data_ptr<float>();
    rotary.k_weight = k_weight.const_data_ptr<float>();
  }
  return rotary;
}

std::tuple<Tensor, Tensor, Tensor> rotary_qkv(const Tensor& qkv, const Tensor& cos,
                                              const Tensor& sin, int64_t num_kv_heads,
                                              const optional<Tensor>& q_weight,
                                              const optional<Tensor>& k_weight, double eps) {
  const Tensor heads = qkv.contiguous(), c = as_floats(cos), s = as_floats(sin);
  const Tensor qw = as_floats(q_weight), kw = as_floats(k_weight);
  RotaryQkv rotary = rotary_of(heads, c, s, num_kv_heads, qw, kw, eps);
  const int64_t B = qkv.size(0), T = qkv.size(1), D = qkv.size(3);
  Tensor q = empty_of({B, T, rotary.num_heads, D}, heads, heads.scalar_type());
  Tensor k = empty_of({B, T, num_kv_heads, D}, heads, heads.scalar_type()), v = empty_of(k);
  rotary.qkv = const_cast<void*>(heads.const_data_ptr());
  rotary.q = q.mutable_data_ptr();
  rotary.k = k.mutable_data_ptr();
  rotary.v = v.mutable_data_ptr();
  rotary_forward(rotary, B * T);
  return {q, k, v};
}

// Gradients of qkv and of the weights, which are empty where there are none; only for them qkv is
// read.
std::tuple<Tensor, Tensor, Tensor> rotary_qkv_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const optional<Tensor>& qkv,
    const Tensor& cos, const Tensor& sin, const optional<Tensor>& q_weight,
    const optional<Tensor>& k_weight, double eps) {
  const Tensor q = dq.contiguous(), k = dk.contiguous(), v = dv.contiguous();
  const Tensor c = as_floats(cos), s = as_floats(sin);
  const Tensor qw = as_floats(q_weight), kw = as_floats(k_weight);
  const int64_t H = q.size(2), H_kv = k.size(2), D = q.size(3);
  Tensor dqkv = empty_of({q.size(0), q.size(1), H + 2 * H_kv, D}, q, q.scalar_type());
  RotaryQkv rotary = rotary_of(dqkv, c, s, H_kv, qw, kw, eps);
  const Tensor heads = qkv ? qkv->contiguous() : Tensor();
  Tensor dq_weight = nothing(c), dk_weight = nothing(c);
  if (q_weight) {
    rotary.qkv = const_cast<void*>(heads.const_data_ptr());
    dq_weight = empty_of({D}, c, at::kFloat);
    dk_weight = empty_of(dq_weight);
    rotary.dq_weight = dq_weight.mutable_data_ptr<float>();
    rotary.dk_weight = dk_weight.mutable_data_ptr<float>();
  }
  rotary.q = const_cast<void*>(q.const_data_ptr());
  rotary.k = const_cast<void*>(k.const_data_ptr());
  rotary.v = const_cast<void*>(v.const_data_ptr());
  rotary.dqkv = dqkv.mutable_data_ptr();
  rotary_backward(rotary, q.size(0) * q.size(1));
  const auto weight_dtype = q_weight ? q_weight->scalar_type() : at::kFloat;
  return {dqkv, dq_weight.to(weight_dtype), dk_weight.to(weight_dtype)};
}

void check_indices(const Tensor& index, int64_t num_rows, const char* name) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < num_rows, "embedding: ", name, " ", values[i],
                      " is out of range [0, ", num_rows, ")");
  }
}

Tensor embedding_forward(const Tensor& tokens, const Tensor& weight,
                         const optional<Tensor>& positions,
                         const optional<Tensor>& position_weight) {
  const Tensor index = tokens.contiguous(), table = weight.contiguous();
  check_indices(index, table.size(0), "token");
  Lookup second = {};
  Tensor places, second_table;
  if (positions) {
    places = positions->expand(tokens.sizes()).contiguous();
    second_table = position_weight->contiguous();
    check_indices(places, second_table.size(0), "position");
    second = {second_table.const_data_ptr(), places.const_data_ptr<int64_t>(),
              second_table.size(0)};
  }
  at::DimVector shape(tokens.sizes());
  shape.push_back(table.size(1));
  Tensor out = empty_of(shape, table, table.scalar_type());
  embedding({table.const_data_ptr(), index.const_data_ptr<int64_t>(), table.size(0)}, second,
            dtype_of(table), index.numel(), table.size(1), out.mutable_data_ptr());
  return out;
}

// The gradient of a table (num_rows, C), of which `index` took rows.
Tensor embedding_table_backward(const Tensor& grad, const Tensor& index, int64_t num_rows) {
  const Tensor rows = as_rows(grad);
  const Tensor taken = index.expand(grad.sizes().slice(0, grad.dim() - 1)).contiguous();
  Tensor out = empty_of({num_rows, rows.size(1)}, rows, rows.scalar_type());
  embedding_backward(rows.const_data_ptr(), taken.const_data_ptr<int64_t>(), dtype_of(rows),
                     taken.numel(), num_rows, rows.size(1), out.mutable_data_ptr());
  return out;
}

float scale_of(const optional<Tensor>& scale) { return scale ? scale->item().toFloat() : 1.0f; }

// Tensors to change in place: each as it is where its elements lie behind each other, else a copy,
// which goes back at the end.
class Changed {
 public:
  explicit Changed(at::TensorList tensors) : tensors_(tensors) {
    for (const Tensor& tensor : tensors) packed_.push_back(tensor.contiguous());
  }
  void* data(size_t i) const { return packed_[i].mutable_data_ptr(); }
  float* floats(size_t i) const { return packed_[i].mutable_data_ptr<float>(); }
  void finish() const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (packed_[i].is_same(tensors_[i])) {
        tensors_[i].unsafeGetTensorImpl()->bump_version();
      } else {
        tensors_[i].copy_(packed_[i]);
      }
    }
  }

 private:
  at::TensorList tensors_;
  std::vector<Tensor> packed_;
};

std::vector<Tensor> packed(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.contiguous());
  return result;
}

void adamw_step(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList masters, int64_t step, double lr,
                double beta1, double beta2, double eps, double weight_decay,
                const optional<Tensor>& grad_scale) {
  const double number = static_cast<double>(step);
  const AdamW factors = {scale_of(grad_scale),
                         static_cast<float>(lr * weight_decay),
                         static_cast<float>(lr / (1 - std::pow(beta1, number))),
                         static_cast<float>(1 - beta1),
                         static_cast<float>(1 - beta2),
                         static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, number))),
                         static_cast<float>(eps)};
  const Changed param(params), exp_avg(exp_avgs), exp_avg_sq(exp_avg_sqs), master(masters);
  const std::vector<Tensor> grad = packed(grads);
  std::vector<AdamWPart> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    tensors.push_back({param.data(i), grad[i].const_data_ptr(), exp_avg.floats(i),
                       exp_avg_sq.floats(i), masters.empty() ? nullptr : master.floats(i),
                       dtype_of(params[i]), dtype_of(grad[i]), grad[i].numel()});
  }
  adamw(factors, tensors);
  for (const Changed* changed : {&param, &exp_avg, &exp_avg_sq, &master}) changed->finish();
}

void muon_step(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
               double lr, double momentum, double weight_decay,
               const optional<Tensor>& grad_scale) {
  const Muon factors = {scale_of(grad_scale), static_cast<float>(momentum), static_cast<float>(lr),
                        static_cast<float>(weight_decay)};
  const Changed param(params), buffer(momentum_buffers);
  const std::vector<Tensor> grad = packed(grads);
  std::vector<MuonMatrix> matrices;
  for (size_t i = 0; i < params.size(); ++i) {
    matrices.push_back({param.floats(i), grad[i].const_data_ptr<float>(), buffer.floats(i),
                        grad[i].size(0), grad[i].size(1)});
  }
  muon(factors, std::move(matrices));
  param.finish();
  buffer.finish();
}

Tensor grad_norm(at::TensorList grads) {
  const std::vector<Tensor> kept = packed(grads);
  std::vector<Elements> tensors;
  for (const Tensor& grad : kept) {
    tensors.push_back({grad.const_data_ptr(), dtype_of(grad), grad.numel()});
  }
  return at::scalar_tensor(std::sqrt(sum_squares(tensors)), kept[0].options().dtype(at::kFloat));
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
  m.def(
      "normalize(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool is_rms, "
      "ScalarType y_dtype) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "normalize_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor mean, Tensor rstd, "
      "Tensor weight, ScalarType x_dtype, bool is_rms) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
      "str reduction, float label_smoothing, float z_loss, ScalarType compute, "
      "bool[2] wanted) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, int step, float lr, float beta1, "
      "float beta2, float eps, float weight_decay, Tensor? grad_scale) -> ()");
  m.def(
      "muon_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, "
      "float momentum, float weight_decay, Tensor? grad_scale) -> ()");
  m.def("grad_norm(Tensor[] grads) -> Tensor");
  m.def(
      "rotary_qkv(Tensor qkv, Tensor cos, Tensor sin, int num_kv_heads, Tensor? q_weight, "
      "Tensor? k_weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rotary_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, Tensor cos, Tensor sin, "
      "Tensor? q_weight, Tensor? k_weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "embedding(Tensor tokens, Tensor weight, Tensor? positions, Tensor? position_weight) -> "
      "Tensor");
  m.def("embedding_backward(Tensor grad, Tensor index, int num_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(leangpt, CPU, m) {
  m.impl("linear", &leangpt::train::linear);
  m.impl("linear_backward", &leangpt::train::linear_backward);
  m.impl("mlp", &leangpt::train::mlp);
  m.impl("mlp_backward", &leangpt::train::mlp_backward);
  m.impl("attention", &leangpt::train::attention_forward);
  m.impl("attention_backward", &leangpt::train::attention_backward);
  m.impl("normalize", &leangpt::train::normalize);
  m.impl("normalize_backward", &leangpt::train::normalize_backward);
  m.impl("linear_cross_entropy", &leangpt::train::linear_cross_entropy);
  m.impl("adamw_step", &leangpt::train::adamw_step);
  m.impl("muon_step", &leangpt::train::muon_step);
  m.impl("grad_norm", &leangpt::train::grad_norm);
  m.impl("rotary_qkv", &leangpt::train::rotary_qkv);
  m.impl("rotary_qkv_backward", &leangpt::train::rotary_qkv_backward);
  m.impl("embedding", &leangpt::train::embedding_forward);
  m.impl("embedding_backward", &leangpt::train::embedding_table_backward);
}
