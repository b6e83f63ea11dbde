"""Token shards: files of token ids that are memory-mapped for reading.

A shard is a header of 64 bytes and the tokens, all little-endian:

    bytes 0-7    b"leantok\\n"
    bytes 8-11   format version
    bytes 12-15  bytes of a token: 2 (uint16) or 4 (uint32)
    bytes 16-23  number of tokens
    bytes 24-55  sha256 of the tokens
    bytes 56-63  zero

Beside the shards of a folder lies `manifest.json`: what they were made of and with which tokenizer.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..files import read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MAGIC = b"leantok\n"
_HEADER = struct.Struct("<8sIIQ32s8x")

Tokens = NDArray[np.unsignedinteger[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes a stream of tokens as `{name}-00000.bin`, `{name}-00001.bin`, … of at most `shard_tokens` tokens each."""

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype[Any], shard_tokens: int = 2**27
    ) -> None:
        self.shards: list[dict[str, Any]] = []  # file, tokens and sha256 of those that are complete
        self._folder, self._name, self._dtype = folder, name, dtype
        self._shard_tokens = shard_tokens
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._finish()

    def write(self, tokens: Tokens) -> None:
        while len(tokens):
            if self._file is None:
                self._begin()
            part = tokens[: self._shard_tokens - self._count]
            data = part.astype(self._dtype, copy=False).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._count += len(part)
            if self._count == self._shard_tokens:
                self._finish()
            tokens = tokens[len(part) :]

    def _begin(self) -> None:
        self._path = self._folder / f"{self._name}-{len(self.shards):05d}.bin"
        self._file = self._path.open("wb")
        self._file.write(bytes(_HEADER.size))
        self._digest = hashlib.sha256()
        self._count = 0

    def _finish(self) -> None:
        with self._file as file:
            self._file = None
            file.seek(0)
            file.write(
                _HEADER.pack(
                    _MAGIC,
                    FORMAT_VERSION,
                    self._dtype.itemsize,
                    self._count,
                    self._digest.digest(),
                )
            )
        self.shards.append(
            {
                "file": self._path.name,
                "tokens": self._count,
                "sha256": self._digest.hexdigest(),
            }
        )


def open_shard(path: Path, sha256: str | None = None) -> Tokens:
    """Memory-map the tokens of a shard, checking header, size and content.

    Args:
        sha256: what the manifest says of this file; None: only the header's own is checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a shard, another version, truncated, or damaged.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        size = path.stat().st_size
    if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
        raise ValueError(f"{path}: not a token shard")
    _, version, itemsize, count, digest = _HEADER.unpack(header)
    if version != FORMAT_VERSION or itemsize not in (2, 4):
        raise ValueError(
            f"{path}: must be a token shard of version {FORMAT_VERSION} with 2 or 4 bytes a token, "
            f"got version {version} with {itemsize}"
        )
    expected = _HEADER.size + count * itemsize
    if size != expected:
        raise ValueError(
            f"{path}: damaged, must have {expected} bytes for {count} tokens, got {size}"
        )
    if not count:
        return np.empty(0, dtype=f"<u{itemsize}")
    tokens = np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=_HEADER.size)
    if hashlib.sha256(tokens.data).digest() != digest:
        raise ValueError(f"{path}: damaged, its tokens do not match their sha256")
    if sha256 not in (None, digest.hex()):
        raise ValueError(f"{path}: not the shard that {MANIFEST} beside it names")
    return tokens


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        FileNotFoundError: the folder was not written by `leangpt prepare`.
        ValueError: a damaged manifest, or one of another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(
            f"{folder}: no prepared data here ({MANIFEST} is missing); make some with leangpt prepare"
        )
    manifest = read_json(path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: must have format_version {FORMAT_VERSION}, got {version}")
    return manifest


def open_split(folder: Path, split: str) -> list[Tokens]:
    """Memory-map the shards of a split, in order, checked against the manifest."""
    shards = read_manifest(folder)["splits"][split]["shards"]
    return [open_shard(folder / shard["file"], shard["sha256"]) for shard in shards]
