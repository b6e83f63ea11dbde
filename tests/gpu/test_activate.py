"""The activation of an MLP alone on Triton: values, gradients and hazards of the compiled kernels."""

import pytest
import torch
from helpers import check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from leangpt.kernels import ops, use_backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ACTIVATIONS = ["gelu_tanh", "gelu", "relu2", "swiglu"]
# every activation in one dtype, every dtype with and without a gate
CASES = [
    *((BF16, activation) for activation in ACTIVATIONS),
    (FP16, "gelu_tanh"),
    (FP16, "swiglu"),
    (FP32, "gelu_tanh"),
    (FP32, "swiglu"),
]


def make(M: int, F: int, dtype: torch.dtype, activation: str, device: str, seed: int = 0) -> Tensor:
    """h; a few of its values are where the functions are flat."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 * F if activation == "swiglu" else F
    return (3 * torch.randn(M, width, generator=generator)).to(device, dtype)


def call(activation: str):
    return lambda h: ops.activate(h, activation)


@pytest.mark.parametrize(("dtype", "activation"), CASES, ids=str)
def test_values_and_gradients(dtype, activation, device):
    for seed in (1, 2):
        check_op(call(activation), [make(37, 144, dtype, activation, device, seed)], "triton")


# sizes of 1, primes, tiles and one more or less, rows that are read element by element
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (31, 127), (32, 128), (33, 129)], ids=str)
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_shapes(activation, shape, device):
    check_op(call(activation), [make(*shape, BF16, activation, device)], "triton")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(M=st.integers(1, 100), F=st.integers(1, 20), seed=st.integers(0, 99))
def test_any_size(M, F, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h = make(M, 16 * F, BF16, "swiglu", device, seed)
    check_op(call("swiglu"), [h], "triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_inputs_saturate(activation, device):
    """No infinity meets a zero."""
    check_op(call(activation), [100 * make(5, 16, BF16, activation, device)], "triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_passed_on(activation, device):
    h = make(9, 16, BF16, activation, device)
    h[7] = torch.nan
    with use_backend("triton"):
        assert call(activation)(h).isnan().any(1).nonzero().tolist() == [[7]]


def test_any_strides_and_dimensions(device):
    """A view of wider rows, a transposed matrix, a cube, and a gradient that one number stands for."""
    h = make(12, 64, BF16, "swiglu", device)
    for tensor in (torch.cat((h, h), 1)[:, 32:160], h.T.contiguous().T, h.view(2, 6, 128)):
        check_op(call("swiglu"), [tensor], "triton")
        check_op(lambda h: ops.activate(h, "swiglu").sum(), [tensor], "triton")


def test_empty(device):
    h = make(0, 16, BF16, "swiglu", device).requires_grad_()
    with use_backend("triton"):
        a = ops.activate(h, "swiglu")
        (dh,) = torch.autograd.grad(a.sum(), h)
    assert a.shape == (0, 16) and dh.shape == (0, 32)


def test_autocast(device):
    """The dtype is that of h, as of torch's own activations."""
    h = make(5, 16, FP32, "gelu", device)
    with use_backend("triton"), torch.autocast(device, BF16):
        assert ops.activate(h, "gelu").dtype == FP32
        assert ops.activate(h.to(BF16), "gelu").dtype == BF16


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_opcheck(activation, device):
    h = make(5, 16, BF16, activation, device)
    da = torch.ones(5, 16, dtype=BF16, device=device)
    torch.library.opcheck(torch.ops.leangpt_triton.activate_backward, (da, h, activation))
    arguments = (h.requires_grad_(), activation)
    torch.library.opcheck(torch.ops.leangpt_triton.activate, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, device):
    compiled = torch.compile(call("swiglu"), fullgraph=True, backend=backend)
    check_op(compiled, [make(5, 16, BF16, "swiglu", device)], "triton")


def test_fake_tensors():
    """Of forward and backward; autograd itself needs a build of torch with CUDA."""
    with FakeTensorMode(), use_backend("triton"):
        h = torch.empty(2, 3, 32, dtype=BF16, device="cuda")
        a = ops.activate(h, "swiglu")
        dh = torch.ops.leangpt_triton.activate_backward(a.view(6, 16), h.view(6, 32), "swiglu")
    for result, shape in ((a, (2, 3, 16)), (dh, (6, 32))):
        assert result.shape == shape and result.dtype == BF16 and result.is_cuda
