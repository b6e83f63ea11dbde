"""Set-up of every test: import paths, offline mode, seeds, and poisoned memory."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the clone's own folders must not be importable: ./kernels would shadow Hugging Face's package of that name
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny tensors: threads would only wait for each other
_TIKTOKEN_CACHE = ROOT.parent / "shared" / "data" / "tiktoken_cache"
if _TIKTOKEN_CACHE.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(_TIKTOKEN_CACHE))

import pytest
import torch

from leangpt.kernels import decode


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN, so that an op which forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def in_ci() -> bool:
    return os.environ.get("CI") == "true"


@pytest.fixture(scope="session")
def native_engine(in_ci: bool) -> None:
    """Skip where the native decode engine was not built; CI must test it."""
    if decode.unavailable_reason:
        assert not in_ci, f"CI must test the native engine: {decode.unavailable_reason}"
        pytest.skip(decode.unavailable_reason)
