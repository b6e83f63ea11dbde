"""leangpt: a lean GPT engine on custom kernels.

Names are imported when they are first used, so that what needs no torch (the command line, the processes that tokenize)
starts without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import GPTConfig, RopeScaling, SamplingParams, TrainConfig
    from .generation.completion import Completion
    from .generation.generator import Generator
    from .model import GPT
    from .training import train

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "Completion",
    "GPTConfig",
    "Generator",
    "RopeScaling",
    "SamplingParams",
    "TrainConfig",
    "train",
]

_MODULES = {
    "GPT": "model",
    "Completion": "generation.completion",
    "GPTConfig": "config",
    "Generator": "generation.generator",
    "RopeScaling": "config",
    "SamplingParams": "config",
    "TrainConfig": "config",
    "train": "training",  # the module leangpt.train is only the entry of `python -m leangpt.train`
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'leangpt' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
