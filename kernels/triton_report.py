# pyright: reportArgumentType=false
"""What Triton kernels compile to, on any machine: resources and instructions of their code, for GPUs that are not there.

An op is called with tensors of the wanted shapes, forward and backward; a recorder notes what it would launch
(triton_recorder.py); each kernel is compiled for the architecture, and its code read (sass.py).
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from triton import knobs
from triton.runtime.cache import get_cache_manager

from . import chips, contract, sass
from .chips import CHIPS
from .contract import Figures
from .triton_recorder import AbsentGPU, Launch, Recorder


@dataclass(frozen=True)
class Empty:
    """A tensor among the arguments of a case: made for its call, and never written."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    strides: tuple[int, ...] | None = None  # None: contiguous
    requires_grad: bool = True

    def make(self) -> Tensor:
        if self.strides is None:
            tensor = torch.empty(self.shape, dtype=self.dtype)
        else:
            tensor = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        return tensor.requires_grad_(self.requires_grad and self.dtype.is_floating_point)


@dataclass(frozen=True)
class Case:
    """A call of an op to report on."""

    model: str
    op: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float = 0.0  # of the matrix products of forward
    backward_flops: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a direction of a case has to do at least."""

    model: str
    op: str
    direction: str  # "forward" or "backward"
    flops: float  # of matrix products
    num_bytes: int  # of what launches and torch's ops read and write, each tensor once
    library_products: int  # products that are torch's


@dataclass(frozen=True)
class Row:
    """What the report says of one kernel on one architecture."""

    work: Work
    kernel: str  # numbered where there is more than one of that name
    arch: str
    constants: dict[str, Any]  # compile-time arguments
    code: str  # all that the figures came of, as contract.py has it
    figures: Figures

    @property
    def name(self) -> str:
        return _name(self.work, self.kernel)


def _name(work: Work, kernel: str) -> str:
    return f"{work.model} {work.op} {work.direction} {kernel}"


def versions() -> dict[str, str]:
    """Of the programs that decide about the code."""
    tools = {"ptxas": knobs.nvidia.ptxas, "ptxas-blackwell": knobs.nvidia.ptxas_blackwell}
    return {"triton": triton.__version__} | {name: tool.version for name, tool in tools.items()}


def report(
    cases: Sequence[Case],
    archs: Sequence[str],
    agreed: Mapping[str, Mapping[str, Figures]] | None = None,
    num_threads: int = 2,
) -> list[Row]:
    """Compile what the cases launch for each of the architectures.

    `agreed` is a contract: what it says of code that has not changed since is taken from there.
    """
    launches = [
        (work, label, arch, launch)
        for arch in archs
        for case in cases
        for work, label, launch in _record(case, Recorder(arch))
    ]
    # cases share some kernels
    sources, figures = {}, {}
    for work, label, arch, launch in launches:
        code = _code(arch, launch)
        sources[code] = arch, launch
        known = (agreed or {}).get(_name(work, label), {}).get(arch, {})
        if contract.are_of(code, known):
            figures[code] = known
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = {
            code: pool.submit(_figures, *source)
            for code, source in sources.items()
            if code not in figures
        }
        figures |= {code: job.result() for code, job in jobs.items()}
    return [
        Row(work, label, arch, launch.constants, code, figures[code])
        for work, label, arch, launch in launches
        for code in [_code(arch, launch)]
    ]


def _record(case: Case, recorder: Recorder) -> list[tuple[Work, str, Launch]]:
    """What a case launches, in both directions."""
    with recorder.recording():
        outputs = case.function(*tree_map_only(Empty, Empty.make, case.arguments))
        noted = list(_noted(case, "forward", case.flops, recorder))
        recorder.clear()
        outputs = [out for out in tree_leaves(outputs) if out is not None and out.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
        return noted + list(_noted(case, "backward", case.backward_flops, recorder))


def _noted(
    case: Case, direction: str, flops: float, recorder: Recorder
) -> Iterator[tuple[Work, str, Launch]]:
    work = Work(
        case.model, case.op, direction, flops, recorder.num_bytes, recorder.library_products
    )
    seen: Counter[tuple[str, int]] = Counter()
    for launch in recorder.launches.values():
        # block sizes are no part of the name: a contract should tell what came of their change
        key = (launch.kernel, launch.configuration)
        seen[key] += 1
        number = f" #{seen[key]}" if seen[key] > 1 else ""
        configuration = f" configuration {launch.configuration}" if launch.configuration else ""
        yield work, launch.kernel + number + configuration, launch


def _code(arch: str, launch: Launch) -> str:
    """All that the figures of a kernel come of, but for the versions of Triton and ptxas."""
    return f"{arch} {launch.key()} {_tools()}"


@functools.cache
def _tools() -> str:
    """A digest of what reads compiled code."""
    texts = [inspect.getsource(tool) for tool in (sass, chips, _figures)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _figures(arch: str, launch: Launch) -> Figures:
    """Compile a kernel and look at its code."""
    target = AbsentGPU(arch).get_current_target()
    compiled = triton.compile(launch.source, target=target, options=launch.options)
    code = _read(compiled.asm["cubin"])
    needs = compiled.metadata
    blocks_per_sm = CHIPS[arch].blocks_per_sm(
        code.registers, needs.shared, needs.num_warps, needs.tmem_size
    )
    return {
        "num_warps": needs.num_warps,
        "num_stages": needs.num_stages,
        "shared_bytes": needs.shared,
        "blocks_per_sm": blocks_per_sm,
        **dataclasses.asdict(code),
    }


def _read(cubin: bytes) -> sass.Code:
    """`sass.parse`, kept: the disassembler takes as long as the compiler."""
    digest = hashlib.sha256(cubin + inspect.getsource(sass).encode()).hexdigest()
    return sass.Code(**kept(digest, lambda: dataclasses.asdict(sass.parse(*disassemble(cubin)))))


def disassemble(cubin: bytes) -> list[str]:
    """`sass.disassemble`, with the programs that come with Triton."""
    return sass.disassemble(cubin, knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path)


def kept(digest: str, compute: Callable[[], Any]) -> Any:
    """What is computed, as JSON has it, once: it stays in Triton's cache."""
    cache = get_cache_manager(digest)
    path = cache.get_file("code.json")
    if path:
        return json.loads(Path(path).read_text())
    found = compute()
    cache.put(json.dumps(found), "code.json", binary=False)
    return found
