"""What several test files share."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from leangpt.kernels import use_backend

# dtypes in which all configurations of a product run; in float32 the large ones have too little shared memory
CONFIGURATION_DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)]


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


def run_op(
    call: Callable[..., Any], tensors: Sequence[Tensor], backend: str, with_gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of an op on a backend and, if asked for, the gradients of all `tensors`.

    The gradients of the outputs are drawn from a fixed seed, the same for every backend and dtype.
    """
    leaves = [t.detach().requires_grad_(with_gradients) for t in tensors]
    with use_backend(backend):  # type: ignore[arg-type]
        result = call(*leaves)
        outputs = list(result) if isinstance(result, tuple) else [result]
        if not with_gradients:
            return outputs, []
        generator = torch.Generator().manual_seed(1)
        gradients = [
            torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs
        ]
        return outputs, list(torch.autograd.grad(outputs, leaves, gradients))


def check_op(
    call: Callable[..., Any],
    tensors: Sequence[Tensor],
    backend: str,
    with_gradients: bool = True,
) -> None:
    """Hold the error rule for an op of `ops` on a backend: outputs, and gradients of all `tensors`.

    `call(*tensors)` returns one tensor or a tuple; all randomness and integer arguments are in it. The truth is the
    reference in float64, the baseline the reference in the dtype of the tensors.
    """
    doubles = [t.double() for t in tensors]
    truths = run_op(call, doubles, "reference", with_gradients)
    baselines = run_op(call, tensors, "reference", with_gradients)
    results = run_op(call, tensors, backend, with_gradients)
    for factor, *kinds in zip((2.0, 4.0), results, truths, baselines, strict=True):
        for out, ref, baseline in zip(*kinds, strict=True):
            assert_as_accurate(out.detach(), ref.detach(), baseline.detach(), factor)
