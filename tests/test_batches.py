import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leangpt.data.batches import Batches, TokenDataset, evaluation_batches
from leangpt.data.permutation import keyed_hash, permute
from leangpt.data.shards import ShardWriter, token_dtype


def make_dataset(folder, num_tokens, shard_tokens=2**27, vocab_size=2**16) -> TokenDataset:
    """Token i of the stream is i, so that a window tells where it was cut."""
    with ShardWriter(folder, "train", token_dtype(vocab_size), shard_tokens) as writer:
        writer.write(np.arange(num_tokens, dtype=np.uint32))
    split = {"tokens": num_tokens, "bytes": 3 * num_tokens, "shards": writer.shards}
    manifest = {
        "format_version": 1,
        "tokenizer": {"vocab_size": vocab_size},
        "splits": {"train": split, "val": {"tokens": 0, "bytes": 0, "shards": []}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenDataset(folder, "train")


def test_dataset(tmp_path):
    dataset = make_dataset(tmp_path, 100, shard_tokens=33)
    assert len(list(tmp_path.glob("*.bin"))) == 4
    assert (dataset.num_tokens, dataset.num_bytes, dataset.bytes_per_token) == (100, 300, 3.0)
    assert dataset.read(30, 40).tolist() == list(range(30, 70))
    assert dataset.read(95, 10).tolist() == [95, 96, 97, 98, 99, 0, 1, 2, 3, 4]
    assert dataset.read(0, 100).dtype == np.int64
    with pytest.raises(FileNotFoundError, match="no prepared data here"):
        TokenDataset(tmp_path / "nowhere", "train")


def test_damaged_shards_are_not_trained_on(tmp_path):
    make_dataset(tmp_path, 100)
    path = tmp_path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(ValueError, match="damaged"):
        TokenDataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("num_tokens", "seq_len"), [(1000, 7), (1001, 7), (64, 8), (9, 8), (17, 1)]
)
def test_an_epoch_covers_each_window_once(tmp_path, num_tokens, seq_len):
    dataset = make_dataset(tmp_path, num_tokens, shard_tokens=100)
    batches = Batches(dataset, batch_size=1, seq_len=seq_len, seed=5)
    count = batches.sequences_per_epoch
    assert count == max(1, num_tokens // seq_len)
    orders = []
    for _ in range(3):
        starts = []
        seen: Counter[int] = Counter()
        for _ in range(count):
            tokens, targets = batches.next()
            assert tokens.shape == targets.shape == (1, seq_len)
            assert tokens.dtype == targets.dtype == torch.int64
            torch.testing.assert_close(targets, (tokens + 1) % num_tokens, rtol=0, atol=0)
            seen.update(tokens[0].tolist())
            starts.append(tokens[0, 0].item())
        assert len(seen) == count * seq_len and set(seen.values()) == {1}
        orders.append(starts)
    if count > 2:
        # the steps from window to window tell the order apart from where the first cut is
        steps = [np.diff(starts) % num_tokens for starts in orders]
        assert any((steps[0] != other).any() for other in steps[1:])


def test_order_is_random(tmp_path):
    """Not nearly sorted, and different for another seed."""
    dataset = make_dataset(tmp_path, 8 * 1000)
    starts = {}
    for seed in (1, 2):
        tokens, _ = Batches(dataset, 1000, 8, seed).next()
        starts[seed] = np.argsort(tokens[:, 0].numpy())
        assert abs(np.corrcoef(starts[seed], np.arange(1000))[0, 1]) < 0.1
    assert (starts[1] != starts[2]).mean() > 0.9


def test_epochs_cut_at_other_places(tmp_path):
    dataset = make_dataset(tmp_path, 16 * 100)
    batches = Batches(dataset, 100, 16, seed=0)
    phases = {int(batches.next()[0][0, 0]) % 16 for _ in range(40)}
    assert len(phases) > 10


def test_the_cursor_is_the_whole_state(tmp_path):
    dataset = make_dataset(tmp_path, 500)
    first = Batches(dataset, 6, 7, seed=3)
    for _ in range(25):  # 71 sequences an epoch: into the third
        first.next()
    assert first.cursor == 150
    second = Batches(dataset, 6, 7, seed=3)
    second.cursor = first.cursor
    for _ in range(30):
        for one, other in zip(first.next(), second.next(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_the_global_batch(tmp_path, world_size):
    dataset = make_dataset(tmp_path, 500)
    whole = Batches(dataset, 6, 7, seed=3)
    ranks = [Batches(dataset, 6, 7, 3, rank, world_size) for rank in range(world_size)]
    for _ in range(30):
        tokens, targets = whole.next()
        for rank, batches in enumerate(ranks):
            part = batches.next()
            assert torch.equal(part[0], tokens[rank::world_size])
            assert torch.equal(part[1], targets[rank::world_size])
            assert batches.cursor == whole.cursor


def test_batches_check_their_arguments(tmp_path):
    dataset = make_dataset(tmp_path, 20)
    Batches(dataset, 1, 19, seed=0).next()
    with pytest.raises(ValueError, match="the train split has 20 tokens, a sequence needs 21"):
        Batches(dataset, 1, 20, seed=0)
    with pytest.raises(ValueError, match="the val split has 0 tokens"):
        next(evaluation_batches(TokenDataset(tmp_path, "val"), 1, 4, 1))
    with pytest.raises(ValueError, match="multiple of the 2 processes, got 3"):
        Batches(dataset, 3, 4, seed=0, world_size=2)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        Batches(dataset, 2, 4, seed=0, rank=2, world_size=2)


def test_evaluation_batches(tmp_path):
    dataset = make_dataset(tmp_path, 8 * 100 + 1)
    batches = list(evaluation_batches(dataset, batch_size=4, seq_len=8, num_batches=5))
    assert [tokens.shape for tokens, _ in batches] == [(4, 8)] * 5
    starts = [start for tokens, _ in batches for start in tokens[:, 0].tolist()]
    assert starts == [40 * i for i in range(20)]
    for tokens, targets in batches:
        assert torch.equal(targets, tokens + 1)
    # more than there is: every window once
    tokens = torch.cat([tokens for tokens, _ in evaluation_batches(dataset, 64, 8, 9)])
    assert tokens.flatten().tolist() == list(range(800))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**64), epoch=st.integers(0, 9))
def test_permute_is_a_permutation(size, seed, epoch):
    assert sorted(permute(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_permute_needs_no_memory():
    size = 10**15
    values = {permute(i, size, 1) for i in range(1000)}
    assert len(values) == 1000 and max(values) < size and min(values) < size / 100


def test_permutations_are_uniform():
    """All 24 orders of four things, about equally often."""
    orders = Counter(tuple(permute(i, 4, seed) for i in range(4)) for seed in range(4800))
    chi_square = sum((orders[order] - 200) ** 2 / 200 for order in orders)
    assert len(orders) == 24 and chi_square < 60  # 23 degrees of freedom: p < 1e-4


def test_keyed_hash_never_changes():
    """A resumed run must find the same order, also with the next version."""
    digest = hashlib.blake2b(b"1337 2", digest_size=8).digest()
    assert keyed_hash(1337, 2) == int.from_bytes(digest, "little")
    assert [permute(i, 10, 1337, 0) for i in range(10)] == [8, 3, 1, 2, 6, 9, 7, 4, 0, 5]
