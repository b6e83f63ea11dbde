"""Where single CUDA kernels are tested: on the GPU where there is one, and else in the emulator, which also checks every access.

What the tests of the launchers need of a device: libraries that nvcc compiled, and memory.
"""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from emulator import build
from emulator import cuda as emulated
from torch import Tensor

HAS_GPU = torch.cuda.is_available() and build.CUDA_HOME is not None


class GpuTensor:
    """Memory of the GPU; in ctypes calls it is the address. As emulator.cuda.DeviceTensor."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor.contiguous().cuda()
        self.shape, self.dtype, self.nbytes = tensor.shape, tensor.dtype, tensor.nbytes
        self._as_parameter_ = ctypes.c_void_p(self.address)
        _kept.append(self)

    @property
    def address(self) -> int:
        return self._tensor.data_ptr()

    def cpu(self) -> Tensor:
        """Wait for the device, and copy the values."""
        torch.cuda.synchronize()
        return self._tensor.cpu()


_kept: list[GpuTensor] = []  # kernels are given addresses alone


def release() -> None:
    """Free what a test allocated on the GPU."""
    _kept.clear()


def to_device(tensor: Tensor, name: str) -> Any:
    """A tensor's values in device memory, by this name in reports of the emulator."""
    return GpuTensor(tensor) if HAS_GPU else emulated.to_device(tensor, name)


def empty(shape: int | Sequence[int], dtype: torch.dtype, name: str) -> Any:
    """Device memory that nobody wrote."""
    return (
        GpuTensor(torch.empty(shape, dtype=dtype))
        if HAS_GPU
        else emulated.empty(shape, dtype, name)
    )


def library(name: str, sources: Iterable[Path]) -> ctypes.CDLL:
    """Sources, .cu and .cpp, as a library whose launches go to the device."""
    return _gpu_library(name, tuple(sources)) if HAS_GPU else emulated.library(name, sources)


@functools.cache
def _gpu_library(name: str, sources: tuple[Path, ...]) -> ctypes.CDLL:
    """The kernels come as PTX, which the driver compiles for its GPU."""
    folder = f"{build.CUDA_HOME}/lib64"
    link = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lcudart"]
    flags = [f"-I{build.CUDA_HOME}/include"]
    return ctypes.CDLL(str(build.shared_library(f"{name}_gpu", sources, flags, link)))
