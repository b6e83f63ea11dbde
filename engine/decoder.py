"""Running a model over sequences that grow: the `Decoder` protocol, and its implementation on PyTorch.

A step takes a flat batch of tokens: a piece of a prompt is many tokens of one sequence, decoding is one token of each of
many, and a batch may mix both. A decoder knows tokens and sequences; it knows neither text nor how tokens are drawn.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from leangpt.kernels import log_backend, ops

from .config import GPTConfig
from .kv_cache import KVCache
from .model import GPT

Output = Literal["logits", "hidden", "logprob_of"]


class Decoder(Protocol):
    """What a generator needs of a model."""

    @property
    def config(self) -> GPTConfig: ...

    def add_sequence(self) -> int:
        """Start an empty sequence; the number that it goes by."""
        ...

    def fork(self, sequence: int) -> int:
        """Start a sequence that holds what `sequence` holds."""
        ...

    def drop(self, sequence: int) -> None:
        """Forget a sequence and give its memory back."""
        ...

    def forward(
        self,
        tokens: Tensor,
        sequences: Tensor,
        positions: Tensor,
        output_rows: Tensor,
        output: Output = "logits",
        targets: Tensor | None = None,
    ) -> Tensor:
        """Append tokens to their sequences and return what the model says at some of them.

        Args:
            tokens: `(N,)` int64, N > 0, on any device, as all arguments.
            sequences: `(N,)` int64, the sequence of each token.
            positions: `(N,)` int64; those of a sequence continue it, in order.
            output_rows: `(R,)` int64, the rows of the batch to return something for; R may be 0.
            output: "logits", "hidden" (after the final norm), or "logprob_of" the targets.
            targets: `(R,)` int64, for "logprob_of".

        Returns:
            `(R, V)` or `(R, C)` in the dtype of the model, or `(R,)` in float32 or wider, in nats; on the model's device.

        Raises:
            ValueError: a sequence is unknown or full, positions do not continue it, or shapes do not fit. Nothing is
                appended then.
        """
        ...


@dataclass(frozen=True)
class _Group:
    """Rows of a flat batch that attend together: B sequences with T new tokens each."""

    slots: list[int]
    slot_index: Tensor  # (B,), the slots
    rows: Tensor  # (B, T), into the flat batch
    positions: Tensor  # (B, T)
    length: int  # of the longest sequence, new tokens included
    seqlens_k: Tensor | None  # (B,); None: all are of that length


class TorchDecoder:
    """A `GPT` with a key/value cache, on the device and in the dtype of its weights; its dropout is off.

    Results agree with those of another batch up to rounding. One thread at a time may use it.
    """

    def __init__(self, model: GPT) -> None:
        log_backend(model.device.type)
        self.model = model
        self.cache = KVCache(model.config, model.wte.weight.dtype, model.device)
        self._slots: dict[int, int] = {}  # by sequence; a number is never used twice
        self._next_sequence = 0

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    @torch.inference_mode()
    def add_sequence(self) -> int:
        return self._register(self.cache.allocate())

    @torch.inference_mode()
    def fork(self, sequence: int) -> int:
        return self._register(self.cache.fork(self._slot(sequence)))

    @torch.inference_mode()
    def drop(self, sequence: int) -> None:
        self.cache.free(self._slot(sequence))
        del self._slots[sequence]

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        sequences: Tensor,
        positions: Tensor,
        output_rows: Tensor,
        output: Output = "logits",
        targets: Tensor | None = None,
    ) -> Tensor:
        _check_shapes(tokens, sequences, positions, output_rows, output, targets)
        device = self.model.device
        rows_by_slot = self._rows_by_slot(sequences.tolist(), positions.tolist())
        lengths = {slot: self.cache.lengths[slot] + len(r) for slot, r in rows_by_slot.items()}
        self.cache.reserve(max(lengths.values()))
        tokens, positions = tokens.to(device), positions.to(device)
        groups = self._groups(rows_by_slot, lengths, positions)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)  # (1, N, H, D)
            for group in groups:
                new_k, new_v = k[0, group.rows], v[0, group.rows]  # (B, T, H_kv, D)
                self.cache.append(layer, group.slot_index, group.positions, new_k, new_v)
                keys, values = self.cache.read(layer, group.slots, group.length)
                out[0, group.rows] = ops.attention(
                    q[0, group.rows],
                    keys,
                    values,
                    seqlens_k=group.seqlens_k,
                    sliding_window=self.config.sliding_window,
                )
            return out

        with _evaluating(self.model):
            hidden = self.model.hidden(tokens[None], positions[None], attend)[0]
            hidden = hidden[output_rows.to(device)]  # (R, C)
            result = self._output(hidden, output, targets)
        for slot, length in lengths.items():
            self.cache.lengths[slot] = length
        return result

    def _output(self, hidden: Tensor, output: Output, targets: Tensor | None) -> Tensor:
        if targets is not None:
            weight = self.model.head_weight
            targets = targets.to(hidden.device)
            return -ops.linear_cross_entropy(hidden, weight, targets, reduction="none")
        return self.model.logits(hidden) if output == "logits" else hidden

    def _register(self, slot: int) -> int:
        sequence = self._next_sequence
        self._next_sequence += 1
        self._slots[sequence] = slot
        return sequence

    def _slot(self, sequence: int) -> int:
        if sequence not in self._slots:
            raise ValueError(f"there is no sequence {sequence}: it was dropped, or never added")
        return self._slots[sequence]

    def _rows_by_slot(self, sequences: list[int], positions: list[int]) -> dict[int, list[int]]:
        rows_by_slot: dict[int, list[int]] = defaultdict(list)
        for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            slot = self._slot(sequence)
            expected = self.cache.lengths[slot] + len(rows_by_slot[slot])
            if position != expected:
                raise ValueError(
                    f"the next position of sequence {sequence} is {expected}, got {position}"
                )
            rows_by_slot[slot].append(row)
        return rows_by_slot

    def _groups(
        self, rows_by_slot: dict[int, list[int]], lengths: dict[int, int], positions: Tensor
    ) -> list[_Group]:
        slots_by_count: dict[int, list[int]] = defaultdict(list)
        for slot in sorted(rows_by_slot):
            slots_by_count[len(rows_by_slot[slot])].append(slot)
        groups = []
        for slots in slots_by_count.values():
            rows = torch.tensor([rows_by_slot[slot] for slot in slots], device=positions.device)
            seqlens_k = [lengths[slot] for slot in slots]
            length = max(seqlens_k)
            groups.append(
                _Group(
                    slots=slots,
                    slot_index=torch.tensor(slots, device=positions.device),
                    rows=rows,
                    positions=positions[rows],
                    length=length,
                    seqlens_k=None
                    if min(seqlens_k) == length
                    else torch.tensor(seqlens_k, device=positions.device),
                )
            )
        return groups


def _check_shapes(
    tokens: Tensor,
    sequences: Tensor,
    positions: Tensor,
    output_rows: Tensor,
    output: Output,
    targets: Tensor | None,
) -> None:
    if output not in get_args(Output):
        raise ValueError(f"output must be one of {get_args(Output)}, got {output!r}")
    shape = tuple(tokens.shape)
    for name, tensor in (("sequences", sequences), ("positions", positions)):
        if len(shape) != 1 or shape == (0,) or tensor.shape != tokens.shape:
            raise ValueError(
                f"tokens and {name} must be (N,) with N > 0, got {shape} and {tuple(tensor.shape)}"
            )
    if (output == "logprob_of") != (targets is not None):
        raise ValueError("targets go with output='logprob_of', and only with it")
    if targets is not None and targets.shape != output_rows.shape:
        raise ValueError(
            f"targets must be {tuple(output_rows.shape)} as output_rows, got {tuple(targets.shape)}"
        )


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Dropout off, for a model that is in the middle of its training."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def prefill(decoder: Decoder, sequence: int, tokens: list[int], max_batch_tokens: int) -> None:
    """Append the first tokens of an empty sequence, some at a time, and ask for nothing in return."""
    no_rows = torch.tensor([], dtype=torch.int64)
    for start in range(0, len(tokens), max_batch_tokens):
        piece = torch.tensor(tokens[start : start + max_batch_tokens])
        positions = torch.arange(start, start + len(piece))
        decoder.forward(piece, torch.full_like(piece, sequence), positions, no_rows)
