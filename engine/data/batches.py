"""Token shards to batches.

The documents of a split, one after the other, are one stream, which is closed to a ring. An epoch cuts it, from a point that
(seed, epoch) chooses, into windows of `seq_len` tokens, and gives them out in an order that (seed, epoch) chooses. So the n-th
sequence of a run is a function of n: a cursor is all the state there is.
"""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .permutation import keyed_hash, permute
from .shards import open_split, read_manifest


class TokenDataset:
    """One split of a folder that `leangpt prepare` wrote, memory-mapped and checked against its hashes."""

    def __init__(self, folder: Path, split: Literal["train", "val"]) -> None:
        folder = Path(folder)
        self.split = split
        self.manifest = read_manifest(folder)
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.num_bytes: int = self.manifest["splits"][split]["bytes"]  # UTF-8, of its text
        self._shards = open_split(folder, split)
        self._ends = np.array(list(accumulate(map(len, self._shards))), dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self._shards else 0

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte are nats per token / (ln 2 · bytes_per_token)."""
        return self.num_bytes / self.num_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, int64; after the last token comes the first one again."""
        parts = []
        while count:
            start %= self.num_tokens
            shard = int(np.searchsorted(self._ends, start, side="right"))
            tokens = self._shards[shard]
            begin = start - (int(self._ends[shard]) - len(tokens))
            parts.append(tokens[begin : begin + count])
            start += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError unless one window of `seq_len` tokens and their targets fits."""
        if self.num_tokens < seq_len + 1:
            raise ValueError(
                f"the {self.split} split has {self.num_tokens} tokens, a sequence needs {seq_len + 1}: "
                "prepare more text, a larger val_fraction, or train with a smaller seq_len"
            )


class Batches:
    """Training batches of a dataset, from `cursor` on, without end.

    Args:
        batch_size: sequences of a batch, over all processes.
        rank, world_size: this process gets rows rank, rank + world_size, … of the batch.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        dataset.check_length(seq_len)
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size must be a multiple of the {world_size} processes, got {batch_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.cursor = 0  # sequences given out, over all processes: the whole state
        self._dataset, self._seq_len, self._seed = dataset, seq_len, seed
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.sequences_per_epoch = max(1, dataset.num_tokens // seq_len)

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, each (batch_size / world_size, seq_len) int64; a target is the token that follows."""
        rows = range(self.cursor + self._rank, self.cursor + self._batch_size, self._world_size)
        windows = [self._dataset.read(self._start(row), self._seq_len + 1) for row in rows]
        self.cursor += self._batch_size
        return _shifted(windows)

    def _start(self, sequence: int) -> int:
        epoch, index = divmod(sequence, self.sequences_per_epoch)
        phase = keyed_hash(self._seed, epoch) % self._dataset.num_tokens
        return phase + permute(index, self.sequences_per_epoch, self._seed, epoch) * self._seq_len


def evaluation_batches(
    dataset: TokenDataset, batch_size: int, seq_len: int, num_batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Always the same batches, in order: windows that do not overlap, spread evenly over the split.

    There are fewer than `num_batches`, and the last is smaller, where the split has no more windows.
    """
    dataset.check_length(seq_len)
    available = (dataset.num_tokens - 1) // seq_len
    count = min(available, num_batches * batch_size)
    starts = [i * available // count * seq_len for i in range(count)]
    for first in range(0, count, batch_size):
        yield _shifted(
            [dataset.read(start, seq_len + 1) for start in starts[first : first + batch_size]]
        )


def _shifted(windows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack(windows))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
