"""The native backend: the ops of the compiled extension as ops.py calls them, their fake implementations and their gradients.

They compute in float32, or in bfloat16 with float32 sums, on a CPU. Within `torch.autocast` they do what torch's own do:
products run in its dtype, norms and the residual stream keep theirs. Weights are rounded to that dtype while they are packed,
and their gradients are float32 sums that no bfloat16 stands between. Where an op has no kernel for its options, or the
reference is faster, the reference runs. Gradients have no gradients of their own.
"""

from typing import Any

import torch
from torch import Tensor

from . import native, reference

DTYPES = (torch.float32, torch.bfloat16)
# with fewer rows, a product waits for its weights: packing them would take longer than PyTorch's product
MIN_ROWS = 32


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which products of this tensor are formed."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _wanted(gradients: tuple[Tensor, ...], wanted: list[bool]) -> list[Tensor | None]:
    return [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]


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
    if activation == "swiglu" or dropout_p or x.numel() < MIN_ROWS * x.shape[-1]:
        return reference.mlp(x, w_in, b_in, w_out, b_out, activation, residual, dropout_p)
    dtype = compute_dtype(x)
    return torch.ops.leangpt.mlp(x, w_in, b_in, w_out, b_out, residual, activation, dtype)[0]


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


def _register() -> None:
    """The fake implementation and the gradients of each op."""
    ops, register_fake = torch.ops.leangpt, torch.library.register_fake

    def register_autograd(name: str, backward: Any, setup_context: Any) -> None:
        torch.library.register_autograd(f"leangpt::{name}", backward, setup_context=setup_context)

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

    def keep_linear(ctx, inputs, output):
        x, weight, _, ctx.compute = inputs
        ctx.save_for_backward(x, weight)

    def linear_backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:3])
        gradients = ops.linear_backward(grad, *ctx.saved_tensors, ctx.compute, wanted)
        return *_wanted(gradients, wanted), None

    register_autograd("linear", linear_backward, keep_linear)

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

    def keep_mlp(ctx, inputs, output):
        x, w_in, _, w_out, _, _, ctx.activation, ctx.compute = inputs
        ctx.save_for_backward(x, output[1], w_in, w_out)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def mlp_backward(ctx, grad, _):
        *wanted, wants_residual = ctx.needs_input_grad[:6]
        gradients = ops.mlp_backward(grad, *ctx.saved_tensors, ctx.activation, ctx.compute, wanted)
        return *_wanted(gradients, wanted), grad if wants_residual else None, None, None

    register_autograd("mlp", mlp_backward, keep_mlp)

    @register_fake("leangpt::attention")
    def _(q, k, v, window, scale):
        B, T, H, _ = q.shape
        return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)

    @register_fake("leangpt::attention_backward")
    def _(grad, q, k, v, out, lse, window, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep_attention(ctx, inputs, output):
        *tensors, ctx.window, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def attention_backward(ctx, grad, _):
        gradients = ops.attention_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale)
        return *gradients, None, None

    register_autograd("attention", attention_backward, keep_attention)


if native.unavailable_reason is None:
    _register()
