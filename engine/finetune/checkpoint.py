"""The checkpoint of a fine-tuning that has not come to its end, in a folder beside that of the tuned model.

    OUT.checkpoint/
        weights.safetensors      what is trained, as it is, and with "best." before the name as it was at the best evaluation
        optimizer.safetensors    the moments of AdamW by parameter name
        state.json               `Progress`, the options, hashes of base model and examples, those of the other files

It is whole or not there, see `files.atomic_directory`, and is deleted when the tuned model is written. There is no state of
random generators in it: the loop seeds them anew at each step. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import atomic_directory, read_json, write_json
from ..training.checkpoint import file_sha256, fill_optimizer, optimizer_tensors, warn_of_changes
from .config import FinetuneConfig
from .dataset import Dataset
from .tasks import Task
from .tuned import Tuned

FORMAT_VERSION = 1
_WEIGHTS_FILE, _OPTIMIZER_FILE, _STATE_FILE = (
    "weights.safetensors",
    "optimizer.safetensors",
    "state.json",
)
# options that a resumed training may change: they make the steps no others
_MAY_CHANGE = {"out", "overwrite", "resume", "checkpoint_every", "device", "progress", "merge"}
_BEST = "best."


@dataclass
class Progress:
    """Where a fine-tuning stands, besides weights and optimizer."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of all sessions
    best_loss: float | None = None  # of validation, in nats a target


def checkpoint_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint")


def has_checkpoint(out: Path) -> bool:
    return (checkpoint_folder(out) / _STATE_FILE).is_file()


def resume_command(config: FinetuneConfig) -> str:
    return f"leangpt finetune {config.task.name} --resume --out {shlex.quote(str(config.out))}"


def load_options(out: Path) -> FinetuneConfig:
    """The options of the fine-tuning that has a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return FinetuneConfig.from_dict(_read_state(out)["options"])


def fingerprint(task: Task, datasets: Iterable[Dataset]) -> str:
    """SHA-256 of all that the training reads: a task with what it learnt from the data, and the examples."""
    digest = hashlib.sha256(json.dumps(task.to_dict(), sort_keys=True).encode())
    for dataset in datasets:
        digest.update(b"\n")
        for example in dataset.examples:
            digest.update(f"{example.tokens} {example.targets}\n".encode())
    return digest.hexdigest()


def weights(tuned: Tuned) -> dict[str, Tensor]:
    """Copies of all that is trained, and of what the method remembers of its training."""
    parts = {"model": tuned.adapted.state_dict()}
    if tuned.module.head is not None:
        parts["head"] = tuned.module.head.state_dict()
    return {
        f"{part}.{name}": tensor.detach().cpu().clone()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def set_weights(tuned: Tuned, tensors: Mapping[str, Tensor]) -> None:
    """Go back to what `weights` gave."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    tuned.adapted.load_state_dict(part("model."))
    if tuned.module.head is not None:
        tuned.module.head.load_state_dict(part("head."))


def save_checkpoint(
    config: FinetuneConfig,
    tuned: Tuned,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: Mapping[str, Tensor],
    data_sha256: str,
    environment: Mapping[str, Any],
) -> None:
    """Write the checkpoint of this step in place of the one before.

    Raises:
        OSError: it could not be written, the disk is full for one; the one before is untouched.
    """
    folder = checkpoint_folder(config.out)
    try:
        with atomic_directory(folder) as new:
            tensors = weights(tuned) | {f"{_BEST}{name}": t for name, t in best.items()}
            save_file(tensors, new / _WEIGHTS_FILE)
            save_file(optimizer_tensors(tuned.module, optimizer), new / _OPTIMIZER_FILE)
            files = {path.name: file_sha256(path) for path in sorted(new.iterdir())}
            write_json(
                new / _STATE_FILE,
                {
                    "format_version": FORMAT_VERSION,
                    "progress": dataclasses.asdict(progress),
                    "options": config.to_dict(),
                    "base_sha256": tuned.adapted.base_hash,
                    "data_sha256": data_sha256,
                    "environment": environment,
                    "sha256": files,
                },
            )
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder}: the checkpoint could not be written ({error}); the one before it is whole, if there was one: free "
            f"some space, then `{resume_command(config)}`"
        ) from error


def load_checkpoint(
    config: FinetuneConfig,
    tuned: Tuned,
    optimizer: torch.optim.Optimizer,
    data_sha256: str,
    environment: Mapping[str, Any],
) -> tuple[Progress, dict[str, Tensor]]:
    """Read weights and moments; where the training stands, and its best weights. Warns where the environment is another.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, or was made with other options, data, or another base model.
    """
    folder = checkpoint_folder(config.out)
    state = _read_state(config.out)
    _check_same_options(folder, FinetuneConfig.from_dict(state["options"]), config)
    for what, name, now in (
        ("data", "data_sha256", data_sha256),
        ("base model", "base_sha256", tuned.adapted.base_hash),
    ):
        if state[name] != now:
            raise ValueError(
                f"{folder}: the {what} is another than when the training began; bring it back, or start anew with --overwrite"
            )
    tensors = load_file(folder / _WEIGHTS_FILE)
    set_weights(tuned, {n: t for n, t in tensors.items() if not n.startswith(_BEST)})
    fill_optimizer(tuned.module, optimizer, load_file(folder / _OPTIMIZER_FILE))
    warn_of_changes(state["environment"], environment)
    best = {n.removeprefix(_BEST): t.clone() for n, t in tensors.items() if n.startswith(_BEST)}
    return Progress(**state["progress"]), best


def delete_checkpoint(out: Path) -> None:
    folder = checkpoint_folder(out)
    if folder.exists():
        hidden = folder.rename(folder.with_name(f".{folder.name}.old"))  # never half a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)


def _check_same_options(folder: Path, before: FinetuneConfig, now: FinetuneConfig) -> None:
    for field in dataclasses.fields(FinetuneConfig):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name not in _MAY_CHANGE:
            raise ValueError(
                f"{folder}: the training was started with {field.name}={old}, a resumed one cannot change it to {new}"
            )


def _read_state(out: Path) -> dict[str, Any]:
    """What is in state.json, after all files were checked."""
    folder = checkpoint_folder(out)
    if not has_checkpoint(out):
        raise FileNotFoundError(f"{folder}: there is no checkpoint to resume: leave out --resume")
    state = read_json(folder / _STATE_FILE)
    try:
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: must be a checkpoint of version {FORMAT_VERSION}, got {state['format_version']}"
            )
        for name, expected in state["sha256"].items():
            if file_sha256(folder / name) != expected:
                raise ValueError(
                    f"{folder / name}: damaged, it does not match its sha256: start anew with --overwrite"
                )
    except (FileNotFoundError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: not a whole checkpoint ({error!r}): start anew with --overwrite"
        ) from error
    return state
