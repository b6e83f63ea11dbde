"""Every op, on every backend that has it: checked against float64, then timed, forward and backward, in turn.

    python benchmarks/bench_ops.py                     all cases: a table, and one JSON document as the last line
    python benchmarks/bench_ops.py -k attention        those whose name matches
    python benchmarks/bench_ops.py --compile           torch.compile of the reference too: it takes minutes to compile
    python benchmarks/bench_ops.py --plot FOLDER       each op at several sizes, and a picture of its speed against size

    python -m pytest benchmarks/bench_ops.py           the same cases in groups of pytest-benchmark

Contenders: `reference`, which is PyTorch with its best op (SDPA, F.cross_entropy, …), `torch` where PyTorch has a better
one, `compile`, `triton` and `native`. One whose result is wrong is not timed: the run fails.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from leangpt import machine
from leangpt.kernels import ops, use_backend

sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH is set
from harness import (
    ceilings,
    environment,
    peak_bytes,
    print_json,
    print_table,
    synchronize,
    time_interleaved,
)

DEVICE = machine.default_device()
DTYPES = [torch.float32, *([torch.bfloat16] if machine.multiplies_bf16(DEVICE) else [])]
BACKENDS = ("reference", "triton", "native")
SIZES = (1, 4, 16) if DEVICE == "cpu" else (1, 4, 16, 64)  # batches of a plot


@dataclass(frozen=True)
class Case:
    """An op on inputs of one shape."""

    op: str
    shape: str
    rows: int  # tokens or sequences: what a plot has as the size
    inputs: tuple[tuple[int, ...], ...]  # shapes of the floating-point tensors
    call: Callable[..., Any]  # (*tensors) -> output or outputs
    flops: float = 0.0  # of the forward pass; 0: the op is bound by memory
    is_differentiable: bool = True
    torch_call: Callable[..., Any] | None = None  # where PyTorch has a better op than the reference
    # how many inputs, from the first on, have the dtype of the run, the others being float32; None: all of them
    num_narrow: int | None = None

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Without float32 where it would be another case again."""
        return [d for d in DTYPES if self.num_narrow is None or d != torch.float32]

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        tensors = [
            (torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.25).to(DEVICE)
            for shape in self.inputs
        ]
        narrow = tensors[: self.num_narrow]
        return [t.to(dtype) for t in narrow] + tensors[len(narrow) :]


def cases(B: int = 8) -> list[Case]:
    """Of one layer of a small GPT, on B sequences of 256 tokens."""
    T, C, H, D, V = 256, 384, 6, 64, 4096
    F_, N = 4 * C, B * T
    tokens = torch.randint(0, V, (B, T), device=DEVICE)
    angles = torch.randn(1, T, D // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    lengths = torch.full((B,), T, dtype=torch.int32, device=DEVICE)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    row = {
        name: torch.full((B,), value, device=DEVICE)
        for name, value in (("temperature", 0.8), ("top_k", 50), ("top_p", 0.9), ("min_p", 0.05))
    }
    row |= {name: torch.arange(B, device=DEVICE) for name in ("seed", "sample_index", "position")}
    heads, packed, grouped = (B, T, H, D), (N, H, D), (B, T, 2, D)
    cached = ((B, 1, H, D), (B, 1024, H, D), (B, 1024, H, D))

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_varlen(q, k, v, cu_seqlens, T)

    def swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return ops.mlp(x, w_in, None, w_out, None, "swiglu")

    def adamw(*tensors: Tensor) -> tuple[Tensor, ...]:
        param, grad, *moments = tensors
        exp_avg, exp_avg_sq = (m.float() if m.dtype == torch.bfloat16 else m for m in moments)
        options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        ops.adamw_step([param], [grad], [exp_avg], [exp_avg_sq.abs_()], step=10, **options)
        return param, exp_avg, exp_avg_sq

    def muon(param: Tensor, grad: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        buffer = buffer.float() if buffer.dtype == torch.bfloat16 else buffer
        ops.muon_step([param], [grad], [buffer], lr=1e-3, momentum=0.95, weight_decay=0.1)
        return param, buffer

    return [
        Case("embedding", f"{N}x{C}", N, ((V, C),), lambda w: ops.embedding(tokens, w)),
        Case("layer_norm", f"{N}x{C}", N, ((N, C), (C,), (C,)), ops.layer_norm),
        Case("add_layer_norm", f"{N}x{C}", N, ((N, C), (N, C), (C,), (C,)), ops.add_layer_norm),
        Case(
            "add_layer_norm",
            f"{N}x{C}, as within autocast",
            N,
            ((N, C), (N, C), (C,), (C,)),
            ops.add_layer_norm,
            num_narrow=1,  # a branch beside a float32 stream
        ),
        Case(
            "rms_norm",
            f"{N}x{C}",
            N,
            ((N, C), (C,)),
            ops.rms_norm,
            torch_call=lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        ),
        Case("add_rms_norm", f"{N}x{C}", N, ((N, C), (N, C), (C,)), ops.add_rms_norm),
        Case("rotary", f"{B}x{T}x{H}x{D}", N, (heads,), lambda x: ops.rotary(x, cos, sin)),
        Case(
            "rotary_qkv",
            f"{B}x{T}x{H + 4}x{D}",
            N,
            ((B, T, H + 4, D),),
            lambda qkv: ops.rotary_qkv(qkv, cos, sin, 2),
        ),
        Case(
            "rotary_qkv",
            f"{B}x{T}x{H + 4}x{D}, QK-norm",
            N,
            ((B, T, H + 4, D), (D,), (D,)),
            lambda qkv, *weights: ops.rotary_qkv(qkv, cos, sin, 2, *weights),
        ),
        Case("attention", f"{B}x{T}x{H}x{D}", N, (heads,) * 3, ops.attention, 2 * N * T * H * D),
        Case(
            "attention",
            f"{B}x{T}x{H}x{D}, 2 key heads",
            N,
            (heads, grouped, grouped),
            ops.attention,
            2 * N * T * H * D,
        ),
        Case(
            "attention",
            f"decode {B}x1x{H}x{D}, 1024 keys",
            B,
            cached,
            ops.attention,
            4 * B * 1024 * H * D,
            is_differentiable=False,
        ),
        Case("attention_varlen", f"{B}x{T}x{H}x{D}", N, (packed,) * 3, varlen, 2 * N * T * H * D),
        Case("linear", f"{N}x{C} to {3 * C}", N, ((N, C), (3 * C, C)), ops.linear, 6 * N * C * C),
        Case("linear", f"{B}x{C} to {3 * C}", B, ((B, C), (3 * C, C)), ops.linear, 6 * B * C * C),
        *(
            Case(
                "activate",
                f"{activation} {N}x{F_}",
                N,
                ((N, F_),),
                lambda h, activation=activation: ops.activate(h, activation),
            )
            for activation in ("gelu_tanh", "swiglu")
        ),
        Case(
            "mlp",
            f"gelu_tanh {N}x{C}",
            N,
            ((N, C), (F_, C), (F_,), (C, F_), (C,)),
            lambda x, *weights: ops.mlp(x, *weights, "gelu_tanh"),
            4 * N * C * F_,
        ),
        Case(
            "mlp",
            f"swiglu {N}x{C}",
            N,
            ((N, C), (2 * 1024, C), (C, 1024)),
            swiglu,
            6 * N * C * 1024,
        ),
        Case(
            "linear_cross_entropy",
            f"{N}x{C} to {V}",
            N,
            ((B, T, C), (V, C)),
            lambda h, w: ops.linear_cross_entropy(h, w, tokens),
            2 * N * C * V,
        ),
        Case(
            "sample",
            f"{B}x50257",
            B,
            ((B, 50257),),
            lambda logits: ops.sample(logits, **row),
            is_differentiable=False,
        ),
        Case("adamw_step", f"{N}x{C}", N, ((N, C),) * 4, adamw, is_differentiable=False),
        Case(
            "muon_step",
            f"{F_}x{C}",
            N,
            ((F_, C),) * 3,
            muon,
            flops=5 * (4 * F_ * C**2 + 2 * C**3),
            is_differentiable=False,
        ),
        Case(
            "grad_norm",
            f"{N}x{C}",
            N,
            ((N, C),),
            lambda grad: ops.grad_norm([grad]),
            is_differentiable=False,
        ),
    ]


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For ops that change their arguments."""
    return [t.clone() for t in tensors]


def _gradients(case: Case, tensors: list[Tensor]) -> list[Tensor]:
    """What the backward pass gets for each output.

    Of both signs: PyTorch's layer_norm adds bfloat16 gradients up in bfloat16 on CPUs, where many ones end at 256.
    """
    generator = torch.Generator().manual_seed(1)
    outputs = _run(case.call, _clones(tensors))
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def _run(
    call: Callable[..., Any], tensors: Sequence[Tensor], gradients: list[Tensor] | None = None
) -> list[Tensor]:
    """The outputs, or with their gradients those of all inputs."""
    if gradients is None:
        with torch.no_grad():
            return _outputs(call(*tensors))
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(_outputs(call(*leaves)), leaves, gradients))


def contenders(case: Case, with_compile: bool) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Name, backend to run on, and call of each; backends that lack the op are told by calling them."""
    yield "reference", "reference", case.call
    if case.torch_call:
        yield "torch", "reference", case.torch_call
    if with_compile:
        yield "compile", "reference", torch.compile(case.call, dynamic=False)
    yield "triton", "triton", case.call
    yield "native", "native", case.call


def _can_run(backend: str, call: Callable[..., Any], *arguments: Any) -> bool:
    try:
        with use_backend(backend):  # type: ignore[arg-type]
            _run(call, *arguments)
    except RuntimeError as error:
        if "was asked for, but" not in str(error):
            raise
        return False
    return True


def check(
    case: Case,
    name: str,
    backend: str,
    call: Callable[..., Any],
    tensors: list[Tensor],
    gradients: list[Tensor] | None,
) -> None:
    """Raise unless a contender is within the project's error rule of the float64 reference."""
    dtype, backward = tensors[0].dtype, gradients is not None
    with use_backend("reference"):
        wide = None if gradients is None else [g.double() for g in gradients]
        truth = _run(case.call, [t.double() for t in tensors], wide)
        baseline = _run(case.call, _clones(tensors), gradients)
    with use_backend(backend):  # type: ignore[arg-type]
        results = _run(call, _clones(tensors), gradients)
    for result, ref, base in zip(results, truth, baseline, strict=True):
        if not result.is_floating_point():
            assert torch.equal(result, ref), f"{name} {case.op}: other tokens than in float64"
            continue
        scale = max(1.0, ref.abs().max().item())
        limit = 64 * torch.finfo(dtype).eps * scale  # for PyTorch itself
        if name in ("triton", "native"):
            floor = torch.finfo(result.dtype).eps * scale
            limit = (4 if backward else 2) * (base.double() - ref).abs().max().item() + floor
        error = (result.double() - ref).abs().max().item()
        assert error <= limit, f"{name} {case.op}: error {error:.2e} > {limit:.2e}"


def _bytes(case: Case, tensors: list[Tensor]) -> int:
    """What the forward pass must read and write at least: inputs and outputs once."""
    outputs = _run(case.call, _clones(tensors))
    read = 0 if case.op == "embedding" else sum(t.nbytes for t in tensors)
    return read + sum(t.nbytes for t in outputs) * (2 if case.op == "embedding" else 1)


def measure(
    case: Case, dtype: torch.dtype, backward: bool, limits: dict[str, float], with_compile: bool
) -> list[dict[str, Any]]:
    """A row for each contender that has the op, timed in turn."""
    tensors = case.tensors(dtype)
    gradients = _gradients(case, tensors) if backward else None
    timed: dict[str, Callable[[], Any]] = {}
    for name, backend, call in contenders(case, with_compile):
        if not _can_run(backend, call, _clones(tensors), gradients):
            continue
        check(case, name, backend, call, tensors, gradients)
        work = _clones(tensors)

        def run(
            backend: str = backend, call: Callable[..., Any] = call, work: list[Tensor] = work
        ) -> None:
            with use_backend(backend):  # type: ignore[arg-type]
                _run(call, work, gradients)

        timed[name] = run
    timings = time_interleaved(timed, DEVICE, rounds=15, warm_up=2)
    gflop = case.flops * (3 if backward else 1) / 1e9
    gbytes = _bytes(case, tensors) * (2 if backward else 1) / 1e9
    matmul = limits["matmul_bf16_gflops" if dtype == torch.bfloat16 else "matmul_fp32_gflops"]
    rows = []
    for name, timing in timings.items():
        speed = gflop / timing.p50 if case.flops else gbytes / timing.p50
        ceiling = matmul if case.flops else limits["memory_read_gb_per_s"]
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": str(dtype).removeprefix("torch."),
                "direction": "forward+backward" if backward else "forward",
                "contender": name,
                **{f"{q}_us": getattr(timing, q) * 1e6 for q in ("p20", "p50", "p80")},
                "GB/s": gbytes / timing.p50,
                "GFLOP/s": gflop / timing.p50,
                "% of ceiling": 100 * speed / ceiling,
                "vs reference": timings["reference"].p50 / timing.p50,
                "rows": case.rows,
                **peak_bytes(timed[name], DEVICE),
            }
        )
    return rows


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op} {case.shape}")
def test_op(benchmark: Any, case: Case, backend: str, dtype: torch.dtype, backward: bool) -> None:
    if backward and not case.is_differentiable:
        pytest.skip("not differentiable")
    if dtype not in case.dtypes:
        pytest.skip(f"not in {dtype}")
    tensors = case.tensors(dtype)
    gradients = _gradients(case, tensors) if backward else None
    if not _can_run(backend, case.call, _clones(tensors), gradients):
        pytest.skip(f"{backend} has no {case.op} here")
    check(case, backend, backend, case.call, tensors, gradients)

    def timed() -> None:
        with use_backend(backend):  # type: ignore[arg-type]
            _run(case.call, tensors, gradients)
            synchronize(DEVICE)

    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"{case.op} {case.shape} {dtype} {direction}"
    benchmark.pedantic(timed, rounds=15, warmup_rounds=2)


def plot(rows: list[dict[str, Any]], limits: dict[str, float], folder: Path) -> None:
    """A picture of each op: speed against size, a line for each contender, the machine's ceiling dashed."""
    import matplotlib.figure

    colours = {
        "reference": "#8c8c8c",
        "torch": "#4c72b0",
        "compile": "#8172b3",
        "triton": "#55a868",
        "native": "#dd8452",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        # the first shape of an op is the one that is drawn
        kind = next(row["shape"] for row in rows if row["op"] == op).split()[0]
        drawn = [r for r in rows if r["op"] == op and r["shape"].count(",") == 0]
        if not kind[0].isdigit():
            drawn = [r for r in drawn if r["shape"].startswith(kind)]
        dtypes = list(dict.fromkeys(row["dtype"] for row in drawn))
        directions = list(dict.fromkeys(row["direction"] for row in drawn))
        figure = matplotlib.figure.Figure(
            figsize=(4 * len(dtypes), 3 * len(directions)), layout="constrained"
        )
        grid = figure.subplots(len(directions), len(dtypes), squeeze=False)
        unit = "GFLOP/s" if any(row["GFLOP/s"] for row in drawn) else "GB/s"
        for i, direction in enumerate(directions):
            for j, dtype in enumerate(dtypes):
                axes = grid[i, j]
                chosen = [r for r in drawn if (r["direction"], r["dtype"]) == (direction, dtype)]
                for name in dict.fromkeys(row["contender"] for row in chosen):
                    line = {r["rows"]: r[unit] for r in chosen if r["contender"] == name}
                    sizes = sorted(line)
                    axes.plot(
                        sizes, [line[n] for n in sizes], "o-", label=name, color=colours[name]
                    )
                ceiling = limits["memory_read_gb_per_s"]
                if unit == "GFLOP/s":
                    ceiling = limits[f"matmul_{'bf16' if dtype == 'bfloat16' else 'fp32'}_gflops"]
                axes.axhline(ceiling, color="black", linestyle="--", linewidth=0.8)
                axes.set_xscale("log", base=2)
                axes.set_ylim(bottom=0)
                axes.set_title(f"{op}, {dtype}, {direction}", fontsize=9)
                axes.set_xlabel("rows")
                axes.set_ylabel(unit)
                axes.legend(fontsize=7)
        figure.savefig(folder / f"{op}.png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="TEXT", default="", help="cases whose name has this in it")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too")
    parser.add_argument("--plot", metavar="FOLDER", type=Path, help="PNGs of speed against size")
    options = parser.parse_args(arguments)
    limits = ceilings(DEVICE)
    chosen = [
        case
        for size in (SIZES if options.plot else (8,))
        for case in cases(size)
        if options.k in f"{case.op} {case.shape}"
    ]
    if not chosen:
        parser.error(f"no case has {options.k!r} in its name: {', '.join(c.op for c in cases())}")
    rows = []
    for case in tqdm(chosen, disable=None, leave=False):
        for dtype in case.dtypes:
            for backward in (False, True) if case.is_differentiable else (False,):
                rows += measure(case, dtype, backward, limits, options.compile)
    print_table([{k: v for k, v in row.items() if k != "rows"} for row in rows])
    print()
    print("ceilings: " + ", ".join(f"{name} {value:,}" for name, value in limits.items()))
    if options.plot:
        plot(rows, limits, options.plot)
    document = {"environment": environment(DEVICE), "ceilings": limits, "rows": rows}
    print_json({"benchmark": "ops", **document})


if __name__ == "__main__":
    main()
