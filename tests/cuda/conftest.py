"""Tests of the CUDA kernels and of the decode engine on them: what nvcc compiled runs on the GPU where there is one (the launchers,
cuda_device.py, and the engine), and in the emulator, launch code included.
"""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cuda_device
import pytest
from emulator import cuda as emulated_cuda

from leangpt.kernels import decode

CSRC = Path(__file__).parents[2] / "csrc"
ENGINE = [
    *(CSRC / name for name in ("engine_cuda.cpp", "batch.cpp", "kv_blocks.cpp")),
    *sorted((CSRC / "cuda").glob("*.cpp")),
    *sorted((CSRC / "cuda").glob("*.cu")),
]
# settings of the emulator
SCHEDULES = {
    "random": {"seed": 1, "preempt": 20},
    "forward": {"order": "forward", "preempt": 0, "early_async": True},
    "reverse": {"order": "reverse", "resident": 100, "is_deferred": True},
}


@pytest.fixture(scope="session")
def _nvcc(in_ci: bool) -> None:
    """Skip where nothing can be compiled."""
    if emulated_cuda.unavailable_reason:
        reason = f"NOTHING of tests/cuda ran: {emulated_cuda.unavailable_reason}"
        if in_ci:
            warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)


@pytest.fixture
def cuda(_nvcc: None) -> Iterator[ModuleType]:
    """The module emulator.cuda: libraries with kernels in them, and device memory.

    A fault that was not raised as an exception fails the test; `cuda.reset()` forgets one that is expected. Memory, streams and
    graphs of code under test must be freed; what the test itself allocated is freed here.
    """
    emulated_cuda.reset()
    yield emulated_cuda
    cuda_device.release()
    fault, leaks = emulated_cuda.untold_fault(), []
    if not emulated_cuda.fault() and emulated_cuda.leaks():
        gc.collect()  # what the test made may still be in a cycle
        leaks = emulated_cuda.leaks()
    emulated_cuda.reset()
    assert fault is None, fault
    assert not leaks, f"not freed: {leaks}"


@pytest.fixture
def emulated(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA decode engine is one that runs in the emulator."""
    library = cuda.library("engine_cuda", ENGINE)
    decode.declare_cuda(library)
    monkeypatch.setattr(decode, "cuda_library", lambda: library)


@pytest.fixture(
    params=["random", *(pytest.param(s, marks=pytest.mark.full) for s in ("forward", "reverse"))]
)
def schedule(request: pytest.FixtureRequest, cuda: ModuleType) -> Iterator[str]:
    """Run the test's launches in different orders of threads and times of copies, which must change nothing."""
    with cuda.settings(**SCHEDULES[request.param]):
        yield request.param
