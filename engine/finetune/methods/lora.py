"""LoRA: a product of two thin matrices is trained beside each frozen one, if wanted beside head and token table too.

Where these two are tied, they part: each has its own product, and a merged model has a head of its own.

References: Hu et al., 2021, https://arxiv.org/abs/2106.09685; rank-stabilised: Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ...decoding.adapter import Adapter, Prefix
from ...model import GPT, Linear
from .base import TARGETS, Adapted, Method, Target, check, named_targets
from .deltas import EmbeddingLowRank, HeadLowRank, LowRank
from .full import untie_head
from .int8 import dequantize_blocks, quantize_blocks

LoRATarget = Literal[Target, "head", "wte"]
LORA_TARGETS: tuple[LoRATarget, ...] = (*TARGETS, "head", "wte")


class AdaptedProducts(Adapted):
    """A model with low-rank products beside its matrices."""

    def deltas(self) -> dict[str, LowRank]:
        """By the names of their matrices."""
        named = named_targets(self.model, TARGETS)
        return {name: m.delta for name, m in named if isinstance(m.delta, LowRank)}

    def additions(self) -> tuple[Prefix | None, Adapter | None]:
        check(
            self.model.head_delta is None and self.model.wte_delta is None,
            "decoders add to the matrices of blocks alone, and this adapter has products beside head or token table: merge it",
        )
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
        self._merge_tables()
        self.model.requires_grad_(True)
        return self.model

    def _merge_tables(self) -> None:
        head, wte = self.model.head_delta, self.model.wte_delta
        if self.model.head is None and not (head is None and wte is None):
            untie_head(self.model)
        if isinstance(head, HeadLowRank):
            down, up = head.factors()
            weight = self.model.head_weight
            weight += (up.double() @ down.double()).to(weight.dtype)
            self.model.head_delta = None
        if isinstance(wte, EmbeddingLowRank):
            table = self.model.wte.weight
            table += wte.product().to(table.dtype)
            self.model.wte_delta = None


@dataclass(frozen=True)
class LoRA(Method):
    """Train `scale * up down` beside each matrix; scale is `alpha / rank`, rank-stabilised `alpha / sqrt(rank)`."""

    name: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 3e-3
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of what the thin matrices read
    targets: tuple[LoRATarget, ...] = TARGETS  # besides these: head, wte (token table)
    rank_stabilized: bool = False  # rsLoRA: larger ranks learn as fast
    int8_base: bool = False  # hold the frozen matrices of the blocks in 8 bits

    def __post_init__(self) -> None:
        check(self.rank > 0, f"rank must be positive, got {self.rank}")
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        check_targets(self.targets, LORA_TARGETS)

    @property
    def block_targets(self) -> tuple[Target, ...]:
        return tuple(target for target in TARGETS if target in self.targets)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def with_rank(self, rank: int) -> "LoRA":
        """The same scale with another rank."""
        growth = rank / self.rank
        alpha = self.alpha * (math.sqrt(growth) if self.rank_stabilized else growth)
        return replace(self, rank=rank, alpha=alpha)

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> AdaptedProducts:
        for _, linear in named_targets(model, self.block_targets):
            linear.delta = LowRank(linear, self.rank, self.scale, self.dropout)
        if "head" in self.targets:
            model.head_delta = HeadLowRank(model, self.rank, self.scale, self.dropout)
        if "wte" in self.targets:
            model.wte_delta = EmbeddingLowRank(model.wte, self.rank, self.scale)
        if self.int8_base:
            quantize_blocks(model)
        return AdaptedProducts(self, model, base)


def check_targets(targets: Sequence[str], known: Sequence[str]) -> None:
    check(len(targets) > 0, f"targets must name at least one of {', '.join(known)}")
    for target in targets:
        check(target in known, f"targets must be of {', '.join(known)}, got {target!r}")
