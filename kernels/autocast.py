"""What `torch.autocast` asks of an op: products run in its dtype, and norms write it, for products to read."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor, residual: Tensor | None = None) -> torch.dtype:
    """The dtype of autocast where that is on, else of x, or the wider of x and residual."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
