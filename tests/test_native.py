"""The compiled extension: built, loaded, and refused where it does not fit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leangpt.kernels import native


@pytest.fixture
def extension(in_ci):
    if native.unavailable_reason:
        assert not in_ci, f"CI must test the extension: {native.unavailable_reason}"
        pytest.skip(native.unavailable_reason)


def run_isa(isa: str) -> subprocess.CompletedProcess:
    program = "from leangpt.kernels.decode import cpu_isa; print(cpu_isa())"
    env = os.environ | {"LEANGPT_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_isa_can_be_forced_where_the_cpu_has_it(isa):
    flags = {
        "portable": True,
        "avx2": "avx2",
        "avx512": "avx512_f",
        "avx512_bf16": "avx512_bf16",
        "amx": "amx_bf16",
    }
    flag = flags[isa]
    has_it = flag is True or torch.cpu.get_capabilities().get(flag, False)
    run = run_isa(isa)
    if has_it:
        assert run.stdout.strip() == isa, run.stderr
    else:
        assert (
            run.returncode == 1
            and f"LEANGPT_CPU_ISA={isa}: not supported by this CPU" in run.stderr
        )


@pytest.mark.usefixtures("extension")
def test_misspelt_isa_is_an_error():
    run = run_isa("avx1024")
    assert run.returncode == 1
    assert (
        "LEANGPT_CPU_ISA must be amx, avx512_bf16, avx512, avx2 or portable, got avx1024"
        in run.stderr
    )


@pytest.mark.usefixtures("extension")
def test_extension_needs_no_python():
    """No symbol of Python is wanted: one build serves every Python, and needs no headers of it."""
    library = next(Path(native.__file__).parent.glob("_C-torch*.so"))
    symbols = subprocess.run(
        ["nm", "-D", library], capture_output=True, text=True, check=True
    ).stdout
    assert "TORCH_LIBRARY" in symbols or "Library" in symbols  # nm has read it
    assert not [line for line in symbols.splitlines() if " U Py" in line or " U _Py" in line]


def reason_in(folder: Path) -> str:
    """What a copy of native.py in `folder` says of the libraries beside it."""
    shutil.copy(native.__file__, folder / "native.py")
    program = "import sys; sys.path.insert(0, sys.argv[1]); import native; print(native.unavailable_reason)"
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_missing_extension_says_what_to_do(tmp_path):
    assert reason_in(tmp_path).startswith("not built: install a C++ compiler")


def test_extension_of_another_torch_is_not_loaded(tmp_path):
    (tmp_path / "_C-torch1.0.so").write_bytes(b"not even a library")
    assert reason_in(tmp_path).startswith("built for torch 1.0, but torch")


@pytest.mark.usefixtures("extension")
def test_extension_without_gradients_is_not_used(monkeypatch):
    """As one is that was built before they came: a model would train on it, and learn nothing."""
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert native._load() == "built from older sources: run `make build` or reinstall leangpt"
