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
from ...model import GPT, Linear


def _zeros(module: nn.Linear | nn.Embedding, *shape: int) -> nn.Parameter:
    wide = torch.promote_types(module.weight.dtype, torch.float32)
    return nn.Parameter(torch.zeros(shape, dtype=wide, device=module.weight.device))


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
        """Without the rows of `down` whose column of `up` is zero."""
        down, up = self.factors()
        kept = up.any(0)
        return adapter.LowRank(_array(down[kept]), _array(up[:, kept]))


class HeadLowRank(LowRank):
    """LoRA of the head, `GPT.head_delta`: the two factors of what is added to the logits."""

    def __init__(self, model: GPT, rank: int, scale: float, dropout_p: float) -> None:
        V, C = model.head_weight.shape
        with torch.device("meta"):
            linear = Linear(C, V, bias=False)
        linear.weight = model.head_weight  # of a tied one, the token table
        super().__init__(linear, rank, scale, dropout_p)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = F.dropout(hidden, self.dropout_p, self.training)
        down, up = self.factors()
        return ops.linear(x, down.to(x.dtype)), up


class EmbeddingLowRank(nn.Module):
    """LoRA of the token table, `GPT.wte_delta`: `out + scale * (column of down)^T up^T`, with `down` `(r, V)`, which starts as
    zeros, and `up` `(C, r)`.
    """

    def __init__(self, embedding: nn.Embedding, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        V, C = embedding.weight.shape
        self.down = _zeros(embedding, rank, V)
        self.up = _zeros(embedding, C, rank)
        nn.init.normal_(self.up)

    def forward(self, tokens: Tensor, out: Tensor) -> Tensor:
        rows = F.embedding(tokens, self.down.T).to(out.dtype)  # (B, T, r)
        return out + ops.linear(rows, (self.scale * self.up).to(out.dtype))

    def product(self) -> Tensor:
        """`(V, C)` in float64, what merging adds to the table."""
        return self.down.double().T @ (self.scale * self.up.double()).T


class SingularLowRank(LowRank):
    """AdaLoRA: `out + scale * ((dropout(x) down^T) * singular) up^T`, where the `singular` values start as zeros, and rows of
    `down` and columns of `up` as orthonormal ones, which their penalty would make them anyway.
    """

    def __init__(self, linear: Linear, rank: int, scale: float, dropout_p: float) -> None:
        super().__init__(linear, rank, scale, dropout_p)
        self.singular = _zeros(linear, rank)
        nn.init.orthogonal_(self.down)
        nn.init.orthogonal_(self.up)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        if not len(self.singular):  # it lost all its rank
            return out
        return super().forward(x, out)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up * (self.scale * self.singular)

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
