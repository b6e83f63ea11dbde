"""Models on disk: read from and written to Hugging Face's format and the project's own; nanoGPT's is read."""

from .load import load_model, resolve_model
from .save import save_packed, save_pretrained

__all__ = ["load_model", "resolve_model", "save_packed", "save_pretrained"]
