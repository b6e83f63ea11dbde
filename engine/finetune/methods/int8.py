"""Frozen matrices of a base model in 8 bits: a quarter of the memory of float32 while something small beside them trains.

Weights are rounded to 255 steps of each output's largest (`reference.quantize`); a product, and its gradient, make floats of
one matrix at a time.
"""

from typing import Any

import torch
from torch import Tensor, nn

from leangpt.kernels import ops, reference

from ...model import GPT, Linear
from .base import TARGETS, named_targets


class _Product(torch.autograd.Function):
    """`x w^T` that keeps the integers of w for its gradient, not the floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return ops.linear(x, _floats(values, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        values, scale = ctx.saved_tensors
        return dout @ _floats(values, scale, dout.dtype), None, None


def _floats(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(N, K)`; what is summed up is rounded once."""
    return (values * scale).to(dtype)


class Int8Linear(Linear):
    """A frozen `Linear` with integers `values` `(N, K)` and a `scale` `(N, 1)` in place of its weight."""

    values: Tensor
    scale: Tensor

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)  # without a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantized = reference.quantize(linear.weight.detach(), bits=8)
        self.register_buffer("values", quantized.values[:, 0])
        self.register_buffer("scale", quantized.scale)
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        self.delta = linear.delta

    @property
    def is_plain(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        out = _Product.apply(x, self.values, self.scale)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out if self.delta is None else self.delta(x, out)

    def to_floats(self) -> Linear:
        """A `Linear` of the rounded weights, without a delta."""
        with torch.device(self.values.device):
            linear = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear = linear.to(self.dtype)
        linear.weight = nn.Parameter(_floats(self.values, self.scale, self.dtype))
        linear.bias = self.bias
        return linear


def quantize_blocks(model: GPT) -> None:
    """Replace the matrices of all blocks by their rounded selves, with the deltas that hang on them."""
    for name, linear in list(named_targets(model, TARGETS)):
        model.set_submodule(name, Int8Linear(linear))


def dequantize_blocks(model: GPT) -> None:
    """Make floats of the integers of all blocks; their deltas are taken off."""
    for name, linear in list(named_targets(model, TARGETS)):
        if isinstance(linear, Int8Linear):
            model.set_submodule(name, linear.to_floats())
