"""LayerNorm on Triton, alone and with dropout and the residual add: values, gradients and hazards of the compiled kernels."""

import pytest
import torch
from helpers import check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from leangpt.kernels import dispatch, ops, triton_layer_norm, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Few rows are enough for backward's programs to take several groups of them."""
    monkeypatch.setattr(triton_layer_norm, "num_sms", lambda: 1)


def make_inputs(*shape, dtype=torch.bfloat16, device, seed=0):
    """x, residual, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, shape, shape[-1:], shape[-1:])
    x, residual, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
    return [t.to(device, dtype) for t in (x + 3, residual, weight + 1, bias)]


# 1, primes, a tile's width and one less, more groups of rows than programs
SHAPES = [(1, 1), (1, 37), (3, 7, 63), (2, 83, 64), (97, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    for seed in (1, 2):
        inputs = make_inputs(*shape, device=device, seed=seed)
        check_op(lambda *t: ops.add_layer_norm(*t), inputs, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device):
    for seed in (1, 2):
        inputs = make_inputs(5, 7, 64, dtype=dtype, device=device, seed=seed)
        check_op(lambda *t: ops.add_layer_norm(*t, eps=1e-3), inputs, "triton")


BRANCH_AND_STREAM = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("shape", [(5, 7, 64), (3, 37), (2, 16400)], ids=str)
@pytest.mark.parametrize(("branch", "stream"), BRANCH_AND_STREAM, ids=str)
def test_branch_and_stream_of_two_dtypes(branch, stream, shape, device):
    """As within autocast: the sum has the wider dtype, gradients have their tensors'."""
    x, residual, weight, bias = make_inputs(*shape, dtype=torch.float32, device=device)
    tensors = [x.to(branch), residual.to(stream), weight, bias]
    check_op(lambda *t: ops.add_layer_norm(*t), tensors, "triton")


def test_autocast(device):
    """What products read has its dtype, the sum that of the stream."""
    x, residual, weight, bias = make_inputs(5, 7, 64, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        check_op(ops.layer_norm, [x, weight, bias], "triton")
        check_op(ops.add_layer_norm, [x.bfloat16(), residual, weight, bias], "triton")
        with use_backend("triton"):
            y, total = ops.add_layer_norm(x.bfloat16(), residual, weight)
            assert y.dtype == ops.layer_norm(x, weight).dtype == torch.bfloat16
    assert total.dtype == torch.float32


@pytest.mark.parametrize("C", [768, 8192, 16400])
def test_configurations(C, device):
    """Two rows in a tile, one row in the largest tile, and rows longer than a tile, more than fit into a program's tile."""
    inputs = make_inputs(11 if C > 8192 else 3, C, device=device)
    check_op(lambda *t: ops.add_layer_norm(*t), inputs, "triton")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    outer=st.integers(1, 7),
    inner=st.integers(1, 40),
    C=st.sampled_from((48, 64)),
    seed=st.integers(0, 99),
)
def test_any_number_of_rows(outer, inner, C, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(outer, inner, C, device=device, seed=seed)
    check_op(lambda *t: ops.add_layer_norm(*t), inputs, "triton")


def test_same_bits_in_every_run(device, thread_orders):
    leaves = [t.requires_grad_() for t in make_inputs(97, 48, device=device)]
    runs = []
    for order in thread_orders:
        with use_backend("triton"), order():
            outputs = ops.add_layer_norm(*leaves)
            runs.append((*outputs, *torch.autograd.grad(outputs, leaves, outputs)))
    assert all(map(torch.equal, *runs))


def test_alone_and_without_bias(device):
    x, _, weight, bias = make_inputs(3, 5, 64, device=device)
    check_op(lambda *t: ops.layer_norm(*t), [x, weight, bias], "triton")
    check_op(lambda *t: ops.layer_norm(*t, eps=1e-2), [x, weight], "triton")


def test_strides(device):
    """Rows that lie apart, in one level or two, elements that do, and gradients of stride 0."""
    x, other, weight, bias = make_inputs(4, 6, 64, device=device)
    for view in (x[:, ::2], x[1:, 3:].transpose(0, 1), x.mT.contiguous().mT):
        dense = other.flatten()[: view.numel()].view(view.shape)
        check_op(lambda *t: ops.add_layer_norm(*t), [view, dense, weight, bias], "triton")
        check_op(lambda *t: ops.add_layer_norm(*t), [dense, view, weight, bias], "triton")
    for dim in (0, -1):
        check_op(lambda *t, d=dim: ops.layer_norm(*t).sum(d), [x, weight, bias], "triton")


def test_gradient_of_one_output(device):
    x, residual, weight, bias = make_inputs(3, 64, device=device)
    check_op(lambda *t: ops.add_layer_norm(*t)[0], [x, residual, weight, bias], "triton")
    check_op(lambda *t: ops.add_layer_norm(*t, weight.to(t[0]))[1], [x, residual], "triton")


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 64), (3, 37)], ids=str)
def test_dropout(shape, stream, device):
    """The mask of a seed, read off the sum, is the mask of the same seed in forward and backward."""
    x, *others = make_inputs(*shape, dtype=stream, device=device)
    x = x.bfloat16()
    with use_backend("triton"):
        torch.manual_seed(3)
        ones, zeros = torch.ones_like(x), torch.zeros_like(x)
        kept = ops.add_layer_norm(ones, zeros, *others[1:], dropout_p=0.25)[1] > 0

    def call(x, *others):
        if dispatch.forced_backend() == "reference":
            return ops.add_layer_norm(torch.where(kept, x / 0.75, 0.0), *others)
        torch.manual_seed(3)
        return ops.add_layer_norm(x, *others, dropout_p=0.25)

    check_op(call, [x, *others], "triton")


def test_dropout_is_random(device):
    x = torch.ones(64, 64, dtype=torch.bfloat16, device=device)

    def keep(p):
        with use_backend("triton"):
            total = ops.add_layer_norm(x, torch.zeros_like(x), x[0], x[0], dropout_p=p)[1]
        return total, (total > 0).double()

    def assert_share(events, share):
        assert abs(events.mean().item() - share) < 5 * (share * (1 - share) / x.numel()) ** 0.5

    for p in (0.25, 0.5):
        total, kept = keep(p)
        assert torch.equal(total, (kept / (1 - p)).bfloat16())
        assert_share(kept, 1 - p)
        for other in (kept.roll(1, 0), kept.roll(1, 1), keep(p)[1]):  # they are independent
            assert_share(kept * other, (1 - p) ** 2)
    assert not keep(1.0)[0].any()


def test_empty(device):
    x, residual, weight, bias = (t.requires_grad_() for t in make_inputs(2, 0, 64, device=device))
    with use_backend("triton"):
        y, total = ops.add_layer_norm(x, residual, weight, bias)
    assert y.shape == total.shape == (2, 0, 64)
    gradients = torch.autograd.grad((y, total), (x, weight, bias), (y, total))
    assert gradients[0].shape == x.shape and not gradients[1].any() and not gradients[2].any()


def test_opcheck(device):
    x, residual, weight, bias = (t.requires_grad_() for t in make_inputs(3, 5, 64, device=device))
    seed = torch.tensor([5], device=device)
    torch.library.opcheck(triton_layer_norm._layer_norm, (x, weight, bias, 1e-5, torch.bfloat16))
    for arguments in ((bias, None, 1e-5, 0.0, x.dtype), (bias, seed, 1e-5, 0.5, torch.bfloat16)):
        torch.library.opcheck(triton_layer_norm._add_layer_norm, (x, residual, weight, *arguments))
    mean = torch.randn(3, 5, device=device)
    arguments = (x.detach(), None, x.detach(), weight.detach(), mean, mean.exp())
    for options in (
        (None, 0.0, True, x.dtype),
        (seed, 0.5, True, x.dtype),
        (None, 0.0, True, torch.float32),
    ):
        torch.library.opcheck(triton_layer_norm.norm_backward, (*arguments, *options))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend, device):
    inputs = make_inputs(3, 5, 64, device=device)

    def call(x, residual, weight, bias):
        y, total = ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.25)
        return ops.layer_norm(y * total, weight, bias)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        torch.manual_seed(3)
        with use_backend("triton"):
            y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, inputs[0])))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_fake_tensors_on_cuda():
    with FakeTensorMode(), use_backend("triton"):
        x = torch.empty(2, 3, 40, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(40, dtype=torch.bfloat16, device="cuda")
        y, total = ops.add_layer_norm(x, x, weight, dropout_p=0.1)
        mean = torch.empty(2, 3, device="cuda")
        arguments = (y, total, x, weight, mean, mean, None, 0.0, True, x.dtype)
        (dresidual,), dweights = triton_layer_norm.norm_backward(*arguments)
        outputs = (y, total, ops.layer_norm(x, weight, weight), dresidual)
        # a float32 stream
        wide = triton_layer_norm.norm_backward(y, None, total.float(), *arguments[3:])
        sums = ops.add_layer_norm(x, x.float(), weight)
    for out in outputs:
        assert out.device.type == "cuda" and out.dtype == torch.bfloat16
        assert out.shape == (2, 3, 40)
    assert [t.dtype for t in (*wide[0], *sums)] == [
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    assert dweights.shape == (2, 40) and dweights.is_cuda
