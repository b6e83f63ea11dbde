"""The key/value cache: what is written is read back, whatever the slots do."""

import pytest
import torch
from torch import Tensor

from leangpt import GPTConfig
from leangpt.decoding.kv_cache import KVCache

CONFIG = GPTConfig(vocab_size=11, max_seq_len=40, n_layer=2, n_head=4, n_kv_head=2, n_embd=12)


def make_cache() -> KVCache:
    return KVCache(CONFIG, torch.float64, torch.device("cpu"))


def write(cache: KVCache, slot: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Append random keys and values to all layers; return them."""
    start = cache.lengths[slot]
    cache.reserve(start + count)
    written = []
    for layer in range(CONFIG.n_layer):
        k, v = torch.randn(2, 1, count, 2, 3, dtype=torch.float64)
        positions = torch.arange(start, start + count)[None]
        cache.append(layer, torch.tensor([slot]), positions, k, v)
        written.append((k[0], v[0]))
    cache.lengths[slot] += count
    return written


def assert_holds(cache: KVCache, slot: int, expected: list[tuple[Tensor, Tensor]]) -> None:
    for layer, (k, v) in enumerate(expected):
        keys, values = cache.read(layer, [slot], cache.lengths[slot])
        assert torch.equal(keys[0], k) and torch.equal(values[0], v)


def test_what_is_appended_is_read_back_while_slots_and_capacity_grow():
    cache = make_cache()
    written = {}
    for count in (1, 17, 3, 40, 5):
        slot = cache.allocate()
        written[slot] = write(cache, slot, count)
    assert sorted(written) == [0, 1, 2, 3, 4]
    for slot, expected in written.items():
        assert_holds(cache, slot, expected)


def test_several_slots_are_written_and_read_at_once():
    cache = make_cache()
    slots = [cache.allocate() for _ in range(4)]
    cache.reserve(3)
    k, v = torch.randn(2, 3, 2, 2, 3, dtype=torch.float64)
    positions = torch.tensor([[0, 1], [1, 2], [0, 1]])
    cache.append(1, torch.tensor([slots[3], slots[0], slots[1]]), positions, k, v)
    keys, values = cache.read(1, [slots[0], slots[3]], 3)  # not neighbours
    assert torch.equal(keys[0, 1:3], k[1]) and torch.equal(values[1, 0:2], v[0])
    keys, values = cache.read(1, [slots[0], slots[1]], 2)  # neighbours: a view
    assert torch.equal(keys[1], k[2]) and keys.data_ptr() == cache.keys[1].data_ptr()


def test_fork_copies_and_then_goes_its_own_way():
    cache = make_cache()
    parent = cache.allocate()
    first = write(cache, parent, 5)
    child = cache.fork(parent)
    assert cache.lengths[child] == 5
    assert_holds(cache, child, first)
    write(cache, parent, 1)
    more = write(cache, child, 2)
    cache.free(parent)
    both = [
        (torch.cat((k, k2)), torch.cat((v, v2)))
        for (k, v), (k2, v2) in zip(first, more, strict=True)
    ]
    assert_holds(cache, child, both)


def test_a_freed_slot_is_used_again_lowest_first_and_holds_nothing():
    cache = make_cache()
    slots = [cache.allocate() for _ in range(4)]
    for slot in slots:
        write(cache, slot, 3)
    cache.keys[0][1, 2:] = torch.nan  # as a model that overflows leaves it
    for slot in (3, 1, 2):
        cache.free(slot)
    assert cache.allocate() == 1
    assert cache.lengths[1] == 0
    assert all(not storage[1].any() for storage in cache.keys + cache.values)


def test_truncating_keeps_the_beginning_and_nothing_else():
    cache = make_cache()
    slots = [cache.allocate() for _ in range(3)]
    written = [write(cache, slot, 9) for slot in slots]
    cache.truncate(slots[1], 4)
    assert cache.lengths[slots[1]] == 4
    assert_holds(cache, slots[1], [(k[:4], v[:4]) for k, v in written[1]])
    assert all(not storage[1, 4:].any() for storage in cache.keys + cache.values)
    for slot in (0, 2):
        assert_holds(cache, slots[slot], written[slot])
    more = write(cache, slots[1], 2)
    both = [
        (torch.cat((k[:4], k2)), torch.cat((v[:4], v2)))
        for (k, v), (k2, v2) in zip(written[1], more, strict=True)
    ]
    assert_holds(cache, slots[1], both)


def test_memory_follows_use():
    cache = make_cache()
    slot = cache.allocate()
    assert cache.keys[0].numel() == 0
    write(cache, slot, 1)
    assert cache.keys[0].shape == (1, 16, 2, 3)
    write(cache, slot, 16)
    assert cache.keys[0].shape == (1, 32, 2, 3)
    write(cache, slot, 23)
    assert cache.keys[0].shape == (1, 40, 2, 3)  # max_seq_len, not 64


def test_longer_than_the_context_is_an_error():
    cache = make_cache()
    cache.allocate()
    with pytest.raises(ValueError, match="at most 40 tokens, got 41"):
        cache.reserve(41)


@pytest.mark.parametrize("failing_call", range(4))
def test_running_out_of_memory_while_growing_leaves_it_usable(monkeypatch, failing_call):
    cache = make_cache()
    slot = cache.allocate()
    written = write(cache, slot, 10)
    calls = []

    def new_zeros(self, *shape):
        calls.append(shape)
        if len(calls) == failing_call + 1:
            raise MemoryError
        return torch.zeros(shape, dtype=self.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", new_zeros)
        with pytest.raises(MemoryError):
            cache.reserve(33)
    assert_holds(cache, slot, written)
    other = cache.allocate()
    more = write(cache, other, 20)
    assert_holds(cache, slot, written)
    assert_holds(cache, other, more)
