"""The Triton backend: the ops of ops.py that have Triton kernels, one file an op or family, each with its gradients.

Every op is a `torch.library.custom_op` with a fake implementation and autograd, so that torch.compile, export and
FakeTensor see one node; what it computes is written in ops.py.

Within `torch.autocast` the residual stream keeps its dtype: float32 where the parameters are.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Triton 3.10 changes the default: products and sums contract to one rounding, as elsewhere on GPUs
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from . import (
    triton_attention,
    triton_linear,
    triton_linear_cross_entropy,
    triton_mlp,
)
from .autocast import compute_dtype
from .triton_activate import activate
from .triton_adamw import adamw_step
from .triton_embedding import embedding
from .triton_layer_norm import add_layer_norm, layer_norm
from .triton_rms_norm import add_rms_norm, rms_norm
from .triton_rotary import rotary, rotary_qkv
from .triton_sampling import sample


def _cast(arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """Floating-point tensors in this dtype, all else as it is."""
    return [
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    ]


def _product(function: Callable[..., Any]) -> Callable[..., Any]:
    """In the dtype of autocast, where that is on."""

    @functools.wraps(function)
    def run(x: Tensor, *arguments: Any) -> Any:
        if torch.is_autocast_enabled(x.device.type):
            return function(*_cast((x, *arguments), compute_dtype(x)))
        return function(x, *arguments)

    return run


attention = _product(triton_attention.attention)
attention_varlen = _product(triton_attention.attention_varlen)
linear = _product(triton_linear.linear)
linear_cross_entropy = _product(triton_linear_cross_entropy.linear_cross_entropy)


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
    def product(
        x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None
    ) -> Tensor:
        # the residual keeps its dtype within autocast
        return triton_mlp.mlp(x, w_in, b_in, w_out, b_out, activation, residual, dropout_p)

    return _product(product)(x, w_in, b_in, w_out, b_out)


__all__: list[str] = [
    "activate",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "embedding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "rms_norm",
    "rotary",
    "rotary_qkv",
    "sample",
]
