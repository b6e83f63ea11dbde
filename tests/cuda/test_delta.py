"""What adapters add to products, on CUDA: thin matrices of several adapters, each for rows of its own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from linear_launchers import DeviceDelta, add_branch, linear_decode, multiply_deltas
from native_helpers import PackedMatrix

pytestmark = pytest.mark.usefixtures("cuda")

# one row, a tile of rows, more than one
ROWS = {0: [3], 2: [0, 7, 8, 9], 1: [1, 2, 4, 5, 6, 11]}


def make_deltas(n: int, k: int, ranks: list[int | None], is_bottleneck: bool = False):
    """Random deltas by adapter, None where it has none: weights and biases, and the same on the device."""
    deltas = []
    for rank in ranks:
        if rank is None:
            deltas.append(None)
            continue
        down = torch.randn(rank, n if is_bottleneck else k) / k**0.5
        biases = (torch.randn(rank), torch.randn(n)) if is_bottleneck else (None, None)
        deltas.append((down, biases[0], torch.randn(n, rank), biases[1]))
    return deltas, [None if d is None else DeviceDelta(*d, is_bottleneck) for d in deltas]


def expected(delta, x, is_bottleneck: bool = False):
    down, down_bias, up, up_bias = (None if t is None else t.to(x.dtype) for t in delta)
    narrow = F.linear(x, down, down_bias)
    return F.linear(F.gelu(narrow, approximate="tanh") if is_bottleneck else narrow, up, up_bias)


def addend_rows() -> list[int]:
    return [row for rows in ROWS.values() for row in rows]


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("is_bottleneck", [False, True], ids=["low_rank", "bottleneck"])
@pytest.mark.parametrize(
    ("n", "k", "ranks"),
    [(40, 30, [1, 3, 8]), (64, 300, [17, None, 4]), (600, 50, [70, 64, 5])],
    ids=str,
)
def test_accuracy(n, k, ranks, is_bottleneck):
    deltas, on_device = make_deltas(n, k, ranks, is_bottleneck)
    x = torch.randn(12, n if is_bottleneck else k)
    if not is_bottleneck:
        x = x.bfloat16()
    addends = multiply_deltas(on_device, ROWS, x, n, is_bottleneck)
    at = 0
    for adapter, rows in ROWS.items():
        found = addends[at : at + len(rows)]
        at += len(rows)
        delta = deltas[adapter]
        if delta is None:
            assert (found == 0).all() and found.signbit().all(), "-0 is neutral"
            continue
        of_rows = x[rows]
        truth = expected(delta, of_rows.double(), is_bottleneck)
        assert_as_accurate(found, truth, expected(delta, of_rows.float(), is_bottleneck))


@pytest.mark.parametrize("is_bottleneck", [False, True], ids=["low_rank", "bottleneck"])
def test_a_row_has_the_same_bits_in_any_company(is_bottleneck):
    _, on_device = make_deltas(70, 90, [9, 16, 33], is_bottleneck)
    x = torch.randn(12, 70 if is_bottleneck else 90)
    if not is_bottleneck:
        x = x.bfloat16()
    together = multiply_deltas(on_device, ROWS, x, 70, is_bottleneck)
    row_of = addend_rows()
    adapter_of = {row: adapter for adapter, rows in ROWS.items() for row in rows}
    for i, row in enumerate(row_of):
        alone = multiply_deltas(on_device, {adapter_of[row]: [row]}, x, 70, is_bottleneck)
        assert torch.equal(alone[0], together[i])


def test_deltas_of_the_other_kind_are_left_out():
    _, on_device = make_deltas(32, 32, [4, 4, 4], is_bottleneck=True)
    addends = multiply_deltas(on_device, ROWS, torch.randn(12, 32).bfloat16(), 32, False)
    assert (addends == 0).all() and addends.signbit().all()


@pytest.mark.parametrize(
    ("num_rows", "activation"),
    [(1, "none"), (12, "gelu_tanh"), (40, "swiglu"), (300, "gelu_tanh")],
)
def test_products_with_addends(num_rows, activation):
    """In every kernel of products; rows without one have the bits that they have in a step without adapters."""
    n, k = 64 if num_rows < 300 else 5504, 40
    packed = PackedMatrix("bf16", np.random.default_rng(0).standard_normal((n, k)).astype("f"))
    x = torch.randn(num_rows, k).bfloat16()
    addend_of = torch.full((num_rows,), -1, dtype=torch.int32)
    addend_of[::3] = torch.randperm(len(addend_of[::3]), dtype=torch.int32)
    addends = torch.randn(len(addend_of[::3]), -(-n // 64) * 64)
    dtype = torch.float32 if activation == "none" else torch.bfloat16
    out = linear_decode(packed, x, activation=activation, dtype=dtype, addends=(addends, addend_of))
    plain = linear_decode(packed, x, activation=activation, dtype=dtype)
    assert torch.equal(out[addend_of < 0], plain[addend_of < 0])

    def by_definition(dtype):
        y = F.linear(x.to(dtype), torch.from_numpy(packed.unpacked()).to(dtype))
        y[::3] += addends[addend_of[::3].long(), :n].to(dtype)
        if activation == "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        if activation == "swiglu":
            gate, up = y.unflatten(1, (-1, 2, 16)).unbind(2)
            return (F.silu(gate) * up).flatten(1)
        return y

    baseline = by_definition(torch.bfloat16 if activation != "none" else torch.float32)
    assert_as_accurate(out, by_definition(torch.float64), baseline)


@pytest.mark.usefixtures("schedule")
def test_a_branch_joins_the_stream():
    n, branch, stream = 40, torch.randn(9, 40), torch.randn(9, 40)
    addends = torch.randn(4, 64)
    addend_of = torch.tensor([-1, 2, -1, 0, 1, -1, -1, 3, -1], dtype=torch.int32)
    out = add_branch(branch, addends, addend_of, n, stream)
    more = torch.where((addend_of < 0)[:, None], -0.0, addends[addend_of.clamp(min=0).long(), :n])
    assert torch.equal(out, stream + (branch + more))


def test_errors():
    _, on_device = make_deltas(32, 32, [4])
    x = torch.randn(12, 32).bfloat16()
    with pytest.raises(ValueError, match="outputs and most_ranks must be positive, got 0 and 4"):
        multiply_deltas(on_device, {0: [1]}, x, 0, False)
    with pytest.raises(ValueError, match="add_branch: stride must be .* at most 64, got 80"):
        add_branch(
            torch.randn(1, 80), torch.randn(1, 64), torch.zeros(1).int(), 64, torch.randn(1, 80)
        )
