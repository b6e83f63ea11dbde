"""`leangpt demo`: train a small GPT on the sources of Python's standard library and generate from it.

Every step is one that a user could take with `leangpt prepare`, `train` and `generate`; what is done is not done again.
"""

import dataclasses
import sys
from pathlib import Path

from .config import GPTConfig, SamplingParams, TrainConfig
from .data.prepare import PrepareConfig, prepare
from .generation.generator import Generator
from .training import train
from .training.checkpoint import load_config

PROMPTS = ("def __init__(self", "class Error", "import os")


def demo_config(out: Path, data: Path, minutes: float) -> TrainConfig:
    return TrainConfig(
        data=data,
        out=out,
        arch=GPTConfig.preset("tiny"),
        batch_size=8,
        learning_rate=3e-3,  # a model as narrow as this takes more than the default
        decay_fraction=0.75,
        warmup_steps=50,
        short_fraction=1 / 3,
        minutes=minutes,
        max_minutes=1.5 * minutes,  # should the machine get slower meanwhile
        eval_every=100,
        eval_batches=8,
        sample_every=0,
        checkpoint_every=200,
    )


def run_demo(out: Path, minutes: float) -> None:
    """Prepare the default corpus, train for about `minutes`, print samples and where the loss curve is."""
    prepared = PrepareConfig(vocab_size=2048)  # a small model is better off with few tokens
    try:
        prepare(prepared)
    except FileExistsError as error:
        raise FileExistsError(
            f"{prepared.out} holds other data than the demo's: remove this folder, or run `leangpt prepare --vocab-size"
            f" {prepared.vocab_size} --overwrite`; remove {out} too if it is a run on that data"
        ) from error
    config = demo_config(out, prepared.out, minutes)
    if (out / "train.json").exists():
        config = dataclasses.replace(load_config(out), resume=True)
    summary = train(config)
    if summary.reason == "interrupted":
        print("go on with: leangpt demo", file=sys.stderr)
        raise KeyboardInterrupt

    generator = Generator.from_pretrained(str(out))
    samples = [
        # so small a model repeats itself without end unless that is made dearer
        SamplingParams(
            max_new_tokens=96, temperature=0.8, top_p=0.95, repetition_penalty=1.15, seed=seed
        )
        for seed in range(len(PROMPTS))
    ]
    for completion in generator.generate(list(PROMPTS), samples):
        print(f"\n--- sample {completion.prompt_index + 1}")
        print(PROMPTS[completion.prompt_index] + completion.text)
    if summary.bits_per_byte is not None:
        print(f"\nvalidation: {summary.bits_per_byte:.3f} bits per byte")
    print(f"loss curve: {summary.loss_curve}")
    print(f"next: leangpt generate 'def main' --model {out} --stream")
