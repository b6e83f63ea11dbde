"""CUDA code without a GPU: libraries that nvcc compiled, with a fake CUDA runtime (cudart/) that runs their kernels in the emulator.

    library = cuda.library("scale", [Path("csrc/cuda/scale.cu"), ...])   # a ctypes.CDLL, its calls raise Fault
    x, y = cuda.to_device(torch.randn(8), "x"), cuda.empty(8, torch.float32, "y")
    with cuda.settings(seed=1, order="reverse", is_deferred=True):
        library.scale(x, y, 8)
    y.cpu()

Device memory lies at addresses that the host cannot touch; `to_device`, `empty` and `cpu` copy. What the code under test allocates
by itself is seen too: `leaks` tells what of it was not freed.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from . import machine
from .build import CUDA_HOME, NVCC, shared_library
from .lowering import lower
from .machine import Fault, Machine, Options, OptionsStruct
from .ptx import Module, Unsupported

__all__ = [
    "DeviceTensor", "Fault", "Settings", "call_op", "empty", "fault", "leaks", "library", "load_ops", "reset", "settings", "synchronize",
    "tensors_as_device_memory", "to_device", "untold_fault",
]  # fmt: skip

SOURCES = Path(__file__).parent / "cudart"
# a library gets the fake runtime's functions even where PyTorch has loaded the real ones
_OWN_SYMBOLS_FIRST = ctypes.DEFAULT_MODE | os.RTLD_DEEPBIND

unavailable_reason = None if NVCC else "nvcc was not found: set CUDA_HOME"


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """How launches are run, and the device that there seems to be."""

    race: int = 1
    resident: int = 2
    is_deferred: bool = False  # streams do nothing before the host waits for them
    capability: tuple[int, int] = (8, 0)  # (0, 0): neither a device nor a driver
    num_multiprocessors: int = 108
    memory_bytes: int = 1 << 32


class _Settings(ctypes.Structure):
    """Twin of Settings in cudart/runtime.h."""

    _fields_ = [
        ("options", OptionsStruct),
        *((name, ctypes.c_int32) for name in ("is_deferred", "major", "minor")),
        ("num_multiprocessors", ctypes.c_int32),
        ("memory_bytes", ctypes.c_uint64),
    ]


class _Kernel(ctypes.Structure):
    """Twin of Kernel in cudart/runtime.h."""

    _fields_ = [
        ("program", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("num_params", "param_bytes", "shared_bytes")),
        *(
            (name, ctypes.c_uint32)
            for name in ("shared_layout_bytes", "local_bytes", "max_threads")
        ),
        *((name, ctypes.POINTER(ctypes.c_uint32)) for name in ("param_offsets", "param_sizes")),
    ]


_LOADER = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Kernel)
)
_modules: dict[int, Module] = {}
_loaded: list[Any] = []  # what the runtime points to


@_LOADER
def _load(module: int, ptx: bytes, name: bytes, out: Any) -> bool:
    """Translate a kernel for the runtime."""
    try:
        if module not in _modules:
            _modules[module] = Module(ptx.decode())
        kernel = _modules[module].kernel(name.decode())
        program = lower(kernel)
        handle = Machine(program).handle
    except Unsupported as error:
        runtime().emulator_refuse(str(error).encode())
        return False
    params = kernel.params
    offsets = (ctypes.c_uint32 * len(params.offsets))(*params.offsets.values())
    sizes = (ctypes.c_uint32 * len(params.sizes))(*params.sizes.values())
    for variable, memory in program.buffers.items():
        text = variable.encode()
        runtime().emulator_register(memory, ctypes.c_size_t(len(memory)), text)
        _loaded.append(text)
    _loaded.extend([program.buffers, offsets, sizes])
    out[0] = _Kernel(
        handle, len(offsets), params.num_bytes, kernel.shared_bytes, kernel.shared.num_bytes, kernel.local.num_bytes,
        kernel.max_threads, offsets, sizes,
    )  # fmt: skip
    return True


@functools.cache
def runtime() -> ctypes.CDLL:
    """The fake runtime, compiled at its first use: its functions are those of libcudart."""
    loaded = ctypes.CDLL(str(runtime_path()))
    loaded.emulator_fault.restype = ctypes.c_char_p
    loaded.emulator_leaks.restype = ctypes.c_char_p
    loaded.cudaGetErrorString.restype = ctypes.c_char_p
    loaded.emulator_set_loader(_load)
    _configure(loaded, _current)
    return loaded


@functools.cache
def runtime_path() -> Path:
    """The fake runtime's library."""
    flags = [f"-I{CUDA_HOME}/include"]
    return shared_library("cudart", SOURCES.glob("*.cpp"), flags, link=[machine.library_path()])


def _configure(loaded: ctypes.CDLL, to: Settings) -> None:
    struct = _Settings(
        to.as_struct(), to.is_deferred, *to.capability, to.num_multiprocessors, to.memory_bytes
    )
    loaded.emulator_configure(ctypes.byref(struct))


_current = Settings()


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[None]:
    """Change the settings in the block."""
    global _current
    before = _current
    _current = dataclasses.replace(before, **changes)
    _configure(runtime(), _current)
    try:
        yield
    finally:
        _current = before
        _configure(runtime(), _current)


class Library(ctypes.CDLL):
    """A library whose calls raise the fault of a kernel that they launched."""

    def __getitem__(self, name: Any) -> Any:
        function = super().__getitem__(name)
        function.errcheck = _raise_fault
        return function


_raised: str | None = None  # the last fault that the caller was told


def _raise_fault(result: Any, function: Any, arguments: Any) -> Any:
    global _raised
    text = fault()
    if text:
        _raised = text
        raise Fault(text)
    return result


def library(name: str, sources: Iterable[Path], flags: Sequence[str] = ()) -> Library:
    """Compile sources, .cu and .cpp, into a library that is linked with the fake runtime, and load it."""
    return _load_library(name, tuple(sources), tuple(flags))


@functools.cache
def _load_library(name: str, sources: tuple[Path, ...], flags: tuple[str, ...]) -> Library:
    runtime()
    path = shared_library(name, sources, [f"-I{CUDA_HOME}/include", *flags], link=[runtime_path()])
    return Library(str(path), mode=_OWN_SYMBOLS_FIRST)


def fault() -> str | None:
    """The fault of a kernel, or the reason for which a launch was refused and nobody noticed."""
    text = runtime().emulator_fault()
    return text.decode() if text else None


def untold_fault() -> str | None:
    """A fault that was not raised as an exception."""
    return None if fault() == _raised else fault()


def leaks() -> list[str]:
    """Memory, streams, events and graphs that were not freed, without the tensors that `to_device` and `empty` made."""
    own = [t for t in _tensors if t.address]
    return [
        line
        for line in runtime().emulator_leaks().decode().splitlines()
        if line not in {f"{t.name}, {t.nbytes} bytes" for t in own}
    ]


def reset() -> None:
    """Forget all faults and free everything: as in a new process."""
    global _raised
    _raised = None
    _tensors.clear()
    runtime().emulator_reset()


def synchronize() -> None:
    """Wait until the device has done everything."""
    runtime().cudaDeviceSynchronize()
    _raise_fault(None, None, None)


def _check(error: int) -> None:
    if error:
        raise RuntimeError(runtime().cudaGetErrorString(error).decode())


_tensors: list["DeviceTensor"] = []  # since the last reset


class DeviceTensor:
    """Device memory with the shape and dtype of a tensor; in ctypes calls it is the address."""

    def __init__(self, tensor: Tensor, name: str):
        """Allocate memory for a tensor; its values are not copied."""
        self.name, self.shape, self.dtype, self.nbytes = (
            name,
            tensor.shape,
            tensor.dtype,
            tensor.nbytes,
        )
        address = ctypes.c_void_p()
        _check(runtime().cudaMalloc(ctypes.byref(address), ctypes.c_size_t(self.nbytes)))
        self._as_parameter_ = address
        if address:
            runtime().emulator_name(address, name.encode())
        _tensors.append(self)

    @property
    def address(self) -> int:
        return self._as_parameter_.value or 0

    def copy_(self, tensor: Tensor) -> "DeviceTensor":
        """Copy the values of a tensor of the same shape and dtype."""
        assert (tensor.shape, tensor.dtype) == (self.shape, self.dtype)
        source = tensor.contiguous()
        self._copy(self._as_parameter_, ctypes.c_void_p(source.data_ptr()), 1)
        return self

    def cpu(self) -> Tensor:
        """Wait for the device, as cudaMemcpy does, and copy the values."""
        result = torch.empty(self.shape, dtype=self.dtype)
        self._copy(ctypes.c_void_p(result.data_ptr()), self._as_parameter_, 2)
        return result

    def _copy(self, to: ctypes.c_void_p, source: ctypes.c_void_p, kind: int) -> None:
        _check(runtime().cudaMemcpy(to, source, ctypes.c_size_t(self.nbytes), kind))

    def free(self) -> None:
        _check(runtime().cudaFree(self._as_parameter_))


def to_device(tensor: Tensor, name: str) -> DeviceTensor:
    """A tensor's values in device memory, by this name in reports."""
    return DeviceTensor(tensor, name).copy_(tensor)


def empty(shape: int | Sequence[int], dtype: torch.dtype, name: str) -> DeviceTensor:
    """Device memory that nobody wrote: to read it is a fault."""
    return DeviceTensor(torch.empty(shape, dtype=dtype), name)


# ---- CUDA implementations of PyTorch's ops, on CPU tensors


@functools.cache
def _tensor_memory() -> ctypes.CDLL:
    path = shared_library(
        "tensors",
        (SOURCES / "torch").glob("*.cpp"),
        _torch_flags(),
        link=[runtime_path(), *_torch_libraries()],
    )
    return ctypes.CDLL(str(path))


def _torch_flags() -> list[str]:
    return ["-std=c++20", *(f"-I{path}" for path in cpp_extension.include_paths())]


def _torch_libraries() -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]


@contextlib.contextmanager
def tensors_as_device_memory() -> Iterator[None]:
    """In the block, the CPU tensors that are made are memory that kernels may access."""
    runtime()
    _tensor_memory().emulator_use_tensors(True)
    try:
        yield
    finally:
        _tensor_memory().emulator_use_tensors(False)


def load_ops(name: str, kernels: Iterable[Path], bindings: Iterable[Path]) -> None:
    """Compile C++ that registers CUDA implementations of ops (TORCH_LIBRARY_IMPL) with the kernels they launch, and load it."""
    runtime()
    include = f"-I{CUDA_HOME}/include"
    kernel_library = shared_library(f"{name}_kernels", kernels, [include], link=[runtime_path()])
    link = [kernel_library, runtime_path(), *_torch_libraries()]
    path = shared_library(name, bindings, [include, *_torch_flags()], link)
    ctypes.CDLL(str(path), mode=_OWN_SYMBOLS_FIRST)


def call_op(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the CUDA implementation of an op, such as torch.ops.leangpt.x, on CPU tensors; raises Fault."""
    try:
        return op.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs
        )
    finally:
        _raise_fault(None, None, None)
