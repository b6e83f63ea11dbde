"""A tiny data folder and model, and training sessions in processes of their own, which may be killed at any point."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import leangpt.training.checkpoint
import leangpt.training.loop
import leangpt.training.optimizer
from leangpt import GPTConfig, TrainConfig
from leangpt.data import batches
from leangpt.data.prepare import PrepareConfig, prepare
from leangpt.training import train

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
    "potions",
    "by",
    "moonlight",
]

# Children are forked from a server that has imported everything, so that a session starts at once: also what is imported at
# the first optimizer step and at the first plot.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["leangpt.training", "leangpt.data.prepare", "torch._dynamo", "matplotlib.backends.backend_agg"]
)


def make_data(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Prepare sentences of a few words, in bytes."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=40)) + ".\n"}) + "\n")
    config = PrepareConfig((str(folder / "text.jsonl"),), folder / "data", "byte", val_fraction=0.2)
    prepare(config, progress=False)
    return folder / "data"


TINY = GPTConfig(
    n_layer=1, n_head=2, n_embd=16, max_seq_len=32, norm="rms_norm", position="rotary", bias=False
)


def tiny_config(data: Path, out: Path, **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "arch": TINY,
        "batch_size": 4,
        "max_steps": 20,
        "warmup_steps": 4,
        "eval_every": 10,
        "eval_batches": 2,
        "checkpoint_every": 5,
        "sample_every": 0,
        "device": "cpu",
        "dtype": "float32",
        "tensorboard": False,
        "progress": False,
    }
    return TrainConfig(data=data, out=out, **defaults | options)


def without_measuring() -> None:
    """Spare the second in which the machine's matrix product is timed."""
    leangpt.training.loop.matmul_peak = lambda dtype, device: 1e12


Hook = Callable[[int], None]


def run_sessions(
    *configs: TrainConfig, hooks: Sequence[Hook] = (), timeout: float = 60
) -> list[int]:
    """Train with each config at once, each in its own process; returns the exit codes (negative: the signal).

    Every hook is called in the child before, with the index of its config. What `train` raised is in `out` with the suffix
    .error.
    """
    children = [
        PROCESSES.Process(target=_session, args=(config, hooks, i))
        for i, config in enumerate(configs)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert None not in codes, f"a process hangs: {codes}"
    return codes


def _session(config: TrainConfig, hooks: Sequence[Hook], index: int) -> None:
    torch.set_num_threads(1)
    without_measuring()
    for hook in hooks:
        hook(index)
    try:
        summary = train(config)
    except (RuntimeError, OSError, ValueError) as error:
        config.out.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    raise SystemExit(130 if summary.reason == "interrupted" else 0)


def at_step(step: int, act: Callable[[], Any]) -> None:
    """Call `act` when the training loop begins the step after `step` steps."""
    loop: Any = leangpt.training.loop
    seed_step = loop.seed_step

    def seed_and_act(seed: int, current: int, group: Any) -> None:
        if current == step:
            act()
        seed_step(seed, current, group)

    loop.seed_step = seed_and_act


@dataclass
class SignalAt:
    """Sends itself a signal at a step, in the child of one index."""

    step: int
    signum: int
    only: int = 0

    def __call__(self, index: int) -> None:
        if index == self.only:
            at_step(self.step, lambda: os.kill(os.getpid(), self.signum))


@dataclass
class FailAt:
    """Raises an error at a step, in the child of one index."""

    step: int
    only: int = 0

    def __call__(self, index: int) -> None:
        def fail() -> None:
            raise RuntimeError("planted")

        if index == self.only:
            at_step(self.step, fail)


@dataclass
class LimitFileSizeAt:
    """No file can grow beyond a size from a step on, as if the disk were full."""

    step: int
    size_bytes: int

    def __call__(self, index: int) -> None:
        limits = (self.size_bytes, resource.RLIM_INFINITY)
        at_step(self.step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))


@dataclass
class BreakGradients:
    """Multiplies the gradients of some steps, which a detector that has warmed in after 6 steps then skips."""

    factors: dict[int, float]

    def __call__(self, index: int) -> None:
        leangpt.training.optimizer.WARM_IN_STEPS = 6
        loop: Any = leangpt.training.loop
        accumulate_gradients = loop.accumulate_gradients
        pending: list[float] = []
        for step, factor in self.factors.items():
            at_step(step, lambda factor=factor: pending.append(factor))

        def accumulate(model: Any, *args: Any) -> Any:
            result = accumulate_gradients(model, *args)
            if pending:
                factor = pending.pop()
                for p in model.parameters():
                    p.grad *= factor
            return result

        loop.accumulate_gradients = accumulate


@dataclass
class KillAtEvent:
    """Kills the process (SIGKILL) at the n-th of the events that matter, of all or of those of one name.

    Events: the begin of a step; before and after every sync, rename and removal of files; a file of moments half written.
    """

    number: int
    trace: Path  # gets the name of the event
    name: str | None = None
    count: int = 0

    def __call__(self, index: int) -> None:
        for module, name in (
            (os, "fsync"),
            (os, "rename"),
            (os, "replace"),
            (shutil, "rmtree"),
            (leangpt.training.loop, "seed_step"),
        ):
            setattr(module, name, self._watched(name, getattr(module, name)))
        checkpoint: Any = leangpt.training.checkpoint
        save_file = checkpoint.save_file

        def save_half(tensors: Any, path: Path) -> None:
            save_file(tensors, path)
            self._event("half a file", lambda: os.truncate(path, path.stat().st_size // 2))

        checkpoint.save_file = save_half

    def _watched(self, name: str, function: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._event(f"before {name}")
            result = function(*args, **kwargs)
            self._event(f"after {name}")
            return result

        return watched

    def _event(self, name: str, act: Callable[[], Any] = lambda: None) -> None:
        self.count += self.name in (None, name)
        if self.count == self.number:
            act()
            with self.trace.open("a") as file:
                file.write(f"{name}\n")
            os.kill(os.getpid(), signal.SIGKILL)


class Float64:
    """Weights and all that follows from them are doubles."""

    def __call__(self, index: int) -> None:
        torch.set_default_dtype(torch.float64)


class IgnoreSpaces:
    """Targets that are spaces do not count, and in every fourth sequence none of the first half does."""

    def __call__(self, index: int) -> None:
        shifted = batches._shifted

        def masked(windows: Any) -> Any:
            tokens, targets = shifted(windows)
            targets[targets == ord(" ")] = -100
            uneven = tokens[:, 0] % 4 == 0
            targets[uneven, : targets.shape[1] // 2] = -100
            return tokens, targets

        batches._shifted = masked


@dataclass
class JoinGroup:
    """Makes the child of an index that rank of a group on this machine, as torchrun does."""

    size: int
    port: int

    def __call__(self, index: int) -> None:
        os.environ |= {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def content(out: Path) -> dict[str, Any]:
    """All that a run determines: hashes of weights and moments, state and log without clock times."""
    newest = max((out / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())["state"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "checkpoint": newest.name,
        "model": hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": hashlib.sha256((newest / "optimizer.safetensors").read_bytes()).hexdigest(),
        "state": {k: v for k, v in state.items() if "seconds" not in k},
        "best": json.loads((out / "best.json").read_text()),
        "log": [
            {k: v for k, v in line.items() if k not in ("tokens_per_s", "seconds")} for line in log
        ],
        "checkpoints": sorted(path.name for path in (out / "checkpoints").iterdir()),
    }
