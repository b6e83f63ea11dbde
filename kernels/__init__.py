"""Ops on tensors with interchangeable backends: `ops` is the API, `reference` the definition of each op."""

from . import ops, reference
from .dispatch import describe_backends, log_backend, use_backend

__all__ = ["describe_backends", "log_backend", "ops", "reference", "use_backend"]
