"""`leangpt demo`: train a small GPT on the sources of Python's standard library and generate from it.

Every step is one that a user could take with `leangpt prepare`, `train` and `generate`; what is done is not done again.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import torch

from .config import GPTConfig, SamplingParams, TrainConfig
from .data.batches import Batches, TokenDataset
from .data.prepare import PrepareConfig, prepare
from .generation.generator import Generator
from .machine import default_device
from .model import GPT
from .training import train
from .training.checkpoint import load_config
from .training.distributed import Group
from .training.loop import accumulate_gradients, autocast_of
from .training.optimizer import make_optimizer

PROMPTS = ("def __init__(self", "class Error", "import os")
MEASURED_STEPS = 12


def demo_config(out: Path, data: Path, minutes: float) -> TrainConfig:
    return TrainConfig(
        data=data,
        out=out,
        arch=GPTConfig.preset("mini"),
        batch_size=4,
        warmup_steps=50,
        max_minutes=1.5 * minutes,  # should the machine get slower meanwhile
        eval_every=100,
        eval_batches=8,
        sample_every=0,
        checkpoint_every=200,
    )


def measured_step_seconds(config: TrainConfig) -> float:
    """Seconds of a training step on this machine: the quickest of a few, for something else may run beside them."""
    data = TokenDataset(config.data, "train")
    group = Group(torch.device(default_device()))
    model = GPT(dataclasses.replace(config.arch, vocab_size=data.vocab_size)).to(group.device)
    optimizer = make_optimizer(model, config)
    batches = Batches(data, config.batch_size, model.config.max_seq_len, config.seed)
    autocast = autocast_of(config, group.device)
    quickest = math.inf
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        accumulate_gradients(model, *batches.next(), config.batch_size, group, autocast)
        optimizer.step()
        optimizer.zero_grad()
        quickest = min(quickest, time.perf_counter() - start)
    return 1.15 * quickest  # clipping, logs, evaluations, checkpoints, and most steps are slower


def run_demo(out: Path, minutes: float) -> None:
    """Prepare the default corpus, train for about `minutes`, print samples and where the loss curve is."""
    prepared = PrepareConfig(vocab_size=1024)  # a small model is better off with few tokens
    prepare(prepared)
    config = demo_config(out, prepared.out, minutes)
    if (out / "train.json").exists():
        config = dataclasses.replace(load_config(out), resume=True)
    else:
        # the schedule counts steps, so that a run resumes exactly: the clock is read once, before it
        steps = int(minutes * 60 / measured_step_seconds(config))
        config = dataclasses.replace(config, max_steps=max(100, min(steps, 20_000)))
    summary = train(config)
    if summary.reason == "interrupted":
        print("go on with: leangpt demo", file=sys.stderr)
        raise KeyboardInterrupt

    generator = Generator.from_pretrained(str(out))
    samples = [
        SamplingParams(max_new_tokens=96, temperature=0.7, top_p=0.95, seed=seed)
        for seed in range(len(PROMPTS))
    ]
    for completion in generator.generate(list(PROMPTS), samples):
        print(f"\n--- sample {completion.prompt_index + 1}")
        print(PROMPTS[completion.prompt_index] + completion.text)
    if summary.bits_per_byte is not None:
        print(f"\nvalidation: {summary.bits_per_byte:.3f} bits per byte")
    print(f"loss curve: {summary.loss_curve}")
    print(f"next: leangpt generate 'def main' --model {out} --stream")
