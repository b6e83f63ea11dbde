"""The training loop: data cursor, forward, backward, clip, step, evaluate, sample, checkpoint.

A run resumes bit for bit: its weights are a function of the options and of the number of steps. All that one step hands to the
next is in the checkpoint; random generators (dropout) are seeded at each step from (seed, step, rank), and the schedule counts
steps, not seconds. That holds for the same machine and threads, and on GPUs as far as PyTorch's own ops are deterministic there.
"""

import copy
import dataclasses
import itertools
import math
import sys
import time
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leangpt.kernels import log_backend, ops

from .. import __version__
from ..config import GPTConfig, SamplingParams, TrainConfig
from ..data.batches import Batches, TokenDataset, evaluation_batches
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..files import read_json
from ..generation.generator import Generator
from ..machine import matmul_peak, multiplies_bf16
from ..model import GPT
from ..pretrained import load_model
from .checkpoint import (
    TrainState,
    begin_session,
    checkpoint_folder,
    find_run,
    load_checkpoint,
    load_config,
    resume_command,
    save_checkpoint,
)
from .distributed import Group, process_group
from .interrupt import Interrupt
from .logs import Console, RunLog
from .optimizer import learning_rate, make_optimizer
from .plot import plot_losses
from .summary import Reason, Summary, read_summary, write_summary

# for `minutes`: at least so many steps, and such a share of the time
MEASURED_STEPS, MEASURED_SHARE = 12, 0.02


class TrainingError(RuntimeError):
    """Training cannot go on: too many steps in a row had to be skipped."""


def train(config: TrainConfig) -> Summary:
    """Train a model, or go on with the run in `config.out`; a run that has come to its end is left as it is.

    SIGINT (Ctrl-C) and SIGTERM end it after the step, with a checkpoint; the reason in the summary is "interrupted" then. Under
    torchrun every process calls this; the first one writes and prints.

    Raises:
        FileExistsError: there is a run in `config.out`, and `config.resume` is not set.
        FileNotFoundError, ValueError: data, model, batch size or the run to resume do not fit the options.
        OSError: a checkpoint could not be written.
        TrainingError: `config.max_skipped` steps in a row were skipped; a checkpoint was written.
    """
    with process_group(config.device) as group, Interrupt() as interrupt:
        return _train(config, group, interrupt)


def _train(config: TrainConfig, group: Group, interrupt: Interrupt) -> Summary:
    train_data, val_data = TokenDataset(config.data, "train"), TokenDataset(config.data, "val")
    tokenizer = load_tokenizer(config.data)
    if config.minutes is not None and config.resume and (config.out / "train.json").exists():
        config = dataclasses.replace(config, max_steps=load_config(config.out).max_steps)
    checkpoint, state = find_run(config, train_data.manifest)
    reason = stop_reason(config, state)
    if reason is not None and (config.out / "summary.json").exists():
        return conclude(config, group, read_summary(config.out))

    log_backend(group.device.type)
    dtype = compute_dtype(config, group.device)
    environment = describe_environment(group, dtype)
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer, checkpoint).to(group.device)
    optimizer = make_optimizer(model, config)
    if checkpoint is not None:
        load_checkpoint(checkpoint, model, optimizer, environment)
    seq_len = sequence_length(config, model)
    micro_batch_size = rows_of_a_pass(config, group)
    batches = Batches(train_data, config.batch_size, seq_len, config.seed, group.rank, group.size)
    batches.cursor = state.cursor
    parallel_model = group.parallel(torch.compile(model) if config.compile else model)
    autocast = autocast_of(config, group.device)
    if config.minutes is not None and checkpoint is None:
        max_steps = steps_within(config, model, batches, micro_batch_size, group, autocast)
        config = dataclasses.replace(config, max_steps=max_steps)

    group.wait()  # until every process has looked into `out`, before one writes
    run_id = begin_session(config, train_data.manifest, state) if group.is_main else ""
    peak = matmul_peak(dtype, group.device.type) * group.size if group.is_main else math.inf
    peak_seconds_per_token = model.flops_per_token(seq_len) / peak
    clock_start = time.perf_counter() - state.seconds
    log = RunLog(config, run_id, state.step, enabled=group.is_main)
    console = Console(state.step, config.max_steps, enabled=config.progress and group.is_main)
    with closing(log), closing(console):
        console.say(
            f"{model.num_parameters:,} parameters, {train_data.num_tokens:,} tokens of training data; "
            f"{environment['dtype']} on {environment['device']}, {environment['threads']} threads"
        )
        while reason is None:
            step_start = time.perf_counter()
            seed_step(config.seed, state.step, group)
            pieces = 2 if state.step < config.short_steps else 1
            tokens, targets = (cut(rows, pieces) for rows in batches.next())
            loss, num_targets = accumulate_gradients(
                parallel_model, tokens, targets, pieces * micro_batch_size, group, autocast
            )
            norm = ops.grad_norm([p.grad for p in model.parameters() if p.grad is not None])
            # what is decided from here on must be the same on every process
            loss, num_interrupts = group.sum(loss, interrupt.requested)
            norm_value, state.seconds = group.from_main(
                norm.item(), time.perf_counter() - clock_start
            )

            rate = learning_rate(config, state.step)
            is_accepted = state.detector.accepts(norm_value, config.spike_factor)
            if is_accepted:
                optimizer.set_learning_rate(rate)
                optimizer.step(grad_scale=clip_factor(norm, config.grad_clip))
            optimizer.zero_grad()
            state.step += 1
            state.cursor = batches.cursor
            state.tokens += num_targets
            step_seconds = time.perf_counter() - step_start
            state.step_seconds += step_seconds
            tokens_per_s = num_targets / step_seconds
            log.write(
                "step" if is_accepted else "skip",
                state.step,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm_value,
                tokens_per_s=round(tokens_per_s),
            )
            console.step(loss, tokens_per_s, peak_seconds_per_token)

            reason = stop_reason(config, state, is_interrupted=num_interrupts > 0)
            is_best = False
            if state.step % config.eval_every == 0 or reason in ("max_steps", "max_minutes"):
                val_loss = evaluate(model, val_data, config, micro_batch_size, group, autocast)
                state.val_loss = val_loss
                is_best = val_loss < (math.inf if state.best_loss is None else state.best_loss)
                if is_best:
                    state.best_loss, state.best_step = val_loss, state.step
                bits = bits_per_byte(val_loss, val_data)
                log.write(
                    "eval",
                    state.step,
                    val_loss=val_loss,
                    bits_per_byte=bits,
                    seconds=round(time.perf_counter() - clock_start, 1),
                )
                console.say(
                    f"step {state.step:,}: loss {loss:.4f}, validation {val_loss:.4f}, {bits:.4f} bits per byte"
                )
                reason = reason or stop_reason(config, state)  # the target may be reached
            if config.sample_every and state.step % config.sample_every == 0 and group.is_main:
                text = sample_text(model, tokenizer, config)
                log.write("sample", state.step, text=text)
                console.say(f"step {state.step:,}: sample\n{text}\n")
            is_due = state.step % config.checkpoint_every == 0 or is_best or reason is not None
            if is_due and group.is_main:
                log.flush()  # a checkpoint's steps are in the log
                save_checkpoint(config, state, model, optimizer, tokenizer, environment)
    assert reason is not None
    summary = summarize(config, state, reason, val_data, peak_seconds_per_token)
    if group.is_main:
        plot_losses(config.out / "log.jsonl", summary.loss_curve)
        write_summary(config.out, summary)
    return conclude(config, group, summary)


def clip_factor(norm: Tensor, limit: float) -> Tensor | None:
    """What gradients of this norm are multiplied with, so that it is `limit` at most; a limit of 0 leaves them."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else None


def stop_reason(
    config: TrainConfig, state: TrainState, is_interrupted: bool = False
) -> Reason | None:
    """Why to stop after `state.step` steps; None to go on."""
    if state.detector.skipped_in_row >= config.max_skipped:
        return "skipped"
    if state.step >= config.max_steps:
        return "max_steps"
    target, val_loss = config.target_loss, state.val_loss
    if target is not None and val_loss is not None and val_loss <= target:
        return "target_loss"
    if config.max_minutes is not None and state.seconds >= 60 * config.max_minutes:
        return "max_minutes"
    return "interrupted" if is_interrupted else None


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What matrix products are computed in; weights and moments are float32 anyway."""
    if config.dtype == "auto":
        return torch.bfloat16 if multiplies_bf16(device.type) else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def autocast_of(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context in which a pass computes its products in `compute_dtype`."""
    is_bf16 = compute_dtype(config, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)


def describe_environment(group: Group, dtype: torch.dtype) -> dict[str, Any]:
    """What roundings depend on, besides the options."""
    is_cuda = group.device.type == "cuda"
    return {
        "leangpt": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(group.device)
        if is_cuda
        else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": group.size,
    }


def build_model(config: TrainConfig, tokenizer: Tokenizer, checkpoint: Path | None) -> GPT:
    """A new model, that of `config.model`, or one for the weights of a checkpoint."""
    if checkpoint is not None:
        return GPT(GPTConfig.from_dict(read_json(checkpoint / "config.json")["config"]))
    if config.model is None:
        return GPT(dataclasses.replace(config.arch, vocab_size=tokenizer.vocab_size))
    model = load_model(config.model)
    if model.config.vocab_size < tokenizer.vocab_size:  # more is padding of the model's
        raise ValueError(
            f"the tokenizer of {config.data} has {tokenizer.vocab_size} tokens, {config.model} has {model.config.vocab_size}: "
            "prepare the data with the model's own, `leangpt prepare --tokenizer FOLDER`"
        )
    return model.train()


def sequence_length(config: TrainConfig, model: GPT) -> int:
    seq_len, limit = config.seq_len or model.config.max_seq_len, model.config.max_seq_len
    if seq_len > limit:
        raise ValueError(f"seq_len ({seq_len}) must not exceed the model's max_seq_len ({limit})")
    if config.short_fraction and seq_len % 2:
        raise ValueError(f"short_fraction cuts sequences in half, and seq_len is odd: {seq_len}")
    return seq_len


def cut(rows: Tensor, pieces: int) -> Tensor:
    """(B, T) to (B · pieces, T / pieces)."""
    return rows.reshape(len(rows) * pieces, -1)


def rows_of_a_pass(config: TrainConfig, group: Group) -> int:
    """Sequences of one forward pass of this process."""
    if config.batch_size % group.size:
        raise ValueError(
            f"batch_size ({config.batch_size}) must be a multiple of the {group.size} processes"
        )
    rows = config.batch_size // group.size
    micro_batch_size = config.micro_batch_size or rows
    if rows % micro_batch_size:
        raise ValueError(
            f"micro_batch_size ({micro_batch_size}) must divide the {rows} sequences of a process "
            f"(batch_size {config.batch_size}, processes: {group.size})"
        )
    return micro_batch_size


def steps_within(
    config: TrainConfig,
    model: GPT,
    batches: Batches,
    micro_batch_size: int,
    group: Group,
    autocast: torch.autocast,
) -> int:
    """How many steps take about `config.minutes` on this machine, by the quickest of a few: something else may run beside them.

    They are steps of a copy, and `batches` go on from where they were. A schedule counts steps, so that a run resumes
    exactly: the clock is read once, before it.
    """
    model, cursor = copy.deepcopy(model), batches.cursor
    optimizer, parallel_model = make_optimizer(model, config), group.parallel(model)
    assert config.minutes is not None
    quickest = math.inf
    end = time.perf_counter() + MEASURED_SHARE * 60 * config.minutes
    for step in itertools.count():
        start = time.perf_counter()
        [is_over] = group.from_main(start >= end)
        if step >= MEASURED_STEPS and is_over:
            break
        accumulate_gradients(parallel_model, *batches.next(), micro_batch_size, group, autocast)
        optimizer.step()
        optimizer.zero_grad()
        quickest = min(quickest, time.perf_counter() - start)
    batches.cursor = cursor
    # logs, evaluations and checkpoints take time too, and most steps are slower
    [steps] = group.from_main(60 * config.minutes / (1.15 * quickest))
    return max(2 * config.warmup_steps, int(steps), 1)


def seed_step(seed: int, step: int, group: Group) -> None:
    """Seed torch's generators, so that what a step draws is a function of (seed, step, rank)."""
    # torch.manual_seed asks for every kind of device there is, in 0.1 to 0.4 ms
    number = (seed * 1_000_003 + step) * group.size + group.rank
    torch.default_generator.manual_seed(number)
    if group.device.type == "cuda":
        torch.cuda.manual_seed(number)


def accumulate_gradients(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    micro_batch_size: int,
    group: Group,
    autocast: AbstractContextManager,
) -> tuple[float, int]:
    """Add up gradients of the mean loss over all targets of the global batch that count, in passes of a few sequences.

    Each loss is a sum divided by that number of targets, so every target weighs the same wherever it stands.

    Args:
        model: (tokens, targets, reduction) -> loss, as `group.parallel` gives it.
        tokens, targets: this process's sequences, each `(B, T)` int64; targets of -100 do not count.

    Returns:
        This process's share of the loss (their sum is the mean loss, in nats), and the number of targets of all processes.
    """
    num_targets = int(group.sum(int((targets != -100).sum()))[0])
    device = group.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    passes = list(zip(tokens.split(micro_batch_size), targets.split(micro_batch_size), strict=True))
    for i, (x, y) in enumerate(passes):
        with group.local_gradients(model, is_local=i < len(passes) - 1):
            with autocast:
                loss = model(x.to(device), y.to(device), "sum")
            # the processes' gradients are averaged: times their number, that is a sum
            (loss * (group.size / max(1, num_targets))).backward()
        loss_sum += loss.detach()
    return loss_sum.item() / max(1, num_targets), num_targets


@torch.no_grad()
def evaluate(
    model: GPT,
    data: TokenDataset,
    config: TrainConfig,
    micro_batch_size: int,
    group: Group,
    autocast: AbstractContextManager,
) -> float:
    """Mean loss over the fixed validation set, in nats per token; the processes share the work."""
    seq_len = sequence_length(config, model)
    model.eval()
    loss_sum = num_targets = 0.0
    for tokens, targets in evaluation_batches(
        data, config.batch_size, seq_len, config.eval_batches
    ):
        rows = slice(group.rank, None, group.size)
        for x, y in zip(
            tokens[rows].split(micro_batch_size), targets[rows].split(micro_batch_size), strict=True
        ):
            with autocast:
                loss = model(x.to(group.device), y.to(group.device), "sum")
            loss_sum += loss.item()
            num_targets += (y != -100).sum().item()
    model.train()
    loss_sum, num_targets = group.sum(loss_sum, num_targets)
    return loss_sum / num_targets


def bits_per_byte(loss: float, data: TokenDataset) -> float:
    """Bits in which the model codes a byte of UTF-8, from its loss in nats per token: comparable between tokenizers."""
    return loss / math.log(2) / data.bytes_per_token


def sample_text(model: GPT, tokenizer: Tokenizer, config: TrainConfig) -> str:
    """A continuation of `config.sample_prompt`, drawn with the seed of the run."""
    num_tokens = min(config.sample_tokens, model.config.max_seq_len - 1)
    params = SamplingParams(max_new_tokens=num_tokens, seed=config.seed)
    model.eval()
    [completion] = Generator(model, tokenizer).generate(
        [config.sample_prompt], params, overflow="truncate"
    )
    model.train()
    return config.sample_prompt + completion.text


def summarize(
    config: TrainConfig,
    state: TrainState,
    reason: Reason,
    val_data: TokenDataset,
    peak_seconds_per_token: float,
) -> Summary:
    val_loss, best_step = state.val_loss, state.best_step
    tokens_per_s = state.tokens / state.step_seconds
    return Summary(
        reason=reason,
        steps=state.step,
        skipped_steps=state.detector.skipped,
        tokens=state.tokens,
        minutes=state.seconds / 60,
        tokens_per_s=tokens_per_s,
        peak_share=tokens_per_s * peak_seconds_per_token,
        val_loss=val_loss,
        bits_per_byte=None if val_loss is None else bits_per_byte(val_loss, val_data),
        best_val_loss=state.best_loss,
        best_checkpoint=None if best_step is None else checkpoint_folder(config.out, best_step),
        last_checkpoint=checkpoint_folder(config.out, state.step),
        loss_curve=config.out / "loss.png",
    )


def conclude(config: TrainConfig, group: Group, summary: Summary) -> Summary:
    """Say on the terminal how the run ended, or raise where that is an error."""
    if summary.reason == "skipped":
        raise TrainingError(
            f"{config.out}: stopped after {config.max_skipped} steps in a row were skipped, since their gradients were not "
            f"finite or far longer than those before (see log.jsonl). {summary.last_checkpoint.name} has the weights from "
            "before them. Start anew with a lower learning_rate, or go on with a larger max_skipped or spike_factor: "
            f"`{resume_command(config)} --max-skipped {2 * config.max_skipped}`"
        )
    if config.progress and group.is_main:
        print(f"\n{summary}", file=sys.stderr)
        if summary.reason == "interrupted":
            print(f"go on with: {resume_command(config)}", file=sys.stderr)
    return summary
