"""From data files to examples: what was skipped, cut, or is in training and validation alike is counted and told."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.permutation import permute
from ..data.prepare import is_validation
from ..data.tokenizer import Tokenizer
from .rows import BadRows, Row, read_rows
from .tasks import Example, Task

_SHOWN = 3  # duplicates that are named


@dataclass(frozen=True)
class Samples:
    """Parsed rows and where they came from."""

    samples: list[Any]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: Sequence[int]) -> "Samples":
        return Samples([self.samples[i] for i in indices], [self.sources[i] for i in indices])


def read_samples(paths: Sequence[Path], task: Task, bad_rows: BadRows) -> Samples:
    """Parse all rows of some files.

    Raises:
        FileNotFoundError, ValueError: a file or a row cannot be read, see `read_rows`; there is no row at all.
    """
    rows = (row for path in paths for row in read_rows(path, bad_rows))
    parsed = list(parse_rows(rows, task.parse, bad_rows))
    if not parsed:
        raise ValueError(f"{', '.join(map(str, paths))}: no row that can be used")
    return Samples([sample for _, sample in parsed], [row.source for row, _ in parsed])


def parse_rows(
    rows: Iterable[Row], parse: Callable[[dict[str, Any]], Any], bad_rows: BadRows
) -> Iterator[tuple[Row, Any]]:
    """Rows with their samples; those that cannot be parsed go to `bad_rows`."""
    for row in rows:
        try:
            sample = parse(row.values)
        except ValueError as error:
            bad_rows.report(ValueError(f"{row.source}: {error}"))
            continue
        yield row, sample


def split(samples: Samples, val_fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Training and validation samples, spread over the data.

    Raises:
        ValueError: there are fewer than two.
    """
    count = len(samples)
    if count < 2:
        raise ValueError(f"{samples.sources[0]}: one row cannot be split; name --val-data")
    is_val = [is_validation(i, count, val_fraction, seed) for i in range(count)]
    return (
        samples.take([i for i in range(count) if not is_val[i]]),
        samples.take([i for i in range(count) if is_val[i]]),
    )


def find_duplicates(task: Task, train: Samples, val: Samples) -> list[tuple[str, str]]:
    """Places in validation and in training data where the same is asked."""
    known = {task.key(s): source for s, source in zip(train.samples, train.sources, strict=True)}
    pairs = zip(val.samples, val.sources, strict=True)
    return [(source, known[task.key(s)]) for s, source in pairs if task.key(s) in known]


def describe_duplicates(duplicates: Sequence[tuple[str, str]], num_val: int) -> str:
    shown = ", ".join(f"{val} as {train}" for val, train in duplicates[:_SHOWN])
    more = ", …" if len(duplicates) > _SHOWN else ""
    return (
        f"{len(duplicates):,} of {num_val:,} validation rows are in the training data too ({shown}{more}): "
        "the report is better than the model"
    )


@dataclass(frozen=True)
class Dataset:
    """Samples and their examples."""

    samples: list[Any]
    examples: list[Example]
    num_split: int  # samples that are several examples, since they are long

    @property
    def num_cut(self) -> int:
        return sum(example.is_cut for example in self.examples)


def encode_samples(
    samples: Samples, task: Task, tokenizer: Tokenizer, max_len: int, bad_rows: BadRows
) -> Dataset:
    """Tokenize samples.

    Raises:
        ValueError: a sample cannot be encoded, see `Task.encode` and `BadRows`; or none can.
    """
    kept: list[Any] = []
    examples: list[Example] = []
    num_split = 0
    for sample, source in zip(samples.samples, samples.sources, strict=True):
        try:
            found = task.encode_all(sample, tokenizer, max_len)
        except ValueError as error:
            bad_rows.report(ValueError(f"{source}: {error}"))
            continue
        kept.append(sample)
        examples += found
        num_split += len(found) > 1
    if not examples:
        raise ValueError(f"{samples.sources[0]} and what follows: no row that can be used")
    return Dataset(kept, examples, num_split)


class ExampleStream:
    """Examples of training, and those replayed among them, without end: the n-th one is a function of n."""

    def __init__(
        self, own: Sequence[Example], replayed: Sequence[Example], share: float, seed: int
    ) -> None:
        self._own, self._replayed = own, replayed
        self._share, self._seed = (share if replayed else 0.0), seed

    def __getitem__(self, n: int) -> Example:
        before = int(n * self._share)  # replayed ones before this
        if int((n + 1) * self._share) > before:
            return _shuffled(self._replayed, before, self._seed + 1)
        return _shuffled(self._own, n - before, self._seed)

    def batch(self, step: int, batch_size: int, rank: int, num_processes: int) -> list[Example]:
        """The rows of a step that are this process's."""
        first = step * batch_size
        return [self[n] for n in range(first + rank, first + batch_size, num_processes)]


def _shuffled(examples: Sequence[Example], n: int, seed: int) -> Example:
    """The n-th of an endless sequence in which each epoch has another order."""
    epoch, index = divmod(n, len(examples))
    return examples[permute(index, len(examples), seed, epoch)]
