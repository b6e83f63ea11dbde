"""The file from which a tokenizer is restored: JSON with its state and the sha256 of that state."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..files import read_json, write_json

FILE_NAME = "tokenizer_leangpt.json"
FORMAT_VERSION = 1


def fingerprint(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def write_state(folder: Path, state: dict[str, Any]) -> None:
    header = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(state)}
    write_json(folder / FILE_NAME, header | state)


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `write_state` wrote, or ValueError where it is damaged or of another version."""
    path = folder / FILE_NAME
    state = read_json(path)
    version = state.pop("format_version", None) if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: must be a tokenizer of format version {FORMAT_VERSION}, got {version}"
        )
    if state.pop("fingerprint", None) != fingerprint(state):
        raise ValueError(f"{path}: damaged, its content does not match its fingerprint")
    return state
