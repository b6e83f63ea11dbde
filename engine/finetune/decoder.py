"""A tuned model in the decode engine: merged where its method can be, else its base with what was added to each sequence."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..decoding.adapter import Adapter, Prefix
from ..decoding.choice import decoder_of
from ..decoding.decoder import Decoder, prefill
from ..model import GPT, Linear
from .methods import Adapted
from .methods.int8 import dequantize_blocks

_TOKENS_AT_ONCE = 512  # of a context that candidates share


def decoder_of_tuned(adapted: Adapted, format: str | None = None) -> Decoder:
    """A decoder of the model as it is now, which later training does not change; `format` as in `decoder_of`."""
    adapted = copy.deepcopy(adapted)
    additions = None
    try:
        plain = adapted.merge()
    except ValueError:  # the method has no merged form
        additions = adapted.additions()
        plain = _without_additions(adapted.model)
    decoder = decoder_of(plain.eval(), format=format)
    return decoder if additions is None else AdaptedDecoder(decoder, *additions)


def _without_additions(model: GPT) -> GPT:
    dequantize_blocks(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.delta = None
    model.prefix = None
    return model


class AdaptedDecoder:
    """A decoder that gives every sequence the same prefix and adapter; all else is the base's."""

    def __init__(self, base: Decoder, prefix: Prefix | None, adapter: Adapter | None) -> None:
        self.config, self.kv_block_size = base.config, base.kv_block_size
        self.num_blocks = base.num_blocks
        self.fork, self.truncate, self.drop = base.fork, base.truncate, base.drop
        self.forward, self.sample, self.add_adapter = base.forward, base.sample, base.add_adapter
        self._base = base
        self._prefix = prefix
        self._adapter = None if adapter is None else base.add_adapter(adapter)

    def add_sequence(self, prefix: Prefix | None = None, adapter: int | None = None) -> int:
        adapter = self._adapter if adapter is None else adapter
        return self._base.add_sequence(prefix or self._prefix, adapter)


def hidden_states(
    decoder: Decoder, texts: Sequence[Sequence[int]], batch_size: int, last: bool = False
) -> Iterator[np.ndarray]:
    """Hidden states of texts, each one run once without padding: `(T, C)` of all tokens, or `(1, C)` of the last one."""
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        with _sequences(decoder) as sequences:
            sequences += [decoder.add_sequence() for _ in batch]
            yield from _hidden(decoder, sequences, batch, 0, last)


def hidden_of_candidates(
    decoder: Decoder, context: Sequence[int], candidates: Sequence[Sequence[int]], batch_size: int
) -> Iterator[np.ndarray]:
    """`(1, C)` of the last token of each candidate behind a context, which is run once for all."""
    with _sequences(decoder) as shared:
        shared.append(decoder.add_sequence())
        prefill(decoder, shared[0], context, _TOKENS_AT_ONCE)
        for start in range(0, len(candidates), batch_size):
            batch = candidates[start : start + batch_size]
            with _sequences(decoder) as forks:
                forks += [decoder.fork(shared[0]) for _ in batch]
                yield from _hidden(decoder, forks, batch, len(context), last=True)


def _hidden(
    decoder: Decoder,
    sequences: Sequence[int],
    texts: Sequence[Sequence[int]],
    position: int,
    last: bool,
) -> list[np.ndarray]:
    """Append texts from a position on, each to its sequence."""
    lengths = [len(text) for text in texts]
    ends = np.cumsum(lengths)
    positions = np.concatenate([np.arange(position, position + n) for n in lengths])
    rows = ends - 1 if last else np.arange(ends[-1])
    hidden = decoder.forward(
        np.concatenate([np.array(text) for text in texts]),
        np.repeat(sequences, lengths),
        positions,
        rows,
        "hidden",
    )
    return np.split(hidden, range(1, len(texts)) if last else ends[:-1])


@contextmanager
def _sequences(decoder: Decoder) -> Iterator[list[int]]:
    """A list whose sequences are dropped at the end."""
    sequences: list[int] = []
    try:
        yield sequences
    finally:
        for sequence in sequences:
            decoder.drop(sequence)
