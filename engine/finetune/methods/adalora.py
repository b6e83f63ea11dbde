"""AdaLoRA: LoRA whose ranks go, while it trains, to the matrices where they matter most.

The product beside a matrix is `scale * up diag(singular) down`. After each step the importance of each triplet (a singular
value, its column of `up`, its row of `down`) is

    s = singular's score + mean of the column's scores + mean of the row's scores
    score(w) = I U,   I <- beta1 I + (1 - beta1) |w dw|,   U <- beta2 U + (1 - beta2) | |w dw| - I |

that is, smoothed sensitivity times smoothed uncertainty. Only the most important triplets of all matrices keep their singular
value; how many, falls with the cube of the training's progress from `initial_rank` to `rank` per matrix. The penalty
`||up^T up - 1||^2 + ||down down^T - 1||^2` holds columns and rows orthogonal.

Penalty and allocation are part of `optimizer_step`, so that no training loop can forget them.

Reference: Zhang et al., 2023, https://arxiv.org/abs/2303.10512
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...model import GPT
from .base import TARGETS, Adapted, Method, Target, check, named_targets
from .deltas import SingularLowRank
from .int8 import quantize_blocks
from .lora import AdaptedProducts, check_targets


class AdaptedSingularProducts(AdaptedProducts):
    """A model with low-rank products beside its matrices, whose ranks are allocated over `max_steps` steps; None: they stay."""

    method: "AdaLoRA"

    def __init__(
        self, method: "AdaLoRA", model: GPT, base: str, max_steps: int | None = None
    ) -> None:
        super().__init__(method, model, base)
        self.max_steps = max_steps
        self.step = 0
        self.sensitivity = {name: torch.zeros_like(p) for name, p in self._parameters()}
        self.uncertainty = {name: torch.zeros_like(p) for name, p in self._parameters()}
        self.is_kept = {
            name: torch.ones_like(delta.singular, dtype=torch.bool)
            for name, delta in self._products()
        }

    def _products(self) -> Iterator[tuple[str, SingularLowRank]]:
        for name, linear in named_targets(self.model, TARGETS):
            if isinstance(linear.delta, SingularLowRank):
                yield name, linear.delta

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, delta in self._products():
            for field in ("down", "singular", "up"):
                yield f"{name}.delta.{field}", getattr(delta, field)

    @torch.no_grad()
    def optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the penalty's gradient, take the step, and allocate the ranks."""
        self._add_penalty()
        optimizer.step()
        self.step += 1
        if self.max_steps is None:
            return
        first = self.method.warmup_steps(self.max_steps)
        last = self.max_steps - self.method.cooldown_steps(self.max_steps)
        if self.step < last:
            self._update_importance()
        is_due = first < self.step < last and self.step % self.method.interval == 0
        if is_due or self.step == last:
            budget = self.method.budget(self.step, self.max_steps, len(self.is_kept))
            self.is_kept = self._most_important(budget)
        if is_due or self.step >= last:
            for name, delta in self._products():
                delta.singular.mul_(self.is_kept[name])

    def _add_penalty(self) -> None:
        """The gradient of `weight * ||a a^T - 1||^2` is `4 weight (a a^T - 1) a`."""
        for _, delta in self._products():
            for parameter, rows in ((delta.down, delta.down), (delta.up, delta.up.T)):
                excess = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
                gradient = 4 * self.method.orthogonality * (excess @ rows)
                assert parameter.grad is not None
                parameter.grad += gradient if parameter is delta.down else gradient.T

    def _update_importance(self) -> None:
        beta1, beta2 = self.method.beta1, self.method.beta2
        for name, p in self._parameters():
            assert p.grad is not None
            now = (p * p.grad).abs()
            self.sensitivity[name].lerp_(now, 1 - beta1)
            self.uncertainty[name].lerp_((now - self.sensitivity[name]).abs(), 1 - beta2)

    def importance(self) -> dict[str, Tensor]:
        """Of each triplet, `(r,)`, by the names of the matrices."""
        score = {name: self.sensitivity[name] * self.uncertainty[name] for name in self.sensitivity}
        return {
            name: score[f"{name}.delta.singular"]
            + score[f"{name}.delta.down"].mean(1)
            + score[f"{name}.delta.up"].mean(0)
            for name, _ in self._products()
        }

    def _most_important(self, budget: int) -> dict[str, Tensor]:
        """Whether a triplet is among the `budget` most important ones of all matrices, `(r,)` bool by matrix."""
        importance = self.importance()
        order = torch.cat(list(importance.values())).argsort(descending=True, stable=True)
        is_kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        is_kept[order[:budget]] = True
        parts = is_kept.split([len(scores) for scores in importance.values()])
        return dict(zip(importance, parts, strict=True))

    def ranks(self) -> dict[str, int]:
        """Of each matrix, the triplets that it has now."""
        return {name: int(kept.sum()) for name, kept in self.is_kept.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Without the triplets that were taken away."""
        tensors = {}
        for name, delta in self._products():
            kept = self.is_kept[name]
            tensors[f"{name}.delta.down"] = delta.down.detach()[kept]
            tensors[f"{name}.delta.singular"] = delta.singular.detach()[kept]
            tensors[f"{name}.delta.up"] = delta.up.detach()[:, kept]
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {"step": torch.tensor(self.step)}
        for kind in ("sensitivity", "uncertainty", "is_kept"):
            state |= {f"{kind}.{name}": tensor for name, tensor in getattr(self, kind).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.fill({name: state[name] for name in self.trainable_parameters()})
        self.step = int(state["step"])
        for kind in ("sensitivity", "uncertainty", "is_kept"):
            for name, tensor in getattr(self, kind).items():
                tensor.copy_(state[f"{kind}.{name}"])


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Train `scale * up diag(singular) down` beside each matrix, with `rank` of them per matrix on average in the end."""

    name: ClassVar[str] = "adalora"
    learning_rate: ClassVar[float] = 1e-2
    rank: int = 8
    initial_rank: int | None = None  # of every matrix; None: half as much again as `rank`
    alpha: float = 128.0  # scale is alpha / initial_rank; singular values start at zero, and move by the rate at most
    dropout: float = 0.0  # of what the thin matrices read
    targets: tuple[Target, ...] = TARGETS
    warmup: float = 0.1  # share of the steps before ranks begin to fall
    cooldown: float = (
        0.3  # share of the steps at the end, in which the ranks that are left train on
    )
    interval: int = 10  # steps from one allocation to the next
    beta1: float = 0.85  # smoothing of the sensitivity
    beta2: float = 0.85  # smoothing of the uncertainty
    orthogonality: float = 0.1  # weight of the penalty
    int8_base: bool = False  # hold the frozen matrices of the blocks in 8 bits

    def __post_init__(self) -> None:
        check(self.rank > 0, f"rank must be positive, got {self.rank}")
        check(
            self.first_rank >= self.rank,
            f"initial_rank must be at least rank ({self.rank}), got {self.initial_rank}",
        )
        check(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")
        check(self.interval > 0, f"interval must be positive, got {self.interval}")
        for field in ("warmup", "cooldown", "beta1", "beta2"):
            value = getattr(self, field)
            check(0 <= value < 1, f"{field} must be in [0, 1), got {value}")
        check(
            self.warmup + self.cooldown < 1,
            f"warmup and cooldown must leave steps between them, got {self.warmup} and {self.cooldown}",
        )
        check(
            self.orthogonality >= 0,
            f"orthogonality must not be negative, got {self.orthogonality}",
        )
        check_targets(self.targets, TARGETS)

    @property
    def first_rank(self) -> int:
        return self.initial_rank or self.rank + self.rank // 2

    def warmup_steps(self, max_steps: int) -> int:
        return int(self.warmup * max_steps)

    def cooldown_steps(self, max_steps: int) -> int:
        return int(self.cooldown * max_steps)

    def budget(self, step: int, max_steps: int, num_matrices: int) -> int:
        """Triplets of all matrices together that are kept after `step` steps."""
        first, last = self.first_rank * num_matrices, self.rank * num_matrices
        warmup = self.warmup_steps(max_steps)
        falling_steps = max_steps - self.cooldown_steps(max_steps) - warmup
        remaining = 1 - min(1.0, max(0, step - warmup) / falling_steps)
        return int((first - last) * remaining**3 + last)

    def _attach(self, model: GPT, base: str, max_steps: int | None) -> AdaptedSingularProducts:
        scale = self.alpha / self.first_rank
        for _, linear in named_targets(model, self.targets):
            linear.delta = SingularLowRank(linear, self.first_rank, scale, self.dropout)
        if self.int8_base:
            quantize_blocks(model)
        return AdaptedSingularProducts(self, model, base, max_steps)

    def restore(self, model: GPT, tensors: Mapping[str, Tensor]) -> Adapted:
        base = self.attach(model).base_hash
        for name, linear in named_targets(model, self.targets):
            singular = tensors.get(f"{name}.delta.singular")
            if singular is not None and isinstance(linear.delta, SingularLowRank):
                linear.delta.keep_first(len(singular))
        adapted = AdaptedSingularProducts(self, model, base)
        adapted.fill(tensors)
        return adapted
