"""Writing a model folder: Hugging Face's format where an architecture for the options exists, the project's own, or packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..decoding.native_decoder import pack_model
from ..decoding.packed import PACKED_FILE
from ..files import atomic_directory
from ..model import GPT
from . import huggingface, native
from .huggingface_config import closest_architecture

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer

Format = Literal["auto", "hf", "native"]

# what readers would mix with the new files, or prefer to them; config.json goes first
_MODEL_FILES = (
    "config.json",
    PACKED_FILE,
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
_TOKENIZER_FILES = (
    "tokenizer_leangpt.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def save_pretrained(
    model: GPT, folder: str | Path, tokenizer: "Tokenizer | None" = None, format: Format = "auto"
) -> None:
    """Write config, weights and, if one is given, the tokenizer.

    A folder that is there keeps its other files. Dropout is kept by the own format and by GPT-2 only.

    Args:
        model: on any device; weights are written in its dtype.
        folder: made where it is not there.
        tokenizer: its begin and end of text go into the config too.
        format: "hf" for transformers and other tools; "native" for any options; "auto" is "hf" where it is possible.

    Raises:
        ValueError: format is "hf" and no architecture has the model's options (named), format is unknown, or the model is not
            plain.
    """
    if format not in ("auto", "hf", "native"):
        raise ValueError(f"format must be 'auto', 'hf' or 'native', got {format!r}")
    model.must_be_plain("save_pretrained")
    architecture, obstacles = closest_architecture(model.config)
    if format == "hf" and obstacles:
        raise ValueError(
            f"no Hugging Face architecture has {', '.join(obstacles)} (the closest is {architecture}): "
            "use format 'native'"
        )
    write = native.write if format == "native" or obstacles else huggingface.write
    with _model_folder(Path(folder), tokenizer) as temporary:
        write(model, temporary, _token_ids(tokenizer))


def save_packed(
    model: GPT, folder: str | Path, weights: str, tokenizer: "Tokenizer | None" = None
) -> None:
    """Write a model as the native decoder runs it, without torch, and, if one is given, the tokenizer.

    A folder that is there keeps its other files.

    Args:
        model: in float32 or bfloat16.
        folder: made where it is not there.
        weights: their format, see `WeightFormat`.
        tokenizer: with its chat template, if it has one.

    Raises:
        FileExistsError: the folder holds a model that is not packed, which would be lost or mixed with this one.
        ValueError: the format is unknown, or the engine cannot run the model.
    """
    folder = Path(folder)
    if any((folder / name).exists() for name in ("config.json", "best.json", "ckpt.pt")):
        raise FileExistsError(f"{folder}: holds a model that is not packed: choose another folder")
    packed = pack_model(model, weights)
    with _model_folder(folder, tokenizer) as temporary:
        packed.save(temporary / PACKED_FILE)


@contextmanager
def _model_folder(folder: Path, tokenizer: "Tokenizer | None") -> Iterator[Path]:
    """Give a temporary folder, with the tokenizer in it, whose files become those of the folder."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: must be a folder, got a file")
    # a folder that is there stays: it may be a link or a mount point, and has the user's files
    target = folder / ".save_pretrained" if folder.is_dir() else folder
    with atomic_directory(target) as temporary:
        if tokenizer is not None:
            tokenizer.save(temporary)
        yield temporary
    if target != folder:
        _replace_model(folder, target)


def _token_ids(tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """Written even where there are none: transformers takes those of the architecture's first model otherwise."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    eos = list(tokenizer.eos_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos if len(eos) > 1 else tokenizer.eos_id,
    }


def _replace_model(folder: Path, new: Path) -> None:
    """Move the new files in. A kill in between leaves a folder without a model, not a mixture of two."""
    names = {path.name for path in new.iterdir()}
    stale = list(_MODEL_FILES)
    if any(name.startswith("tokenizer") for name in names):
        stale += _TOKENIZER_FILES
    for pattern in stale:
        for path in folder.glob(pattern):
            path.unlink()
    for name in sorted(names, key=("config.json", PACKED_FILE).__contains__):
        (new / name).replace(folder / name)
    new.rmdir()
