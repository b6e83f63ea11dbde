"""AdamW and what is decided around it: which parameters decay, how fast to learn at a step, which steps to leave out."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig

WARM_IN_STEPS = 50  # gradient norms seen before one can count as a spike
MEAN_STEPS = 50  # norms over which the running mean reaches back


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, the token table among them, since it is the head's matrix where both are tied; vectors (norms, biases)
    and learned positions do not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = {name: p.ndim >= 2 and not name.endswith("wpe.weight") for name, p in named}
    return [
        {"params": [p for name, p in named if decays[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays[name]], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in one fused pass over the parameters; the learning rate is set at each step."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
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
