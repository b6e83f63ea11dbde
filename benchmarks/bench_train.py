"""Steps of training on the CPU by this engine and by lean PyTorch, eager and compiled: checked first, then timed in turn.

    python benchmarks/bench_train.py                                    small models, in the dtypes this CPU multiplies
    python benchmarks/bench_train.py --cases small-bf16,gpt2-1x1024 --rounds 15 --plot train.png
    python benchmarks/bench_train.py --no-compile                       without the minutes that torch.compile takes

A step is forward, backward, clipping of the gradient norm and AdamW. PyTorch's model is written for this comparison: SDPA,
F.layer_norm, F.gelu, fused AdamW, the same parameters and random tokens; bf16 is autocast with float32 parameters, for both.
The losses of the first steps must agree before anything is timed. `peak` is the share of what the registers of this CPU
multiply at best. Each in a process of its own: `memory`, the highest resident memory of a step above that before it, gradients
and moments taken off; and `step_10_s`, the time from the start of Python to the end of the tenth step, where torch.compile
finds nothing that it compiled before.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
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

from leangpt import GPT, GPTConfig, machine
from leangpt.kernels import ops

CHECKED_STEPS = 3
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.01
CONTENDERS = ("leangpt", "torch", "torch.compile")
OURS, EAGER = CONTENDERS[:2]


DTYPES = [torch.float32, *([torch.bfloat16] if machine.multiplies_bf16("cpu") else [])]


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
    Case("gpt2-4x64", 12, 768, 12, 50257, 4, 64, DTYPES[-1]),
    Case("gpt2-1x1024", 12, 768, 12, 50257, 1, 1024, DTYPES[-1]),
]
DEFAULT_CASES = [case.name for case in CASES[:4] if case.dtype in DTYPES]


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


def our_update(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Clipping and AdamW by this engine's ops."""
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    step = 0

    def update() -> None:
        nonlocal step
        step += 1
        gradients = [p.grad for p in parameters if p.grad is not None]
        ops.adamw_step(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            step=step,
            lr=LEARNING_RATE,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            grad_scale=(1 / (ops.grad_norm(gradients) + 1e-6)).clamp(max=1.0),
        )

    return update


def torch_update(parameters: list[nn.Parameter]) -> Callable[[], None]:
    options = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.AdamW(parameters, fused=True, **options)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return update


def make_step(
    case: Case, contender: str, is_compared: bool = True
) -> tuple[nn.Module, Callable[[], float]]:
    """A model of the case, and what takes one step of its training and returns the loss.

    Models that are compared have the same weights, for which PyTorch's takes longer to make than one that is not.
    """
    torch.manual_seed(0)
    config = case.config()
    model: nn.Module = GPT(config) if contender == OURS else PlainGPT(config)
    if contender != OURS and is_compared:
        torch.manual_seed(0)
        model.load_state_dict(GPT(config).state_dict())
    run = torch.compile(model) if contender == "torch.compile" else model
    parameters = list(model.parameters())
    update = our_update(parameters) if contender == OURS else torch_update(parameters)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        shape = (case.batch_size, case.seq_len + 1)
        text = torch.randint(case.vocab_size, shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == torch.bfloat16):
            loss = run(text[:, :-1], text[:, 1:])
        loss.backward()
        update()
        model.zero_grad()
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


def print_time_of_step_10(case: Case, contender: str) -> None:
    _, step = make_step(case, contender, is_compared=False)
    for _ in range(10):
        step()
    print(time.time(), flush=True)
    os._exit(0)  # without waiting for the processes of the compiler


def seconds_to_step_10(case: Case, contender: str, threads: int) -> float:
    """From the start of a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        options = ["--cases", case.name, "--threads", str(threads), "--until-step-10", contender]
        start = time.time()
        process = subprocess.run(
            [sys.executable, __file__, *options],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return float(process.stdout.split()[-1]) - start


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
            "step_10_s": None,
            "memory_mb": None,
        }
        if options.starts:
            row["step_10_s"] = seconds_to_step_10(case, name, torch.get_num_threads())
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
    names = ", ".join(case.name for case in CASES)
    parser.add_argument("--cases", default=",".join(DEFAULT_CASES), help=f"of {names}")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure it too"
    )
    parser.add_argument(
        "--starts", action=argparse.BooleanOptionalAction, default=True, help="time to step 10"
    )
    parser.add_argument("--until-step-10", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, help="where to draw the tokens/s, as PNG")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    wanted = options.cases.split(",")
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}")
    if options.until_step_10:
        [case] = [case for case in CASES if case.name in wanted]
        print_time_of_step_10(case, options.until_step_10)
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
