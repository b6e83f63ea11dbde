"""Ops on tensors with interchangeable backends: `ops` is the API, `reference` the definition of each op.

Names are imported when they are first used, so that a packed model runs without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops, reference
    from .dispatch import describe_backends, log_backend, use_backend

__all__ = ["describe_backends", "log_backend", "ops", "reference", "use_backend"]


def __getattr__(name: str) -> Any:
    if name in ("ops", "reference"):
        return import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(import_module(".dispatch", __name__), name)
    raise AttributeError(f"module 'leangpt.kernels' has no attribute {name!r}")
