"""What the GPU kernels compile to: `leangpt kernels`. Triton's at the shapes of two models, in bfloat16; CUDA's as they are.

GPT-2, with the dropout of its time, and Qwen3-8B for what GPT-2 lacks: RMSNorm, rotary positions, a gated MLP, grouped
heads of 128; with a sliding window, which models like it have.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from leangpt.kernels import contract, cuda_report, triton_ops
from leangpt.kernels.chips import CHIPS, predicted_bound
from leangpt.kernels.triton_report import Case, Empty, Row, Work, report, versions

from .config import GPTConfig

GPT2 = dataclasses.replace(GPTConfig.preset("gpt2"), dropout=0.1)
QWEN3_8B = GPTConfig(
    vocab_size=151936,
    max_seq_len=4096,
    n_embd=4096,
    n_head=32,
    n_kv_head=8,
    head_dim=128,
    n_inner=12288,
    norm="rms_norm",
    position="rotary",
    activation="swiglu",
    bias=False,
    qk_norm=True,
    sliding_window=1024,
)


AUTOCAST = " autocast"  # what is called within it

# step, lr, betas, eps, weight_decay, grad_scale
_ADAMW = (1, 1e-3, (0.9, 0.95), 1e-8, 0.1, None)


def cases() -> list[Case]:
    """A call of every op for each of the models."""
    return [*_cases("gpt2", GPT2, batch=8), *_cases("qwen3-8b", QWEN3_8B, batch=2)]


def _cases(model: str, config: GPTConfig, batch: int) -> Iterator[Case]:
    B, T = batch, config.max_seq_len
    H, H_kv, D = config.n_head, config.kv_heads, config.head_size
    C, F, V = config.n_embd, config.inner_size, config.vocab_size
    fused_F = F * (1 + config.is_gated)
    H_qkv = H + 2 * H_kv  # heads in a row of packed qkv
    x, row = Empty((B, T, C)), Empty((C,))
    bias = {n: Empty((n,)) if config.bias else None for n in (C, fused_F, H_qkv * D)}
    tokens = Empty((B, T), torch.int64)

    dropouts = {0.0: "", config.dropout: " dropout"} if config.dropout else {0.0: ""}

    def case(op: str, *arguments: Any, note: str = "", flops: Sequence[float] = (0, 0)) -> Case:
        function = getattr(triton_ops, op)
        if note == AUTOCAST:
            function = torch.autocast("cpu", torch.bfloat16)(function)
        return Case(model, op + note, function, arguments, *flops)

    def heads(n: int) -> Empty:
        """Part of packed qkv."""
        return Empty((B, T, n, D), strides=(T * H_qkv * D, H_qkv * D, D, 1))

    def linear_flops(n: int, k: int) -> tuple[float, float]:
        return 2.0 * B * T * n * k, 4.0 * B * T * n * k

    def attention_flops(window: int = T) -> tuple[float, float]:
        """Two products in forward, five in backward, of D each for a query and a key that it sees."""
        keys_seen = sum(min(t + 1, window) for t in range(T))
        product = 2.0 * B * H * D * keys_seen
        return 2 * product, 5 * product

    positions: tuple[Empty | None, ...] = (None, None)
    if config.position == "learned":
        positions = Empty((1, T), torch.int64), Empty((config.max_seq_len, C))
    yield case("embedding", tokens, Empty((V, C)), *positions)

    norm = config.norm
    parameters = (row, bias[C]) if norm == "layer_norm" else (row,)
    yield case(norm, x, *parameters, config.norm_eps)
    for dropout_p, note in dropouts.items():
        yield case(f"add_{norm}", x, x, *parameters, config.norm_eps, dropout_p, note=note)
    # a bfloat16 branch beside parameters and a residual stream in float32
    stream = Empty(x.shape, torch.float32)
    wide_parameters = [p and Empty(p.shape, torch.float32) for p in parameters]
    yield case(norm, stream, *wide_parameters, config.norm_eps, note=AUTOCAST)
    arguments = (x, stream, *wide_parameters, config.norm_eps, config.dropout)
    yield case(f"add_{norm}", *arguments, note=AUTOCAST)
    if config.qk_norm:
        yield case("rms_norm", heads(H), Empty((D,)), config.norm_eps, note=" of heads")

    qkv = Empty((H_qkv * D, C))
    yield case("linear", x, qkv, bias[H_qkv * D], flops=linear_flops(H_qkv * D, C))
    if config.position == "rotary":
        angles = Empty((1, T, D // 2), torch.float32, requires_grad=False)
        yield case("rotary", heads(H), angles, angles)
        arguments = (Empty((B, T, H_qkv, D)), angles, angles, H_kv)
        yield case("rotary_qkv", *arguments, None, None, 0.0)
        if config.qk_norm:
            norms = Empty((D,)), Empty((D,))
            yield case("rotary_qkv", *arguments, *norms, config.norm_eps, note=" norm")

    q, k, v = heads(H), heads(H_kv), heads(H_kv)
    flops = attention_flops()
    for dropout_p, note in dropouts.items():
        yield case("attention", q, k, v, None, None, None, dropout_p, note=note, flops=flops)
    packed = [Empty((B * T, n, D), strides=(H_qkv * D, D, 1)) for n in (H, H_kv, H_kv)]
    lengths = Empty((B + 1,), torch.int32)
    yield case("attention_varlen", *packed, lengths, T, None, None, 0.0, flops=flops)
    window = config.sliding_window or T // 4
    options = window, None, 0.0
    flops = attention_flops(window)
    yield case("attention_varlen", *packed, lengths, T, *options, note=" window", flops=flops)
    if config.sliding_window is not None:
        yield case("attention", q, k, v, None, *options, note=" window", flops=flops)

    weights = Empty((fused_F, C)), bias[fused_F], Empty((C, F)), bias[C]
    flops = linear_flops(fused_F + F, C)
    for dropout_p, note in dropouts.items():
        yield case("mlp", x, *weights, config.activation, x, dropout_p, note=note, flops=flops)
    residual = config.activation, stream, config.dropout
    yield case("mlp", x, *weights, *residual, note=AUTOCAST, flops=flops)

    # as where an adapter hangs on the matrices of the MLP
    yield case("activate", Empty((B, T, fused_F)), config.activation)

    # the gradients of the mean are computed in forward
    flops = (sum(linear_flops(V, C)), 0.0)
    head = Empty((V, C))
    yield case("linear_cross_entropy", x, head, tokens, -100, "mean", 0.0, 0.0, flops=flops)

    def state(dtype: torch.dtype) -> list[Empty]:
        """Of the matrices of a block, in training."""
        shapes = (H_qkv * D, C), (C, H * D), (fused_F, C), (C, F)
        return [Empty(shape, dtype, requires_grad=False) for shape in shapes]

    wide = state(torch.float32)
    yield case("adamw_step", wide, wide, wide, wide, None, *_ADAMW)
    narrow = state(torch.bfloat16)
    yield case("adamw_step", narrow, narrow, wide, wide, wide, *_ADAMW, note=" masters")

    N = 64  # sequences of a step of generation
    integer, fraction = Empty((N,), torch.int64), Empty((N,), torch.float32)
    filters = fraction, integer, fraction, fraction
    yield case("sample", Empty((N, V)), *filters, integer, integer, integer)


def make_report(
    archs: Sequence[str], agreed: contract.Kernels | None = None
) -> tuple[list[Row], list[cuda_report.Kernel]]:
    """The Triton kernels, and those of CUDA where they can be compiled; `agreed` as for `triton_report.report`."""
    for arch in archs:
        if arch not in CHIPS:
            raise ValueError(f"arch must be one of {', '.join(CHIPS)}, got {arch!r}")
    rows = report(cases(), archs, agreed)
    return rows, [] if cuda_report.obstacle() else cuda_report.report(archs, agreed)


def all_versions() -> dict[str, str]:
    """Of all programs that decide about the code."""
    return versions() | ({} if cuda_report.obstacle() else {"nvcc": cuda_report.version()})


def check(archs: Sequence[str], anew: bool = False) -> None:
    """Print what is worse than the contract says; raises ValueError where something is.

    Kernels whose code is that of the contract need not be compiled, but they are if `anew`.
    """
    agreed = contract.load(all_versions())
    obstacle = cuda_report.obstacle()
    if obstacle:
        print(f"the CUDA kernels are left out: {obstacle}")
    expected = {
        name: {arch: figures for arch, figures in kernel.items() if arch in archs}
        for name, kernel in agreed.items()
        if not (obstacle and name.startswith(f"{cuda_report.PREFIX} "))
    }
    kernels = by_name(chain(*make_report(archs, None if anew else agreed)))
    lines = contract.differences(expected, kernels)
    if lines:
        print("\n".join(lines))
        raise ValueError(
            f"{len(lines)} differences from {contract.PATH.name}; if they are wanted, accept them with"
            " `leangpt kernels update`"
        )
    count = sum(map(len, kernels.values()))
    changed = sum(
        figures["digest"] != expected[name][arch].get("digest")
        for name, rows in kernels.items()
        for arch, figures in rows.items()
    )
    print(f"{count} kernels and architectures are as {contract.PATH.name} says, or better")
    if changed:
        print(
            f"{changed} of them have changed: compiling them again is saved by `leangpt kernels update`"
        )


def update(anew: bool = False) -> None:
    """Write the contract, with all kernels that have changed since the last one; with all there are if `anew`."""
    obstacle = cuda_report.obstacle()
    if obstacle:
        raise ValueError(f"the contract has the CUDA kernels too, and {obstacle}")
    versions = all_versions()
    agreed = None if anew or not contract.is_of(versions) else contract.load(versions)
    contract.save(versions, by_name(chain(*make_report(list(CHIPS), agreed))))
    print(f"wrote {contract.PATH}")


def by_name(rows: Iterable[Row | cuda_report.Kernel]) -> contract.Kernels:
    """As the contract has them."""
    kernels: contract.Kernels = {}
    for row in rows:
        kernels.setdefault(row.name, {})[row.arch] = contract.with_digest(row.code, row.figures)
    return kernels


def to_json(rows: Sequence[Row], cuda_kernels: Sequence[cuda_report.Kernel] = ()) -> str:
    documents = [
        {
            **dataclasses.asdict(row.work),
            "kernel": row.kernel,
            "arch": row.arch,
            "constants": row.constants,
            **row.figures,
            "predicted_bound": _predicted_bound(row.work, row.arch),
        }
        for row in rows
    ]
    cuda = [
        {"source": kernel.source, "kernel": kernel.function, "arch": kernel.arch, **kernel.figures}
        for kernel in cuda_kernels
    ]
    document = {"versions": all_versions(), "rows": documents, "cuda": cuda}
    return json.dumps(document, indent=1, default=str)


def _predicted_bound(work: Work, arch: str) -> str:
    return predicted_bound(work.flops, work.num_bytes, CHIPS[arch])


def to_text(rows: Sequence[Row], cuda_kernels: Sequence[cuda_report.Kernel] = ()) -> str:
    """A paragraph for each direction of each op, and in it one for each kernel, with a line an architecture; then CUDA's."""
    programs = ", ".join(f"{name} {version}" for name, version in all_versions().items())
    lines = [
        f"Compiled by {programs}; nothing was run. Numbers of instructions are those in the code. A bound is predicted",
        "from the least work of the op, on paper, and the figures of the chips, on paper too: it is no measured speed.",
    ]
    ops: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        ops.setdefault((row.work.model, row.work.op, row.work.direction), []).append(row)
    for op, rows_of_op in ops.items():
        lines += ["", f"{' '.join(op)}: {_work_in_words(rows_of_op)}"]
        kernels: dict[str, list[Row]] = {}
        for row in rows_of_op:
            kernels.setdefault(row.kernel, []).append(row)
        for kernel, rows_of_kernel in kernels.items():
            lines.append(f"  {kernel}: {_configuration_in_words(rows_of_kernel[0])}")
            lines += [f"    {_figures_in_words(row)}" for row in rows_of_kernel]
    if cuda_kernels:
        lines += [
            "",
            "CUDA kernels of the decode step; shared memory is what is not asked for at a launch",
        ]
    instances: dict[str, list[cuda_report.Kernel]] = {}
    for instance in cuda_kernels:
        instances.setdefault(f"{instance.source} {instance.function}", []).append(instance)
    for name, on_archs in instances.items():
        lines.append(f"  {name}: warps={on_archs[0].figures['num_warps']}")
        lines += [f"    {_figures_in_words(instance)}" for instance in on_archs]
    return "\n".join(lines)


def _work_in_words(rows: Sequence[Row]) -> str:
    work = rows[0].work
    parts = [f"{work.flops / 1e9:.1f} GFLOP"] if work.flops else []
    parts.append(f"{work.num_bytes / 1e6:.0f} MB")
    if work.library_products:
        parts.append(f"{work.library_products} products are the library's")
    archs = dict.fromkeys(row.arch for row in rows)
    bounds = [f"{CHIPS[arch].name} by {_predicted_bound(work, arch)}" for arch in archs]
    return f"{', '.join(parts)}; predicted to be bound on {', '.join(bounds)}"


def _configuration_in_words(row: Row) -> str:
    constants = [f"{name}={value}" for name, value in row.constants.items()]
    return " ".join([*constants, f"warps={row.figures['num_warps']}"])


def _figures_in_words(row: Row | cuda_report.Kernel) -> str:
    figures = row.figures
    blocks = figures["blocks_per_sm"]
    occupancy = f"{blocks} blocks, {blocks * figures['num_warps']} warps an SM"
    parts = [
        f"{row.arch:6} {figures['registers']:3} registers {figures['spills']:3} spills",
        f"{figures['shared_bytes'] / 1024:5.1f} KB shared",
        occupancy if blocks else "more shared memory than there is",
        *(f"{kind} {n}" for kind, n in (figures["tensor_cores"] | figures["copies"]).items()),
        f"loads {_accesses_in_words(figures['loads'])}",
        f"stores {_accesses_in_words(figures['stores'])}",
    ]
    return "  ".join(parts)


def _accesses_in_words(accesses: dict[str, int]) -> str:
    return ", ".join(f"{n} of {width} bits" for width, n in accesses.items()) or "none"
