"""A run's folder: which run it is, its checkpoints, the best of them.

    train.json                      options, fingerprint of the data
    best.json                       step, validation loss and folder of the best checkpoint
    checkpoints/step-00000500/      a model folder (config.json, model.safetensors, tokenizer) that any --model takes, and
        optimizer.safetensors       the moments of AdamW by parameter name
        state.json                  `TrainState`, the environment, the sha256 of every other file

A checkpoint is whole or not there, see `files.atomic_directory`; one that was damaged later is noticed by its hashes. There is
no state of random generators in it: the loop seeds them anew at each step. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import shlex
import shutil
import uuid
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.tokenizer import Tokenizer
from ..files import atomic_directory, read_json, write_json
from ..model import GPT
from ..pretrained import save_pretrained
from .optimizer import SpikeDetector, learning_rate

FORMAT_VERSION = 1
# Options that a resumed run may change, since the steps done would have been the same, or since they are about accidents.
# `data` is compared by its content, `max_steps` by the learning rates and lengths that it gave.
MAY_CHANGE = {
    *("data", "out", "resume", "max_steps", "max_minutes", "target_loss", "max_skipped"),
    *("spike_factor", "keep_last", "sample_every", "sample_prompt", "sample_tokens"),
    *("device", "tensorboard", "wandb_project", "progress"),
}


@dataclass
class TrainState:
    """Where a run stands, besides weights and optimizer."""

    step: int = 0  # steps done, skipped ones too
    cursor: int = 0  # sequences given out
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # of the run, all sessions
    step_seconds: float = 0.0  # of these, in steps
    val_loss: float | None = None  # the last evaluation's
    best_loss: float | None = None
    best_step: int | None = None
    detector: SpikeDetector = field(default_factory=SpikeDetector)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        return cls(**values | {"detector": SpikeDetector(**values["detector"])})


def resume_command(config: TrainConfig) -> str:
    return f"leangpt train --resume --out {shlex.quote(str(config.out))}"


def load_config(out: Path) -> TrainConfig:
    """The options with which the run in `out` was last started.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: its train.json is damaged.
    """
    return TrainConfig.from_dict(_read_run(out)["config"])


def _read_run(out: Path) -> dict[str, Any]:
    path = out / "train.json"
    if not path.exists():
        raise FileNotFoundError(f"{out}: there is no run here (train.json is missing)")
    run = read_json(path)
    if not isinstance(run, dict) or run.keys() != {"config", "data_sha256", "run_id"}:
        raise ValueError(f"{path}: damaged, must have config, data_sha256 and run_id")
    return run


def find_run(config: TrainConfig, manifest: dict[str, Any]) -> tuple[Path | None, TrainState]:
    """The checkpoint from which to go on, and its state; None where the run starts.

    Raises:
        FileExistsError: there is a run in `out`, and `resume` was not asked for.
        ValueError: the run was made with other options or data.
    """
    if not (config.out / "train.json").exists():
        return None, TrainState()
    if not config.resume:
        raise FileExistsError(
            f"{config.out}: there is a run already; go on with it by `{resume_command(config)}`, or choose another --out"
        )
    checkpoint, state = _newest_checkpoint(config.out)
    _check_same_run(config, manifest, state)
    return checkpoint, state


def _check_same_run(config: TrainConfig, manifest: dict[str, Any], state: TrainState) -> None:
    stored = load_config(config.out)
    for f in dataclasses.fields(TrainConfig):
        before, now = getattr(stored, f.name), getattr(config, f.name)
        if before != now and f.name not in MAY_CHANGE:
            raise ValueError(
                f"{config.out}: the run was started with {f.name}={before}, a resumed run cannot change it to {now}"
            )
    if _read_run(config.out)["data_sha256"] != _fingerprint(manifest):
        raise ValueError(
            f"{config.out}: the run was started with other data than is in {config.data} now"
        )
    if config.max_steps != stored.max_steps and any(
        learning_rate(config, step) != learning_rate(stored, step) for step in range(state.step)
    ):
        raise ValueError(
            f"{config.out}: the run was started with max_steps={stored.max_steps}, and with {config.max_steps} the "
            f"learning rates of the {state.step} steps done would have been others (schedule={config.schedule})"
        )
    if min(config.short_steps, state.step) != min(stored.short_steps, state.step):
        raise ValueError(
            f"{config.out}: the run was started with max_steps={stored.max_steps}, and with {config.max_steps} others of the "
            f"{state.step} steps done would have cut sequences in half (short_fraction={config.short_fraction})"
        )


def _fingerprint(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def begin_session(config: TrainConfig, manifest: dict[str, Any], state: TrainState) -> str:
    """Write down what is about to run, and tidy up after the session before; returns the id of the run."""
    path = config.out / "train.json"
    run_id = _read_run(config.out)["run_id"] if path.exists() else uuid.uuid4().hex
    write_json(
        path,
        {"config": config.to_dict(), "data_sha256": _fingerprint(manifest), "run_id": run_id},
    )
    for leftover in (config.out / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in config.out.glob(".*.tmp"):
        leftover.unlink()
    (config.out / "summary.json").unlink(
        missing_ok=True
    )  # of a session before, which was not the last
    _write_best(config.out, state)
    return run_id


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def save_checkpoint(
    config: TrainConfig,
    state: TrainState,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    environment: dict[str, Any],
) -> Path:
    """Write the checkpoint of this step, and delete those that are neither among the last nor the best.

    Raises:
        OSError: it could not be written, the disk is full for one; the checkpoints before are untouched.
    """
    folder = checkpoint_folder(config.out, state.step)
    try:
        with atomic_directory(folder) as new:
            save_pretrained(model, new, tokenizer, format="native")
            save_file(optimizer_tensors(model, optimizer), new / "optimizer.safetensors")
            files = {path.name: file_sha256(path) for path in sorted(new.iterdir())}
            write_json(
                new / "state.json",
                {
                    "format_version": FORMAT_VERSION,
                    "state": dataclasses.asdict(state),
                    "environment": environment,
                    "sha256": files,
                },
            )
        _write_best(config.out, state)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder}: the checkpoint could not be written ({error}); those before it are whole: free some space, then "
            f"`{resume_command(config)}`"
        ) from error
    _delete_old_checkpoints(config, state)
    return folder


def _write_best(out: Path, state: TrainState) -> None:
    if state.best_step is not None:
        folder = checkpoint_folder(out, state.best_step).relative_to(out)
        write_json(
            out / "best.json",
            {"step": state.best_step, "val_loss": state.best_loss, "checkpoint": str(folder)},
        )


def _delete_old_checkpoints(config: TrainConfig, state: TrainState) -> None:
    for folder in _checkpoints(config.out)[: -config.keep_last]:
        if state.best_step is None or folder != checkpoint_folder(config.out, state.best_step):
            hidden = folder.rename(
                folder.with_name(f".{folder.name}.old")
            )  # never half a checkpoint
            shutil.rmtree(hidden, ignore_errors=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments, by `moment.name of the parameter`."""
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_checkpoint(out: Path) -> tuple[Path | None, TrainState]:
    """The newest checkpoint that is whole; a warning names those that are not."""
    damages = []
    for folder in reversed(_checkpoints(out)):
        try:
            state = _read_state(folder)
        except ValueError as error:
            damages.append(str(error))
            continue
        if damages:
            warnings.warn(f"{'; '.join(damages)}; going on from {folder.name}", stacklevel=2)
        return folder, state
    if damages:
        raise ValueError(f"{out}: there is no whole checkpoint: {'; '.join(damages)}")
    return None, TrainState()


def _read_state(folder: Path) -> TrainState:
    """Check every file of a checkpoint and return its state, or raise ValueError saying what is damaged."""
    try:
        content = read_json(folder / "state.json")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: must be a checkpoint of version {FORMAT_VERSION}, got {content['format_version']}"
            )
        for name, expected in content["sha256"].items():
            if file_sha256(folder / name) != expected:
                raise ValueError(f"{folder / name}: damaged, it does not match its sha256")
        return TrainState.from_dict(content["state"])
    except (FileNotFoundError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint ({error!r})") from error


def load_checkpoint(
    folder: Path, model: GPT, optimizer: torch.optim.Optimizer, environment: dict[str, Any]
) -> None:
    """Read weights and moments; warn where the environment is not that of the checkpoint, since roundings may differ."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    fill_optimizer(model, optimizer, load_file(folder / "optimizer.safetensors"))
    warn_of_changes(read_json(folder / "state.json")["environment"], environment)


def fill_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Set the moments to what `optimizer_tensors` gave."""
    moments: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        moments[name][key] = tensor.clone()  # out of the mapped file
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    states = {i: moments[name] for i, name in enumerate(order) if name in moments}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def warn_of_changes(before: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """Warn where the environment is not that of a checkpoint."""
    changes = [
        f"{name} {before.get(name)} -> {value}"
        for name, value in environment.items()
        if before.get(name) != value
    ]
    if changes:
        warnings.warn(
            f"not the environment of the checkpoint ({', '.join(changes)}): results may differ in roundings",
            stacklevel=2,
        )
