"""Every op, on every backend that has it: checked against float64, then timed, forward and backward.

    python benchmarks/bench_ops.py                  all cases, one table, one JSON document
    python benchmarks/bench_ops.py -k attention     those whose name matches

It is a pytest file with a pytest-benchmark group for each op, shape and direction, which this script runs and prints. A
backend whose result is wrong is not timed: it fails.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leangpt import machine
from leangpt.kernels import ops, use_backend

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off
from harness import ceilings, environment, print_json, print_table, synchronize

DEVICE = machine.default_device()
DTYPES = [torch.float32, *([torch.bfloat16] if machine.multiplies_bf16(DEVICE) else [])]
BACKENDS = ("reference", "triton", "native")


@dataclass(frozen=True)
class Case:
    """An op on inputs of one shape."""

    op: str
    shape: str
    inputs: tuple[tuple[int, ...], ...]  # shapes of the floating-point tensors
    call: Callable[..., Any]  # (*tensors) -> output or outputs
    flops: float = 0.0  # of the forward pass; 0: the op is bound by memory
    is_differentiable: bool = True

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            (torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.25).to(DEVICE, dtype)
            for shape in self.inputs
        ]


def _cases() -> list[Case]:
    B, T, C, H, D, V = 8, 256, 384, 6, 64, 4096
    F, N = 4 * C, B * T
    tokens = torch.randint(0, V, (B, T), device=DEVICE)
    angles = torch.randn(1, T, D // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    row = {
        name: torch.full((B,), value, device=DEVICE)
        for name, value in (("temperature", 0.8), ("top_k", 50), ("top_p", 0.9), ("min_p", 0.05))
    }
    row |= {name: torch.arange(B, device=DEVICE) for name in ("seed", "sample_index", "position")}
    heads = (B, T, H, D)
    return [
        Case("embedding", f"{N}x{C}", ((V, C),), lambda w: ops.embedding(tokens, w)),
        Case("layer_norm", f"{N}x{C}", ((N, C), (C,), (C,)), ops.layer_norm),
        Case("add_layer_norm", f"{N}x{C}", ((N, C), (N, C), (C,), (C,)), ops.add_layer_norm),
        Case("rms_norm", f"{N}x{C}", ((N, C), (C,)), ops.rms_norm),
        Case("add_rms_norm", f"{N}x{C}", ((N, C), (N, C), (C,)), ops.add_rms_norm),
        Case("rotary", f"{B}x{T}x{H}x{D}", (heads,), lambda x: ops.rotary(x, cos, sin)),
        Case("attention", f"{B}x{T}x{H}x{D}", (heads,) * 3, ops.attention, 2 * N * T * H * D),
        Case(
            "attention",
            f"decode {B}x1x{H}x{D}, 1024 keys",
            ((B, 1, H, D), (B, 1024, H, D), (B, 1024, H, D)),
            ops.attention,
            4 * B * 1024 * H * D,
            is_differentiable=False,
        ),
        Case("linear", f"{N}x{C} to {3 * C}", ((N, C), (3 * C, C)), ops.linear, 6 * N * C * C),
        Case("linear", f"{B}x{C} to {3 * C}", ((B, C), (3 * C, C)), ops.linear, 6 * B * C * C),
        Case(
            "mlp",
            f"gelu_tanh {N}x{C}",
            ((N, C), (F, C), (F,), (C, F), (C,)),
            lambda x, *weights: ops.mlp(x, *weights, "gelu_tanh"),
            4 * N * C * F,
        ),
        Case(
            "mlp",
            f"swiglu {N}x{C}",
            ((N, C), (2 * 1024, C), (C, 1024)),
            lambda x, w_in, w_out: ops.mlp(x, w_in, None, w_out, None, "swiglu"),
            6 * N * C * 1024,
        ),
        Case(
            "linear_cross_entropy",
            f"{N}x{C} to {V}",
            ((B, T, C), (V, C)),
            lambda h, w: ops.linear_cross_entropy(h, w, tokens),
            2 * N * C * V,
        ),
        Case(
            "sample",
            f"{B}x50257",
            ((B, 50257),),
            lambda logits: ops.sample(logits, **row),
            is_differentiable=False,
        ),
    ]


CASES = _cases()


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _gradients(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """What the backward pass gets for each output.

    Of both signs: PyTorch's layer_norm adds bfloat16 gradients up in bfloat16 on CPUs, where many ones end at 256.
    """
    generator = torch.Generator().manual_seed(1)
    outputs = _run(case, tensors)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def _run(case: Case, tensors: list[Tensor], gradients: list[Tensor] | None = None) -> list[Tensor]:
    """The outputs, or with their gradients those of all inputs."""
    if gradients is None:
        with torch.no_grad():
            return _outputs(case.call(*tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(_outputs(case.call(*leaves)), leaves, gradients))


def check(case: Case, backend: str, tensors: list[Tensor], gradients: list[Tensor] | None) -> None:
    """Raise unless the backend is within the project's error rule of the float64 reference."""
    dtype, backward = tensors[0].dtype, gradients is not None
    with use_backend("reference"):
        wide = None if gradients is None else [g.double() for g in gradients]
        truth = _run(case, [t.double() for t in tensors], wide)
        baseline = _run(case, tensors, gradients)
    with use_backend(backend):  # type: ignore[arg-type]
        results = _run(case, tensors, gradients)
    for result, ref, base in zip(results, truth, baseline, strict=True):
        if not result.is_floating_point():
            assert torch.equal(result, ref), f"{backend} {case.op}: other tokens than in float64"
            continue
        scale = max(1.0, ref.abs().max().item())
        limit = 64 * torch.finfo(dtype).eps * scale  # for the reference itself
        if backend != "reference":
            floor = torch.finfo(dtype).eps * scale
            limit = (4 if backward else 2) * (base.double() - ref).abs().max().item() + floor
        error = (result.double() - ref).abs().max().item()
        assert error <= limit, f"{backend} {case.op}: error {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.shape}")
def test_op(benchmark: Any, case: Case, backend: str, dtype: torch.dtype, backward: bool) -> None:
    if backward and not case.is_differentiable:
        pytest.skip("not differentiable")
    tensors = case.tensors(dtype)
    gradients = None
    with use_backend(backend):  # type: ignore[arg-type]
        try:
            if backward:
                gradients = _gradients(case, tensors)
            _run(case, tensors, gradients)
        except RuntimeError as error:
            if "was asked for, but" not in str(error):
                raise
            pytest.skip(str(error))
    check(case, backend, tensors, gradients)

    def timed() -> None:
        with use_backend(backend):  # type: ignore[arg-type]
            _run(case, tensors, gradients)
            synchronize(DEVICE)

    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"{case.op} {case.shape} {dtype} {direction}"
    benchmark.extra_info.update(
        op=case.op,
        shape=case.shape,
        dtype=str(dtype).removeprefix("torch."),
        direction=direction,
        backend=backend,
        gflop=case.flops * (3 if backward else 1) / 1e9,
        mbytes=_bytes(case, tensors) * (2 if backward else 1) / 1e6,
    )
    timed()
    benchmark.pedantic(timed, rounds=15, warmup_rounds=2)


def _bytes(case: Case, tensors: list[Tensor]) -> int:
    """What the forward pass must read and write at least: inputs and outputs once."""
    outputs = _run(case, tensors)
    read = 0 if case.op == "embedding" else sum(t.nbytes for t in tensors)
    return read + sum(t.nbytes for t in outputs) * (2 if case.op == "embedding" else 1)


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a measurement; `vs reference` is how many times faster than the reference in the same group."""
    reference = {
        r["group"]: r["stats"]["median"]
        for r in results
        if r["extra_info"]["backend"] == "reference"
    }
    rows = []
    for result in results:
        info, seconds = result["extra_info"], result["stats"]["median"]
        rows.append(
            {
                "op": info["op"],
                "shape": info["shape"],
                "dtype": info["dtype"],
                "direction": info["direction"],
                "backend": info["backend"],
                "p50_us": seconds * 1e6,
                "GB/s": info["mbytes"] / 1e3 / seconds,
                "GFLOP/s": info["gflop"] / seconds,
                "vs reference": reference[result["group"]] / seconds,
            }
        )
    return rows


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        options = [
            "-q",
            "--no-header",
            "--no-summary",
            "--benchmark-quiet",
            "--import-mode=importlib",
        ]
        options += [
            "-p",
            "no:cacheprovider",
            f"--benchmark-json={output}",
            "--benchmark-min-rounds=1",
        ]
        status = pytest.main([__file__, *options, "-o", "addopts=", *arguments])
        if not output.exists():
            return int(status)
        results = json.loads(output.read_text(encoding="utf-8"))["benchmarks"]
    limits, where = ceilings(DEVICE), environment(DEVICE)
    rows = rows_of(results)
    print()
    print_table(rows)
    print()
    print("ceilings: " + ", ".join(f"{name} {value:,}" for name, value in limits.items()))
    print_json({"benchmark": "ops", "environment": where, "ceilings": limits, "rows": rows})
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
