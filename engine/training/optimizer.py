"""Muon and AdamW, and what is decided around them: which parameters go where and decay, how fast to learn at a step, which
steps to leave out.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leangpt.kernels import ops

from ..config import TrainConfig

WARM_IN_STEPS = 50  # gradient norms seen before one can count as a spike
MEAN_STEPS = 50  # norms over which the running mean reaches back
EPS = 1e-8  # of AdamW


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Which algorithm steps which parameters, with which share of the learning rate and which decay.

    Muon is for the matrices between hidden states, those of the blocks; a token table is no such map, since a step touches
    few of its rows. Matrices decay, the token table among them, since it is the head's matrix where both are tied; vectors
    (norms, biases) and learned positions do not.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_hidden = p.ndim == 2 and "blocks." in name
            algorithm = "muon" if is_hidden and config.optimizer == "muon" else "adamw"
            decays = p.ndim >= 2 and not name.endswith("wpe.weight")
            groups[algorithm, decays].append(p)
    return [
        {
            "params": params,
            "algorithm": algorithm,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": config.muon_lr_scale if algorithm == "muon" else 1.0,
        }
        for (algorithm, decays), params in groups.items()
    ]


class Optimizer(torch.optim.Optimizer):
    """Steps each group of parameters by its own algorithm, in a few calls for all tensors.

    Args:
        groups: as `parameter_groups` makes them.
        lr: learning rate; a group's is `lr_scale` times that.
        betas: of AdamW.
        momentum: of Muon.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        momentum: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum})
        self.set_learning_rate(lr)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = rate * group["lr_scale"]

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, grad_scale: Tensor | None = None
    ) -> float | None:
        """Step all parameters that have a gradient.

        Args:
            closure: computes gradients first and returns the loss, as PyTorch's optimizers allow.
            grad_scale: scalar that all gradients are multiplied with, as clipping of their norm wants it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["algorithm"] == "muon":
                self._step_muon(group, params, grad_scale)
            else:
                self._step_adamw(group, params, grad_scale)
        return loss

    def _step_muon(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None
    ) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        ops.muon_step(
            params,
            [_gradient(p) for p in params],
            [self.state[p]["momentum_buffer"] for p in params],
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
        )

    def _step_adamw(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None
    ) -> None:
        # parameters that had no gradient at some step count fewer
        by_step: dict[int, list[Tensor]] = defaultdict(list)
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.int64)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            by_step[int(state["step"])].append(p)
        for step, members in by_step.items():
            ops.adamw_step(
                members,
                [_gradient(p) for p in members],
                [self.state[p]["exp_avg"] for p in members],
                [self.state[p]["exp_avg_sq"] for p in members],
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=EPS,
                weight_decay=group["weight_decay"],
                grad_scale=grad_scale,
            )


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    return Optimizer(
        parameter_groups(model, config),
        config.learning_rate,
        (config.beta1, config.beta2),
        config.muon_momentum,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0, 1, …, max_steps - 1.

    It rises linearly over the warm-up. Then it falls to `min_learning_rate` at the last step: `cosine` on half a wave, `wsd`
    (warm-up, stable, decay) linearly within the last `decay_fraction` of the steps; `constant` stays.
    """
    high, low = config.learning_rate, config.last_learning_rate
    if step < config.warmup_steps:
        return high * (step + 1) / config.warmup_steps
    last = config.max_steps - 1
    match config.schedule:
        case "cosine":
            progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
            return low + (high - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        case "wsd":
            remaining = max(0, last - step) / max(1, round(config.decay_fraction * last))
            return low + (high - low) * min(1.0, remaining)
        case "constant":
            return high


@dataclass
class SpikeDetector:
    """Tells steps to leave out: a gradient that is not finite, or far longer than those before it.

    What is left out moves the running mean too, as if it were just at the limit, so that a lasting change is let through.
    """

    mean: float = 0.0  # of gradient norms
    count: int = 0  # norms that went into the mean
    skipped: int = 0
    skipped_in_row: int = 0

    def accepts(self, norm: float, factor: float) -> bool:
        """Whether to take the step with this gradient norm; a `factor` of 0 leaves out only what is not finite."""
        is_spike = factor > 0 and self.count >= WARM_IN_STEPS and norm > factor * self.mean
        is_accepted = math.isfinite(norm) and not is_spike
        self.skipped += not is_accepted
        self.skipped_in_row = 0 if is_accepted else self.skipped_in_row + 1
        if math.isfinite(norm):
            self.count += 1
            seen = factor * self.mean if is_spike else norm
            self.mean += (seen - self.mean) / min(self.count, MEAN_STEPS)
        return is_accepted
