"""Keys and values on their way to pages, queries on theirs to attention, and copies of pages, on CUDA."""

from ctypes import c_int64

import cuda_device as cuda
import pytest
import torch
from cache_launchers import HeadShape, PagedCache, Rows, call, rotary_angles
from helpers import assert_as_accurate

from leangpt.kernels import reference

pytestmark = pytest.mark.usefixtures("cuda")

DIMS = [8, 20, 40, 64, 80, 128, 256]
KINDS = ("bf16", "fp16", "int8", "fp8")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = {"int8": 127, "fp8": 448}


def every_row(lengths):
    return Rows([(s, p) for s, length in enumerate(lengths) for p in range(length)])


def rounded(x, kind):
    """Rows as the cache keeps them."""
    if kind in DTYPES:
        return x.to(DTYPES[kind]).float()
    largest, amax = LARGEST[kind], x.abs().amax(-1, keepdim=True)
    scaled = x * (largest / amax)
    rounded = scaled.round() if kind == "int8" else scaled.to(torch.float8_e4m3fn).float()
    return rounded * (amax / largest)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", DIMS)
def test_append(head_dim, kind):
    lengths = [17, 1, 32]
    cache = PagedCache(HeadShape(4, 2, head_dim), kind, lengths)
    rows = every_row(lengths)
    qkv = torch.randn(len(rows.rows), 8, head_dim)
    order = torch.randperm(len(rows.rows))  # a batch may mix its sequences
    queries = cache.append(qkv[order], Rows([rows.rows[i] for i in order]))
    scale = torch.tensor(head_dim, dtype=torch.float32).rsqrt()
    assert torch.equal(queries, (qkv[order, :4] * scale).to(cache.query_dtype))
    for sequence, parts in enumerate(qkv.split(lengths)):
        keys, values = cache.keys_and_values(sequence, len(parts))
        torch.testing.assert_close(keys, rounded(parts[:, 4:6], kind), rtol=1e-6, atol=0)
        torch.testing.assert_close(values, rounded(parts[:, 6:], kind), rtol=1e-6, atol=0)


@pytest.mark.parametrize("head_dim", [20, 64])
def test_first_values_are_added_to_those_of_later_layers(head_dim):
    lengths = [17, 3]
    first, later = (PagedCache(HeadShape(4, 2, head_dim), "bf16", lengths) for _ in range(2))
    rows = every_row(lengths)
    qkv, later_qkv = (torch.randn(20, 8, head_dim) for _ in range(2))
    kept = cuda.to_device(torch.full((20, 2, head_dim), torch.nan), "first_values")
    first.append(qkv, rows, first_values=kept, is_first_layer=True)
    later.append(later_qkv, rows, first_values=kept)
    assert torch.equal(kept.cpu(), qkv[:, 6:])
    for cache, expected in (
        (first, qkv),
        (later, torch.cat((later_qkv[:, :6], later_qkv[:, 6:] + qkv[:, 6:]), 1)),
    ):
        for sequence, parts in enumerate(expected.split(lengths)):
            keys, values = cache.keys_and_values(sequence, len(parts))
            assert torch.equal(keys, rounded(parts[:, 4:6], "bf16"))
            assert torch.equal(values, rounded(parts[:, 6:], "bf16"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("head_dim", [80, 112, 144])
def test_half_of_the_lanes_have_more_to_do(request, head_dim, kind, seed):
    """In whatever order the halves of a warp come: bytes in the lanes of the one once counted as predicates of the other."""
    with request.getfixturevalue("cuda").settings(seed=seed, preempt=20):
        cache = PagedCache(HeadShape(1, 1, head_dim), kind, [120])
        qkv = torch.randn(120, 3, head_dim)
        cache.append(qkv, every_row([120]))
    keys, values = cache.keys_and_values(0, 120)
    torch.testing.assert_close(keys[:, 0], rounded(qkv[:, 1], kind), rtol=1e-6, atol=0)
    torch.testing.assert_close(values[:, 0], rounded(qkv[:, 2], kind), rtol=1e-6, atol=0)


def test_a_token_joins_a_page():
    """What stands in the page already stays."""
    cache = PagedCache(HeadShape(1, 1, 40), "bf16", [5])
    qkv = torch.randn(5, 3, 40)
    for i in range(5):
        cache.append(qkv[i : i + 1], Rows([(0, i)]))
    keys, values = cache.keys_and_values(0, 5)
    assert torch.equal(keys[:, 0], qkv[:, 1].bfloat16().float())
    assert torch.equal(values[:, 0], qkv[:, 2].bfloat16().float())


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 128, 256])
def test_norms_and_rotation(head_dim, has_norm):
    lengths = [20, 3]
    rows = every_row(lengths)
    frequencies = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    rotations = rotary_angles(rows.positions, frequencies, 1.25)
    q_norm, k_norm = (torch.rand(2, head_dim) + 0.5) if has_norm else (None, None)
    cache = PagedCache(HeadShape(4, 2, head_dim), "bf16", lengths)
    qkv = torch.randn(23, 8, head_dim)
    queries = cache.append(qkv, rows, q_norm, k_norm, rotations)

    def expected(dtype):
        x = qkv.to(dtype)
        q, k = x[:, :4], x[:, 4:6]
        if q_norm is not None:
            q = reference.rms_norm(q, q_norm.to(dtype), 1e-5)
            k = reference.rms_norm(k, k_norm.to(dtype), 1e-5)
        angles = (rows.positions[:, None].float() * frequencies).to(dtype)
        cosines, sines = angles.cos() * 1.25, angles.sin() * 1.25
        q, k = (reference.rotary(x[None], cosines, sines)[0] for x in (q, k))
        return q * head_dim**-0.5, k

    (q, k), (q32, k32) = expected(torch.float64), expected(torch.float32)
    assert_as_accurate(queries, q, q32.bfloat16())
    keys = torch.cat([cache.keys_and_values(s, n)[0] for s, n in enumerate(lengths)])
    assert_as_accurate(keys.bfloat16(), k, k32.bfloat16())


def test_angles_are_exact():
    """Also of positions that are far."""
    positions = torch.tensor([0, 1, 7, 1000, 131071, 10_000_000])
    frequencies = torch.tensor([1.0, 0.3, 1e-4, 1.0 / 3])
    found = rotary_angles(positions, frequencies).cpu()
    angles = (positions[:, None].float() * frequencies).double()
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=6e-8)


def test_a_row_has_the_same_bits_in_any_batch():
    lengths = [20, 9, 33]
    rows = every_row(lengths)
    shape = HeadShape(2, 1, 64)
    qkv = torch.randn(62, 4, 64)
    norms = torch.rand(2, 64)
    frequencies = torch.rand(32)
    whole = PagedCache(shape, "int8", lengths)
    queries = whole.append(qkv, rows, *norms, rotary_angles(rows.positions, frequencies))
    apart = PagedCache(shape, "int8", lengths)
    for i, row in enumerate(rows.rows):
        one = Rows([row])
        alone = apart.append(qkv[i : i + 1], one, *norms, rotary_angles(one.positions, frequencies))
        assert torch.equal(alone[0], queries[i])
    for sequence, length in enumerate(lengths):
        a, b = (c.keys_and_values(sequence, length) for c in (whole, apart))
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_not_lost(kind, value):
    cache = PagedCache(HeadShape(1, 1, 24), kind, [3])
    qkv = torch.randn(3, 3, 24)
    qkv[1, 1:, 7] = value
    cache.append(qkv, Rows([(0, 0), (0, 1), (0, 2)]))
    for part in cache.keys_and_values(0, 3):
        assert part[[0, 2]].isfinite().all()
        assert not part[1].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_tiny_rows_keep_their_numbers(kind):
    cache = PagedCache(HeadShape(1, 1, 16), kind, [2])
    qkv = torch.zeros(2, 3, 16)
    qkv[0, 1:] = torch.arange(16) * 1e-44
    cache.append(qkv, Rows([(0, 0), (0, 1)]))
    for part in cache.keys_and_values(0, 2):
        assert (part[0, 0] - qkv[0, 1]).abs().max() <= 1e-38
        assert not part[1].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 16, 21])
def test_a_prefix_stands_in_pages_as_tokens_do(length, kind):
    shape = HeadShape(4, 2, 40)
    cache, as_tokens = (PagedCache(shape, kind, [40, 30]) for _ in range(2))
    qkv = torch.randn(length, 8, 40)
    cache.write_prefix(1, qkv[:, 4:6].contiguous(), qkv[:, 6:].contiguous())
    as_tokens.append(qkv, Rows([(1, p) for p in range(length)]))
    found, expected = (c.keys_and_values(1, length) for c in (cache, as_tokens))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.usefixtures("schedule")
def test_copies_of_pages():
    n_layer, num_pages, block_bytes = 3, 6, 4 * 16 * 33
    pages = torch.randint(256, (n_layer, num_pages, block_bytes), dtype=torch.uint8)
    memory = cuda.to_device(pages, "pages")
    copies = torch.tensor([[4, 0], [4, 2], [1, 5]], dtype=torch.int32)
    call(
        "copy_pages", memory, c_int64(num_pages * block_bytes), n_layer, c_int64(block_bytes),
        cuda.to_device(copies, "copies"), len(copies),
    )  # fmt: skip
    assert torch.equal(memory.cpu(), pages[:, [4, 1, 4, 3, 4, 1]])


def test_errors():
    with pytest.raises(ValueError, match=r"append_kv: head_dim must be at most 256, got 257"):
        PagedCache(HeadShape(1, 1, 257), "bf16", [1]).append(torch.zeros(1, 3, 257), Rows([(0, 0)]))
    with pytest.raises(ValueError, match=r"n_head \(3\) must be a multiple of n_kv_head \(2\)"):
        PagedCache(HeadShape(3, 2, 16), "bf16", [1]).append(torch.zeros(1, 7, 16), Rows([(0, 0)]))
