"""Running a model over sequences that grow: the protocol `Decoder`, which knows tokens and sequences, and no text.

A step takes a flat batch of tokens: a piece of a prompt is many tokens of one sequence, decoding is one token of each of
many, and a batch may mix both. Its two implementations are `leangpt.decoding.torch_decoder` and `leangpt.decoding.native_decoder`; this module
needs no torch.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from ..config import GPTConfig
from .adapter import Adapter, Prefix
from .sampling import Draw, RowSampling

Output = Literal["logits", "hidden", "logprob_of"]
Ints = Sequence[int] | np.ndarray  # one dimension; an array of int64


class CacheFull(RuntimeError):
    """The decoder's cache has no page left; nothing was appended."""


@runtime_checkable
class Decoder(Protocol):
    """What a generator needs of a model. One thread at a time may use it."""

    @property
    def config(self) -> GPTConfig: ...

    @property
    def kv_block_size(self) -> int:
        """Tokens in a page of the cache: a sequence takes whole pages, and shares full ones with its forks."""
        ...

    @property
    def num_blocks(self) -> int | None:
        """Pages of the cache; None: it grows as needed."""
        ...

    def add_adapter(self, adapter: Adapter) -> int:
        """Make room for what fine-tuning added to the model; the number by which sequences are given it.

        Raises:
            ValueError: it does not fit the model, or this decoder does not run any.
        """
        ...

    def add_sequence(self, prefix: Prefix | None = None, adapter: int | None = None) -> int:
        """Start an empty sequence; the number that it goes by.

        Args:
            prefix: stands in front of it; takes room in the cache, but no positions.
            adapter: from `add_adapter`, for the tokens of this sequence and its forks alone.

        Raises:
            ValueError: the prefix does not fit the model, the adapter is unknown, or this decoder does not run any.
            CacheFull: there is no page for the prefix.
        """
        ...

    def fork(self, sequence: int) -> int:
        """Start a sequence that holds what `sequence` holds."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence but the first `length`.

        Raises:
            ValueError: the sequence is unknown, or holds fewer.
        """
        ...

    def drop(self, sequence: int) -> None:
        """Forget a sequence and give its memory back."""
        ...

    def forward(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        output: Output = "logits",
        targets: Ints | None = None,
    ) -> np.ndarray:
        """Append tokens to their sequences and return what the model says at some of them.

        Args:
            tokens: `(N,)`, N > 0.
            sequences: `(N,)`, the sequence of each token.
            positions: `(N,)`; those of a sequence continue it, in order.
            output_rows: `(R,)`, the rows of the batch to return something for, in any order; R may be 0.
            output: "logits", "hidden" (after the final norm), or "logprob_of" the targets.
            targets: `(R,)`, for "logprob_of".

        Returns:
            `(R, V)`, `(R, C)`, or `(R,)` in nats; float32, for a model of float64 float64.

        Raises:
            ValueError: a sequence is unknown or full, positions do not continue it, a token, row or target is out of
                range, or shapes do not fit. Nothing is appended then.
            CacheFull: there is no page for the tokens.
        """
        ...

    def sample(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        rows: Sequence[RowSampling],
    ) -> list[Draw]:
        """`forward`, and a draw for each output row from its logits; nothing is drawn where there are none.

        Raises:
            ValueError, CacheFull: as `forward`.
            RuntimeError: logits are NaN.
        """
        ...


@runtime_checkable
class AsyncDecoder(Decoder, Protocol):
    """A decoder that can start a step before the draws of the one before are read."""

    def start_sample(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        rows: Sequence[RowSampling],
    ) -> Callable[[], list[Draw]]:
        """Start `sample`; what is returned waits for the draws, and must be called once.

        The next step may be started before that, and no more than one. Its token -1 - i stands for draw i of this one, whatever that
        will be. Draws are read in the order of the steps.

        Raises:
            ValueError, CacheFull: as `forward`. The call that waits: RuntimeError where logits are NaN.
        """
        ...


def prefill(decoder: Decoder, sequence: int, tokens: Sequence[int], max_batch_tokens: int) -> None:
    """Append the first tokens of an empty sequence, some at a time, and ask for nothing in return."""
    for start in range(0, len(tokens), max_batch_tokens):
        piece = tokens[start : start + max_batch_tokens]
        positions = range(start, start + len(piece))
        decoder.forward(piece, [sequence] * len(piece), positions, [])
