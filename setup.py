"""Build of leangpt: `engine/` is the package `leangpt`, `kernels/` is `leangpt.kernels`, `csrc/` its extension.

Libraries without a Python binding (no Python headers): `_C` registers `torch.ops.leangpt`, and its file name carries the torch
it was built for, `_C-torch<version>.so`, so that `kernels/native.py` never loads one built for another torch; `_engine.so` and
`_engine_cuda.so`, the decode engines, know no torch, and `kernels/decode.py` loads them with ctypes.

What is for CUDA is built where there is nvcc: it holds the CUDA runtime, and can be loaded without a GPU or a driver.
LEANGPT_CUDA=0 leaves it out, LEANGPT_CUDA=1 insists. TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") narrows the GPUs it is for.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit(
        "leangpt is built against the torch of this environment, and there is none. Run:\n"
        "    pip install 'torch>=2.10' setuptools wheel ninja\n"
        "    pip install --no-build-isolation ."
    )

CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
CUDA_FOLDER = Path("build/cuda")  # objects of nvcc
CXX_FLAGS = ("-std=c++17", "-O3", "-g0", "-fvisibility=hidden")
# Where in a cache line a kernel's loop begins changes its speed by up to a tenth, and else any edit moves it.
ALIGNED = ("-falign-functions=64", "-falign-loops=64")


class Cuda:
    """The CUDA toolkit that the build uses.

    Attributes:
        home: of the toolkit.
        archs: as in TORCH_CUDA_ARCH_LIST.
    """

    def __init__(self, home: Path, archs: list[str]) -> None:
        self.home = home
        self.archs = archs
        self.include_dirs = [str(home / "include")]
        self.sources = sorted(glob("csrc/cuda/*.cu"))
        self.objects = [
            str(CUDA_FOLDER / Path(source).with_suffix(".o").name) for source in self.sources
        ]
        # the runtime is this library's own, whatever other one the process has; a kernel that is missing is told here
        options = "-Wl,--exclude-libs,ALL -Wl,--no-undefined -lcudart_static -lrt -ldl -pthread"
        folders = [path for path in (home / "lib64", home / "lib") if path.is_dir()]
        self.link_args = [*(f"-L{path}" for path in folders), *options.split()]

    def compile(self) -> None:
        """The kernels, as far as they have changed."""
        flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        builds = [f"build {o}: nvcc {s}" for o, s in zip(self.objects, self.sources, strict=True)]
        CUDA_FOLDER.mkdir(parents=True, exist_ok=True)
        (CUDA_FOLDER / "build.ninja").write_text(
            f"builddir = {CUDA_FOLDER}\n"
            "rule nvcc\n"
            f"  command = {self.home}/bin/nvcc {' '.join(flags)} -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n"
            "  deps = gcc\n" + "\n".join(builds) + "\n"
        )
        command = ["ninja", "--quiet", "-f", str(CUDA_FOLDER / "build.ninja")]
        subprocess.run(command, check=True)


def find_cuda() -> Cuda | None:
    """The toolkit to build with; prints what was decided."""
    wish = os.environ.get("LEANGPT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"leangpt: LEANGPT_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        print("leangpt: the CUDA kernels are left out (LEANGPT_CUDA=0)", file=sys.stderr)
        return None
    home, obstacle = _cuda_home()
    if home is None:
        if wish == "1":
            sys.exit(f"leangpt: LEANGPT_CUDA=1 asks for the CUDA kernels, but {obstacle}")
        print(f"leangpt: no CUDA kernels are built, since {obstacle}", file=sys.stderr)
        return None
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    chosen = [arch for arch in archs.split(";") if arch]
    if not chosen:
        # for a torch without CUDA it is a proof that all compiles and links, and PTX is enough for that
        chosen = list(CUDA_ARCHS) if torch.version.cuda else ["8.0+PTX"]
    wrong = [arch for arch in chosen if not re.fullmatch(r"\d+\.\d(\+PTX)?", arch)]
    if wrong:
        sys.exit(f"leangpt: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', got {archs!r}")
    print(f"leangpt: CUDA kernels for {' '.join(chosen)} by {home}/bin/nvcc", file=sys.stderr)
    return Cuda(home, chosen)


def _cuda_home() -> tuple[Path | None, str]:
    """Where a usable toolkit is, or why there is none."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    homes = [Path(named)] if named else []
    if on_path:
        homes.append(Path(on_path).resolve().parents[1])
    homes.append(Path("/usr/local/cuda"))
    home = next((home for home in homes if _is_toolkit(home)), None)
    if home is None:
        return None, "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to it"
    told = subprocess.run(
        [home / "bin" / "nvcc", "--version"], capture_output=True, text=True
    ).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None or (int(release[1]), int(release[2])) < (12, 8):
        version = f"{release[1]}.{release[2]}" if release else "of an unknown version"
        return None, f"{home}/bin/nvcc is {version}: 12.8 or later is needed"
    if shutil.which("ninja") is None:
        return None, "there is no ninja: pip install ninja"
    return home, ""


def _is_toolkit(home: Path) -> bool:
    """Not a lone nvcc, which may be a script that calls another."""
    return all((home / name).exists() for name in ("bin/nvcc", "include/cuda_runtime_api.h"))


class BuildNative(BuildExtension):
    """BuildExtension with the torch version in the file name and objects kept between builds."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/temp"  # also for editable installs, which would compile all again

    def run(self) -> None:
        if cuda and self.extensions:
            cuda.compile()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # a folder of its own: some sources are in two libraries, with other flags
        self.build_temp = f"build/temp/{ext.name.rpartition('.')[2]}"
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        suffix = f"-torch{torch.__version__}" if fullname.endswith("_C") else ""
        return f"{fullname.replace('.', os.sep)}{suffix}.so"

    def copy_extensions_to_source(self) -> None:
        for stale in [*Path("kernels").glob("_C-torch*.so"), Path("kernels/_engine_cuda.so")]:
            stale.unlink(missing_ok=True)
        super().copy_extensions_to_source()


def native_extensions(cuda: Cuda | None) -> list[Extension]:
    headers = [
        name for ending in ("h", "cuh") for name in glob(f"csrc/**/*.{ending}", recursive=True)
    ]
    shared = ["csrc/batch.cpp", "csrc/kv_blocks.cpp"]
    extensions = [
        CppExtension(
            "leangpt.kernels._C",
            [
                *("csrc/bindings.cpp", "csrc/bindings_train.cpp", "csrc/bindings_autograd.cpp"),
                "csrc/cpu/isa.cpp",
                *sorted(glob("csrc/train/*.cpp")),
            ],
            depends=headers,
            py_limited_api=True,  # no libtorch_python: the library knows nothing of Python
            # torch adds the -std that its headers need; with OpenMP its parallel_for runs on its own threads
            extra_compile_args=[
                *("-O3", "-g0", "-fopenmp", "-ffp-contract=off", *ALIGNED),
                *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unused-function"),
            ],
            extra_link_args=["-fopenmp"],
        ),
        Extension(
            "leangpt.kernels._engine",
            ["csrc/engine.cpp", *shared, *sorted(glob("csrc/cpu/*.cpp"))],
            depends=headers,
            language="c++",
            py_limited_api=True,
            # no product and sum become one rounding but where the code says so: the same bits wherever it is inlined
            extra_compile_args=[
                *CXX_FLAGS,
                *ALIGNED,
                "-ffp-contract=off",
                # g++ 12 takes the AVX-512 headers' undefined registers for mistakes
                *("-pthread", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
            ],
            extra_link_args=["-pthread"],
        ),
    ]
    if cuda:
        ops = extensions[0]
        ops.sources.append("csrc/bindings_cuda.cpp")
        engine = Extension(
            "leangpt.kernels._engine_cuda",
            ["csrc/engine_cuda.cpp", *shared, *sorted(glob("csrc/cuda/*.cpp"))],
            depends=headers,
            language="c++",
            py_limited_api=True,
            extra_compile_args=[*CXX_FLAGS],
        )
        extensions.append(engine)
        for extension in (ops, engine):
            extension.include_dirs += cuda.include_dirs
            extension.extra_objects += cuda.objects
            extension.extra_link_args += cuda.link_args
    return extensions


def has_compiler() -> bool:
    compiler = get_cxx_compiler()
    if shutil.which(compiler.split()[0]):
        return True
    print(
        f"leangpt: no C++ compiler ({compiler!r} not found): installing without the native extension; ops run on"
        " PyTorch's own. Install g++ or clang and run the installation again to get it.",
        file=sys.stderr,
    )
    return False


is_native = has_compiler()
cuda = find_cuda() if is_native else None

setup(
    packages=[
        "leangpt",
        *(f"leangpt.{name}" for name in find_packages("engine")),
        "leangpt.kernels",
    ],
    package_dir={"leangpt": "engine", "leangpt.kernels": "kernels"},
    package_data={"leangpt": ["py.typed"]},
    ext_modules=native_extensions(cuda) if is_native else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
