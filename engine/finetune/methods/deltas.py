"""Modules that hang on a frozen matrix (`Linear.delta`): a product of two thin ones beside it, or a bottleneck behind it.

They are held in float32 at least, and multiply in the dtype of what they are given. At the start none of them changes what
the model computes.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leangpt.kernels import ops

from ...decoding import adapter
from ...model import Linear


def _zeros(linear: Linear, *shape: int) -> nn.Parameter:
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    return nn.Parameter(torch.zeros(shape, dtype=wide, device=linear.weight.device))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


class LowRank(nn.Module):
    """LoRA: `out + scale * (dropout(x) down^T) up^T`, with `down` `(r, K)` and `up` `(N, r)`, which starts as zeros."""

    def __init__(self, linear: Linear, rank: int, scale: float, dropout_p: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout_p = dropout_p
        self.down = _zeros(linear, rank, linear.in_features)
        self.up = _zeros(linear, linear.out_features, rank)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout_p, self.training)
        down, up = self.factors()
        return out + ops.linear(ops.linear(x, down.to(x.dtype)), up.to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(r, K)` and `(N, r)`, whose product is what merging adds to the matrix."""
        return self.down, self.scale * self.up

    def exported(self) -> adapter.LowRank:
        down, up = self.factors()
        return adapter.LowRank(_array(down), _array(up))


class SingularLowRank(LowRank):
    """AdaLoRA: `out + scale * ((dropout(x) down^T) * singular) up^T`, where the `singular` values start as zeros."""

    def __init__(self, linear: Linear, rank: int, scale: float, dropout_p: float) -> None:
        super().__init__(linear, rank, scale, dropout_p)
        self.singular = _zeros(linear, rank)
        nn.init.normal_(self.down, std=0.02)
        nn.init.normal_(self.up, std=0.02)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        if not len(self.singular):  # it lost all its rank
            return out
        return super().forward(x, out)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up * (self.scale * self.singular)

    def exported(self) -> adapter.LowRank:
        """Without the triplets whose singular value is zero."""
        down, up = self.factors()
        kept = self.singular != 0
        return adapter.LowRank(_array(down[kept]), _array(up[:, kept]))

    def keep_first(self, rank: int) -> None:
        """Drop all triplets but the first."""
        self.down = nn.Parameter(self.down.detach()[:rank])
        self.singular = nn.Parameter(self.singular.detach()[:rank])
        self.up = nn.Parameter(self.up.detach()[:, :rank])


class Bottleneck(nn.Module):
    """Houlsby's adapter: `out + gelu_tanh(out down^T + down_bias) up^T + up_bias`, where `up` and biases start as zeros."""

    def __init__(self, linear: Linear, width: int) -> None:
        super().__init__()
        self.down = _zeros(linear, width, linear.out_features)
        self.down_bias = _zeros(linear, width)
        self.up = _zeros(linear, linear.out_features, width)
        self.up_bias = _zeros(linear, linear.out_features)
        nn.init.normal_(self.down, std=0.02)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (
            w.to(out.dtype) for w in (self.down, self.down_bias, self.up, self.up_bias)
        )
        return ops.mlp(out, down, down_bias, up, up_bias, "gelu_tanh", residual=out)

    def exported(self) -> adapter.Bottleneck:
        arrays = map(_array, (self.down, self.down_bias, self.up, self.up_bias))
        return adapter.Bottleneck(*arrays)
