"""The tensors of a model folder, memory-mapped. No code of the file runs: safetensors, or torch.load(weights_only=True)."""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import read_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the first of `WEIGHT_FILES` that is there, by name.

    Raises:
        FileNotFoundError: none of them is there, or a shard is missing.
        ValueError: a file is truncated, damaged, or holds anything but floating-point tensors.
    """
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            break
    else:
        raise FileNotFoundError(f"{folder}: no weights, looked for {', '.join(WEIGHT_FILES)}")
    if not name.endswith(".json"):
        return _read_file(folder / name)

    index = read_json(folder / name)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise ValueError(f"{folder / name}: weight_map must give each tensor's file in this folder")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors |= _read_file(folder / shard)
    lost = weight_map.keys() - tensors.keys()
    if lost:
        raise ValueError(f"{folder / name}: no file holds {', '.join(sorted(lost)[:5])}")
    return tensors


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    if path.suffix != ".safetensors":
        return check_tensors(path, load_weights_only(path))
    try:
        return check_tensors(path, load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated, damaged or not a safetensors file ({error}); download it again"
        ) from error


# what PyTorch's reader raises where it stumbles over bytes that it did not write
_DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


def load_weights_only(path: Path) -> Any:
    """torch.load of tensors and plain values; a pickle that asks for more is refused, never executed."""
    with path.open("rb") as file:  # a missing permission is no damage
        is_zip = zipfile.is_zipfile(file)
    try:
        # PyTorch's format before 1.6 is no zip and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        # of PyTorch's text only the name is of use: the rest advises to allow it
        name = re.search(r"GLOBAL (\S+)", str(error))
        found = f"asks for {name[1]}" if name else "is damaged, or no pickle of PyTorch"
        raise ValueError(
            f"{path}: refused, it {found}; only tensors and plain values are read, no code is run: "
            "convert it to safetensors"
        ) from error
    except _DAMAGE as error:
        raise ValueError(f"{path}: truncated or damaged ({error})") from error


def check_tensors(path: Path, tensors: Any) -> dict[str, Tensor]:
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: must hold named tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name!r} must be a tensor, got {type(tensor).__name__}")
    return tensors
