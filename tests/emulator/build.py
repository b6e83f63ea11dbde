"""Compiles the C++ and CUDA of the emulator and of tests, and keeps what it made under build/emulator of the repository.

What is kept is named by a hash of all that it was made of: sources, the headers they include, compiler, flags and CPU.
"""

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(__file__).parents[2] / "build" / "emulator"


def _find_cuda() -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, or where it usually is."""
    named, found = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [Path(named)] if named else [Path("/usr/local/cuda")]
    if found and not named:
        places.append(Path(found).resolve().parents[1])
    parts = ("bin/nvcc", "include/cuda_runtime_api.h")
    return next((p for p in places if all((p / part).exists() for part in parts)), None)


CUDA_HOME = _find_cuda()
NVCC = str(CUDA_HOME / "bin" / "nvcc") if CUDA_HOME else None
COMPILER = os.environ.get("CXX", "g++")
CPP_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-w", "-ffp-contract=off"]
if "clang" not in COMPILER:
    # g++ makes symbols of which a process has one, but libraries may hold kernels of the same names
    CPP_FLAGS.append("-fno-gnu-unique")
# the kernels as PTX that the fake runtime can read out of the object
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fno-gnu-unique", "-w"),
    *("-gencode", "arch=compute_80,code=compute_80", "-Xfatbin", "-compress=false"),
]


@functools.cache
def _version(compiler: str) -> bytes:
    """What the output of a compiler depends on, besides its input."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    flags = re.search(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.M)  # of -march=native
    return version + (platform.machine() + (flags[0] if flags else "")).encode()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


@contextmanager
def _locked() -> Iterator[None]:
    """One process compiles, the others wait for it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Object:
    """A source, and the object that is made of it."""

    def __init__(self, source: Path, flags: Sequence[str]):
        compiler = NVCC if source.suffix == ".cu" else COMPILER
        assert compiler, "there is no nvcc"
        self.source = source
        self.command = [compiler, *(NVCC_FLAGS if source.suffix == ".cu" else CPP_FLAGS), *flags]
        self._key = [_version(compiler), " ".join(self.command).encode(), str(source).encode()]
        self._headers = (
            CACHE / f"{source.stem}-{_digest(self._key)}.headers"
        )  # of the last compilation

    @property
    def path(self) -> Path | None:
        """Where the object is or will be; None: nobody knows yet what the source includes."""
        if not self._headers.exists():
            return None
        headers = self._headers.read_text().split("\n")
        contents = [Path(h).read_bytes() if Path(h).exists() else b"" for h in headers]
        return CACHE / f"{self.source.stem}-{_digest([*self._key, *contents])}.o"

    @property
    def exists(self) -> bool:
        return self.path is not None and self.path.exists()

    def compile(self, folder: str) -> subprocess.Popen:
        self._output = f"{folder}/{_digest(self._key)}"
        return subprocess.Popen(
            [*self.command, "-MD", "-MF", f"{self._output}.d", "-c", self.source, "-o", f"{self._output}.o"]
        )  # fmt: skip

    def keep(self) -> None:
        """Keep what was compiled."""
        rule = Path(f"{self._output}.d").read_text().replace("\\\n", " ")
        headers = sorted({str(Path(name)) for name in rule.split(":", 1)[1].split()})
        Path(f"{self._output}.headers").write_text("\n".join(headers))
        os.replace(f"{self._output}.headers", self._headers)
        assert self.path
        os.replace(f"{self._output}.o", self.path)


def shared_library(
    name: str,
    sources: Iterable[Path],
    flags: Sequence[str] = (),
    link: Sequence[str | Path] = (),
) -> Path:
    """Compile .cpp and .cu files, side by side, and link them; flags are for all of them, `link` for the linker."""
    objects = [_Object(source.resolve(), flags) for source in sorted(sources)]
    if not all(o.exists for o in objects):
        with _locked(), tempfile.TemporaryDirectory(dir=CACHE) as folder:
            missing = [o for o in objects if not o.exists]
            while missing:
                batch = missing[: os.cpu_count()]
                del missing[: len(batch)]
                for o, process in [(o, o.compile(folder)) for o in batch]:
                    if process.wait():
                        raise RuntimeError(f"{o.command[0]} cannot compile {o.source}")
                    o.keep()
    paths = [str(o.path) for o in objects]
    command = [COMPILER, "-shared", "-Wl,-z,defs", *paths, *map(str, link)]
    library = CACHE / f"{name}-{_digest([' '.join(command).encode()])}.so"
    if not library.exists():
        with _locked(), tempfile.TemporaryDirectory(dir=CACHE) as folder:
            output = f"{folder}/{library.name}"
            if subprocess.run([*command, "-o", output]).returncode:
                raise RuntimeError(f"{name}: cannot be linked")
            os.replace(output, library)
    return library
