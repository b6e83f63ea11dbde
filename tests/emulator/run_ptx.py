"""Run a few lines of PTX in the emulator: what its own tests are written in."""

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from .lowering import lower
from .machine import Machine, Options
from .ptx import Module

_KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k({params})
{{
.reg .pred %p<9>; .reg .b16 %h<33>; .reg .b32 %r<99>; .reg .b64 %d<99>;
{loads}
mov.u32 %r90, %tid.x; mov.u32 %r91, %ctaid.x;
{body}
ret;
}}
"""


def run_ptx(
    body: str,
    arrays: Sequence[np.ndarray],
    num_threads: int = 32,
    num_blocks: int = 1,
    shared_bytes: int = 0,
    **options: Any,
) -> None:
    """Run the body of a kernel on arrays; their addresses are in %d90, %d91 and so on, %tid.x is in %r90, %ctaid.x in %r91.

    It has registers %p, %h (16 bits), %r (32 bits) and %d (64 bits), and shared memory from address 0 on.
    """
    params = ", ".join(f".param .u64 a{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.u64 %d{90 + i}, [a{i}];" for i in range(len(arrays)))
    kernel = Module(_KERNEL.format(params=params, loads=loads, body=body)).kernel("k")
    addresses = [array.ctypes.data for array in arrays]
    Machine(lower(kernel)).launch(
        grid=(num_blocks, 1, 1),
        block=(num_threads, 1, 1),
        shared_bytes=shared_bytes,
        params=struct.pack(f"<{len(arrays)}Q", *addresses),
        buffers=[
            (a, array.nbytes, f"a{i}")
            for i, (a, array) in enumerate(zip(addresses, arrays, strict=True))
        ],
        options=Options(**options),
    )
