"""The folder of a tuned model.

task.json                 task with its options, labels and template; the base model, where it is needed
head.safetensors          the linear head, where the task has one
config.json, model.safetensors             the whole model (method full, or merged), or
adapter.json, adapter.safetensors          what was trained beside the base model
tokenizer files, chat_template.jinja       those of the base model
report.json, report.txt, *.png             how good it is
"""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.tokenizer import load_tokenizer
from ..files import atomic_directory, mend_after_kill, read_json, write_json
from ..pretrained import load_model, resolve_model, save_pretrained
from . import methods
from .checkpoint import checkpoint_folder, has_checkpoint, resume_command
from .config import FinetuneConfig
from .tasks import task_from_dict
from .tuned import Tuned

if TYPE_CHECKING:
    from .trainer import Outcome

TASK_FILE, HEAD_FILE = "task.json", "head.safetensors"
FORMAT_VERSION = 1


def check_out(config: FinetuneConfig) -> None:
    """Refuse to replace what `finetune` has not written, or should not replace."""
    out = config.out
    for path in (out, checkpoint_folder(out)):
        mend_after_kill(path)
    is_unfinished = has_checkpoint(out)
    if is_unfinished and not (config.resume or config.overwrite):
        raise FileExistsError(
            f"{checkpoint_folder(out)}: a training has not come to its end; go on with it by `{resume_command(config)}`, start "
            "anew with --overwrite, or choose another --out"
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_tuned(out):
        raise FileExistsError(f"{out}: exists and is not a tuned model; choose another --out")
    if not config.overwrite and not (config.resume and is_unfinished):
        raise FileExistsError(
            f"{out}: holds a tuned model; choose another --out, or replace it with --overwrite"
        )


def save_tuned(config: FinetuneConfig, tuned: Tuned, outcome: "Outcome") -> None:
    """Write `config.out`, whole or not at all."""
    is_whole = config.merge or config.method.name == "full"
    is_local = Path(config.model).exists()  # else a name of the hub
    base = str(Path(config.model).resolve()) if is_local else config.model
    options = config.train_config(1, tuned.module.model.config.n_embd)
    with atomic_directory(config.out) as folder:
        module = tuned.module
        if module.head is not None:
            head = {name: t.detach().cpu() for name, t in module.head.state_dict().items()}
            save_file(head, folder / HEAD_FILE)
        if is_whole:
            save_pretrained(tuned.adapted.merge(), folder, tuned.tokenizer)
        else:
            tuned.adapted.save(folder)
            tuned.tokenizer.save(folder)
        template = tuned.task.chat_template(tuned.tokenizer)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
        write_json(
            folder / TASK_FILE,
            {
                "format_version": FORMAT_VERSION,
                "task": tuned.task.to_dict(),
                "max_len": tuned.max_len,
                "base": None if is_whole else base,
                "training": config.to_dict() | {"learning_rate": options.learning_rate},
            },
        )
        report = {
            name: value
            for name, value in dataclasses.asdict(outcome).items()
            if name not in ("out", "report")
        }
        write_json(folder / "report.json", report | {"metrics": outcome.report.metrics})
        (folder / "report.txt").write_text(outcome.report.text + "\n", encoding="utf-8")
        for name, png in outcome.report.pictures.items():
            (folder / name).write_bytes(png)


def is_tuned(folder: str | Path) -> bool:
    """Whether `finetune` wrote this folder."""
    return (Path(folder) / TASK_FILE).is_file()


def load_tuned(folder: str | Path, base: str | None = None, device: str = "cpu") -> Tuned:
    """Load a tuned model, ready to predict.

    Args:
        folder: written by `finetune`.
        base: where the base model is now, where the folder does not hold all of the model; None: where it was.

    Raises:
        FileNotFoundError: there is no tuned model, or its base model is gone.
        ValueError: a file is damaged, or `base` is another model than that of the training.
    """
    folder = Path(folder)
    if not is_tuned(folder):
        raise FileNotFoundError(
            f"{folder}: there is no tuned model here ({TASK_FILE} is missing): make one with "
            f"`leangpt finetune TASK --out {shlex.quote(str(folder))}`"
        )
    values = _read_task(folder / TASK_FILE)
    task = task_from_dict(values["task"])
    name = values["base"] and (base or values["base"])
    model = load_model(resolve_model(name or folder), device=device)
    adapted = methods.load(folder, model) if name else methods.create("full").attach(model)
    module = task.make_module(model, ()).to(device)
    if module.head is not None:
        try:
            module.head.load_state_dict(load_file(folder / HEAD_FILE))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder / HEAD_FILE}: damaged ({error})") from error
    module.requires_grad_(False)
    module.eval()
    return Tuned(task, module, adapted, load_tokenizer(folder), values["max_len"])


def _read_task(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: must be a tuned model of format version {FORMAT_VERSION}")
    if missing := {"task", "max_len", "base"} - values.keys():
        raise ValueError(f"{path}: damaged, {', '.join(sorted(missing))} is missing")
    return values
