"""The angles of rotary position embeddings, with the scalings that stretch them beyond the context of pre-training.

Computed in float32, step by step as the released models were trained with: other roundings would move their logits.
"""

import math

import torch
from torch import Tensor

from .config import GPTConfig, RopeScaling


def inverse_frequencies(config: GPTConfig) -> tuple[Tensor, float]:
    """`(D/2,)` float32, radians per position of each pair, and the factor on cos and sin (1 but for yarn)."""
    dim = config.head_size
    periods = config.rope_theta ** (
        torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    )
    frequencies = 1.0 / periods
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    match scaling.type:
        case "linear":
            return frequencies / scaling.factor, 1.0
        case "llama3":
            return _llama3(frequencies, scaling), 1.0
        case "yarn":
            magnitude = scaling.attention_factor
            if magnitude is None:
                magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
            return _yarn(periods, scaling, config.rope_theta), magnitude


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_seq_len / wavelength  # full turns within the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (turns - scaling.low_freq_factor) / span
    stretched = frequencies / scaling.factor
    between = (1 - smooth) * stretched + smooth * frequencies
    result = torch.where(turns < scaling.low_freq_factor, stretched, between)
    return torch.where(turns > scaling.high_freq_factor, frequencies, result)


def _yarn(periods: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """A ramp over the pairs: those that turn often are kept, those that turn less than once are stretched."""
    dim = 2 * len(periods)

    def pair_that_turns(times: float) -> float:
        circle = times * 2 * math.pi
        return dim * math.log(scaling.original_max_seq_len / circle) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def rotary_tables(
    positions: Tensor, frequencies: Tensor, magnitude: float
) -> tuple[Tensor, Tensor]:
    """cos and sin at some positions `(..., T)`, each `(..., T, D/2)` float32."""
    angles = positions[..., None].float() * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude
