// The CUDA half of torch's dispatch: argument checks, results and scratch memory, and the stream.
// No CUDA headers of torch are needed, so that it is compiled for a torch without CUDA too.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <map>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace leangpt::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The device of a tensor is current, for torch and for the CUDA runtime of this library.
class Current {
 public:
  explicit Current(const Tensor& x)
      : torch_guard_(x.device()), guard_(x.is_cuda() ? x.device().index() : 0) {
    if (!x.is_cuda()) return;  // in the emulator of the tests
    const c10::impl::VirtualGuardImpl guard(x.device().type());
    stream = static_cast<cudaStream_t>(guard.getStream(x.device()).native_handle());
  }

  cudaStream_t stream = nullptr;

 private:
  c10::DeviceGuard torch_guard_;
  DeviceGuard guard_;
};

void check_tensor(const char* op, const char* name, const Tensor& x, at::ScalarType dtype,
                  const std::vector<int64_t>& shape, const Tensor& like) {
  bool fits = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || x.size(i) == shape[i];
  TORCH_CHECK_VALUE(x.scalar_type() == dtype && fits && x.is_contiguous(), op, ": ", name,
                    " must be contiguous ", dtype, " ", at::IntArrayRef(shape), " (-1: any), got ",
                    x.scalar_type(), " ", x.sizes(), x.is_contiguous() ? "" : ", not contiguous");
  TORCH_CHECK_VALUE(x.device() == like.device(), op, ": ", name, " must be on ", like.device(),
                    ", got ", x.device());
}

template <class T>
const T* pointer(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// A vector with zeros behind it, up to a multiple.
OptionalTensor padded(const OptionalTensor& x, int64_t multiple) {
  if (!x) return x;
  const int64_t width = x->size(-1);
  return at::constant_pad_nd(*x, {0, round_up(width, multiple) - width}).contiguous();
}

// (rows, width) zeros, in rows as the kernels want them.
Tensor rows_like(const Tensor& x, int64_t width, at::ScalarType dtype) {
  return at::zeros({x.size(0), round_up(width, kLanes)}, x.options().dtype(dtype));
}

Tensor first_columns(const Tensor& rows, int64_t width) {
  return rows.size(1) == width ? rows : rows.narrow(1, 0, width).contiguous();
}

// The format that a matrix of that many bytes has.
WeightKind kind_of(const Tensor& weight, const Matrix& shape) {
  for (WeightKind kind : {WeightKind::kBf16, WeightKind::kInt8, WeightKind::kInt4}) {
    Matrix w = shape;
    w.kind = kind;
    if (weight.numel() == w.panels() * w.panel_bytes()) return kind;
  }
  TORCH_CHECK_VALUE(false, "linear_decode: weight must be packed bf16, int8 or int4 panels of (",
                    shape.n, ", ", shape.k, "), got ", weight.numel(), " bytes");
}

Activation activation_of(const std::string& name) {
  static const std::map<std::string, Activation> kActivations = {
      {"none", Activation::kNone},
      {"gelu_tanh", Activation::kGeluTanh},
      {"gelu", Activation::kGelu},
      {"relu2", Activation::kRelu2},
      {"swiglu", Activation::kSwiglu}};
  const auto found = kActivations.find(name);
  TORCH_CHECK_VALUE(
      found != kActivations.end(),
      "linear_decode: activation must be none, gelu_tanh, gelu, relu2 or swiglu, got ", name);
  return found->second;
}

Tensor linear_decode_op(const Tensor& x, const Tensor& weight, const OptionalTensor& scales,
                        const OptionalTensor& minimums, const OptionalTensor& bias,
                        int64_t num_outputs, int64_t group, std::string activation) {
  constexpr const char* kOp = "linear_decode";
  check_tensor(kOp, "x", x, at::kBFloat16, {-1, -1}, x);
  check_tensor(kOp, "weight", weight, at::kByte, {-1}, x);
  Matrix w = {};
  w.n = static_cast<int32_t>(num_outputs);
  w.k = static_cast<int32_t>(x.size(1));
  w.group = static_cast<int32_t>(group);
  w.kind = kind_of(weight, w);
  w.data = weight.const_data_ptr<uint8_t>();
  if (w.kind != WeightKind::kBf16) {
    TORCH_CHECK_VALUE(scales, kOp, ": integer weights need scales");
    check_tensor(kOp, "scales", *scales, group ? at::kHalf : at::kFloat, {w.num_scales()}, x);
    w.scales = scales->const_data_ptr();
    if (minimums) check_tensor(kOp, "minimums", *minimums, at::kHalf, {w.num_scales()}, x);
    w.minimums = pointer<uint16_t>(minimums);
  }
  if (bias) check_tensor(kOp, "bias", *bias, at::kFloat, {num_outputs}, x);
  const OptionalTensor padded_bias = padded(bias, kPanelWidth);
  w.bias = pointer<float>(padded_bias);

  const Current current(x);
  const Activation kind = activation_of(activation);
  const int64_t width = kind == Activation::kSwiglu ? num_outputs / 2 : num_outputs;
  const Tensor rows = *padded(x, kLanes);
  Tensor out = rows_like(x, width, at::kBFloat16);
  linear_decode(w,
                {nullptr,
                 static_cast<const uint16_t*>(rows.const_data_ptr()),
                 rows.size(1),
                 nullptr,
                 {},
                 nullptr},
                {nullptr, nullptr, static_cast<uint16_t*>(out.data_ptr()), out.size(1), kind},
                static_cast<int>(x.size(0)), current.stream);
  return first_columns(out, width);
}

KvKind kv_kind_of(const char* op, const std::string& name) {
  static const std::map<std::string, KvKind> kKinds = {{"bfloat16", KvKind::kBf16},
                                                       {"float16", KvKind::kFp16},
                                                       {"int8", KvKind::kInt8},
                                                       {"float8_e4m3", KvKind::kFp8}};
  const auto found = kKinds.find(name);
  TORCH_CHECK_VALUE(found != kKinds.end(), op,
                    ": kv_dtype must be bfloat16, float16, int8 or float8_e4m3, got ", name);
  return found->second;
}

// Of queries, which the cache's elements are multiplied with.
at::ScalarType query_dtype(KvKind kind) {
  return kind == KvKind::kFp16 ? at::kHalf : at::kBFloat16;
}

// What the ops of attention have in common.
struct Cached {
  Cached(const char* op, const Tensor& x, const Tensor& kv_cache, const Tensor& positions,
         const Tensor& block_tables, const HeadShape& shape, KvKind kind)
      : heads(shape),
        table_of(at::arange(x.size(0), positions.options())),
        rows{positions.const_data_ptr<int32_t>(), table_of.const_data_ptr<int32_t>(),
             block_tables.const_data_ptr<int32_t>(), block_tables.size(1),
             static_cast<int>(x.size(0))} {
    const int64_t bytes = kv_block_bytes(shape.n_kv_head, shape.head_dim, kind);
    check_tensor(op, "kv_cache", kv_cache, at::kByte, {-1, bytes}, x);
    layer = {static_cast<uint8_t*>(kv_cache.data_ptr()), bytes, kind};
  }

  static void check(const char* op, const Tensor& x, const Tensor& positions,
                    const Tensor& block_tables) {
    check_tensor(op, "positions", positions, at::kInt, {x.size(0)}, x);
    check_tensor(op, "block_tables", block_tables, at::kInt, {x.size(0), -1}, x);
  }

  HeadShape heads;
  Tensor table_of;
  StepRows rows;
  KvLayer layer;
};

Tensor append_kv_op(const Tensor& qkv, Tensor kv_cache, const Tensor& positions,
                    const Tensor& block_tables, const OptionalTensor& q_norm,
                    const OptionalTensor& k_norm, const OptionalTensor& frequencies, int64_t n_head,
                    int64_t n_kv_head, double norm_eps, double rope_magnitude,
                    std::string kv_dtype) {
  constexpr const char* kOp = "append_kv";
  const int64_t num_heads = n_head + 2 * n_kv_head;
  TORCH_CHECK_VALUE(n_kv_head > 0 && n_head % n_kv_head == 0, kOp,
                    ": n_head must be a multiple of n_kv_head, got ", n_head, " and ", n_kv_head);
  check_tensor(kOp, "qkv", qkv, at::kFloat, {-1, -1}, qkv);
  TORCH_CHECK_VALUE(qkv.size(1) % num_heads == 0, kOp, ": qkv must be (N, (", n_head, " + 2 * ",
                    n_kv_head, ") * head_dim), got ", qkv.sizes());
  const int64_t D = qkv.size(1) / num_heads, N = qkv.size(0);
  const KvKind kind = kv_kind_of(kOp, kv_dtype);
  Cached::check(kOp, qkv, positions, block_tables);
  if (q_norm) check_tensor(kOp, "q_norm", *q_norm, at::kFloat, {D}, qkv);
  if (k_norm) check_tensor(kOp, "k_norm", *k_norm, at::kFloat, {D}, qkv);
  if (frequencies) check_tensor(kOp, "frequencies", *frequencies, at::kFloat, {D / 2}, qkv);

  const Current current(qkv);
  const Cached cached(kOp, qkv, kv_cache, positions, block_tables,
                      {static_cast<int>(n_head), static_cast<int>(n_kv_head), static_cast<int>(D)},
                      kind);
  const OptionalTensor weights[] = {padded(q_norm, kLanes), padded(k_norm, kLanes)};
  Tensor rotations;
  if (frequencies) {
    rotations = at::empty({N, D}, qkv.options());
    rotary_angles(positions.const_data_ptr<int32_t>(), frequencies->const_data_ptr<float>(),
                  static_cast<float>(rope_magnitude), static_cast<int>(D),
                  rotations.data_ptr<float>(), static_cast<int>(N), current.stream);
  }
  const Tensor rows = *padded(qkv, kLanes);
  Tensor queries = rows_like(qkv, n_head * D, query_dtype(kind));
  append_kv({rows.const_data_ptr<float>(), rows.size(1), pointer<float>(weights[0]),
             pointer<float>(weights[1]), static_cast<float>(norm_eps),
             frequencies ? rotations.const_data_ptr<float>() : nullptr,
             static_cast<uint16_t*>(queries.data_ptr()), queries.size(1), nullptr, false},
            cached.heads, cached.rows, cached.layer, current.stream);
  return first_columns(queries, n_head * D).view({N, n_head, D});
}

Tensor attention_decode_op(const Tensor& q, const Tensor& kv_cache, const Tensor& positions,
                           const Tensor& block_tables, int64_t n_kv_head, int64_t max_keys,
                           int64_t sliding_window, std::string kv_dtype) {
  constexpr const char* kOp = "attention_decode";
  const KvKind kind = kv_kind_of(kOp, kv_dtype);
  check_tensor(kOp, "q", q, query_dtype(kind), {-1, -1, -1}, q);
  const int64_t N = q.size(0), H = q.size(1), D = q.size(2);
  TORCH_CHECK_VALUE(n_kv_head > 0 && H % n_kv_head == 0, kOp,
                    ": the heads of q must be a multiple of n_kv_head, got ", H, " and ",
                    n_kv_head);
  Cached::check(kOp, q, positions, block_tables);
  TORCH_CHECK_VALUE(max_keys > 0 && max_keys <= block_tables.size(-1) * kPageSize, kOp,
                    ": max_keys must be in [1, ", block_tables.size(-1) * kPageSize,
                    "], what the block tables hold, got ", max_keys);

  const Current current(q);
  const Cached cached(kOp, q, kv_cache, positions, block_tables,
                      {static_cast<int>(H), static_cast<int>(n_kv_head), static_cast<int>(D)},
                      kind);
  const Tensor queries = *padded(q.view({N, H * D}), kLanes);
  // each row is a tile of its own: those of one sequence give the same bits together
  const Tensor tiles =
      at::stack({cached.table_of, at::ones({N}, positions.options())}, 1).contiguous();
  Tensor out = rows_like(q, H * D, at::kBFloat16);
  const int64_t floats =
      attention_scratch_floats(cached.heads, static_cast<int>(N), static_cast<int>(max_keys));
  Tensor scratch = at::empty({floats}, q.options().dtype(at::kFloat));
  attention_decode(
      {static_cast<const uint16_t*>(queries.const_data_ptr()),
       static_cast<uint16_t*>(out.data_ptr()), out.size(1),
       static_cast<const AttentionTile*>(tiles.const_data_ptr()), static_cast<int>(N),
       static_cast<int>(max_keys), static_cast<int>(sliding_window), scratch.data_ptr<float>()},
      cached.heads, cached.rows, cached.layer, current.stream);
  return first_columns(out, H * D).view({N, H, D});
}

// Logits in rows as the kernels want them.
Tensor padded_logits(const char* op, const Tensor& logits) {
  check_tensor(op, "logits", logits, at::kFloat, {-1, -1}, logits);
  return *padded(logits, kLanes);
}

Tensor sample_decode_op(const Tensor& logits, double temperature, int64_t top_k, double top_p,
                        double min_p, int64_t seed, int64_t position) {
  constexpr const char* kOp = "sample_decode";
  const Tensor rows = padded_logits(kOp, logits);
  const int64_t N = logits.size(0), V = logits.size(1);
  TORCH_CHECK_VALUE(
      temperature >= 0 && top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1, kOp,
      ": temperature and top_k must be at least 0, top_p in (0, 1], min_p in ", "[0, 1], got ",
      temperature, ", ", top_k, ", ", top_p, ", ", min_p);
  const Current current(logits);
  const auto bytes = [&](int64_t count) {
    return at::empty({count}, logits.options().dtype(at::kByte));
  };
  Tensor host = at::empty({N * static_cast<int64_t>(sizeof(DrawSettings))}, at::kByte);
  auto* settings = static_cast<DrawSettings*>(host.data_ptr());
  for (int64_t i = 0; i < N; ++i) {
    settings[i] = {};
    settings[i].temperature = temperature;
    settings[i].top_k = top_k;
    settings[i].top_p = top_p;
    settings[i].min_p = min_p;
    settings[i].repetition_penalty = 1;
    settings[i].seed = static_cast<uint64_t>(seed);
    settings[i].sample_index = i;
    settings[i].position = position;
    settings[i].vocab_limit = V;
    settings[i].num_logprobs = -1;
  }
  const Tensor on_device = host.to(logits.device());
  Tensor drawn = at::empty({N, sizeof(Drawn) / sizeof(int64_t)}, logits.options().dtype(at::kLong));
  Tensor scratch = bytes(sample_scratch_bytes(static_cast<int>(V), static_cast<int>(N)));
  sample(rows.const_data_ptr<float>(), rows.size(1), static_cast<int>(V),
         static_cast<const DrawSettings*>(on_device.const_data_ptr()),
         static_cast<Drawn*>(drawn.data_ptr()), scratch.data_ptr(), static_cast<int>(N),
         current.stream);
  return drawn.select(1, 0).contiguous();
}

Tensor log_probs_op(const Tensor& logits, const Tensor& targets) {
  constexpr const char* kOp = "log_probs";
  const Tensor rows = padded_logits(kOp, logits);
  check_tensor(kOp, "targets", targets, at::kLong, {logits.size(0)}, logits);
  const Current current(logits);
  Tensor out = at::empty({logits.size(0)}, logits.options());
  log_probs(rows.const_data_ptr<float>(), rows.size(1), static_cast<int>(logits.size(1)),
            targets.const_data_ptr<int64_t>(), out.data_ptr<float>(),
            static_cast<int>(logits.size(0)), current.stream);
  return out;
}

TORCH_LIBRARY_IMPL(leangpt, CUDA, m) {
  m.impl("linear_decode", &linear_decode_op);
  m.impl("append_kv", &append_kv_op);
  m.impl("attention_decode", &attention_decode_op);
  m.impl("sample_decode", &sample_decode_op);
  m.impl("log_probs", &log_probs_op);
}

}  // namespace
}  // namespace leangpt::cuda
