"""Token and position embedding on Triton: values, gradients and hazards of the compiled kernels."""

import pytest
import torch
from helpers import check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from leangpt.kernels import ops, triton_embedding, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(B, T, C, V, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, T), generator=generator)
    weight, position_weight = (torch.randn(rows, C, generator=generator) for rows in (V, T + 2))
    return tokens.to(device), weight.to(device, dtype), position_weight.to(device, dtype)


def check(tokens, weight, positions=None, position_weight=None):
    if positions is None:
        check_op(lambda w: ops.embedding(tokens, w), [weight], "triton")
    else:
        check_op(
            lambda *w: ops.embedding(tokens, w[0], positions, w[1]),
            [weight, position_weight],
            "triton",
        )


SHAPES = [(1, 1, 1, 1), (2, 3, 40, 7), (1, 31, 257, 97), (5, 7, 512, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    tokens, weight, position_weight = make_inputs(*shape, torch.bfloat16, device)
    check(tokens, weight, torch.arange(shape[1], device=device)[None] + 1, position_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, device):
    for seed, B, T, V in ((1, 2, 3, 7), (2, 3, 17, 5)):
        tokens, weight, position_weight = make_inputs(B, T, 272, V, dtype, device, seed)
        check(tokens, weight, torch.arange(T, device=device)[None], position_weight)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33, 300])
def test_segments_of_any_length(num_tokens, device):
    """Runs of one token around the blocks whose sums are taken beforehand, up to several loads of these."""
    for num_kinds in (1, 2, 3):
        tokens, weight, _ = make_inputs(1, num_tokens, 16, num_kinds, torch.bfloat16, device)
        check(tokens, weight)
    runs = torch.tensor([3, 1, 2, 0], device=device).repeat_interleave(num_tokens)
    check(runs.view(4, -1), torch.randn(4, 16, device=device))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(B=st.integers(1, 5), T=st.integers(1, 40), V=st.integers(1, 50), seed=st.integers(0, 99))
def test_any_tokens(B, T, V, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, weight, position_weight = make_inputs(B, T, 272, V, torch.bfloat16, device, seed)
    check(tokens, weight, torch.arange(T, device=device)[None], position_weight)


def test_same_bits_in_every_run(device, thread_orders):
    tokens, weight, _ = make_inputs(5, 60, 272, 3, torch.bfloat16, device)
    leaf, runs = weight.requires_grad_(), []
    for order in thread_orders:
        with use_backend("triton"), order():
            y = ops.embedding(tokens, leaf)
            runs.append(torch.autograd.grad(y, leaf, y)[0])
    assert torch.equal(*runs)


def test_positions_that_broadcast(device):
    tokens, weight, position_weight = make_inputs(3, 5, 24, 7, torch.bfloat16, device)
    for shape in ((3, 5), (1, 5), (5,), (3, 1), (1, 1), ()):
        positions = torch.randint(7, shape, device=device)
        check(tokens, weight, positions, position_weight)


def test_strides(device):
    tokens, weight, position_weight = make_inputs(6, 4, 48, 7, torch.bfloat16, device)
    positions = torch.arange(12, device=device).view(2, 6)[:, ::2].t()  # (3, 2)
    check(
        tokens[::2, 1:3],
        weight[:, ::2],
        positions % 6,
        position_weight.t().contiguous().t()[:, 1::2],
    )
    check(tokens.t(), weight.t().contiguous().t())
    leaf = weight.requires_grad_()
    with use_backend("triton"):
        ops.embedding(tokens, leaf).sum().backward()  # a gradient of stride 0
    assert torch.equal(leaf.grad[:, 0], tokens.flatten().bincount(minlength=7).bfloat16())


def test_rounds_once(device):
    """Many addends, each too small for the sum in bfloat16: they are added in float32."""
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, device=device).requires_grad_()
    with use_backend("triton"):
        y = ops.embedding(torch.zeros(1, 1000, dtype=torch.int64, device=device), weight)
    (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert (dweight[0] == 1000).all() and (dweight[1] == 0).all()


def test_empty(device):
    weight = torch.randn(3, 8, device=device).requires_grad_()
    with use_backend("triton"):
        for shape in ((0, 5), (2, 0)):
            y = ops.embedding(torch.empty(shape, dtype=torch.int64, device=device), weight)
            assert y.shape == (*shape, 8)
            assert (torch.autograd.grad(y.sum(), weight)[0] == 0).all()


def test_out_of_range_is_nan_and_has_no_gradient(device):
    tokens = torch.tensor([[0, 3, 2, -1, 2**40]], device=device)
    weight = torch.ones(3, 8, device=device).requires_grad_()
    with use_backend("triton"):
        y = ops.embedding(tokens, weight)
    assert y.isnan().all(-1).tolist() == [[False, True, False, True, True]]
    (dweight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert dweight[:, 0].tolist() == [1, 0, 1]


def test_opcheck(device):
    tokens, weight, position_weight = make_inputs(2, 20, 16, 3, torch.float32, device)
    positions = torch.arange(20, device=device)[None]
    for needs in ((True, True), (True, False), (False, True)):
        tables = (
            weight.clone().requires_grad_(needs[0]),
            position_weight.clone().requires_grad_(needs[1]),
        )
        arguments = (tokens, tables[0], positions, tables[1])
        torch.library.opcheck(triton_embedding._embedding, arguments)
    torch.library.opcheck(
        triton_embedding._embedding, (tokens, weight.requires_grad_(), None, None)
    )
    torch.library.opcheck(
        triton_embedding._embedding_backward, (torch.randn(2, 20, 16, device=device), positions, 22)
    )


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(compiler, device):
    tokens, weight, position_weight = make_inputs(2, 5, 24, 7, torch.bfloat16, device)
    positions = torch.arange(5, device=device)[None]
    leaves = weight.requires_grad_(), position_weight.requires_grad_()
    torch._dynamo.reset()

    def call(weight, position_weight):
        return ops.embedding(tokens, weight, positions, position_weight)

    with use_backend("triton"):
        outputs = [
            f(*leaves) for f in (call, torch.compile(call, backend=compiler, fullgraph=True))
        ]
    dy = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, leaves, dy) for y in outputs]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_fake_tensors_on_a_gpu():
    with FakeTensorMode(), use_backend("triton"):
        tokens = torch.empty(2, 5, dtype=torch.int64, device="cuda")
        weight = torch.empty(7, 16, dtype=torch.bfloat16, device="cuda")
        y = ops.embedding(tokens, weight, tokens, weight)
        assert y.shape == (2, 5, 16) and y.dtype == torch.bfloat16 and y.is_cuda
        dtable = triton_embedding._embedding_backward(y, tokens, 7)
        assert dtable.shape == (7, 16) and dtable.dtype == torch.bfloat16 and dtable.is_cuda
