"""Fine-tuning: rows, examples, the loop, the report, and the folder of the tuned model.

The loop is that of `leangpt.training`, with its parts: gradients of the mean over all targets of a step, whatever passes and
processes they are spread over; AdamW; dropout seeded by the step. After each epoch the validation loss is measured, and the
weights of the best one are kept. Ctrl-C ends it after the step with a checkpoint, and what was learnt is reported and saved. From
a checkpoint it goes on as if it had not been stopped, to the last bit.
"""

import math
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from leangpt.kernels import log_backend

from ..data.tokenizer import Tokenizer, load_tokenizer
from ..generation.chat import ChatTemplate
from ..model import GPT
from ..pretrained import load_model, resolve_model
from ..training.distributed import Group, process_group
from ..training.interrupt import Interrupt
from ..training.logs import Console
from ..training.loop import (
    accumulate_gradients,
    autocast_of,
    compute_dtype,
    describe_environment,
    rows_of_a_pass,
    seed_step,
)
from ..training.optimizer import learning_rate, make_optimizer
from .checkpoint import (
    Progress,
    delete_checkpoint,
    fingerprint,
    has_checkpoint,
    load_checkpoint,
    resume_command,
    save_checkpoint,
    set_weights,
    weights,
)
from .config import FinetuneConfig
from .dataset import (
    Dataset,
    ExampleStream,
    describe_duplicates,
    encode_samples,
    find_duplicates,
    read_samples,
    split,
)
from .padding import PADDING
from .rows import BadRows
from .storage import check_out, save_tuned
from .tasks import Report, Task
from .tuned import Tuned


@dataclass(frozen=True)
class Outcome:
    """How a fine-tuning went."""

    out: Path
    report: Report
    steps: int
    is_interrupted: bool
    num_trainable: int
    val_loss: float  # nats a target, of the weights that are kept
    seconds: float  # of training, over all sessions
    data: dict[str, int]  # rows of training and validation, skipped, cut, split, duplicates
    forgetting: dict[str, float] | None  # loss on rows of the replayed file, before and after

    def __str__(self) -> str:
        counts = (
            "train_rows",
            "val_rows",
            "skipped_rows",
            "cut_examples",
            "split_rows",
            "duplicates",
        )
        rows = {
            "rows": "{:,} to train, {:,} to validate, {:,} skipped, {:,} cut, {:,} in several parts, {:,} in both".format(
                *(self.data[name] for name in counts)
            ),
            "training": f"{self.steps:,} steps in {self.seconds:.0f} s, {self.num_trainable:,} parameters",
            "validation": f"loss {self.val_loss:.4f}",
        }
        if self.forgetting is not None:
            rows["earlier data"] = "loss {loss_before:.4f} before, {loss_after:.4f} after".format(
                **self.forgetting
            )
        rows["model"] = str(self.out)
        lines = [f"{name:16} {value}" for name, value in rows.items()]
        return "\n".join([self.report.text, "", *lines])


def finetune(config: FinetuneConfig) -> Outcome:
    """Fine-tune a model and write it to `config.out`, with its report. Under torchrun every process calls this.

    SIGINT (Ctrl-C) and SIGTERM end it after the step: a checkpoint is written, from which `config.resume` goes on, and the
    best model so far.

    Raises:
        FileExistsError: there is something in `config.out`, and `config.overwrite` is not set or it is not a tuned model; or a
            checkpoint, and neither that nor `config.resume` is set.
        FileNotFoundError: the model or a data file is not there.
        ValueError: a row is bad (with file and line); the data, the model and the options do not fit each other, or not the
            checkpoint.
        OSError: a checkpoint could not be written.
    """
    if not config.data:
        raise ValueError("data must name at least one file")
    check_out(config)
    with process_group(config.device) as group, Interrupt() as interrupt:
        return _finetune(config, group, interrupt)


@dataclass(frozen=True)
class _Data:
    task: Task  # fitted
    train: Dataset
    val: Dataset
    replay: Dataset | None
    old: Dataset | None  # of the replayed file, kept apart to measure what is forgotten
    counts: dict[str, int]
    messages: list[str]  # for the terminal

    def fingerprint(self) -> str:
        sets = (self.train, self.val, self.replay, self.old)
        return fingerprint(self.task, [each for each in sets if each is not None])


def _read_data(
    config: FinetuneConfig, tokenizer: Tokenizer, template: ChatTemplate | None, max_len: int
) -> _Data:
    bad_rows = BadRows(config.skip_bad_rows)
    train = read_samples(config.data, config.task, bad_rows)
    if config.val_data:
        val = read_samples(config.val_data, config.task, bad_rows)
    else:
        train, val = split(train, config.val_fraction, config.seed)
    duplicates = find_duplicates(config.task, train, val)
    sets = [train, val]
    if source := config.replay_source():
        earlier = read_samples([source[0]], config.task, bad_rows)
        sets += split(earlier, config.val_fraction, config.seed)
    # labels of earlier rows are labels still
    task = config.task.fit([s for each in sets[::2] for s in each.samples], tokenizer, template)
    encoded = [encode_samples(each, task, tokenizer, max_len, bad_rows) for each in sets]
    counts = {
        "train_rows": len(encoded[0].samples),
        "val_rows": len(encoded[1].samples),
        "skipped_rows": bad_rows.count,
        "cut_examples": encoded[0].num_cut + encoded[1].num_cut,
        "split_rows": encoded[0].num_split + encoded[1].num_split,
        "duplicates": len(duplicates),
    }
    messages = [
        f"{counts['train_rows']:,} rows to train, {counts['val_rows']:,} to validate, {bad_rows.count:,} skipped; "
        f"{counts['cut_examples']:,} cut to {max_len} tokens, {counts['split_rows']:,} in several parts",
        *(f"skipped {message}" for message in bad_rows.messages),
    ]
    if duplicates:
        messages.append(f"warning: {describe_duplicates(duplicates, len(val))}")
    replay, old = encoded[2:] or (None, None)
    return _Data(task, encoded[0], encoded[1], replay, old, counts, messages)


def _finetune(config: FinetuneConfig, group: Group, interrupt: Interrupt) -> Outcome:
    log_backend(group.device.type)
    path = resolve_model(config.model)
    folder = path if path.is_dir() else path.parent
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(config.seed)
    model = load_model(path, device=group.device)
    max_len = _max_len(config, model)
    config.task.check_length(max_len)
    data = _read_data(config, tokenizer, ChatTemplate.load(folder), max_len)
    if config.progress and group.is_main:
        print("\n".join(data.messages), file=sys.stderr)
    num_steps = config.num_steps(len(data.train.examples))
    tuned = _attach(config, data, model, tokenizer, max_len, num_steps, group)
    num_trainable = sum(p.numel() for p in tuned.module.parameters() if p.requires_grad)

    old_loss = None if data.old is None else mean_loss(tuned, data.old, group)
    progress = _train(config, data, tuned, num_steps, group, interrupt)
    assert progress.best_loss is not None, "the last step was evaluated"
    forgetting = None
    if data.old is not None and old_loss is not None:
        forgetting = {"loss_before": old_loss, "loss_after": mean_loss(tuned, data.old, group)}

    outcome = Outcome(
        out=config.out,
        report=tuned.report(data.val.samples),
        steps=progress.step,
        is_interrupted=progress.step < num_steps,
        num_trainable=num_trainable,
        val_loss=progress.best_loss,
        seconds=progress.seconds,
        data=data.counts,
        forgetting=forgetting,
    )
    if group.is_main:
        save_tuned(config, tuned, outcome)
        if outcome.is_interrupted:
            print(f"go on with: {resume_command(config)}", file=sys.stderr)
        else:
            delete_checkpoint(config.out)
    return outcome


def _max_len(config: FinetuneConfig, model: GPT) -> int:
    limit = model.config.max_seq_len
    max_len = config.max_len or limit
    if max_len > limit:
        raise ValueError(f"max_len ({max_len}) must not exceed the model's max_seq_len ({limit})")
    return max_len


def _attach(
    config: FinetuneConfig,
    data: _Data,
    model: GPT,
    tokenizer: Tokenizer,
    max_len: int,
    num_steps: int,
    group: Group,
) -> Tuned:
    adapted = config.method.attach(model, num_steps)
    model.recomputes_blocks = config.recompute
    module = data.task.make_module(model, data.train.examples).to(group.device)
    tuned = Tuned(data.task, module, adapted, tokenizer, max_len, config.batch_size)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"method {config.method.name} trains nothing for {data.task.name}, which has no head of its own: "
            "say --lm-head to train the model's, or choose another method"
        )
    return tuned


def _train(
    config: FinetuneConfig,
    data: _Data,
    tuned: Tuned,
    num_steps: int,
    group: Group,
    interrupt: Interrupt,
) -> Progress:
    """Train, and leave the best weights in the model; returns how far it came."""
    options = config.train_config(num_steps, tuned.module.model.config.n_embd)
    module, task = tuned.module, data.task
    micro_batch_size = rows_of_a_pass(options, group)
    source = config.replay_source()
    stream = ExampleStream(
        data.train.examples,
        data.replay.examples if data.replay else (),
        source[1] if source else 0.0,
        config.seed,
    )
    optimizer = make_optimizer(module, options)
    environment = describe_environment(group, compute_dtype(options, group.device))
    data_sha256 = data.fingerprint()
    progress, best = Progress(), weights(tuned)
    if config.resume and has_checkpoint(config.out):
        progress, best = load_checkpoint(config, tuned, optimizer, data_sha256, environment)
    group.wait()  # until every process has read the checkpoint, before one writes
    if group.is_main and not config.resume:
        delete_checkpoint(config.out)
    parallel_module = group.parallel(module)
    autocast = autocast_of(options, group.device)
    trainable = [p for p in module.parameters() if p.requires_grad]
    steps_per_epoch = max(1, num_steps // max(1, round(config.epochs)))
    clock_start = time.perf_counter() - progress.seconds
    is_interrupted = False
    module.train()
    with closing(
        Console(progress.step, num_steps, enabled=config.progress and group.is_main)
    ) as console:
        console.say(
            f"{config.method.name}: {sum(p.numel() for p in trainable):,} of "
            f"{sum(p.numel() for p in module.parameters()):,} parameters are trained"
        )
        while progress.step < num_steps and not is_interrupted:
            step_start = time.perf_counter()
            seed_step(config.seed, progress.step, group)
            batch = stream.batch(progress.step, config.batch_size, group.rank, group.size)
            tokens, targets = task.collate(batch)
            loss, _ = accumulate_gradients(
                parallel_module, tokens, targets, micro_batch_size, group, autocast
            )
            loss, num_interrupts = group.sum(loss, interrupt.requested)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss of step {progress.step + 1} is {loss}: start again with a learning_rate below "
                    f"{options.learning_rate}"
                )
            if config.grad_clip:
                norm = get_total_norm([p.grad for p in trainable if p.grad is not None])
                clip_grads_with_norm_(trainable, config.grad_clip, norm)
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(options, progress.step)
            tuned.adapted.optimizer_step(optimizer)
            optimizer.zero_grad()
            progress.step += 1
            seconds = time.perf_counter() - step_start
            console.step(loss, int((tokens != PADDING).sum()) * group.size / seconds)
            is_last = progress.step == num_steps
            is_interrupted = num_interrupts > 0 and not is_last
            if is_last or progress.step % steps_per_epoch == 0:
                val_loss = mean_loss(tuned, data.val, group)
                console.say(f"step {progress.step:,}: loss {loss:.4f}, validation {val_loss:.4f}")
                if progress.best_loss is None or val_loss < progress.best_loss:
                    progress.best_loss, best = val_loss, weights(tuned)
            progress.seconds = time.perf_counter() - clock_start
            is_due = progress.step % config.checkpoint_every == 0 and not is_last
            if group.is_main and (is_due or is_interrupted):
                save_checkpoint(config, tuned, optimizer, progress, best, data_sha256, environment)
    if is_interrupted:  # what was learnt since the last evaluation may be better
        val_loss = mean_loss(tuned, data.val, group)
        if progress.best_loss is None or val_loss < progress.best_loss:
            progress.best_loss, best = val_loss, weights(tuned)
    set_weights(tuned, best)
    module.eval()
    return progress


def mean_loss(tuned: Tuned, data: Dataset, group: Group) -> float:
    """Mean loss over all targets, in nats; the processes share the work."""
    mine = data.examples[group.rank :: group.size]
    num_targets = sum(tuned.task.num_targets(example) for example in mine)
    total, count = group.sum(sum(tuned.losses(mine)), num_targets)
    return total / max(1, count)
