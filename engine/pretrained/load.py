"""Finding a model by its name, and loading it: `--model` means the same everywhere."""

import re
from pathlib import Path
from typing import cast

import torch

from ..model import GPT
from . import huggingface, nanogpt, native
from .layout import Weights, build
from .options import Options

_DTYPES = ("float64", "float32", "bfloat16", "float16")
# a repository may hold the same weights several times, for other programs
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
_HUB_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> GPT:
    """Load a model, ready to generate (`model.train()` switches dropout on).

    Args:
        name: see `resolve_model`.
        dtype: of the parameters, "float32" or torch.float32; None: float32, however they are stored.
        device: where to.

    Raises:
        FileNotFoundError: there is no such model, or files of it are missing.
        ValueError: a file is damaged, or the model has an option that `GPTConfig` cannot express.
    """
    dtype = torch.float32 if dtype is None else _dtype(dtype)
    return build(_read(resolve_model(name)), dtype, device)


def resolve_model(name: str | Path) -> Path:
    """Return the folder of a model's files, or the file that was named.

    Args:
        name: a folder in Hugging Face's or the project's own format; a run folder of `leangpt train` (its best
            checkpoint, else its latest); a ckpt.pt of nanoGPT or the folder that holds one; or a model of the
            Hugging Face hub, which is downloaded unless it was before.

    Raises:
        FileNotFoundError: nothing of this is there; the message says what was tried.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "config.json").exists():
            return path
        if (path / "best.json").exists() or (path / "checkpoints").is_dir():
            return _checkpoint_of(path)
        if (path / "ckpt.pt").exists():
            return path
        if (path / "adapter.json").exists():
            raise FileNotFoundError(
                f"{path}: holds what was trained beside a base model, not a model: `leangpt predict` and `leangpt chat` run "
                "it, `leangpt finetune --merge` makes a model"
            )
        raise FileNotFoundError(
            f"{path}: must be a model, a run or a nanoGPT folder, but holds none of config.json, best.json, "
            "checkpoints/, ckpt.pt"
        )
    if not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", str(name)):
        raise FileNotFoundError(
            f"{name}: no such folder, nor a name of the hub (organization/model)"
        )
    return _download(str(name))


def _checkpoint_of(run: Path) -> Path:
    if (run / "best.json").exists():
        folder = run / Options.of_file(run / "best.json").need("checkpoint", str)
    else:
        folders = [f for f in (run / "checkpoints").glob("step-*") if f.name[5:].isdigit()]
        if not folders:
            raise FileNotFoundError(f"{run}: a run without a checkpoint yet")
        folder = max(folders, key=lambda f: int(f.name[5:]))
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: a checkpoint must hold config.json")
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES + _HUB_PICKLES))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name}: no such folder, and the Hugging Face hub did not give it: {reason}"
        ) from error
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{name}: the repository on the hub has no config.json")
    return folder


def _read(path: Path) -> Weights:
    if path.is_file():
        return nanogpt.read(path)
    if not (path / "config.json").exists():
        return nanogpt.read(path / "ckpt.pt")
    options = Options.of_file(path / "config.json")
    if options.values.get("model_type") == native.MODEL_TYPE:
        return native.read(path, options)
    return huggingface.read(path, options)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    return cast(torch.dtype, getattr(torch, name))
