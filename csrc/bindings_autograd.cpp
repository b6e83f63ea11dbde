// Gradients of the ops of training: what each keeps, and with which op of bindings_train.cpp it
// goes back. In C++: in Python they took a sixth of a small model's step
// (benchmarks/records/training.md).
#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

namespace leangpt::train {
namespace {

using at::Tensor;
using std::optional;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// An op by its name; the signature is that of its schema.
template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What runs an op itself, without recording gradients.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

int64_t length(const Tensor& x) { return x.sym_size(0).guard_int(__FILE__, __LINE__); }

// Which of the tensors that were given to an op need a gradient; those that were not given do not.
template <size_t n>
std::array<bool, n> wanted_of(const AutogradContext* ctx, const std::array<bool, n>& given) {
  std::array<bool, n> wanted = {};
  size_t number = 0;  // among those given
  for (size_t i = 0; i < n; ++i) {
    if (given[i]) wanted[i] = ctx->needs_input_grad(number++);
  }
  return wanted;
}

Tensor if_wanted(const Tensor& gradient, bool is_wanted) { return is_wanted ? gradient : Tensor(); }

struct Embedding : Function<Embedding> {
  static Tensor forward(AutogradContext* ctx, const Tensor& tokens, const Tensor& weight,
                        const optional<Tensor>& positions,
                        const optional<Tensor>& position_weight) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, const optional<Tensor>&,
                                       const optional<Tensor>&)>("leangpt::embedding");
    ctx->save_for_backward({tokens, positions.value_or(Tensor())});
    ctx->saved_data["num_rows"] = length(weight);
    ctx->saved_data["num_positions"] = position_weight ? length(*position_weight) : 0;
    const BelowAutograd below;
    return op.call(tokens, weight, positions, position_weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, int64_t)>("leangpt::embedding_backward");
    const variable_list saved = ctx->get_saved_variables();
    const bool has_positions = saved[1].defined();
    const auto wanted = wanted_of<4>(ctx, {true, true, has_positions, has_positions});
    const auto gradient = [&](int which, const char* size) {
      return op.call(grads[0], saved[which], ctx->saved_data[size].toInt());
    };
    return {Tensor(), wanted[1] ? gradient(0, "num_rows") : Tensor(), Tensor(),
            wanted[3] ? gradient(1, "num_positions") : Tensor()};
  }
};

struct RotaryQkv : Function<RotaryQkv> {
  static variable_list forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& cos,
                               const Tensor& sin, int64_t num_kv_heads,
                               const optional<Tensor>& q_weight, const optional<Tensor>& k_weight,
                               double eps) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, int64_t, const optional<Tensor>&,
        const optional<Tensor>&, double)>("leangpt::rotary_qkv");
    // turning back needs no input, norms do
    ctx->save_for_backward({q_weight ? qkv : Tensor(), cos, sin, q_weight.value_or(Tensor()),
                            k_weight.value_or(Tensor())});
    ctx->saved_data["eps"] = eps;
    const BelowAutograd below;
    const auto [q, k, v] = op.call(qkv, cos, sin, num_kv_heads, q_weight, k_weight, eps);
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, const Tensor&,
        const Tensor&, const optional<Tensor>&, const optional<Tensor>&, double)>(
        "leangpt::rotary_qkv_backward");
    const variable_list saved = ctx->get_saved_variables();
    const bool has_weights = saved[3].defined();
    const auto given = [&](int i) {
      return has_weights ? optional<Tensor>(saved[i]) : std::nullopt;
    };
    const auto [dqkv, dq_weight, dk_weight] =
        op.call(grads[0], grads[1], grads[2], given(0), saved[1], saved[2], given(3), given(4),
                ctx->saved_data["eps"].toDouble());
    return {dqkv,
            Tensor(),
            Tensor(),
            Tensor(),
            if_wanted(dq_weight, has_weights),
            if_wanted(dk_weight, has_weights),
            Tensor()};
  }
};

// The op of norms, without recording gradients: y, total, mean, rstd.
std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(const Tensor& x,
                                                     const optional<Tensor>& residual,
                                                     const Tensor& weight,
                                                     const optional<Tensor>& bias, double eps,
                                                     bool is_rms, at::ScalarType y_dtype) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const optional<Tensor>&, const Tensor&, const optional<Tensor>&, double, bool,
      at::ScalarType)>("leangpt::normalize");
  const BelowAutograd below;
  return op.call(x, residual, weight, bias, eps, is_rms, y_dtype);
}

// What the y of a norm is computed from. The graph that has made x holds this: were x held here, it
// would hold itself.
struct NormRecipe : torch::CustomClassHolder {
  NormRecipe(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, double eps,
             bool is_rms)
      : x(x.getIntrusivePtr()),
        weight(weight),
        bias(bias.value_or(Tensor())),
        eps(eps),
        is_rms(is_rms) {}

  const c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> x;
  const Tensor weight, bias;
  const double eps;
  const bool is_rms;
};

struct Normalize : Function<Normalize> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x,
                               const optional<Tensor>& residual, const Tensor& weight,
                               const optional<Tensor>& bias, double eps, bool is_rms,
                               at::ScalarType y_dtype) {
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["dtype"] = x.scalar_type();
    ctx->saved_data["is_rms"] = is_rms;
    const auto [y, total, mean, rstd] = normalize(x, residual, weight, bias, eps, is_rms, y_dtype);
    const Tensor& normed = residual ? total : x;
    ctx->save_for_backward({normed, mean, rstd, weight});
    ctx->saved_data["recipe"] = c10::IValue::make_capsule(
        c10::make_intrusive<NormRecipe>(normed, weight, bias, eps, is_rms));
    ctx->mark_non_differentiable(residual ? variable_list{mean, rstd}
                                          : variable_list{mean, rstd, total});
    ctx->set_materialize_grads(false);
    return {y, total, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&,
        const Tensor&, at::ScalarType, bool)>("leangpt::normalize_backward");
    auto& data = ctx->saved_data;
    const Tensor &grad = grads[0], &grad_total = grads[1];
    const bool has_residual = data["has_residual"].toBool();
    const auto dtype = data["dtype"].toScalarType();
    if (!grad.defined()) {  // only total was used
      return {grad_total.defined() ? grad_total.to(dtype) : Tensor(),
              if_wanted(grad_total, has_residual),
              Tensor(),
              Tensor(),
              Tensor(),
              Tensor(),
              Tensor()};
    }
    const variable_list saved = ctx->get_saved_variables();
    const optional<Tensor> given =
        grad_total.defined() ? optional<Tensor>(grad_total) : std::nullopt;
    const auto [dtotal, dx, dweight, dbias] = op.call(grad, given, saved[0], saved[1], saved[2],
                                                      saved[3], dtype, data["is_rms"].toBool());
    return {dtype == saved[0].scalar_type() ? dtotal : dx,
            if_wanted(dtotal, has_residual),
            dweight,
            if_wanted(dbias, data["has_bias"].toBool()),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

// What a product keeps of its input x, for the gradient of its weight. A large float32 x that is
// the y of a norm is computed again from the norm's own input, which is kept anyway: all of them
// are a seventh of a step's memory and 0.012 of its time. In bf16 they are half as large, and take
// 0.016 (benchmarks/records/training.md). Hooks, a checkpoint's say, are given x itself.
variable_list keep_input(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
  constexpr size_t kLarge = size_t{1} << 20;
  const auto* node = dynamic_cast<torch::autograd::CppNode<Normalize>*>(x.grad_fn().get());
  if (node && weight.requires_grad() && x.scalar_type() == at::kFloat &&
      !x.unsafeGetTensorImpl()->has_symbolic_sizes_strides() && x.nbytes() >= kLarge &&
      !at::SavedTensorDefaultHooks::get_hooks()) {
    const c10::IValue& recipe = node->ctx_.saved_data.at("recipe");
    const auto norm = c10::static_intrusive_pointer_cast<NormRecipe>(recipe.toCapsule());
    const Tensor normed(norm->x.lock());
    if (normed.defined()) {
      ctx->saved_data["recipe"] = recipe;
      return {normed, norm->weight, norm->bias};
    }
  }
  return {x, Tensor(), Tensor()};
}

// x, of the first three that were saved.
Tensor kept_input(AutogradContext* ctx, const variable_list& saved) {
  const auto recipe = ctx->saved_data.find("recipe");
  if (recipe == ctx->saved_data.end()) return saved[0];
  const auto norm = c10::static_intrusive_pointer_cast<NormRecipe>(recipe->second.toCapsule());
  const optional<Tensor> bias = saved[2].defined() ? optional<Tensor>(saved[2]) : std::nullopt;
  return std::get<0>(
      normalize(saved[0], std::nullopt, saved[1], bias, norm->eps, norm->is_rms, at::kFloat));
}

struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const optional<Tensor>& bias, at::ScalarType compute) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, at::ScalarType)>(
            "leangpt::linear");
    variable_list kept = keep_input(ctx, x, weight);
    kept.push_back(weight);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["compute"] = compute;
    const BelowAutograd below;
    return op.call(x, weight, bias, compute);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, at::ScalarType, std::array<bool, 3>)>(
        "leangpt::linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto wanted = wanted_of<3>(ctx, {true, true, ctx->saved_data["has_bias"].toBool()});
    const auto [dx, dweight, dbias] = op.call(grads[0], kept_input(ctx, saved), saved[3],
                                              ctx->saved_data["compute"].toScalarType(), wanted);
    return {if_wanted(dx, wanted[0]), if_wanted(dweight, wanted[1]), if_wanted(dbias, wanted[2]),
            Tensor()};
  }
};

struct Mlp : Function<Mlp> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& w_in,
                               const optional<Tensor>& b_in, const Tensor& w_out,
                               const optional<Tensor>& b_out, const optional<Tensor>& residual,
                               c10::string_view activation, at::ScalarType compute) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const optional<Tensor>&, const Tensor&,
        const optional<Tensor>&, const optional<Tensor>&, c10::string_view, at::ScalarType)>(
        "leangpt::mlp");
    ctx->saved_data["has_b_in"] = b_in.has_value();
    ctx->saved_data["has_b_out"] = b_out.has_value();
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["compute"] = compute;
    const BelowAutograd below;
    const auto [out, h] = op.call(x, w_in, b_in, w_out, b_out, residual, activation, compute);
    variable_list kept = keep_input(ctx, x, w_in);
    kept.insert(kept.end(), {h, w_in, w_out});
    ctx->save_for_backward(std::move(kept));
    ctx->mark_non_differentiable({h});
    ctx->set_materialize_grads(false);
    return {out, h};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::string_view,
        at::ScalarType, std::array<bool, 5>)>("leangpt::mlp_backward");
    const variable_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto wanted =
        wanted_of<6>(ctx, {true, true, data["has_b_in"].toBool(), true, data["has_b_out"].toBool(),
                           data["has_residual"].toBool()});
    const auto [dx, dw_in, db_in, dw_out, db_out] =
        op.call(grads[0], kept_input(ctx, saved), saved[3], saved[4], saved[5],
                data["activation"].toStringView(), data["compute"].toScalarType(),
                {wanted[0], wanted[1], wanted[2], wanted[3], wanted[4]});
    return {if_wanted(dx, wanted[0]),
            if_wanted(dw_in, wanted[1]),
            if_wanted(db_in, wanted[2]),
            if_wanted(dw_out, wanted[3]),
            if_wanted(db_out, wanted[4]),
            if_wanted(grads[0], wanted[5]),
            Tensor(),
            Tensor()};
  }
};

struct Attention : Function<Attention> {
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, int64_t window, double scale) {
    static const auto op = find<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, int64_t, double)>("leangpt::attention");
    ctx->saved_data["window"] = window;
    ctx->saved_data["scale"] = scale;
    const BelowAutograd below;
    const auto [out, lse] = op.call(q, k, v, window, scale);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->mark_non_differentiable({lse});
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
        int64_t, double)>("leangpt::attention_backward");
    const variable_list saved = ctx->get_saved_variables();
    const auto [dq, dk, dv] =
        op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                ctx->saved_data["window"].toInt(), ctx->saved_data["scale"].toDouble());
    return {dq, dk, dv, Tensor(), Tensor()};
  }
};

// Whether x is known to be 1: tensors have no values while torch.compile traces, nor one value
// under vmap.
bool is_one(const Tensor& x) {
  return x.is_cpu() && x.has_storage() && !x.unsafeGetTensorImpl()->is_python_dispatch() &&
         x.numel() == 1 && x.item().toDouble() == 1;
}

// Its gradients are there with the loss: backward scales them, where that
// changes them.
struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& hidden, const Tensor& weight,
                               const Tensor& targets, int64_t ignore_index,
                               c10::string_view reduction, double label_smoothing, double z_loss,
                               at::ScalarType compute, std::array<bool, 2> wanted) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, int64_t, c10::string_view, double, double,
        at::ScalarType, std::array<bool, 2>)>("leangpt::linear_cross_entropy");
    const BelowAutograd below;
    const auto [loss, dhidden, dweight] = op.call(hidden, weight, targets, ignore_index, reduction,
                                                  label_smoothing, z_loss, compute, wanted);
    ctx->save_for_backward({dhidden, dweight});
    ctx->mark_non_differentiable({dhidden, dweight});
    ctx->set_materialize_grads(false);
    return {loss, dhidden, dweight};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list scaled(9);
    const bool is_as_saved = is_one(grads[0]);
    for (size_t i = 0; i < saved.size(); ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      scaled[i] = is_as_saved ? saved[i] : (saved[i] * grads[0]).to(saved[i].scalar_type());
    }
    return scaled;
  }
};

template <size_t... i>
auto as_tuple(const variable_list& tensors, std::index_sequence<i...>) {
  return std::make_tuple(tensors[i]...);
}

// The autograd kernel of an op: its Function, whose list of results is a tuple here.
template <class Op, size_t num_results, class... Arguments>
auto apply(Arguments... arguments) {
  if constexpr (num_results == 1) {
    return Op::apply(arguments...);
  } else {
    return as_tuple(Op::apply(arguments...), std::make_index_sequence<num_results>());
  }
}

// `apply` with the arguments of Op::forward.
template <class Op, size_t num_results, class Result, class... Arguments>
auto kernel(Result (*)(AutogradContext*, Arguments...)) {
  return &apply<Op, num_results, Arguments...>;
}

}  // namespace
}  // namespace leangpt::train

TORCH_LIBRARY_IMPL(leangpt, Autograd, m) {
  using namespace leangpt::train;
  m.impl("embedding", kernel<Embedding, 1>(Embedding::forward));
  m.impl("rotary_qkv", kernel<RotaryQkv, 3>(RotaryQkv::forward));
  m.impl("linear", kernel<Linear, 1>(Linear::forward));
  m.impl("mlp", kernel<Mlp, 2>(Mlp::forward));
  m.impl("attention", kernel<Attention, 2>(Attention::forward));
  m.impl("normalize", kernel<Normalize, 4>(Normalize::forward));
  m.impl("linear_cross_entropy", kernel<LinearCrossEntropy, 3>(LinearCrossEntropy::forward));
}
