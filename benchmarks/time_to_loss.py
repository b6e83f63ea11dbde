"""Wall time to the same validation loss: nanoGPT's way of training in PyTorch, and `leangpt train`, in turn on one machine.

    python benchmarks/time_to_loss.py                                   # 10 minutes of the baseline, two seeds: half an hour
    python benchmarks/time_to_loss.py --plot curves.png
    python benchmarks/time_to_loss.py --tune 1e-3,2e-3,4e-3 --minutes 3  # the baseline alone, at each learning rate

The baseline is GPT-2's architecture in PyTorch's own ops with nanoGPT's optimization: AdamW (0.9, 0.99), weight decay 0.1 on
matrices, 100 steps of warm-up, a cosine down to a tenth, norms clipped at 1, dropout 0. Of eager and torch.compile, the one with
the quicker step trains. Its steps are as many as fit into `--minutes` at the measured speed, and the loss after the last one
is the target. Then leangpt trains as its demo does for `--ours-minutes`: its time is that of the first evaluation
which reaches the target. Both clocks start with the process, tokens are prepared before; both include evaluations, over
the same validation tokens. Every run is a process of its own; the last line is one JSON document.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent))  # where PYTHONSAFEPATH is set

from bench_train import PlainGPT
from harness import environment, print_json, print_table

from leangpt import GPT, GPTConfig, TrainConfig
from leangpt.data.batches import Batches, TokenDataset, evaluation_batches
from leangpt.demo import demo_config
from leangpt.machine import multiplies_bf16
from leangpt.training import train

EVALUATIONS = 12  # of a run
MEASURED_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Baseline:
    data: Path
    n_layer: int
    n_embd: int
    n_head: int
    batch_size: int
    learning_rate: float
    minutes: float
    seed: int
    seq_len: int = 256
    warmup_steps: int = 100

    def config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(
            vocab_size=vocab_size,
            max_seq_len=self.seq_len,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
        )

    def rate(self, step: int, num_steps: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - 1 - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@dataclasses.dataclass(frozen=True)
class Curve:
    """Bits per byte of the validation set against seconds since the process began."""

    name: str
    seed: int
    steps: int
    tokens_per_s: float
    points: list[tuple[float, int, float]]  # seconds, step, bits per byte

    @property
    def last(self) -> float:
        return self.points[-1][2]

    def seconds_to(self, target: float) -> float:
        """Of the first evaluation at or below the target; infinite where there is none."""
        return next((seconds for seconds, _, bits in self.points if bits <= target), math.inf)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16("cpu"))


@torch.no_grad()
def validate(model: nn.Module, data: TokenDataset, batch_size: int, seq_len: int) -> float:
    """Bits per byte, over the batches that `leangpt train` validates on."""
    losses = []
    for tokens, targets in evaluation_batches(data, batch_size, seq_len, TrainConfig.eval_batches):
        with autocast():
            losses.append(model(tokens, targets).item())
    return sum(losses) / len(losses) / math.log(2) / data.bytes_per_token


def baseline_step(
    run: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor
) -> None:
    with autocast():
        loss = run(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(run.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def step_seconds(run: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> float:
    """The median of a few steps after two to warm up."""
    times = []
    for _ in range(MEASURED_STEPS):
        tokens, targets = batches.next()
        start = time.perf_counter()
        baseline_step(run, optimizer, tokens, targets)
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[(MEASURED_STEPS - 2) // 2]


def train_baseline(options: Baseline, start: float) -> Curve:
    torch.manual_seed(options.seed)
    data, val_data = TokenDataset(options.data, "train"), TokenDataset(options.data, "val")
    config = options.config(data.vocab_size)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = PlainGPT(config)
        model.load_state_dict(GPT(config).state_dict())  # GPT-2's initialization
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)

    def batches() -> Batches:
        return Batches(data, options.batch_size, options.seq_len, options.seed)

    seconds = {}
    before = time.monotonic()
    for kind in ("eager", "torch.compile"):
        model, optimizer = fresh()
        run = torch.compile(model) if kind == "torch.compile" else model
        seconds[kind] = step_seconds(run, optimizer, batches())
    start += time.monotonic() - before  # to choose between them is not training
    kind = min(seconds, key=lambda name: seconds[name])
    num_steps = round(60 * options.minutes / seconds[kind])

    model, optimizer = fresh()
    run = torch.compile(model) if kind == "torch.compile" else model
    stream = batches()
    points = []
    evaluate_every = max(1, num_steps // EVALUATIONS)
    train_start = time.monotonic()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step, num_steps)
        baseline_step(run, optimizer, *stream.next())
        if (step + 1) % evaluate_every == 0 or step == num_steps - 1:
            bits = validate(run, val_data, options.batch_size, options.seq_len)
            points.append((time.monotonic() - start, step + 1, bits))
            print(f"{kind}, step {step + 1} of {num_steps}: {bits:.4f}", file=sys.stderr)
    speed = num_steps * options.batch_size * options.seq_len / (time.monotonic() - train_start)
    return Curve(f"PyTorch, {kind}", options.seed, num_steps, speed, points)


def train_ours(
    data: Path,
    minutes: float,
    seed: int,
    eval_sequences: int,
    start: float,
) -> Curve:
    """The run of `leangpt demo` with another seed, and validated on the sequences of the baseline."""
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config(Path(folder), data, minutes)
        config = dataclasses.replace(
            config,
            seed=seed,
            max_minutes=None,
            eval_every=2 * config.eval_every,
            eval_batches=eval_sequences // config.batch_size,
            progress=False,
        )
        summary = train(config)
        # what came before the loop of steps, and what little comes after it
        seconds_around = time.monotonic() - start - 60 * summary.minutes
        events = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
        points = [
            (seconds_around + event["seconds"], event["step"], event["bits_per_byte"])
            for event in events
            if event["event"] == "eval"
        ]
    return Curve("leangpt", seed, summary.steps, summary.tokens_per_s, points)


def in_a_process(function: Any, *arguments: Any) -> Curve:
    """Run it in a process of its own, whose clock begins with it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (*arguments, time.monotonic()))


def plot(curves: Sequence[Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4))
    for curve in curves:
        is_ours = curve.name == "leangpt"
        xs, ys = [p[0] / 60 for p in curve.points], [p[2] for p in curve.points]
        axis.plot(xs, ys, color="C0" if is_ours else "C1", label=f"{curve.name}, seed {curve.seed}")
    axis.set_xlabel("minutes since the process began")
    axis.set_ylabel("validation, bits per byte")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="`leangpt prepare`d")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the baseline")
    parser.add_argument("--ours-minutes", type=float, default=2.5)
    parser.add_argument("--seeds", default="1,2", help="a pair of runs for each")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of the baseline")
    parser.add_argument("--batch-size", type=int, default=8, help="of the baseline")
    parser.add_argument("--n-layer", type=int, default=4, help="of the baseline")
    parser.add_argument("--n-embd", type=int, default=128, help="of the baseline")
    parser.add_argument("--n-head", type=int, default=4, help="of the baseline")
    parser.add_argument("--tune", help="learning rates for the baseline, with commas between")
    parser.add_argument("--plot", type=Path, help="where to draw the curves, as PNG")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = ("data", "n_layer", "n_embd", "n_head", "batch_size", "learning_rate", "minutes")
    baseline = Baseline(**{name: getattr(options, name) for name in names}, seed=0)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    curves, rows = [], []
    if options.tune:
        for rate in map(float, options.tune.split(",")):
            tuned = dataclasses.replace(baseline, learning_rate=rate, seed=seeds[0])
            curve = in_a_process(train_baseline, tuned)
            rows.append({"learning_rate": rate, "steps": curve.steps, "bits_per_byte": curve.last})
            curves.append(curve)
    else:
        for seed in seeds:
            theirs = in_a_process(train_baseline, dataclasses.replace(baseline, seed=seed))
            sequences = TrainConfig.eval_batches * options.batch_size
            ours = in_a_process(train_ours, options.data, options.ours_minutes, seed, sequences)
            curves += [theirs, ours]
            seconds = theirs.points[-1][0], ours.seconds_to(theirs.last)
            for curve, time_to_target in zip((theirs, ours), seconds, strict=True):
                rows.append(
                    {
                        "engine": curve.name,
                        "seed": seed,
                        "steps": curve.steps,
                        "tokens_per_s": curve.tokens_per_s,
                        "bits_per_byte": curve.last,
                        "seconds_to_target": time_to_target,
                        "sooner": seconds[0] / time_to_target,
                    }
                )
    print_table([row | {"bits_per_byte": f"{row['bits_per_byte']:.4f}"} for row in rows])
    if options.plot:
        plot(curves, options.plot)
    manifest = (options.data / "manifest.json").read_bytes()
    print_json(
        {
            "environment": environment("cpu"),
            "data_sha256": hashlib.sha256(manifest).hexdigest(),
            "baseline": {**dataclasses.asdict(baseline), "data": str(options.data)},
            "curves": [dataclasses.asdict(curve) for curve in curves],
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()
