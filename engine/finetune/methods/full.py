"""Methods that add nothing: all of the model trains (`full`), or nothing of it but its head (`head`)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from ...model import GPT
from .base import Adapted, Method

_TUNED_WIDTH = 128


class AdaptedWeights(Adapted):
    """A model that is still plain."""

    def merge(self) -> GPT:
        self.model.requires_grad_(True)
        return self.model


@dataclass(frozen=True)
class Full(Method):
    """Train all weights. What is saved is as large as the model, and needs the base only for its shape.

    Reference: Yang et al., 2022, https://arxiv.org/abs/2203.03466, of rates and width
    """

    name: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 1e-3  # of the model that it was tuned on

    def default_learning_rate(self, width: int) -> float:
        """A wider matrix sums up more changes, so each of them is smaller."""
        return self.learning_rate * min(1.0, _TUNED_WIDTH / width)

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> Adapted:
        model.requires_grad_(True)
        return AdaptedWeights(self, model, base)


@dataclass(frozen=True)
class Head(Method):
    """Train a head on frozen hidden states: that of the task, which is not the model's, or the model's own."""

    name: ClassVar[str] = "head"
    learning_rate: ClassVar[float] = 3e-2
    lm_head: bool = False  # train the model's own; where it is tied to the token table, it becomes a matrix of its own

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> Adapted:
        if self.lm_head:
            if model.head is None:
                untie_head(model)
            assert model.head is not None
            model.head.requires_grad_(True)
        return AdaptedWeights(self, model, base)


@torch.no_grad()
def untie_head(model: GPT) -> None:
    """Give a model with tied embeddings a head of its own, with the same weights."""
    table = model.wte.weight
    V, C = table.shape
    model.head = nn.Linear(C, V, bias=False, dtype=table.dtype, device=table.device)
    model.head.weight.copy_(table)
    model.config = replace(model.config, tie_embeddings=False)
