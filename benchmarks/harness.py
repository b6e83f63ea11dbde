"""What every benchmark shares: the machine's measured ceilings, medians of interleaved runs, a table, one JSON document.

Shared machines are noisy: compare only what ran side by side in one run, by medians and ratios. The last line on standard
output is one JSON document with everything measured and what it was measured on.
"""

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leangpt import machine
from leangpt.kernels import decode

ROOT = Path(__file__).resolve().parents[1]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds that counted."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(seconds), cuts[7])


class _CpuTimer:
    def time(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class _GpuTimer:
    """By events on the stream, each call with a cold L2 cache, as between the ops of a model."""

    def __init__(self) -> None:
        self.cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def time(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], device: str, rounds: int = 20, warm_up: int = 3
) -> dict[str, Timing]:
    """Time several calls in turn, A B C A B C …, so that a change of the machine's speed meets all of them."""
    timer = _GpuTimer() if device == "cuda" else _CpuTimer()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warm_up + rounds):
        for name, call in calls.items():
            elapsed = timer.time(call)
            if round_ >= warm_up:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


def peak_bytes(call: Callable[[], Any], device: str) -> dict[str, int]:
    """The memory that a call takes above what is there, where the device counts it."""
    if device != "cuda":
        return {}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches at best: matrix products in GFLOP/s, reading of memory in GB/s.

    The peak of products is that of a large one, or that of the CPU's registers where the native engine can measure it.
    """
    result = {"matmul_fp32_gflops": machine.matmul_peak(torch.float32, device) / 1e9}
    if machine.multiplies_bf16(device):
        result["matmul_bf16_gflops"] = machine.matmul_peak(torch.bfloat16, device) / 1e9
    if device == "cpu" and not decode.unavailable_reason:
        for kind, name in enumerate(result):
            result[name] = max(result[name], decode.multiply_rate(kind) / 1e9)
    memory = torch.ones(2**27, device=device)  # 512 MiB: more than any cache
    timing = time_interleaved({"read": memory.sum}, device, rounds=9)["read"]
    result["memory_read_gb_per_s"] = memory.nbytes / timing.p20 / 1e9
    return {name: round(value, 1) for name, value in result.items()}


def environment(device: str) -> dict[str, Any]:
    """Where and when a result was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": commit.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name() if device == "cuda" else machine.cpu_model(),
        "isa": decode.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same columns, numbers to the right."""
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    is_number = [isinstance(rows[0][column], int | float) for column in columns]
    for line in [columns, *cells]:
        aligned = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, is_number, strict=True)
        )
        print("  ".join(aligned).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        if 0 < abs(value) < 0.1:
            return f"{value:.2g}"
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return str(value)


def print_json(document: Mapping[str, Any]) -> None:
    """The last line of every benchmark."""
    print(json.dumps(document, ensure_ascii=False))
