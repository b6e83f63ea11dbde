"""Rotary position embedding on Triton: values, gradients and hazards of the compiled kernels."""

import pytest
import torch
from helpers import check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from leangpt.kernels import ops, triton_rotary, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(B, T, H, D, dtype=torch.bfloat16, *, device, seed=0, angles_of_batch=False):
    """x, cos and sin."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, H, D, generator=generator)
    angles = 9 * torch.randn(B if angles_of_batch else 1, T, D // 2, generator=generator)
    return x.to(device, dtype), angles.cos().to(device), angles.sin().to(device)


def check_rotary(x, cos, sin):
    check_op(lambda x: ops.rotary(x, cos, sin), [x], "triton")


def check_rotary_qkv(qkv, cos, sin, num_kv_heads):
    """Without and with QK-norm."""

    def call(qkv, *weights):
        return ops.rotary_qkv(qkv, cos, sin, num_kv_heads, *weights, eps=1e-5)

    check_op(call, [qkv], "triton")
    check_op(call, [qkv, *make_weights(qkv)], "triton")


def make_weights(qkv):
    """Of the norms of queries and keys."""
    weights = torch.randn(2, qkv.shape[-1], generator=torch.Generator().manual_seed(4))
    return list(weights.to(qkv))


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Few tokens are enough for programs of backward to take several."""
    monkeypatch.setattr(triton_rotary, "num_sms", lambda: 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device):
    for seed, angles_of_batch in ((1, False), (2, True)):
        inputs = make_inputs(
            2, 7, 7, 32, dtype, device=device, seed=seed, angles_of_batch=angles_of_batch
        )
        check_rotary(*inputs)
        check_rotary_qkv(*inputs, num_kv_heads=2)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), T=st.integers(1, 40), seed=st.integers(0, 99), of_batch=st.booleans())
def test_any_number_of_tokens(B, T, seed, of_batch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(B, T, 7, 32, device=device, seed=seed, angles_of_batch=of_batch)
    check_rotary_qkv(*inputs, num_kv_heads=2)


@pytest.mark.parametrize("head_dim", [2, 40, 80, 256])
def test_head_dims(head_dim, device):
    check_rotary_qkv(*make_inputs(1, 3, 5, head_dim, device=device), num_kv_heads=1)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (33, 1), (65, 5), (64, 32)], ids=str)
def test_heads(heads, device):
    """More and fewer heads than a program turns at a time, which is 64 of this head_dim."""
    H, H_kv = heads
    check_rotary_qkv(*make_inputs(2, 3, H + 2 * H_kv, 32, device=device), num_kv_heads=H_kv)


def test_strides(device):
    qkv, cos, sin = make_inputs(2, 5, 8, 32, device=device, angles_of_batch=True)
    for view in (qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, ::2], qkv.mT.contiguous().mT):
        check_rotary(view, cos, sin)
    for view in (qkv[:, :, :6], qkv.mT.contiguous().mT):
        check_rotary_qkv(view, cos, sin, num_kv_heads=2)
    check_rotary(qkv, cos.mT.contiguous().mT, sin[:1].expand(2, -1, -1))
    dense = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    check_op(lambda x: ops.rotary(x, cos, sin).sum(2), [dense], "triton")  # gradients of stride 0


def test_angles_are_not_rounded(device):
    """cos and sin stay float32: a turn of bfloat16 values is exact but for the rounding of the result."""
    x, cos, sin = make_inputs(1, 5, 3, 32, device=device)
    with use_backend("triton"):
        y = ops.rotary(x, cos, sin)
    exact = ops.rotary(x.double(), cos.double(), sin.double())
    assert torch.equal(y, exact.bfloat16())


def test_weights_of_another_dtype(device):
    """Float32 parameters within autocast; keys without a scale, and heads of zeros, which eps keeps finite."""
    qkv, cos, sin = make_inputs(2, 5, 6, 32, device=device)
    qkv[0, 3] = 0
    q_weight, k_weight = make_weights(qkv.float())
    tensors = [qkv, q_weight, torch.zeros_like(k_weight)]
    check_op(lambda qkv, *weights: ops.rotary_qkv(qkv, cos, sin, 2, *weights), tensors, "triton")


def test_frozen_weights(device):
    qkv, cos, sin = make_inputs(2, 5, 6, 32, device=device)
    weights = make_weights(qkv)
    check_op(
        lambda qkv: ops.rotary_qkv(qkv, cos, sin, 2, *(w.to(qkv) for w in weights)), [qkv], "triton"
    )
    check_op(lambda *w: ops.rotary_qkv(qkv.to(w[0]), cos, sin, 2, *w)[:2], weights, "triton")


def test_empty(device):
    for shape in ((0, 5, 6, 32), (2, 0, 6, 32)):
        qkv, cos, sin = make_inputs(*shape, device=device)
        qkv.requires_grad_()
        with use_backend("triton"):
            q, k, v = ops.rotary_qkv(qkv, cos, sin, 2)
            (dqkv,) = torch.autograd.grad((q, k, v), qkv, (q, k, v))
            x = ops.rotary(qkv, cos, sin)
            weight = torch.ones(32, dtype=qkv.dtype, device=device, requires_grad=True)
            normed = ops.rotary_qkv(qkv, cos, sin, 2, weight, weight)
            dnormed, dweight = torch.autograd.grad(normed, (qkv, weight), normed)
        assert q.shape == k.shape == v.shape == normed[0].shape == (*shape[:2], 2, 32)
        assert dqkv.shape == x.shape == dnormed.shape == shape
        assert dweight.shape == weight.shape and not dweight.any()


def test_opcheck(device):
    qkv, cos, sin = make_inputs(2, 5, 6, 32, device=device)
    q, k, v = qkv.split(2, dim=2)
    torch.library.opcheck(triton_rotary._rotary_qkv_backward, (q, k, v, cos, sin))
    qkv.requires_grad_()
    torch.library.opcheck(triton_rotary._rotary, (qkv[:, :, :4], cos, sin, False))
    torch.library.opcheck(triton_rotary._rotary_qkv, (qkv, cos, sin, None, None, 2, 1e-6))
    weights = make_weights(qkv.detach())
    arguments = (q, k, v, qkv, cos, sin, *weights, 1e-6)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(triton_rotary._rotary_qkv_norm_backward, arguments)
    weights = [weight.requires_grad_() for weight in weights]
    torch.library.opcheck(triton_rotary._rotary_qkv, (qkv, cos, sin, *weights, 2, 1e-6))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend, device):
    qkv, cos, sin = make_inputs(2, 5, 6, 32, device=device)

    weights = make_weights(qkv)

    def call(qkv):
        q, k, v = ops.rotary_qkv(qkv, cos, sin, 2)
        q = q + ops.rotary_qkv(qkv, cos, sin, 2, *weights)[0]
        return ops.rotary(q * k, cos, sin) * v

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        leaf = qkv.clone().requires_grad_()
        with use_backend("triton"):
            y = function(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, qkv[:, :, :2])))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_fake_tensors_on_cuda():
    with FakeTensorMode(), use_backend("triton"):
        qkv = torch.empty(2, 5, 6, 32, dtype=torch.bfloat16, device="cuda")
        cos = torch.empty(1, 5, 16, device="cuda")
        q, k, v = ops.rotary_qkv(qkv, cos, cos, 1)
        turned = ops.rotary(q, cos, cos)
        dqkv = triton_rotary._rotary_qkv_backward(q, k, v, cos, cos)
        weights = 2 * [torch.empty(32, dtype=torch.bfloat16, device="cuda")]
        norm = triton_rotary._rotary_qkv_norm_backward(q, k, v, qkv, cos, cos, *weights, 1e-6)
    assert norm[1].shape == (2, 32)
    for out, num_heads in ((q, 4), (k, 1), (v, 1), (turned, 4), (dqkv, 6), (norm[0], 6)):
        assert out.is_cuda and out.dtype == torch.bfloat16 and out.shape == (2, 5, num_heads, 32)
