"""Steps of training on the CPU by this engine and by lean PyTorch, eager and compiled: checked first, then timed in turn.

    python benchmarks/bench_train.py                                    all cases but the long one
    python benchmarks/bench_train.py --cases small-bf16,gpt2-1x1024 --rounds 15 --plot train.png
    python benchmarks/bench_train.py --no-compile --memory              without the minutes that torch.compile takes

A step is forward, backward, clipping of the gradient norm and AdamW. PyTorch's model is written for this comparison: SDPA,
F.layer_norm, F.gelu, fused AdamW, the same parameters and random tokens; bf16 is autocast with float32 parameters, for both.
The losses of the first steps must agree before anything is timed. `peak` is the share of what the registers of this CPU
multiply at best; `memory` is the highest resident memory of a step above that before it, gradients and moments taken off,
each contender in a process of its own.
"""

import argparse
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH is set

from harness import ceilings, environment, print_json, print_table, time_interleaved

from leangpt import GPT, GPTConfig

CHECKED_STEPS = 3
CONTENDERS = ("leangpt", "torch", "torch.compile")
OURS, EAGER = CONTENDERS[:2]


@dataclass(frozen=True)
class Case:
    name: str
    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    batch_size: int
    seq_len: int
    dtype: torch.dtype

    def config(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=self.vocab_size,
            max_seq_len=self.seq_len,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
        )


CASES = [
    Case("tiny-fp32", 4, 128, 4, 65, 12, 64, torch.float32),
    Case("tiny-bf16", 4, 128, 4, 65, 12, 64, torch.bfloat16),
    Case("small-fp32", 6, 384, 6, 65, 12, 256, torch.float32),
    Case("small-bf16", 6, 384, 6, 65, 12, 256, torch.bfloat16),
    Case("gpt2-4x64", 12, 768, 12, 50257, 4, 64, torch.bfloat16),
    Case("gpt2-1x1024", 12, 768, 12, 50257, 1, 1024, torch.bfloat16),
]
DEFAULT_CASES = [case.name for case in CASES[:-1]]


class PlainBlock(nn.Module):
    """A block of GPT-2 in PyTorch's own ops, its parameters named as this engine's."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attn_out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp_in, self.mlp_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, -1).transpose(1, 2)
            for t in self.qkv(self.norm_1(x)).split(C, 2)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(out.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 in PyTorch's own ops."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.max_seq_len, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(config.n_embd)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.flatten())


def make_step(case: Case, contender: str) -> tuple[nn.Module, Callable[[], float]]:
    """A model of the case, and what takes one step of its training and returns the loss."""
    torch.manual_seed(0)
    config = case.config()
    model: nn.Module = GPT(config)
    if contender != OURS:
        plain = PlainGPT(config)
        plain.load_state_dict(model.state_dict())
        model = plain
    run = torch.compile(model) if contender == "torch.compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        shape = (case.batch_size, case.seq_len + 1)
        text = torch.randint(case.vocab_size, shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == torch.bfloat16):
            loss = run(text[:, :-1], text[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: the highest so far."""
    [kilobytes] = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def step_memory(case: Case, contender: str, threads: int) -> int:
    """Bytes that a step needs above model, gradients and moments; for a process of its own."""
    torch.set_num_threads(threads)
    model, step = make_step(case, contender)
    before = resident_bytes("VmRSS")
    for _ in range(3):
        step()
    kept = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    return max(0, resident_bytes("VmHWM") - before - kept)


def check(steps: dict[str, Callable[[], float]], case: Case) -> None:
    """Raise where a contender's losses are not PyTorch's."""
    losses = {name: [step() for _ in range(CHECKED_STEPS)] for name, step in steps.items()}
    limit = 0.03 if case.dtype == torch.bfloat16 else 1e-4
    for name, values in losses.items():
        for value, expected in zip(values, losses[EAGER], strict=True):
            if not abs(value - expected) <= limit:
                raise SystemExit(
                    f"{case.name}: {name} is wrong: losses {values}, not {losses[EAGER]}"
                )


def measure(
    case: Case, options: argparse.Namespace, limits: dict[str, float]
) -> list[dict[str, Any]]:
    names = [name for name in CONTENDERS if options.compile or name != "torch.compile"]
    starts, models, steps = {}, {}, {}
    for name in names:
        start = time.perf_counter()
        models[name], steps[name] = make_step(case, name)
        steps[name]()
        starts[name] = time.perf_counter() - start
    check(steps, case)
    timings = time_interleaved(steps, "cpu", rounds=options.rounds, warm_up=1)
    fastest = min(timings[name].p50 for name in names if name != OURS)
    tokens = case.batch_size * case.seq_len
    flops = GPT.flops_per_token(models[OURS], case.seq_len) * tokens
    kind = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    peak = limits.get(f"matmul_{kind}_gflops", limits["matmul_fp32_gflops"]) * 1e9
    rows = []
    for name, timing in timings.items():
        row = {
            "case": case.name,
            "engine": name,
            "tokens_per_s": tokens / timing.p50,
            "ms": timing.p50 * 1e3,
            "ms_p20": timing.p20 * 1e3,
            "ms_p80": timing.p80 * 1e3,
            "ratio": fastest / timing.p50,  # to the faster of PyTorch's two
            "peak": flops / timing.p50 / peak,
            "first_step_s": starts[name],
            "memory_mb": None,
        }
        if options.memory and name != "torch.compile":  # whose memory is the compiler's too
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                arguments = (case, name, torch.get_num_threads())
                row["memory_mb"] = pool.apply(step_memory, arguments) / 1e6
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        bars = [row for row in rows if row["case"] == name]
        axis.bar([row["engine"] for row in bars], [row["tokens_per_s"] for row in bars])
        axis.set_title(name)
        axis.tick_params(axis="x", rotation=60)
    axes[0][0].set_ylabel("tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default=",".join(DEFAULT_CASES), help="of %(default)s, gpt2-1x1024"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory", action="store_true", help="measure it too")
    parser.add_argument("--plot", type=Path, help="where to draw the tokens/s, as PNG")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    wanted = options.cases.split(",")
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    limits = ceilings("cpu")
    rows = []
    for case in CASES:
        if case.name in wanted:
            rows += measure(case, options, limits)
    print_table(rows)
    if options.plot:
        plot(rows, options.plot)
    print_json({"environment": environment("cpu"), "ceilings": limits, "rows": rows})


if __name__ == "__main__":
    main()
