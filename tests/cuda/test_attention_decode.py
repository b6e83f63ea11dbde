"""Attention of single queries and of chunks to paged keys and values, on CUDA."""

import pytest
import torch
from cache_launchers import HeadShape, PagedCache, Rows
from helpers import assert_as_accurate

from leangpt.kernels import reference

pytestmark = pytest.mark.usefixtures("cuda")

KINDS = ("bf16", "fp16", "int8", "fp8")
# one key, a page, a split of 256 keys, and one more or less
LENGTHS = [1, 15, 16, 17, 255, 256, 257, 530]


def filled_cache(shape, kind, lengths, scale=1.0):
    """A cache that holds random tokens, and the queries of all of them, for each sequence."""
    cache = PagedCache(shape, kind, lengths)
    rows = Rows([(s, p) for s, length in enumerate(lengths) for p in range(length)])
    num_heads = shape.n_head + 2 * shape.n_kv_head
    qkv = torch.randn(len(rows.rows), num_heads, shape.head_dim)
    qkv[:, : shape.n_head] *= scale
    queries = cache.append(qkv, rows)
    return cache, queries.split(list(lengths))


def check(cache, queries, rows, window=0, max_keys=None):
    """Hold the error rule for some rows; what they attend to."""
    q = torch.stack([queries[s][p] for s, p in rows])
    out = cache.attend(q, Rows(rows), window, max_keys)
    shapes = [cache.keys_and_values(s, len(queries[s])) for s in range(len(queries))]
    refs, baselines = [], []
    for one, (s, p) in zip(q, rows, strict=True):
        first = max(0, p + 1 - window) if window else 0
        keys, values = (x[None, first : p + 1] for x in shapes[s])
        for parts, dtype in ((refs, torch.float64), (baselines, torch.bfloat16)):
            call = (one[None, None].to(dtype), keys.to(dtype), values.to(dtype))
            parts.append(reference.attention(*call, None, None, 1.0, 0.0)[0, 0])
    assert_as_accurate(out, torch.stack(refs), torch.stack(baselines))
    return out


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_ragged_decode(head_dim, group, kind):
    """The last token of sequences of every length, in one batch."""
    cache, queries = filled_cache(HeadShape(group, 1, head_dim), kind, LENGTHS)
    check(cache, queries, [(s, length - 1) for s, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [8, 16, 19, 22, 96, 136, 256])
def test_other_head_dims(head_dim, kind):
    cache, queries = filled_cache(HeadShape(2, 2, head_dim), kind, [300, 40])
    check(cache, queries, [(0, 299), (1, 39), (1, 3)])


@pytest.mark.parametrize(("n_head", "n_kv_head"), [(6, 2), (14, 2), (17, 1), (20, 1), (48, 2)])
def test_groups_that_fill_no_tile(n_head, n_kv_head):
    cache, queries = filled_cache(HeadShape(n_head, n_kv_head, 16), "bf16", [270, 18])
    check(cache, queries, [(0, 268), (0, 269), (1, 17)])


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 5, 16, 17, 250, 256, 300])
def test_sliding_window(window, kind):
    cache, queries = filled_cache(HeadShape(2, 1, 32), kind, [530, 30])
    rows = [(0, p) for p in range(500, 530)] + [(1, p) for p in range(3)] + [(0, 257), (1, 29)]
    check(cache, queries, rows, window)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_head", "n_kv_head"), [(2, 2), (4, 1), (6, 2)])
def test_chunks(n_head, n_kv_head, kind):
    """Pieces of prompts and single tokens in one batch, across the ends of pages, tiles and splits."""
    cache, queries = filled_cache(HeadShape(n_head, n_kv_head, 24), kind, [40, 300, 7])
    rows = [(1, p) for p in range(230, 290)] + [(2, 6)] + [(0, p) for p in range(40)]
    check(cache, queries, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(("n_head", "n_kv_head"), [(2, 2), (8, 1)])
def test_a_query_has_the_same_bits_alone_and_in_a_chunk(n_head, n_kv_head, window, kind):
    cache, queries = filled_cache(HeadShape(n_head, n_kv_head, 40), kind, [290, 33])
    rows = [(0, p) for p in range(240, 290)] + [(1, p) for p in range(33)]
    q = torch.stack([queries[s][p] for s, p in rows])
    whole = cache.attend(q, Rows(rows), window)
    for i in (*range(0, 50, 7), 49, 50, 51, 65, 66, 82):
        one = Rows([rows[i]])
        assert torch.equal(cache.attend(q[i : i + 1], one, window)[0], whole[i])
        # a grid for more keys, as graphs have it, and one for so many that no block takes a split
        assert torch.equal(cache.attend(q[i : i + 1], one, window, 2048)[0], whole[i])
    reversed_rows = rows[50:] + rows[:50]
    other = cache.attend(torch.cat([q[50:], q[:50]]), Rows(reversed_rows), window)
    assert torch.equal(torch.cat([other[33:], other[:33]]), whole)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_take_all_splits_have_the_same_bits(kind):
    """As they do where the results of splits would need too much memory."""
    cache, queries = filled_cache(HeadShape(4, 2, 48), kind, [700, 60])
    rows = [(0, p) for p in range(690, 700)] + [(1, 59), (0, 3)]
    split = check(cache, queries, rows)
    assert torch.equal(check(cache, queries, rows, max_keys=1 << 24), split)


def test_large_scores():
    cache, queries = filled_cache(HeadShape(2, 1, 64), "bf16", [300], scale=300.0)
    check(cache, queries, [(0, 299), (0, 0)])


def test_nan_stays_in_its_sequence():
    shape = HeadShape(2, 1, 32)
    cache, queries = filled_cache(shape, "bf16", [40, 300])
    rows = Rows([(0, 39), (1, 299)])
    q = torch.stack([queries[0][39], queries[1][299]])
    clean = cache.attend(q, rows)
    cache.append(torch.full((1, 4, 32), torch.nan), Rows([(1, 17)]))
    out = cache.attend(q, rows)
    assert out[1].isnan().all()
    assert torch.equal(out[0], clean[0])


def test_errors():
    """Before anything is launched."""
    for shape, message in [
        (HeadShape(1, 1, 257), "head_dim must be at most 256, got 257"),
        (HeadShape(3, 2, 16), r"n_head \(3\) must be a multiple of n_kv_head \(2\)"),
    ]:
        cache = PagedCache(shape, "bf16", [1])
        queries = torch.zeros(1, shape.n_head, shape.head_dim).bfloat16()
        with pytest.raises(ValueError, match="attention_decode: " + message):
            cache.attend(queries, Rows([(0, 0)]))
