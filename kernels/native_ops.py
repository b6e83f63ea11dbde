"""The native backend: the ops of the compiled extension as ops.py calls them, and their fake implementations.

They compute in float32, or in bfloat16 with float32 sums, on a CPU. Weights are rounded to the dtype of autocast while they are
packed, and their gradients are float32 sums that no bfloat16 stands between. Where an op has no kernel for its options, or the
reference is faster, the reference runs. Gradients have no gradients of their own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, reference
from .autocast import compute_dtype

DTYPES = (torch.float32, torch.bfloat16)
# with fewer rows, a product waits for its weights: packing them would take longer than PyTorch's product
MIN_ROWS = 32


def embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> Tensor:
    if position_weight is not None and position_weight.dtype != weight.dtype:
        return reference.embedding(tokens, weight, positions, position_weight)
    return torch.ops.leangpt.embedding(tokens, weight, positions, position_weight)


def rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.leangpt.rotary_qkv(qkv, cos, sin, num_kv_heads, q_weight, k_weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() < MIN_ROWS * x.shape[-1]:
        return reference.linear(x, weight, bias)
    return torch.ops.leangpt.linear(x, weight, bias, compute_dtype(x))


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dropout_p: float,
) -> Tensor:
    if x.numel() < MIN_ROWS * x.shape[-1]:
        return reference.mlp(x, w_in, b_in, w_out, b_out, activation, residual, dropout_p)
    addend = None if dropout_p else residual
    out = torch.ops.leangpt.mlp(x, w_in, b_in, w_out, b_out, addend, activation, compute_dtype(x))[
        0
    ]
    if addend is not None:
        return out
    out = F.dropout(out, dropout_p)
    return out if residual is None else residual + out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sliding_window: int | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    if seqlens_k is not None or dropout_p or q.shape[1] < MIN_ROWS:
        return reference.attention(q, k, v, seqlens_k, sliding_window, softmax_scale, dropout_p)
    dtype = compute_dtype(q)
    window = k.shape[1] if sliding_window is None else sliding_window
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.ops.leangpt.attention(q.to(dtype), k.to(dtype), v.to(dtype), window, scale)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return torch.ops.leangpt.normalize(x, None, weight, bias, eps, False, compute_dtype(x))[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return _add_norm(x, residual, weight, bias, eps, dropout_p, is_rms=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.leangpt.normalize(x, None, weight, None, eps, True, compute_dtype(x))[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    return _add_norm(x, residual, weight, None, eps, dropout_p, is_rms=True)


def _add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    is_rms: bool,
) -> tuple[Tensor, Tensor]:
    x = F.dropout(x, dropout_p)
    residual = residual.to(torch.promote_types(x.dtype, residual.dtype))
    y_dtype = compute_dtype(x, residual)
    return torch.ops.leangpt.normalize(x, residual, weight, bias, eps, is_rms, y_dtype)[:2]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    # gradients are formed with the loss, before that of the loss is known: it has to be one number
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    if reduction == "none" and any(wanted):
        return reference.linear_cross_entropy(
            hidden, weight, targets, ignore_index, reduction, label_smoothing, z_loss
        )
    return torch.ops.leangpt.linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        compute_dtype(hidden),
        wanted,
    )[0]


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    if not _all_in(DTYPES, grads):
        return reference.grad_norm(grads)
    return torch.ops.leangpt.grad_norm(grads)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
) -> None:
    if not _all_in(DTYPES, [*params, *grads]):
        reference.adamw_step(
            params, grads, exp_avgs, exp_avg_sqs, masters, step, lr, betas, eps, weight_decay, grad_scale
        )  # fmt: skip
        return
    torch.ops.leangpt.adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, masters or [], step, lr, *betas, eps, weight_decay, grad_scale
    )  # fmt: skip


def muon_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None,
) -> None:
    is_native = _all_in((torch.float32,), [*params, *grads])
    run = torch.ops.leangpt.muon_step if is_native else reference.muon_step
    run(params, grads, momentum_buffers, lr, momentum, weight_decay, grad_scale)


def _all_in(dtypes: tuple[torch.dtype, ...], tensors: Sequence[Tensor]) -> bool:
    return all(tensor.dtype in dtypes for tensor in tensors)


def _register_fakes() -> None:
    register_fake = torch.library.register_fake

    @register_fake("leangpt::embedding")
    def _(tokens, weight, positions, position_weight):
        return weight.new_empty((*tokens.shape, weight.shape[1]))

    @register_fake("leangpt::embedding_backward")
    def _(grad, index, num_rows):
        return grad.new_empty((num_rows, grad.shape[-1]))

    @register_fake("leangpt::rotary_qkv")
    def _(qkv, cos, sin, num_kv_heads, q_weight, k_weight, eps):
        B, T, num_packed, D = qkv.shape
        heads = (num_packed - 2 * num_kv_heads, num_kv_heads, num_kv_heads)
        return tuple(qkv.new_empty((B, T, H, D)) for H in heads)

    @register_fake("leangpt::rotary_qkv_backward")
    def _(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, eps):
        B, T, H, D = dq.shape
        dqkv = dq.new_empty((B, T, H + 2 * dk.shape[2], D))
        if q_weight is None:
            return dqkv, cos.new_empty(0), cos.new_empty(0)
        return dqkv, q_weight.new_empty(D), q_weight.new_empty(D)

    @register_fake("leangpt::linear")
    def _(x, weight, bias, compute):
        return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute)

    @register_fake("leangpt::linear_backward")
    def _(grad, x, weight, compute, wanted):
        shapes = (x, weight, weight[:, 0])
        return tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if is_wanted
            else x.new_empty(0)
            for t, is_wanted in zip(shapes, wanted, strict=True)
        )

    @register_fake("leangpt::mlp")
    def _(x, w_in, b_in, w_out, b_out, residual, activation, compute):
        dtype = compute if residual is None else torch.promote_types(compute, residual.dtype)
        out = x.new_empty((*x.shape[:-1], w_out.shape[0]), dtype=dtype)
        return out, x.new_empty((x.numel() // x.shape[-1], w_in.shape[0]), dtype=compute)

    @register_fake("leangpt::mlp_backward")
    def _(grad, x, h, w_in, w_out, activation, compute, wanted):
        shapes = (x, w_in, w_in[:, 0], w_out, w_out[:, 0])
        return tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if is_wanted
            else x.new_empty(0)
            for t, is_wanted in zip(shapes, wanted, strict=True)
        )

    @register_fake("leangpt::attention")
    def _(q, k, v, window, scale):
        B, T, H, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)

    @register_fake("leangpt::attention_backward")
    def _(grad, q, k, v, out, lse, window, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    @register_fake("leangpt::normalize")
    def _(x, residual, weight, bias, eps, is_rms, y_dtype):
        total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
        statistics = [x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2)]
        return x.new_empty(x.shape, dtype=y_dtype), total, *statistics

    @register_fake("leangpt::normalize_backward")
    def _(grad, grad_total, total, mean, rstd, weight, x_dtype, is_rms):
        has_other_dtype = x_dtype != total.dtype
        dx = total.new_empty(total.shape, dtype=x_dtype) if has_other_dtype else total.new_empty(0)
        return (
            total.new_empty(total.shape),
            dx,
            weight.new_empty(weight.shape),
            weight.new_empty(weight.shape),
        )

    @register_fake("leangpt::grad_norm")
    def _(grads):
        return grads[0].new_empty((), dtype=torch.float32)

    @register_fake("leangpt::adamw_step")
    @register_fake("leangpt::muon_step")
    def _(*args):
        return None

    @register_fake("leangpt::linear_cross_entropy")
    def _(
        hidden,
        weight,
        targets,
        ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        compute,
        wanted,
    ):
        shape = targets.shape if reduction == "none" else ()
        loss = hidden.new_empty(shape, dtype=torch.float32)
        gradients = (
            t.new_empty(t.shape if is_wanted else 0)
            for t, is_wanted in zip((hidden, weight), wanted, strict=True)
        )
        return loss, *gradients


if native.unavailable_reason is None:
    _register_fakes()
