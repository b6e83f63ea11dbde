"""What this machine offers: threads, instructions, backends, measured speed, versions."""

import functools
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from leangpt.kernels import decode, describe_backends


def use_threads() -> None:
    """Let torch use $LEANGPT_THREADS threads, where that is set."""
    wanted = os.environ.get("LEANGPT_THREADS")
    if wanted is None:
        return
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"LEANGPT_THREADS must be a positive number, got {wanted!r}")
    torch.set_num_threads(int(wanted))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16, so that it is faster than float32 and not emulated."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@functools.cache
def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of torch's matrix product, the best of a few tenths of a second."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def decode_engine() -> str:
    """What generates text on this CPU."""
    if decode.unavailable_reason:
        return f"PyTorch, slowly; the native one is {decode.unavailable_reason}"
    return f"native, {decode.cpu_isa()} instructions, {decode.num_threads()} threads"


def describe() -> dict[str, str]:
    """Everything `leangpt info` prints, in order."""
    device = default_device()
    rows = {
        "leangpt": _version("leangpt"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "decode engine": decode_engine(),
        "decode engine on CUDA": decode.cuda_obstacle() or "ready",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "bf16 products": "in hardware"
        if multiplies_bf16(device)
        else "emulated, slow: float32 is used",
    }
    if device == "cuda":
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            rows[f"gpu {i}"] = (
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
            )
    else:
        rows["gpu"] = "none that torch can use"
    for backend, state in describe_backends(device).items():
        rows[f"backend {backend}"] = state
    rows["torch"] = (
        torch.__version__
    )  # with the kind of build, which its package's version may lack
    for package in ("triton", "numpy", "tokenizers", "tiktoken", "safetensors"):
        rows[package] = _version(package)
    return rows
