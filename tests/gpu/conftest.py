"""Tests of GPU kernels: on the GPU where there is one; elsewhere the compiled kernels run on CPU tensors, in the emulator."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from emulator import driver
from triton.runtime.autotuner import Autotuner

from leangpt.kernels import dispatch


def _autotuned_kernels() -> Iterator[Autotuner]:
    for name, module in list(sys.modules.items()):
        if name.startswith("leangpt.kernels.triton_"):
            yield from (v for v in vars(module).values() if isinstance(v, Autotuner))


@pytest.fixture(
    params=[
        "random",
        pytest.param("forward", marks=pytest.mark.full),
        pytest.param("reverse", marks=pytest.mark.full),
    ]
)
def order(request) -> str:
    """In which order the emulator runs blocks and warps, where it may choose."""
    return request.param


@pytest.fixture
def thread_orders() -> list[Callable[[], AbstractContextManager[None]]]:
    """Blocks in which threads run in one order and in another, where anybody can choose."""
    if torch.cuda.is_available():
        return [nullcontext, nullcontext]
    return [functools.partial(driver.options, seed=n, resident=3, preempt=50) for n in (0, 1)]


@pytest.fixture(autouse=True)
def _gpu(monkeypatch, order):
    """Triton kernels run, for the time of a test, on the tensors that it makes: those of the fixture `device`.

    An autotuned kernel runs its first configuration; a test of another one sets `kernel.configs` to it.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        driver.install()
        monkeypatch.setattr(dispatch, "triton_devices", set())
        monkeypatch.setattr(dispatch, "triton_unavailable_reason", None)
        monkeypatch.setitem(dispatch._modules, "triton", None)
        dispatch.enable_triton("cpu", "cuda")
    for kernel in _autotuned_kernels():
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
        # a choice made in the emulator must not be found on disk by a GPU
        monkeypatch.setattr(kernel, "cache_results", on_gpu)
    with nullcontext() if on_gpu else driver.options(order=order):
        yield
