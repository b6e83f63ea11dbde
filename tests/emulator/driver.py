"""A Triton driver without a GPU: after `install()`, kernel[grid](cpu tensors) runs the compiled kernel in the emulator.

Triton specialises and compiles the kernel as it would for an A100 (sm_80); the emulator executes its PTX, of which nobody makes
machine code. Autotuning runs every configuration once, so that all are checked, and takes the first. `options` sets how launches
are run:

    with driver.options(seed=1, order="reverse"):
        kernel[grid](x, y)
"""

import contextlib
import dataclasses
import os
import struct
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from .lowering import lower
from .machine import Fault, Machine, Options
from .ptx import Module, Unsupported

__all__ = ["Fault", "Options", "Unsupported", "install", "options"]

MAX_SHARED_BYTES = 163 * 1024
WARP_SIZE = 32
_FORMATS = {
    **{"i1": "<B", "u1": "<B", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I"},
    **{"i64": "<q", "u64": "<Q", "fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"},
}  # fmt: skip

_options = Options()


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Change the options of all launches in the block."""
    global _options
    before = _options
    _options = dataclasses.replace(before, **changes)
    try:
        yield
    finally:
        _options = before


def _extent(tensor: torch.Tensor) -> int:
    """The number of bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Launcher:
    """What `CompiledKernel.run` is in the emulator."""

    def __init__(self, kernel: CompiledKernel):
        self.metadata = kernel.metadata
        if self.metadata.shared > MAX_SHARED_BYTES:
            raise OutOfResources(self.metadata.shared, MAX_SHARED_BYTES, "shared memory")
        self.kernel = Module(kernel.asm["ptx"]).kernel(self.metadata.name)
        self.machine = Machine(lower(self.kernel))
        self.types = list(kernel.src.signature.items())

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        args = rest[6:]  # behind stream, function, metadata of kernel and launch, hooks
        scratch = _scratch(self.metadata, grid_x * grid_y * grid_z)
        arguments = [
            leaf
            for (name, kind), value in zip(self.types, args, strict=True)
            for leaf in _leaves(name, kind, value)
        ]
        arguments += [(f"scratch {i}", "*i8", tensor) for i, tensor in enumerate(scratch)]
        params = bytearray(self.kernel.params.num_bytes)
        buffers = []
        offsets = self.kernel.params.offsets.values()
        for offset, (name, kind, value) in zip(offsets, arguments, strict=True):
            if kind.startswith("*"):
                struct.pack_into("<Q", params, offset, value.data_ptr() if value is not None else 0)
                if value is not None:
                    buffers.append((value.data_ptr(), _extent(value), name))
            elif kind == "bf16":
                bits = torch.tensor(float(value), dtype=torch.bfloat16).view(torch.int16).item()
                struct.pack_into("<h", params, offset, bits)
            else:
                struct.pack_into(_FORMATS[kind], params, offset, value)
        block = (self.metadata.num_warps * WARP_SIZE, 1, 1)
        shared = max(self.metadata.shared, self.kernel.shared.num_bytes)
        self.machine.launch(
            (grid_x, grid_y, grid_z), block, shared, bytes(params), buffers, _options
        )


def _scratch(metadata: Any, num_blocks: int) -> list[torch.Tensor | None]:
    """The two buffers that Triton passes behind a kernel's own arguments."""
    sizes = (metadata.global_scratch_size, getattr(metadata, "profile_scratch_size", 0))
    return [torch.empty(num_blocks * size, dtype=torch.int8) if size else None for size in sizes]


def _leaves(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """The arguments that a kernel gets for one of its Python signature: tuples and descriptors are taken apart."""
    if isinstance(kind, tuple):
        for i, (inner_kind, inner) in enumerate(zip(kind, value, strict=True)):
            yield from _leaves(f"{name}[{i}]", inner_kind, inner)
    elif kind.startswith("tensordesc"):
        yield name, "*i8", value.base
        sizes = [("i64", n) for n in (*value.shape, *value.strides)]
        flags = [("i1", value.padding == "nan")]
        if hasattr(value, "round_f32_to_tf32"):
            flags.append(("i1", value.round_f32_to_tf32))
        again = [("i32", n) for n in value.shape] + [("i64", n) for n in value.strides]
        yield from ((name, inner_kind, inner) for inner_kind, inner in sizes + flags + again)
    elif kind != "constexpr":
        yield name, kind, value


class _EmulatedGPU(GPUTarget):
    """An A100 that takes PTX."""


def _leave_out_cubin() -> None:
    """Compile for an emulated GPU without ptxas, and keep that apart in Triton's cache."""
    make_cubin, make_hash = CUDABackend.make_cubin, CUDABackend.hash

    def cubin(self: CUDABackend, *arguments: Any) -> bytes:
        return b"" if isinstance(self.target, _EmulatedGPU) else make_cubin(self, *arguments)

    def hash_(self: CUDABackend) -> str:
        found = make_hash(self)
        return f"{found}-emulated" if isinstance(self.target, _EmulatedGPU) else found

    CUDABackend.make_cubin, CUDABackend.hash = cubin, hash_


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": MAX_SHARED_BYTES,
            "multiprocessor_count": 108,
            "max_num_regs": 65536,
            "warpSize": WARP_SIZE,
        }


class _Driver:
    """The parts of Triton's driver that the JIT and the autotuner use."""

    utils = _Utils()

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return _EmulatedGPU("cuda", 80, WARP_SIZE)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        def run_once(function: Any, quantiles: Any = None, **_: Any) -> Any:
            function()
            return [1.0] * len(quantiles) if quantiles else 1.0

        return run_once

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(0)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


def _run(kernel: CompiledKernel) -> _Launcher:
    if not isinstance(kernel._run, _Launcher):
        kernel._run = _Launcher(kernel)
    return kernel._run


def install() -> None:
    """Make Triton run kernels in the emulator, from now on."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # versions differ in the default
    if isinstance(triton.runtime.driver._active, _Driver):
        return
    triton.runtime.driver.set_active(_Driver())
    _leave_out_cubin()
    CompiledKernel.run = property(_run)
    CompiledKernel._init_handles = lambda self: None
