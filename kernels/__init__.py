"""Ops on tensors with interchangeable backends: `ops` is the API, `reference` the definition of each op."""

from . import ops, reference
from .dispatch import describe_backends, use_backend

__all__ = ["describe_backends", "ops", "reference", "use_backend"]
