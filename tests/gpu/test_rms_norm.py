"""RMSNorm on Triton, alone and with dropout and the residual add. What it shares with LayerNorm is tested in its file."""

import pytest
import torch
from helpers import check_op
from torch._subclasses.fake_tensor import FakeTensorMode

from leangpt.kernels import dispatch, ops, triton_layer_norm, triton_rms_norm, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Few rows are enough for backward's programs to take several groups of them."""
    monkeypatch.setattr(triton_layer_norm, "num_sms", lambda: 1)


def make_inputs(*shape, dtype=torch.bfloat16, device, seed=0):
    """x, residual, weight."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, weight = (
        torch.randn(size, generator=generator) for size in (shape, shape, shape[-1:])
    )
    return [t.to(device, dtype) for t in (x, residual, weight + 1)]


# 1, a prime, a tile's width and less, more groups of rows than programs
SHAPES = [(1, 1), (3, 7, 37), (2, 83, 64), (97, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    for seed in (1, 2):
        x, residual, weight = make_inputs(*shape, device=device, seed=seed)
        check_op(lambda *t: ops.add_rms_norm(*t), [x, residual, weight], "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device):
    for seed in (1, 2):
        x, _, weight = make_inputs(5, 7, 64, dtype=dtype, device=device, seed=seed)
        check_op(lambda *t: ops.rms_norm(*t, eps=1e-3), [x, weight], "triton")


def test_branch_and_stream_of_two_dtypes(device):
    """As within autocast; a norm alone has the dtype of x whatever its weight's."""
    x, residual, weight = make_inputs(5, 7, 64, dtype=torch.float32, device=device)
    check_op(lambda *t: ops.add_rms_norm(*t), [x.bfloat16(), residual, weight], "triton")
    check_op(lambda *t: ops.rms_norm(*t), [x.bfloat16(), weight], "triton")


def test_autocast(device):
    """What products read has its dtype, the sum that of the stream."""
    x, residual, weight = make_inputs(5, 7, 64, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        check_op(ops.rms_norm, [x, weight], "triton")
        check_op(ops.add_rms_norm, [x.bfloat16(), residual, weight], "triton")
        with use_backend("triton"):
            y, total = ops.add_rms_norm(x.bfloat16(), residual, weight)
            assert y.dtype == ops.rms_norm(x, weight).dtype == torch.bfloat16
    assert total.dtype == torch.float32


def test_rows_longer_than_a_tile(device):
    x, residual, weight = make_inputs(5, 16400, device=device)
    check_op(lambda *t: ops.add_rms_norm(*t), [x, residual, weight], "triton")


def test_heads_of_packed_qkv(device):
    """Heads are rows in two levels; they are read where they lie."""
    qkv, _, weight = make_inputs(2, 5, 6, 64, device=device)
    for heads in (qkv[:, :, :3], qkv[:, :, 3:5], qkv[1:, ::2, 5:]):
        check_op(lambda *t: ops.rms_norm(*t), [heads, weight], "triton")
        assert triton_layer_norm._as_rows(heads).data_ptr() == heads.data_ptr()


def test_gradient_of_one_output(device):
    x, residual, weight = make_inputs(3, 64, device=device)
    check_op(lambda *t: ops.add_rms_norm(*t)[0], [x, residual, weight], "triton")
    check_op(lambda *t: ops.add_rms_norm(*t, weight.to(t[0]))[1], [x, residual], "triton")


def test_dropout(device):
    """The mask of a seed, read off the sum, is the mask of the same seed in forward and backward."""
    x, residual, weight = make_inputs(5, 7, 64, device=device)
    with use_backend("triton"):
        torch.manual_seed(3)
        total = ops.add_rms_norm(torch.ones_like(x), torch.zeros_like(x), weight, dropout_p=0.25)[1]

    def call(x, *others):
        if dispatch.forced_backend() == "reference":
            return ops.add_rms_norm(torch.where(total > 0, x / 0.75, 0.0), *others)
        torch.manual_seed(3)
        return ops.add_rms_norm(x, *others, dropout_p=0.25)

    check_op(call, [x, residual, weight], "triton")


def test_empty(device):
    x, residual, weight = (t.requires_grad_() for t in make_inputs(2, 0, 64, device=device))
    with use_backend("triton"):
        y, total = ops.add_rms_norm(x, residual, weight)
        alone = ops.rms_norm(x, weight)
    assert y.shape == total.shape == alone.shape == (2, 0, 64)
    dx, dweight = torch.autograd.grad((y, alone), (x, weight), (y, alone))
    assert dx.shape == x.shape and dweight.shape == weight.shape and not dweight.any()


def test_opcheck(device):
    x, residual, weight = (t.requires_grad_() for t in make_inputs(3, 5, 64, device=device))
    torch.library.opcheck(triton_rms_norm._rms_norm, (x, weight, 1e-5, torch.bfloat16))
    seed = torch.tensor([5], device=device)
    for arguments in ((None, 1e-5, 0.0, x.dtype), (seed, 1e-5, 0.5, torch.bfloat16)):
        torch.library.opcheck(triton_rms_norm._add_rms_norm, (x, residual, weight, *arguments))
    arguments = (x.detach(), None, x.detach(), weight.detach(), None, x.detach()[..., 0].float())
    torch.library.opcheck(triton_layer_norm.norm_backward, (*arguments, None, 0.0, False, x.dtype))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend, device):
    inputs = make_inputs(3, 5, 64, device=device)

    def call(x, residual, weight):
        y, total = ops.add_rms_norm(x, residual, weight, dropout_p=0.25)
        return ops.rms_norm(y * total, weight)

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
        outputs = (*ops.add_rms_norm(x, x, weight, dropout_p=0.1), ops.rms_norm(x, weight))
    for out in outputs:
        assert out.is_cuda and out.dtype == torch.bfloat16 and out.shape == (2, 3, 40)
