"""Prefix-tuning: keys and values in front of every sequence are trained, in each layer; nothing else is.

They take room in the cache, but no positions: a prompt's first token is at position 0 with and without. A sliding window
counts them as it counts other keys, so that they pass out of it.

Reference: Li & Liang, 2021, https://arxiv.org/abs/2101.00190
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...config import GPTConfig
from ...decoding.adapter import Adapter, Prefix
from ...model import GPT
from .base import Adapted, Method, check
from .int8 import quantize_blocks


class _Prefix(nn.Module):
    """What `GPT.prefix` calls."""

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `(P, H_kv, D)` each."""
        raise NotImplementedError

    def forward(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layer(layer)
        B = len(k)
        return (
            torch.cat((keys.to(k.dtype).expand(B, -1, -1, -1), k), dim=1),
            torch.cat((values.to(v.dtype).expand(B, -1, -1, -1), v), dim=1),
        )


class LearnedPrefix(_Prefix):
    """The keys and values themselves, `(n_layer, P, H_kv, D)`."""

    def __init__(self, config: GPTConfig, length: int) -> None:
        super().__init__()
        shape = (config.n_layer, length, config.kv_heads, config.head_size)
        self.keys = nn.Parameter(0.02 * torch.randn(shape))
        self.values = nn.Parameter(0.02 * torch.randn(shape))

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer], self.values[layer]


class ReparametrizedPrefix(_Prefix):
    """The keys and values as an MLP makes them of a vector for each place, which trains more steadily.

    Its second product is the layer's own: `mlp_out[layer](tanh(mlp_in(places)))` are keys and values.
    """

    def __init__(self, config: GPTConfig, length: int, width: int) -> None:
        super().__init__()
        self.head_shape = (config.kv_heads, config.head_size)
        outputs = 2 * config.kv_heads * config.head_size
        self.places = nn.Parameter(torch.randn(length, width))
        self.mlp_in = nn.Linear(width, width)
        self.mlp_out = nn.ModuleList(nn.Linear(width, outputs) for _ in range(config.n_layer))

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        out = self.mlp_out[layer](torch.tanh(self.mlp_in(self.places)))  # (P, 2 H_kv D)
        keys, values = out.unflatten(1, (2, *self.head_shape)).unbind(1)
        return keys, values


class AdaptedPrefix(Adapted):
    """A model with a prefix."""

    def tensors(self) -> dict[str, Tensor]:
        """The keys and values; an MLP that made them is needed no more."""
        keys, values = self._layers()
        return {"prefix.keys": keys, "prefix.values": values}

    def additions(self) -> tuple[Prefix | None, Adapter | None]:
        keys, values = self._layers()
        return Prefix(keys.float().cpu().numpy(), values.float().cpu().numpy()), None

    @torch.no_grad()
    def _layers(self) -> tuple[Tensor, Tensor]:
        prefix = self.model.prefix
        assert isinstance(prefix, _Prefix)
        layers = [prefix.layer(i) for i in range(self.model.config.n_layer)]
        return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])

    def merge(self) -> GPT:
        raise ValueError(
            "a prefix is keys and values in front of a sequence, not weights, so no matrix of the model can take it in: keep "
            "the base model and the prefix apart"
        )


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Train the keys and values of `length` places in front of every sequence."""

    name: ClassVar[str] = "prefix"
    learning_rate: ClassVar[float] = 3e-2
    length: int = 16
    reparametrization: int | None = (
        None  # width of an MLP that makes them while they train; None: no MLP
    )
    int8_base: bool = False  # hold the frozen matrices of the blocks in 8 bits

    def __post_init__(self) -> None:
        check(self.length > 0, f"length must be positive, got {self.length}")
        width = self.reparametrization
        check(width is None or width > 0, f"reparametrization must be positive, got {width}")

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> AdaptedPrefix:
        config = model.config
        if self.reparametrization is None:
            prefix: _Prefix = LearnedPrefix(config, self.length)
        else:
            prefix = ReparametrizedPrefix(config, self.length, self.reparametrization)
        wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
        model.prefix = prefix.to(model.device, wide)
        if self.int8_base:
            quantize_blocks(model)
        return AdaptedPrefix(self, model, base)

    def restore(self, model: GPT, tensors: Mapping[str, Tensor]) -> Adapted:
        return Method.restore(replace(self, reparametrization=None), model, tensors)
