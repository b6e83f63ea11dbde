"""What the CUDA kernels of the decode step (csrc/cuda/) compile to, on any machine with nvcc: as triton_report.py for Triton's.

A kernel is compiled for an architecture, in each of its template instances, and its code is read (sass.py). Shared memory that a
launcher asks for is not known here: occupancy is that of registers and of the rest.
"""

import dataclasses
import functools
import hashlib
import inspect
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import chips, contract, sass
from .chips import CHIPS, RESERVED_SHARED_BYTES
from .contract import Figures
from .triton_report import disassemble, kept

CSRC = Path(__file__).resolve().parents[1] / "csrc"  # of the repository: a wheel has none
PREFIX = "cuda"  # of names in the contract


@dataclass(frozen=True)
class Kernel:
    """A kernel on one architecture."""

    source: str  # file
    function: str  # with its template arguments
    arch: str
    code: str  # all that the figures came of, as contract.py has it
    figures: Figures

    @property
    def name(self) -> str:
        return f"{PREFIX} {self.source} {self.function}"


def obstacle() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not CSRC.is_dir():
        return "there is no csrc/: they are compiled in a clone of the repository"
    return None if _nvcc() else "there is no nvcc: set CUDA_HOME, or put it on the PATH"


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which(
        "/usr/local/cuda/bin/nvcc"
    )


@functools.cache
def version() -> str:
    """Of nvcc, as the contract has it."""
    told = subprocess.run([str(_nvcc()), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", told.stdout)
    assert found, told.stdout
    return found[1]


def report(
    archs: Sequence[str],
    agreed: Mapping[str, Mapping[str, Figures]] | None = None,
    num_threads: int = 2,
) -> list[Kernel]:
    """Compile all kernels for each of the architectures.

    `agreed` is a contract: what it says of files that have not changed since is taken from there.
    """
    jobs = [
        (source, arch, agreed or {}) for source in sorted(CSRC.glob("cuda/*.cu")) for arch in archs
    ]
    with ThreadPoolExecutor(num_threads) as pool:
        return [kernel for found in pool.map(lambda job: _compile(*job), jobs) for kernel in found]


def _compile(
    source: Path, arch: str, agreed: Mapping[str, Mapping[str, Figures]] | None = None
) -> list[Kernel]:
    """The kernels of a file, which are kept."""
    code = _code(source, arch)
    start = f"{PREFIX} {source.name} "
    known = {
        name.removeprefix(start): rows[arch]
        for name, rows in (agreed or {}).items()
        if name.startswith(start) and arch in rows
    }
    if not known or not all(contract.are_of(code, figures) for figures in known.values()):
        known = kept(code, lambda: _compile_anew(source, arch))
    return [Kernel(source.name, name, arch, code, figures) for name, figures in known.items()]


def _code(source: Path, arch: str) -> str:
    """A digest of all that the figures of a file come of."""
    tools = [inspect.getsource(tool) for tool in (sass, chips)]
    tools.append(Path(__file__).read_text(encoding="utf-8"))
    key = f"{version()} {source.name} {arch} {''.join(tools)}".encode()
    texts = [path.read_bytes() for path in _with_headers(source)]
    return hashlib.sha256(b"".join([key, *texts])).hexdigest()


def _with_headers(source: Path) -> list[Path]:
    """A file and what it includes of this repository, directly or not."""
    found: list[Path] = []
    todo = [source]
    while todo:
        path = todo.pop()
        if path not in found:
            found.append(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.M)
            todo += [(path.parent / name).resolve() for name in names]
    return found


def _compile_anew(source: Path, arch: str) -> dict[str, Figures]:
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernels.cubin", Path(folder) / f"{source.stem}.ptx"
        command = [str(_nvcc()), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", str(source)]
        command += ["-o", str(cubin), "--keep", "--keep-dir", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr}")
        threads = _threads(ptx.read_text())
        codes = _read(cubin.read_bytes())
    functions = zip(_demangled(list(codes)), codes.items(), strict=True)
    return {
        function: _figures(code, shared, threads[name], arch)
        for function, (name, (code, shared)) in sorted(functions)
    }


def _threads(ptx: str) -> dict[str, int]:
    """The largest block of each kernel, by its __launch_bounds__."""
    found = re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx)
    return {name: int(number) for name, number in found}


def _read(cubin: bytes) -> dict[str, tuple[sass.Code, int]]:
    """Code and bytes of static shared memory by function."""
    resources, listing = disassemble(cubin)
    listings = dict(_sections(listing))
    return {
        name: (sass.parse(usage, listings[name]), int(usage.partition("SHARED:")[2].split()[0]))
        for name, usage in re.findall(r"Function (\w+):\n(.*)", resources)
    }


def _sections(listing: str) -> Iterator[tuple[str, str]]:
    for section in re.split(r"(?m)^//-+ \.", listing):
        name, _, text = section.partition(" ")
        if name.startswith("text."):
            yield name.removeprefix("text."), text


def _demangled(names: list[str]) -> list[str]:
    """As they are written in the source: without return type, namespace and arguments."""
    told = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout
    functions = []
    for line in told.splitlines():
        line = line.removeprefix("void ").replace("(anonymous namespace)::", "")
        line = line.replace("leangpt::cuda::", "").replace("leangpt::", "")
        functions.append(_without_arguments(line))
    return functions


def _without_arguments(function: str) -> str:
    """Up to the parenthesis behind the template arguments, which may have some too."""
    depth = 0
    for i, letter in enumerate(function):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return function[:i]
    return function


def _figures(code: sass.Code, shared_bytes: int, threads: int, arch: str) -> Figures:
    num_warps = threads // 32
    if (
        arch != "sm_80"
    ):  # what the system reserves is among it from sm_90 on, and blocks_per_sm adds it
        shared_bytes = max(0, shared_bytes - RESERVED_SHARED_BYTES)
    blocks_per_sm = CHIPS[arch].blocks_per_sm(code.registers, shared_bytes, num_warps)
    return {
        "num_warps": num_warps,
        "shared_bytes": shared_bytes,
        "blocks_per_sm": blocks_per_sm,
        **dataclasses.asdict(code),
    }
