"""leangpt: a lean GPT engine on custom kernels."""

from .config import GPTConfig, RopeScaling, SamplingParams, TrainConfig
from .model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "RopeScaling", "SamplingParams", "TrainConfig"]
