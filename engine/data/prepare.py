"""`leangpt prepare`: documents to a folder of token shards for training and validation.

The input is read twice, as a stream: a survey counts the documents, fingerprints their text and samples them for training the
tokenizer; then they are tokenized, by several processes where there is much, and written in order. The folder appears whole or
not at all.

The fingerprint is the sha256 of the documents' text, not of paths and times: the same text is the same data wherever it lies,
and no change goes unnoticed. Reading is far cheaper than tokenizing, so that a second run costs little.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tyro.conf import Positional

from ..files import atomic_directory, write_json
from .documents import iter_documents
from .inputs import find_files
from .permutation import keyed_hash
from .shards import (
    FORMAT_VERSION,
    MANIFEST,
    ShardWriter,
    open_split,
    read_manifest,
    token_dtype,
)
from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from .workers import Task, tokenize

_TASK_BYTES = 2**20  # text that a process is given at a time
_SAMPLE_CHARACTERS = 2**26  # text that a tokenizer is trained on, at most
_WORKER_BYTES = 2**25  # text for which one more process is worth its start


@dataclass(frozen=True)
class PrepareConfig:
    """Text to token shards."""

    inputs: Positional[tuple[str, ...]] = ()  # files, folders, globs; none: Python's own sources
    out: Path = Path("data/stdlib")  # the folder that is written
    tokenizer: str = "bpe"  # bpe, byte, char, gpt2, or a folder with a tokenizer
    vocab_size: int = 4096  # bpe, char: tokens at most
    text_field: str = "text"  # field of .jsonl records, column of .parquet files
    val_fraction: float = 0.02  # share of the documents kept for validation, one at least
    shard_tokens: int = 2**27  # of a file, at most
    workers: int | None = None  # processes; None: as many as the machine has and the input is worth
    seed: int = 1337  # of the choice of validation documents
    overwrite: bool = False  # replace what was prepared in `out` from something else

    def __post_init__(self) -> None:
        if isinstance(self.inputs, str):
            raise TypeError(f"inputs must be a tuple of strings, got the string {self.inputs!r}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        for name in ("vocab_size", "shard_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")


def prepare(config: PrepareConfig, progress: bool = True) -> dict[str, Any]:
    """Write `config.out`: shards of both splits, the tokenizer and `manifest.json`, whose content is returned.

    Where that folder was made from the same text with the same options and is intact, nothing is written.

    Raises:
        FileNotFoundError, ValueError: an input that cannot be read; see `iter_documents`.
        FileExistsError: `out` holds something else and `overwrite` is not set, or was not made by `prepare`.
        RuntimeError: a worker process died, or the input changed while it was read.
    """
    tokenizer = None if config.tokenizer in ("bpe", "char") else _fixed_tokenizer(config.tokenizer)
    _check_out(config)
    survey = _survey(config, keep_sample=tokenizer is None, progress=progress)
    recipe = _recipe(config, survey, tokenizer)
    if _is_done(config, recipe):
        _say(progress, f"{config.out}: already prepared from the same text with the same options")
        return read_manifest(config.out)
    if tokenizer is None:
        _say(progress, f"training a {config.tokenizer} tokenizer of {config.vocab_size} tokens")
        tokenizer = train_tokenizer(config.tokenizer, survey.sample, config.vocab_size)
        survey.sample.clear()
    with atomic_directory(config.out) as folder:
        tokenizer.save(folder)
        manifest = recipe | {
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
            },
            "splits": _write_splits(config, survey, tokenizer, folder, progress),
        }
        write_json(folder / MANIFEST, manifest)
    counts = {split: f"{content['tokens']:,}" for split, content in manifest["splits"].items()}
    _say(progress, f"{config.out}: {counts['train']} tokens to train, {counts['val']} to validate")
    return manifest


def _say(progress: bool, message: str) -> None:
    if progress:
        print(message, file=sys.stderr)


def _fixed_tokenizer(name: str) -> Tokenizer:
    if name in ("byte", "gpt2"):
        return train_tokenizer(name, (), 0)
    if not Path(name).is_dir():
        raise ValueError(
            f"tokenizer must be bpe, byte, char, gpt2 or a folder with a tokenizer, got {name!r}"
        )
    tokenizer = load_tokenizer(Path(name))
    if tokenizer.eos_id is None:
        raise ValueError(f"{name}: this tokenizer has no token that ends a text (eos_token)")
    return tokenizer


def _check_out(config: PrepareConfig) -> None:
    """Refuse to replace what `prepare` has not written, and to delete the input."""
    out = config.out
    is_ours = out.is_dir() and ((out / MANIFEST).exists() or not any(out.iterdir()))
    if out.exists() and not is_ours:
        raise FileExistsError(
            f"{out}: exists and was not made by leangpt prepare; choose another --out"
        )
    for path in find_files(config.inputs):
        if path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{path}: lies inside --out {out}, which would be replaced")


@dataclass
class _Survey:
    """What one pass over the documents tells."""

    documents: int = 0
    bytes: int = 0  # UTF-8
    digest: Any = field(default_factory=hashlib.sha256)
    sample: list[str] = field(default_factory=list)  # spread evenly over the documents
    _stride: int = 1
    _sample_characters: int = 0

    def add(self, text: str, keep_sample: bool) -> None:
        data = text.encode()
        self.digest.update(len(data).to_bytes(8, "little"))
        self.digest.update(data)
        self.bytes += len(data)
        if keep_sample and self.documents % self._stride == 0:
            self.sample.append(text[:_SAMPLE_CHARACTERS])
            self._sample_characters += len(self.sample[-1])
            while self._sample_characters > _SAMPLE_CHARACTERS:
                # from here on every other document, and of those before too
                self._stride *= 2
                self.sample = self.sample[::2]
                self._sample_characters = sum(map(len, self.sample))
        self.documents += 1


def _survey(config: PrepareConfig, keep_sample: bool, progress: bool) -> _Survey:
    survey = _Survey()
    with tqdm(desc="read", unit="B", unit_scale=True, disable=not progress) as bar:
        for document in iter_documents(config.inputs, config.text_field):
            before = survey.bytes
            survey.add(document.text, keep_sample)
            bar.update(survey.bytes - before)
    if not survey.documents:
        raise ValueError(f"{', '.join(config.inputs)}: no text in there")
    return survey


def _recipe(config: PrepareConfig, survey: _Survey, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "format_version": FORMAT_VERSION,
        "input": {
            "sha256": survey.digest.hexdigest(),
            "documents": survey.documents,
            "bytes": survey.bytes,
        },
        "options": {
            "tokenizer": tokenizer.fingerprint if tokenizer else config.tokenizer,
            "vocab_size": None if tokenizer else config.vocab_size,
            "val_fraction": config.val_fraction,
            "shard_tokens": config.shard_tokens,
            "seed": config.seed,
        },
    }


def _is_done(config: PrepareConfig, recipe: dict[str, Any]) -> bool:
    """Whether `out` holds the result of this recipe; FileExistsError where it holds another and may not be replaced."""
    if not (config.out / MANIFEST).exists():
        return False
    try:
        found = read_manifest(config.out)
        if all(found.get(key) == value for key, value in recipe.items()):
            for split in found["splits"]:
                open_split(config.out, split)
            return True
        options = found["options"]
        changed = [key for key, value in recipe["options"].items() if options.get(key) != value]
        reason = "was prepared from other text"
        if changed:
            reason = f"was prepared with other options ({', '.join(changed)})"
    except (ValueError, FileNotFoundError) as error:
        reason = str(error)
    if not config.overwrite:
        raise FileExistsError(
            f"{config.out}: {reason}; choose another --out, or replace it with --overwrite"
        )
    return False


def _write_splits(
    config: PrepareConfig, survey: _Survey, tokenizer: Tokenizer, folder: Path, progress: bool
) -> dict[str, dict[str, Any]]:
    """Tokenize all documents into the shards of `folder`; returns what the manifest says of each split."""
    dtype = token_dtype(tokenizer.vocab_size)
    workers = config.workers or min(_num_cpus(), 1 + survey.bytes // _WORKER_BYTES)
    with (
        ShardWriter(folder, "train", dtype, config.shard_tokens) as train,
        ShardWriter(folder, "val", dtype, config.shard_tokens) as val,
        tqdm(
            desc="tokenize", total=survey.bytes, unit="B", unit_scale=True, disable=not progress
        ) as bar,
    ):
        writers = {"train": train, "val": val}
        counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in writers}
        for task, tokens in tokenize(_tasks(config, survey), tokenizer, folder, workers):
            writers[task.split].write(tokens)
            count = counts[task.split]
            count["documents"] += len(task.texts)
            count["tokens"] += len(tokens)
            count["bytes"] += task.num_bytes
            bar.update(task.num_bytes)
    return {split: counts[split] | {"shards": writer.shards} for split, writer in writers.items()}


def _num_cpus() -> int:
    # those that this process may use, where the system tells
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tasks(config: PrepareConfig, survey: _Survey) -> Iterator[Task]:
    texts: dict[str, list[str]] = {"train": [], "val": []}
    sizes = {"train": 0, "val": 0}
    for split, text in _assigned(config, survey):
        texts[split].append(text)
        sizes[split] += len(text.encode())
        if sizes[split] >= _TASK_BYTES:
            yield Task(split, texts[split], sizes[split])
            texts[split], sizes[split] = [], 0
    for split in texts:
        if texts[split]:
            yield Task(split, texts[split], sizes[split])


def _assigned(config: PrepareConfig, survey: _Survey) -> Iterator[tuple[str, str]]:
    """(split, text) of all documents."""
    again = _Survey()
    for document in iter_documents(config.inputs, config.text_field):
        text = document.text
        if survey.documents == 1:
            # the end of the only document, from the start of a line where one is near
            cut = max(1, int(len(text) * (1 - config.val_fraction)))
            cut = text.rfind("\n", max(0, 2 * cut - len(text)), cut) + 1 or cut
            yield "train", text[:cut]
            if text[cut:]:
                yield "val", text[cut:]
        elif is_validation(again.documents, survey.documents, config.val_fraction, config.seed):
            yield "val", text
        else:
            yield "train", text
        again.add(text, keep_sample=False)
    if again.digest.digest() != survey.digest.digest():
        raise RuntimeError("the input changed while it was read; run leangpt prepare again")


def is_validation(index: int, num_documents: int, fraction: float, seed: int) -> bool:
    """Whether this document is one of the validation split.

    The corpus is cut into as many equal stretches as the split gets documents, and one is drawn from each: it is spread over
    the corpus, and of two documents or more neither split is empty.
    """
    picked = min(max(1, round(num_documents * fraction)), num_documents - 1)
    stretch = index * picked // num_documents
    first = -(-stretch * num_documents // picked)
    end = -(-(stretch + 1) * num_documents // picked)
    return index == first + keyed_hash(seed, stretch) % (end - first)
