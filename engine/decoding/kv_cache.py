"""Keys and values of the sequences that a decoder holds: storage by slot, and nothing of the attention that reads it.

A slot is one row of each layer's `(slots, capacity, H_kv, D)` tensors. Both dimensions grow by doubling, so that memory
follows what is used. What lies beyond a slot's length is always finite: attention masks it with weight 0, and 0 times a
stale NaN would still be NaN.
"""

import torch
from torch import Tensor

from ..config import GPTConfig


class KVCache:
    """Per layer, the keys and values of every slot; `lengths[slot]` of them are valid."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.max_seq_len = config.max_seq_len
        self.lengths: list[int] = []
        self._free: list[int] = []
        self._capacity = 0
        shape = (0, 0, config.kv_heads, config.head_size)
        empty = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [empty for _ in range(config.n_layer)]
        self.values = [empty for _ in range(config.n_layer)]

    def allocate(self) -> int:
        """An empty slot, the lowest that is free: `read` is cheaper for slots that are neighbours."""
        if not self._free:
            first, count = len(self.lengths), max(1, len(self.lengths))
            self._resize(first + count, self._capacity)
            self.lengths += [0] * count
            self._free += range(first, first + count)
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def fork(self, slot: int) -> int:
        """A new slot with a copy of what `slot` holds."""
        copy, length = self.allocate(), self.lengths[slot]
        for storage in self.keys + self.values:
            storage[copy, :length] = storage[slot, :length]
        self.lengths[copy] = length
        return copy

    def truncate(self, slot: int, length: int) -> None:
        """Keep only the first `length` of what a slot holds."""
        for storage in self.keys + self.values:
            storage[slot, length : self.lengths[slot]] = 0
        self.lengths[slot] = length

    def free(self, slot: int) -> None:
        for storage in self.keys + self.values:
            storage[slot] = 0  # all of it: a step that failed may have written beyond the length
        self.lengths[slot] = 0
        self._free.append(slot)

    def reserve(self, length: int, prefix: int = 0) -> None:
        """Make room for sequences of that length, the first `prefix` of which are not tokens."""
        limit = self.max_seq_len + prefix
        if length > limit:
            raise ValueError(
                f"a sequence holds at most {self.max_seq_len} tokens, got {length - prefix}"
            )
        if length > self._capacity:
            capacity = min(max(length, 2 * self._capacity, 16), limit)
            self._resize(len(self.lengths), capacity)
            self._capacity = capacity

    def append(self, layer: int, slots: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the keys and values `(B, T, H_kv, D)` of slots `(B,)` at places `(B, T)`, which are reserved.

        They count once the decoder has set `lengths`, after the last layer.
        """
        self.keys[layer][slots[:, None], places] = k
        self.values[layer][slots[:, None], places] = v

    def read(self, layer: int, slots: list[int], length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of some slots, `(B, length, H_kv, D)` each.

        Views where the slots follow each other, copies otherwise.
        """
        first, end = slots[0], slots[0] + len(slots)
        index = slice(first, end) if slots == list(range(first, end)) else slots
        return self.keys[layer][index, :length], self.values[layer][index, :length]

    def _resize(self, num_slots: int, capacity: int) -> None:
        """Grow the storage, one layer at a time: when memory runs out on the way, the cache stays usable."""
        for storages in (self.keys, self.values):
            for layer, old in enumerate(storages):
                shape = (max(num_slots, old.shape[0]), max(capacity, old.shape[1]))
                new = old.new_zeros(*shape, *old.shape[2:])
                new[: old.shape[0], : old.shape[1]] = old
                storages[layer] = new
