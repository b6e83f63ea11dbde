"""What setup.py decides about CUDA, and what came of it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from leangpt.kernels import decode

PROGRAM = """
import runpy, setuptools
setuptools.setup = lambda **options: print([e.name.rpartition(".")[2] for e in options["ext_modules"]])
runpy.run_path("setup.py")
"""
RELEASE = "Cuda compilation tools, release {}, V{}.1"


def decide(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py but for the build: what it prints, and the extensions it would build."""
    known = {
        k: v for k, v in os.environ.items() if not k.startswith(("LEANGPT_", "CUDA_", "TORCH_"))
    }
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=known | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """One that can tell its release, and nothing else."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime_api.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{RELEASE.format('13.0', '13.0')}'\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_with_a_toolkit(toolkit):
    done = decide(CUDA_HOME=str(toolkit))
    assert done.stdout.strip() == "['_C', '_engine', '_engine_cuda']"
    assert f"by {toolkit}/bin/nvcc" in done.stderr


def test_some_architectures(toolkit):
    done = decide(CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST="8.6 9.0+PTX")
    assert "CUDA kernels for 8.6 9.0+PTX" in done.stderr
    done = decide(CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST="Ampere")
    assert done.returncode and "must be like '8.0;9.0+PTX', got 'Ampere'" in done.stderr


def test_left_out(toolkit):
    done = decide(CUDA_HOME=str(toolkit), LEANGPT_CUDA="0")
    assert done.stdout.strip() == "['_C', '_engine']"
    assert "left out (LEANGPT_CUDA=0)" in done.stderr


@pytest.mark.parametrize(
    ("release", "reason"), [("12.4", "is 12.4: 12.8 or later is needed"), ("", "unknown version")]
)
def test_an_old_toolkit(toolkit, release, reason):
    text = RELEASE.format(release, release) if release else "no release"
    (toolkit / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '{text}'\n")
    done = decide(CUDA_HOME=str(toolkit))
    assert done.stdout.strip() == "['_C', '_engine']"
    assert "no CUDA kernels are built, since" in done.stderr and reason in done.stderr
    done = decide(CUDA_HOME=str(toolkit), LEANGPT_CUDA="1")
    assert done.returncode and "LEANGPT_CUDA=1 asks for the CUDA kernels, but" in done.stderr


def test_a_wrong_wish():
    done = decide(LEANGPT_CUDA="yes")
    assert done.returncode and "LEANGPT_CUDA must be 0 or 1, got 'yes'" in done.stderr


def test_the_cuda_engine_loads_without_a_gpu():
    if not decode._CUDA_PATH.exists():
        pytest.skip("the CUDA engine was not built")
    library = ctypes.CDLL(str(decode._CUDA_PATH))
    decode.declare_cuda(library)
    if library.leangpt_check_device(0):
        assert library.leangpt_error().startswith(b"there is no GPU to decode on: ")
    assert library.leangpt_kv_block_size() == decode.library().leangpt_kv_block_size()
