"""The emulator's library, compiled from simt/ at its first use, and what Python tells it."""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .build import shared_library

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
        size = ctypes.c_size_t
        rows, operands = program.rows, program.operands
        num_columns = len(rows) // len(program.statements)
        self.handle = ctypes.c_void_p(
            _library().simt_program(
                program.kernel.name.encode(), ctypes.c_void_p(rows.buffer_info()[0]), size(len(rows) // num_columns),
                (ctypes.c_char_p * len(program.statements))(*map(_place, program.statements)),
                ctypes.c_void_p(operands.buffer_info()[0]), size(len(operands)),
                program.constants, size(len(program.constants)), size(program.register_bytes),
                size(program.kernel.local.num_bytes), program.global_granule, program.shared_granule,
            )
        )  # fmt: skip

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
        constants = [
            (ctypes.addressof(b), len(b), name) for name, b in self.program.buffers.items()
        ]
        ranges = [
            _Buffer(start, start + length, name.encode())
            for start, length, name in (*buffers, *constants)
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
