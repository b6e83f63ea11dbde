"""Bottleneck adapters: two small layers are trained behind attention and behind the MLP of each block.

Reference: Houlsby et al., 2019, https://arxiv.org/abs/1902.00751
"""

from dataclasses import dataclass
from typing import ClassVar

from ...decoding.adapter import Adapter, Prefix
from ...model import GPT
from .base import Adapted, Method, Target, check, named_targets
from .deltas import Bottleneck
from .int8 import quantize_blocks

_TARGETS: tuple[Target, ...] = ("attn_out", "mlp_out")


class AdaptedBottlenecks(Adapted):
    """A model with bottlenecks behind attention and MLP."""

    def additions(self) -> tuple[Prefix | None, Adapter | None]:
        named = named_targets(self.model, _TARGETS)
        return None, Adapter(
            {name: m.delta.exported() for name, m in named if isinstance(m.delta, Bottleneck)}
        )

    def merge(self) -> GPT:
        raise ValueError(
            "bottleneck adapters are not linear, so no matrix of the model can take them in: keep the base model and the "
            "adapter apart"
        )


@dataclass(frozen=True)
class BottleneckAdapter(Method):
    """Train `x + gelu(x down^T) up^T` with `width` numbers in its middle."""

    name: ClassVar[str] = "adapter"
    learning_rate: ClassVar[float] = 1e-2
    width: int = 32
    int8_base: bool = False  # hold the frozen matrices of the blocks in 8 bits

    def __post_init__(self) -> None:
        check(self.width > 0, f"width must be positive, got {self.width}")

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> AdaptedBottlenecks:
        for _, linear in named_targets(model, _TARGETS):
            linear.delta = Bottleneck(linear, self.width)
        if self.int8_base:
            quantize_blocks(model)
        return AdaptedBottlenecks(self, model, base)
