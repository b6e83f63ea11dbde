"""The emulator's library, compiled from simt/ at its first use, and what Python tells it."""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .build import shared_library
from .ptx import SHARED_GAP

if TYPE_CHECKING:
    from .lowering import Program
    from .ptx import Statement

SOURCES = Path(__file__).parent / "simt"
ORDERS = ("forward", "reverse", "random")
FLAGS = ["-march=native", "-fno-math-errno"]


class Fault(RuntimeError):
    """A kernel did what is undefined or illegal."""


class OptionsStruct(ctypes.Structure):
    _fields_ = (
        [("seed", ctypes.c_uint64)]
        + [
            (name, ctypes.c_int32)
            for name in ("order", "resident", "preempt", "race", "early_async")
        ]
        + [("max_instructions", ctypes.c_uint64)]
    )


@dataclass(frozen=True)
class Options:
    """How a kernel is run. Every choice is legal on the hardware, so none may change whether a kernel is right."""

    seed: int = 0
    order: str = "random"  # of blocks and warps: forward, reverse, random
    resident: int = 1  # number of blocks that run at the same time
    preempt: int = 1000  # mean number of instructions until another warp goes on; 0: only where a warp must wait
    # 0: no check of races. 1: strict. 2: threads of a warp may write different values to one address, as Triton's do when
    # copies of a value in several lanes differ in the last bit
    race: int = 2
    early_async: bool = False  # cp.async copies at once instead of when it is waited for
    max_instructions: int = (
        1_000_000_000  # of all warps; a kernel that runs longer is taken not to end
    )

    def as_struct(self) -> OptionsStruct:
        return OptionsStruct(
            self.seed,
            ORDERS.index(self.order),
            self.resident,
            self.preempt,
            self.race,
            self.early_async,
            self.max_instructions,
        )


class _Program(ctypes.Structure):
    """Twin of ProgramParts in simt/api.cpp."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("rows", ctypes.c_void_p),
        ("statements", ctypes.POINTER(ctypes.c_char_p)),
        ("num_rows", ctypes.c_size_t),
        ("operands", ctypes.c_void_p),
        ("num_operands", ctypes.c_size_t),
        ("constants", ctypes.c_char_p),
        *((name, ctypes.c_size_t) for name in ("constant_bytes", "register_bytes", "local_bytes")),
        ("shared_gaps", ctypes.POINTER(ctypes.c_uint32)),
        ("num_shared_gaps", ctypes.c_size_t),
        *((name, ctypes.c_int32) for name in ("global_granule", "shared_granule")),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_size_t), ("end", ctypes.c_size_t), ("name", ctypes.c_char_p)]


@functools.cache
def library_path() -> Path:
    """The emulator's library."""
    return shared_library("simt", SOURCES.glob("*.cpp"), FLAGS)


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_path()))
    loaded.simt_instructions.restype = ctypes.c_char_p
    loaded.simt_launch.restype = ctypes.c_char_p
    loaded.simt_program.restype = ctypes.c_void_p
    return loaded


@functools.cache
def instructions() -> dict[str, tuple[int, list[str]]]:
    """The emulator's instructions: the index of each, and the types of its operands, those of results with a `=`."""
    lines = _library().simt_instructions().decode().splitlines()
    table = {}
    for index, line in enumerate(lines):
        name, signature = line.split("\t")
        table[name] = (index, signature.split())
    return table


class Machine:
    """A program that is loaded and can be launched."""

    def __init__(self, program: "Program"):
        self.program = program
        rows, operands, kernel = program.rows, program.operands, program.kernel
        ends = [
            kernel.shared.offsets[name] + size for name, size in kernel.shared.sizes.items() if size
        ]
        gaps = [edge for end in ends for edge in (end, end + SHARED_GAP)]
        parts = _Program(
            kernel.name.encode(), rows.buffer_info()[0],
            (ctypes.c_char_p * len(program.statements))(*map(_place, program.statements)), len(program.statements),
            operands.buffer_info()[0], len(operands), program.constants, len(program.constants),
            program.register_bytes, kernel.local.num_bytes, (ctypes.c_uint32 * len(gaps))(*gaps), len(ends),
            program.global_granule, program.shared_granule,
        )  # fmt: skip
        self.handle = ctypes.c_void_p(_library().simt_program(ctypes.byref(parts)))

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        params: bytes,
        buffers: Iterable[tuple[int, int, str]],
        options: Options,
    ) -> None:
        """Run a grid; `buffers` are all the memory it may access, as (address, number of bytes, name)."""
        size = ctypes.c_size_t
        variables = [
            (ctypes.addressof(b), len(b), name) for name, b in self.program.buffers.items()
        ]
        ranges = [
            _Buffer(start, start + length, name.encode())
            for start, length, name in (*buffers, *variables)
        ]
        settings = options.as_struct()
        message = _library().simt_launch(
            self.handle, params, size(len(params)), (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block),
            ctypes.c_uint32(shared_bytes), ctypes.byref(settings),
            (_Buffer * len(ranges))(*ranges), size(len(ranges)),
        )  # fmt: skip
        if message is not None:
            raise Fault(message.decode())


def _place(statement: "Statement") -> bytes:
    """Where a statement is from, for reports."""
    text = " ".join(statement.text.split())
    return (f"{statement.source}: {text}" if statement.source else text).encode()
