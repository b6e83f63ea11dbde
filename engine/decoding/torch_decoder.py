"""`TorchDecoder`: a `Decoder` on PyTorch, for every device, dtype and option of a `GPT`."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from leangpt.kernels import log_backend, ops

from ..config import GPTConfig
from ..model import GPT, Linear
from .adapter import Adapter, Bottleneck, LowRank, Prefix
from .decoder import Ints, Output
from .kv_cache import KVCache
from .sampling import Draw, RowSampling
from .torch_sampling import draw

T = TypeVar("T")


@dataclass(frozen=True)
class _Sequence:
    slot: int
    prefix: int  # places in the cache in front of its tokens
    adapter: int | None


@dataclass(frozen=True)
class _Group:
    """Rows of a flat batch that attend together: B sequences with T new tokens each."""

    slots: list[int]
    slot_index: Tensor  # (B,), the slots
    rows: Tensor  # (B, T), into the flat batch
    places: Tensor  # (B, T), of the new tokens in the cache
    length: int  # of the longest sequence in the cache, new tokens included
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
        self._sequences: dict[int, _Sequence] = {}  # a number is never used twice
        self._next_sequence = 0
        self._adapters: list[dict[str, list[Tensor]]] = []  # weights by the matrix

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    def add_adapter(self, adapter: Adapter) -> int:
        self.model.must_be_plain("add_adapter")
        adapter.check(self.config)
        self._adapters.append(
            {name: self._weights(delta) for name, delta in adapter.deltas.items()}
        )
        return len(self._adapters) - 1

    def _weights(self, delta: LowRank | Bottleneck) -> list[Tensor]:
        """Two of a low-rank product, four of a bottleneck."""
        arrays = [delta.down, delta.up]
        if isinstance(delta, Bottleneck):
            arrays = [delta.down, delta.down_bias, delta.up, delta.up_bias]
        return [torch.from_numpy(array).to(self.model.wte.weight) for array in arrays]

    @torch.inference_mode()
    def add_sequence(self, prefix: Prefix | None = None, adapter: int | None = None) -> int:
        """As the protocol says; where the model itself has a prefix, sequences without one have that."""
        if adapter is not None and not 0 <= adapter < len(self._adapters):
            raise ValueError(f"there is no adapter {adapter}: add_adapter gives its number")
        layers = self._prefix_layers(prefix)
        length = layers[0][0].shape[1] if layers else 0
        self.cache.reserve(length, length)
        slot = self.cache.allocate()
        index, places = (torch.tensor([x], device=self.model.device) for x in (slot, range(length)))
        for layer, (keys, values) in enumerate(layers):
            self.cache.append(layer, index, places, keys, values)
        self.cache.lengths[slot] = length
        return self._register(_Sequence(slot, length, adapter))

    def _prefix_layers(self, prefix: Prefix | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, `(1, P, H_kv, D)`; none without a prefix."""
        if prefix is not None:
            prefix.check(self.config)
            keys, values = (
                torch.from_numpy(array).to(self.model.wte.weight)[:, None]
                for array in (prefix.keys, prefix.values)
            )
            return list(zip(keys, values, strict=True))
        own = self.model.prefix
        if own is None:
            return []
        nothing = self.model.wte.weight.new_empty(1, 0, self.config.kv_heads, self.config.head_size)
        return [own(layer, nothing, nothing) for layer in range(self.config.n_layer)]

    @torch.inference_mode()
    def fork(self, sequence: int) -> int:
        source = self._sequence(sequence)
        return self._register(replace(source, slot=self.cache.fork(source.slot)))

    @torch.inference_mode()
    def truncate(self, sequence: int, length: int) -> None:
        s = self._sequence(sequence)
        held = self.cache.lengths[s.slot] - s.prefix
        if not 0 <= length <= held:
            raise ValueError(
                f"truncate: length must be in [0, {held}], what the sequence holds, got {length}"
            )
        self.cache.truncate(s.slot, s.prefix + length)

    @torch.inference_mode()
    def drop(self, sequence: int) -> None:
        self.cache.free(self._sequence(sequence).slot)
        del self._sequences[sequence]

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
                return -self.model.losses(hidden, wanted, "none")
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
        rows_of = self._rows_of(all_sequences.tolist(), all_positions.tolist())
        lengths = {s: self.cache.lengths[s.slot] + len(rows) for s, rows in rows_of.items()}
        for s, length in lengths.items():
            self.cache.reserve(length, s.prefix)
        all_tokens, all_positions = all_tokens.to(device), all_positions.to(device)
        groups = self._groups(rows_of, lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)  # (1, N, H, D)
            for group in groups:
                new_k, new_v = k[0, group.rows], v[0, group.rows]  # (B, T, H_kv, D)
                self.cache.append(layer, group.slot_index, group.places, new_k, new_v)
                keys, values = self.cache.read(layer, group.slots, group.length)
                out[0, group.rows] = ops.attention(
                    q[0, group.rows],
                    keys,
                    values,
                    seqlens_k=group.seqlens_k,
                    sliding_window=self.config.sliding_window,
                )
            return out

        with _evaluating(self.model), self._adapting(rows_of):
            hidden = self.model.hidden(all_tokens[None], all_positions[None], attend)[0]
            result = finish(hidden[wanted.to(device)])
        for s, length in lengths.items():
            self.cache.lengths[s.slot] = length
        return result

    @contextmanager
    def _adapting(self, rows_of: dict[_Sequence, list[int]]) -> Iterator[None]:
        """Let the rows of sequences with an adapter go through its deltas."""
        rows_by_adapter: dict[int, list[int]] = defaultdict(list)
        for s, rows in rows_of.items():
            if s.adapter is not None:
                rows_by_adapter[s.adapter] += rows
        parts: dict[str, list[tuple[Tensor, list[Tensor]]]] = defaultdict(list)
        for adapter, rows in rows_by_adapter.items():
            index = torch.tensor(rows, device=self.model.device)
            for name, weights in self._adapters[adapter].items():
                parts[name].append((index, weights))
        linears = {name: cast(Linear, self.model.get_submodule(name)) for name in parts}
        try:
            for name, linear in linears.items():
                linear.delta = _RowDeltas(parts[name])
            yield
        finally:
            for linear in linears.values():
                linear.delta = None

    def _register(self, sequence: _Sequence) -> int:
        number = self._next_sequence
        self._next_sequence += 1
        self._sequences[number] = sequence
        return number

    def _sequence(self, number: int) -> _Sequence:
        if number not in self._sequences:
            raise ValueError(f"there is no sequence {number}: it was dropped, or never added")
        return self._sequences[number]

    def _rows_of(self, sequences: list[int], positions: list[int]) -> dict[_Sequence, list[int]]:
        rows_of: dict[_Sequence, list[int]] = defaultdict(list)
        for row, (number, position) in enumerate(zip(sequences, positions, strict=True)):
            s = self._sequence(number)
            expected = self.cache.lengths[s.slot] - s.prefix + len(rows_of[s])
            if position != expected:
                raise ValueError(
                    f"the next position of sequence {number} is {expected}, got {position}"
                )
            rows_of[s].append(row)
        return rows_of

    def _groups(
        self, rows_of: dict[_Sequence, list[int]], lengths: dict[_Sequence, int]
    ) -> list[_Group]:
        device = self.model.device
        by_count: dict[int, list[_Sequence]] = defaultdict(list)
        for s in sorted(rows_of, key=lambda s: s.slot):
            by_count[len(rows_of[s])].append(s)
        groups = []
        for count, members in by_count.items():
            ends = torch.tensor([lengths[s] for s in members], device=device)
            length = max(lengths[s] for s in members)
            slots = [s.slot for s in members]
            groups.append(
                _Group(
                    slots=slots,
                    slot_index=torch.tensor(slots, device=device),
                    rows=torch.tensor([rows_of[s] for s in members], device=device),
                    places=ends[:, None] - count + torch.arange(count, device=device),
                    length=length,
                    seqlens_k=None if min(lengths[s] for s in members) == length else ends,
                )
            )
        return groups


class _RowDeltas(nn.Module):
    """`Linear.delta` of a step: some rows of the flat batch go through the deltas of their adapters."""

    def __init__(self, parts: list[tuple[Tensor, list[Tensor]]]) -> None:
        super().__init__()
        self.parts = parts  # rows, weights

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        for rows, weights in self.parts:
            given, product = x[:, rows], out[:, rows]
            if len(weights) == 2:
                down, up = weights
                product = product + ops.linear(ops.linear(given, down), up)
            else:
                down, down_bias, up, up_bias = weights
                product = ops.mlp(
                    product, down, down_bias, up, up_bias, "gelu_tanh", residual=product
                )
            out[:, rows] = product
        return out


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
