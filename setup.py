"""Build of leangpt: `engine/` is the package `leangpt`, `kernels/` is `leangpt.kernels`, `csrc/` its extension.

Two libraries, neither with a Python binding (no Python headers): `_C` registers `torch.ops.leangpt`, and its file name carries
the torch it was built for, `_C-torch<version>.so`, so that `kernels/native.py` never loads one built for another torch;
`_engine.so`, the decode engine, knows no torch, and `kernels/decode.py` loads it with ctypes.
"""

import os
import shutil
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


class BuildNative(BuildExtension):
    """BuildExtension with the torch version in the file name and objects kept between builds."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/temp"  # also for editable installs, which would compile all again

    def get_ext_filename(self, fullname: str) -> str:
        suffix = f"-torch{torch.__version__}" if fullname.endswith("_C") else ""
        return f"{fullname.replace('.', os.sep)}{suffix}.so"

    def copy_extensions_to_source(self) -> None:
        for stale in Path("kernels").glob("_C-torch*.so"):
            stale.unlink()
        super().copy_extensions_to_source()


def native_extensions() -> list[Extension]:
    compiler = get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        print(
            f"leangpt: no C++ compiler ({compiler!r} not found): installing without the native extension; ops run on"
            " PyTorch's own. Install g++ or clang and run the installation again to get it.",
            file=sys.stderr,
        )
        return []
    headers = glob("csrc/**/*.h", recursive=True)
    return [
        CppExtension(
            "leangpt.kernels._C",
            [
                *("csrc/bindings.cpp", "csrc/bindings_train.cpp", "csrc/cpu/isa.cpp"),
                *sorted(glob("csrc/train/*.cpp")),
            ],
            depends=headers,
            py_limited_api=True,  # no libtorch_python: the library knows nothing of Python
            # torch adds the -std that its headers need; with OpenMP its parallel_for runs on its own threads
            extra_compile_args=[
                *("-O3", "-g0", "-fopenmp", "-ffp-contract=off"),
                *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unused-function"),
            ],
            extra_link_args=["-fopenmp"],
        ),
        Extension(
            "leangpt.kernels._engine",
            sorted(["csrc/engine.cpp", "csrc/batch.cpp", "csrc/kv_blocks.cpp", *glob("csrc/cpu/*.cpp")]),
            depends=headers,
            language="c++",
            py_limited_api=True,
            # no product and sum become one rounding but where the code says so: the same bits wherever it is inlined
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"),
                # g++ 12 takes the AVX-512 headers' undefined registers for mistakes
                *("-pthread", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
            ],
            extra_link_args=["-pthread"],
        ),
    ]


setup(
    packages=[
        "leangpt",
        *(f"leangpt.{name}" for name in find_packages("engine")),
        "leangpt.kernels",
    ],
    package_dir={"leangpt": "engine", "leangpt.kernels": "kernels"},
    package_data={"leangpt": ["py.typed"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
