"""Training: the loop, its optimizer, checkpoints, logs, and the processes that share the work."""

from .checkpoint import load_config
from .loop import TrainingError, train
from .summary import Summary

__all__ = ["Summary", "TrainingError", "load_config", "train"]
