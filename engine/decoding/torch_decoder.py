"""`TorchDecoder`: a `Decoder` on PyTorch, for every device, dtype and option of a `GPT`."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from leangpt.kernels import log_backend, ops

from ..config import GPTConfig
from ..model import GPT
from .decoder import Ints, Output
from .kv_cache import KVCache
from .sampling import Draw, RowSampling
from .torch_sampling import draw

T = TypeVar("T")


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

    kv_block_size = 1  # the cache has no pages, and grows
    num_blocks = None

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
    def truncate(self, sequence: int, length: int) -> None:
        slot = self._slot(sequence)
        held = self.cache.lengths[slot]
        if not 0 <= length <= held:
            raise ValueError(
                f"truncate: length must be in [0, {held}], what the sequence holds, got {length}"
            )
        self.cache.truncate(slot, length)

    @torch.inference_mode()
    def drop(self, sequence: int) -> None:
        self.cache.free(self._slot(sequence))
        del self._slots[sequence]

    @torch.inference_mode()
    def forward(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        output: Output = "logits",
        targets: Ints | None = None,
    ) -> np.ndarray:
        _check_output(output, len(output_rows), targets, self.config.vocab_size)

        def finish(hidden: Tensor) -> Tensor:
            if targets is not None:
                wanted = _tensor(targets).to(hidden.device)
                weight = self.model.head_weight
                return -ops.linear_cross_entropy(hidden, weight, wanted, reduction="none")
            return self.model.logits(hidden) if output == "logits" else hidden

        result = self._step(tokens, sequences, positions, output_rows, finish)
        if result.dtype != torch.float64:
            result = result.float()
        return result.cpu().numpy()

    @torch.inference_mode()
    def sample(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        rows: Sequence[RowSampling],
    ) -> list[Draw]:
        if len(rows) != len(output_rows):
            raise ValueError(
                f"sample: rows must be as many as output_rows, {len(output_rows)}, got {len(rows)}"
            )

        def finish(hidden: Tensor) -> list[Draw]:
            return draw(self.model.logits(hidden), rows) if rows else []

        return self._step(tokens, sequences, positions, output_rows, finish)

    def _step(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        finish: Callable[[Tensor], T],
    ) -> T:
        """Run a batch, and `finish` on the hidden states of its output rows, `(R, C)`; it is appended if that ends well."""
        all_tokens, all_positions, wanted = map(_tensor, (tokens, positions, output_rows))
        all_sequences = _tensor(sequences)
        _check_batch(all_tokens, all_sequences, all_positions, wanted, self.config.vocab_size)
        device = self.model.device
        rows_by_slot = self._rows_by_slot(all_sequences.tolist(), all_positions.tolist())
        lengths = {slot: self.cache.lengths[slot] + len(r) for slot, r in rows_by_slot.items()}
        self.cache.reserve(max(lengths.values()))
        all_tokens, all_positions = all_tokens.to(device), all_positions.to(device)
        groups = self._groups(rows_by_slot, lengths, all_positions)

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
            hidden = self.model.hidden(all_tokens[None], all_positions[None], attend)[0]
            result = finish(hidden[wanted.to(device)])
        for slot, length in lengths.items():
            self.cache.lengths[slot] = length
        return result

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


def _tensor(values: Ints) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _check_batch(
    tokens: Tensor, sequences: Tensor, positions: Tensor, output_rows: Tensor, vocab_size: int
) -> None:
    shape = tuple(tokens.shape)
    for name, tensor in (("sequences", sequences), ("positions", positions)):
        if len(shape) != 1 or shape == (0,) or tensor.shape != tokens.shape:
            raise ValueError(
                f"tokens and {name} must be (N,) with N > 0, got {shape} and {tuple(tensor.shape)}"
            )
    _check_range("tokens", tokens, vocab_size)
    _check_range("output_rows", output_rows, len(tokens))


def _check_output(output: Output, num_rows: int, targets: Ints | None, vocab_size: int) -> None:
    if output not in get_args(Output):
        raise ValueError(f"output must be one of {get_args(Output)}, got {output!r}")
    if (output == "logprob_of") != (targets is not None):
        raise ValueError("targets go with output='logprob_of', and only with it")
    if targets is not None:
        if len(targets) != num_rows:
            raise ValueError(f"targets must be ({num_rows},) as output_rows, got ({len(targets)},)")
        _check_range("targets", _tensor(targets), vocab_size)


def _check_range(name: str, values: Tensor, end: int) -> None:
    wrong = values[(values < 0) | (values >= end)]
    if len(wrong):
        raise ValueError(f"{name} must be in [0, {end}), got {wrong[0].item()}")


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
