"""Which implementation of an op runs.

A backend is a module with one function an op, all of the same signature:

    reference   plain PyTorch, the definition of the op; any device and dtype, differentiable
    triton      Triton kernels, on the devices in `triton_devices`; differentiable
    native      the C++/CUDA extension in csrc/; differentiable for the ops in `native.DIFFERENTIABLE`

`select` is the only place that chooses between them. Its state is plain module globals, which torch.compile can trace and
guard on (a ContextVar breaks the graph).
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from . import native, native_ops, reference
from .autocast import compute_dtype

Backend = Literal["native", "triton", "reference"]  # in the order in which they are preferred

# ops whose Triton kernel runs only where it is asked for: the vendor's library is faster, always or in float32
LIBRARY_OPS = frozenset({"linear"})
LIBRARY_OPS_FLOAT32 = frozenset({"mlp"})

triton_devices: set[str] = set()
triton_unavailable_reason: str | None = "not loaded: there is no GPU"

_modules: dict[Backend, ModuleType | None] = {
    "native": native_ops,
    "triton": None,  # see enable_triton
    "reference": reference,
}
_forced: Backend | None = None


def _checked(backend: str, source: str) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"{source} must be one of {get_args(Backend)}, got {backend!r}")
    return backend  # type: ignore[return-value]


if "LEANGPT_BACKEND" in os.environ:
    _forced = _checked(os.environ["LEANGPT_BACKEND"], "LEANGPT_BACKEND")


def enable_triton(*devices: str) -> None:
    """Let Triton kernels run on tensors of these devices: "cuda", and "cpu" where something runs GPU code on a CPU."""
    global triton_unavailable_reason
    try:
        from . import triton_ops
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        triton_unavailable_reason = "not installed: run `pip install triton`"
        return
    _modules["triton"] = triton_ops
    triton_devices.update(devices)
    triton_unavailable_reason = None


if torch.cuda.is_available():
    enable_triton("cuda")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every op inside the `with` block on `backend`; an op that it cannot run raises RuntimeError."""
    global _forced
    before, _forced = _forced, _checked(backend, "backend")
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> Backend | None:
    """The backend that `use_backend` or LEANGPT_BACKEND asks for, if one does."""
    return _forced


def _obstacle(backend: Backend, op: str, tensor: Tensor, needs_grad: bool) -> str | None:
    """Why `backend` cannot run `op` on tensors of the dtype and device of this one, or None where it can."""
    if backend == "native":
        if native.unavailable_reason:
            return f"the native extension is {native.unavailable_reason}"
        if op not in native.OPS:
            return f"the native extension has no {op}"
        if needs_grad and op not in native.DIFFERENTIABLE:
            return f"the native {op} has no backward"
        if tensor.device.type != "cpu":
            return f"native ops run on cpu, not on {tensor.device.type}"
        for dtype in (tensor.dtype, compute_dtype(tensor)):
            if dtype not in native_ops.DTYPES:
                return f"native ops compute in float32 and bfloat16, not in {dtype}"
    if backend == "triton":
        if triton_unavailable_reason:
            return f"Triton is {triton_unavailable_reason}"
        if not hasattr(_modules["triton"], op):
            return f"there is no Triton kernel of {op}"
        if tensor.device.type not in triton_devices:
            devices = ", ".join(sorted(triton_devices))
            return f"Triton kernels run on {devices}, not on {tensor.device.type}"
        if tensor.dtype == torch.float64:
            return "Triton kernels compute in float32, not in float64"
    return None


def select(op: str, *tensors: Tensor | None) -> ModuleType:
    """Return the backend that runs `op` on `tensors` (all its tensor arguments: any of them may need a gradient)."""
    given = [t for t in tensors if t is not None]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if _forced is not None:
        obstacle = _obstacle(_forced, op, given[0], needs_grad)
        if obstacle:
            raise RuntimeError(f"{op}: backend {_forced!r} was asked for, but {obstacle}")
        return _modules[_forced]  # type: ignore[return-value]
    for backend, module in _modules.items():
        if backend == "triton" and (
            op in LIBRARY_OPS
            or (op in LIBRARY_OPS_FLOAT32 and compute_dtype(given[0]) == torch.float32)
        ):
            continue
        if _obstacle(backend, op, given[0], needs_grad) is None:
            return module  # type: ignore[return-value]
    raise AssertionError("the reference runs every op")


def describe_backends(device: str) -> dict[Backend, str]:
    """What each backend offers on `device` ("cpu" or "cuda"), in words: for `leangpt info` and the logs."""
    native_state = native.unavailable_reason or f"{len(native.OPS)} ops"
    if device in triton_devices and _modules["triton"] is not None:
        triton_state = f"{len(_modules['triton'].__all__)} ops"
    else:
        triton_state = f"not on {device}" if device != "cuda" else str(triton_unavailable_reason)
    return {"native": native_state, "triton": triton_state, "reference": "all ops, on PyTorch"}


@functools.cache
def log_backend(device: str) -> None:
    """Log once where there is a GPU and its kernels cannot run: everything runs on PyTorch's ops."""
    if device == "cuda" and triton_unavailable_reason:
        logging.getLogger("leangpt").warning(
            "Triton is %s: all ops run on the PyTorch reference", triton_unavailable_reason
        )
