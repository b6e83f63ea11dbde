"""Which implementation of an op runs.

A backend is a module with one function an op, all of the same signature:

    reference   plain PyTorch, the definition of the op; any device and dtype, differentiable
    triton      Triton kernels, on the devices in `triton_devices`
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

from . import native, reference

Backend = Literal["native", "triton", "reference"]  # in the order in which they are preferred

TRITON_OPS: frozenset[str] = frozenset()  # the ops of ops.py that have a Triton kernel
triton_devices = {"cuda"}

_modules: dict[Backend, ModuleType] = {"native": native, "reference": reference}
_forced: Backend | None = None


def _checked(backend: str, source: str) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"{source} must be one of {get_args(Backend)}, got {backend!r}")
    return backend  # type: ignore[return-value]


if "LEANGPT_BACKEND" in os.environ:
    _forced = _checked(os.environ["LEANGPT_BACKEND"], "LEANGPT_BACKEND")


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


def _obstacle(backend: Backend, op: str, device: str, needs_grad: bool) -> str | None:
    """Why `backend` cannot run `op`, or None where it can."""
    if backend == "native":
        if native.unavailable_reason:
            return f"the native extension is {native.unavailable_reason}"
        if op not in native.OPS:
            return f"the native extension has no {op}"
        if needs_grad and op not in native.DIFFERENTIABLE:
            return f"the native {op} has no backward"
    if backend == "triton":
        if op not in TRITON_OPS:
            return f"there is no Triton kernel of {op}"
        if device not in triton_devices:
            return f"Triton kernels run on {', '.join(sorted(triton_devices))}, not on {device}"
    return None


def select(op: str, *tensors: Tensor | None) -> ModuleType:
    """Return the backend that runs `op` on `tensors` (all its tensor arguments: any of them may need a gradient)."""
    given = [t for t in tensors if t is not None]
    device = given[0].device.type
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if _forced is not None:
        obstacle = _obstacle(_forced, op, device, needs_grad)
        if obstacle:
            raise RuntimeError(f"{op}: backend {_forced!r} was asked for, but {obstacle}")
        return _modules[_forced]
    for backend, module in _modules.items():
        if _obstacle(backend, op, device, needs_grad) is None:
            return module
    raise AssertionError("the reference runs every op")


def describe_backends(device: str) -> dict[Backend, str]:
    """What each backend offers on `device` ("cpu" or "cuda"), in words: for `leangpt info` and the logs."""
    native_state = native.unavailable_reason or f"{len(native.OPS)} ops"
    triton_state = f"{len(TRITON_OPS)} ops" if device in triton_devices else f"not on {device}"
    return {"native": native_state, "triton": triton_state, "reference": "all ops, on PyTorch"}


@functools.cache
def log_backend(device: str) -> None:
    """Log once, where a GPU is there, that its kernels are not: everything runs on PyTorch's ops."""
    if device == "cuda" and not TRITON_OPS:
        logging.getLogger("leangpt").warning(
            "no Triton kernels yet: all ops run on the PyTorch reference"
        )
