"""LoRA: a product of two thin matrices is trained beside each frozen one.

References: Hu et al., 2021, https://arxiv.org/abs/2106.09685; rank-stabilised: Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...decoding.adapter import Adapter, Prefix
from ...model import GPT, Linear
from .base import TARGETS, Adapted, Method, Target, check, named_targets
from .deltas import LowRank
from .int8 import dequantize_blocks, quantize_blocks


class AdaptedProducts(Adapted):
    """A model with low-rank products beside its matrices."""

    def deltas(self) -> dict[str, LowRank]:
        """By the names of their matrices."""
        named = named_targets(self.model, TARGETS)
        return {name: m.delta for name, m in named if isinstance(m.delta, LowRank)}

    def additions(self) -> tuple[Prefix | None, Adapter | None]:
        exported = {name: delta.exported() for name, delta in self.deltas().items()}
        return None, Adapter({name: delta for name, delta in exported.items() if len(delta.down)})

    @torch.no_grad()
    def merge(self) -> GPT:
        """Add each product to its matrix; a base in 8 bits becomes one of floats."""
        deltas = self.deltas()
        dequantize_blocks(self.model)
        for name, delta in deltas.items():
            linear = self.model.get_submodule(name)
            assert isinstance(linear, Linear)
            down, up = delta.factors()
            linear.weight += (up.double() @ down.double()).to(linear.weight.dtype)
            linear.delta = None
        self.model.requires_grad_(True)
        return self.model


@dataclass(frozen=True)
class LoRA(Method):
    """Train `scale * up down` beside each matrix; scale is `alpha / rank`, rank-stabilised `alpha / sqrt(rank)`."""

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of what the thin matrices read
    targets: tuple[Target, ...] = TARGETS
    rank_stabilized: bool = False  # rsLoRA: larger ranks learn as fast
    int8_base: bool = False  # hold the frozen matrices of the blocks in 8 bits

    def __post_init__(self) -> None:
        check(self.rank > 0, f"rank must be positive, got {self.rank}")
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        check_targets(self.targets)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> AdaptedProducts:
        for _, linear in named_targets(model, self.targets):
            linear.delta = LowRank(linear, self.rank, self.scale, self.dropout)
        if self.int8_base:
            quantize_blocks(model)
        return AdaptedProducts(self, model, base)


def check_targets(targets: tuple[Target, ...]) -> None:
    check(len(targets) > 0, f"targets must name at least one of {', '.join(TARGETS)}")
    for target in targets:
        check(target in TARGETS, f"targets must be of {', '.join(TARGETS)}, got {target!r}")
