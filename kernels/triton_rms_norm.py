"""RMSNorm in Triton, alone or with dropout and the residual add in front of it.

total = residual + dropout(x), or x alone
y = total * rstd * w        rstd = 1 / sqrt(mean(total^2) + eps)

dtotal = rstd * (w dy - xhat * mean(w dy xhat)) + the gradient of total as an output        xhat = total * rstd
dresidual = dtotal          dx = dropout(dtotal) with the mask of forward, drawn again
dw = sum over rows of dy xhat

This is LayerNorm without mean and bias, and so are the kernels: triton_layer_norm.py tells how they work. Rows may lie
apart, as heads in packed qkv do.
"""

from typing import Any

import torch
from torch import Tensor

from .autocast import compute_dtype
from .triton_dropout import dropout_seed
from .triton_layer_norm import norm_backward, norm_forward


@torch.library.custom_op("leangpt_triton::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, y_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norm_forward(
        x, None, weight, None, None, eps, 0.0, has_mean=False, y_dtype=y_dtype
    )
    return y, rstd


@_rms_norm.register_fake
def _(x, weight, eps, y_dtype):
    return x.new_empty(x.shape, dtype=y_dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    (dx,), (dweight,) = norm_backward(dy, None, x, weight, None, rstd, None, 0.0, False, x.dtype)
    return dx, dweight, None, None


_rms_norm.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("leangpt_triton::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = norm_forward(
        x, residual, weight, None, seed, eps, dropout_p, has_mean=False, y_dtype=y_dtype
    )
    assert total is not None
    return y, total, rstd


@_add_rms_norm.register_fake
def _(x, residual, weight, seed, eps, dropout_p, y_dtype):
    total = x.new_empty(x.shape, dtype=torch.result_type(x, residual))
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=y_dtype), total, rstd


def _save_for_add_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, seed, _, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(weight, seed, *output[1:])
    ctx.dx_dtype = x.dtype
    ctx.set_materialize_grads(False)


def _add_backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    weight, seed, total, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(total)
    gradients, (dweight,) = norm_backward(
        dy, dtotal, total, weight, None, rstd, seed, ctx.dropout_p, False, ctx.dx_dtype
    )
    dx, dresidual = gradients[-1], gradients[0]
    return dx, dresidual, dweight, None, None, None, None


_add_rms_norm.register_autograd(_add_backward, setup_context=_save_for_add_backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps, compute_dtype(x))[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    seed = dropout_seed(x, dropout_p)
    y_dtype = compute_dtype(x, residual)
    y, total, _ = _add_rms_norm(x, residual, weight, seed, eps, dropout_p, y_dtype)
    return y, total
