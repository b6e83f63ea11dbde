"""What several test files share."""

import torch
from torch import Tensor


def assert_as_accurate(out: Tensor, ref: Tensor, baseline: Tensor, factor: float = 2.0) -> None:
    """Hold the project's error rule.

    `out` may be at most `factor` times further from the float64 `ref` than PyTorch's own `baseline` of the same dtype,
    plus one rounding of the largest value: 2 for outputs, 4 for gradients.
    """
    assert out.dtype == baseline.dtype and out.shape == ref.shape
    floor = torch.finfo(out.dtype).eps * max(1.0, ref.abs().max().item())
    limit = factor * (baseline.double() - ref).abs().max() + floor
    error = (out.double() - ref).abs().max()
    assert error <= limit, f"largest error {error:.3e} > {limit:.3e}"
