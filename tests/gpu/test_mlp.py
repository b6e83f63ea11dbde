"""The MLP on Triton: values, gradients, dropout and hazards of the compiled kernels."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGURATION_DTYPES, check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from leangpt.kernels import (
    dispatch,
    ops,
    reference,
    triton_dropout,
    triton_linear,
    triton_mlp,
    use_backend,
)

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
# (M, C, n_inner): sizes that are no multiple of a tile, with 16-byte loads and without
ALIGNED, ODD = (133, 80, 112), (67, 37, 101)


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str, device: str
) -> list[Tensor]:
    """x, w_in, b_in, w_out, b_out, residual."""
    M, C, n_inner = shape
    rows = 2 * n_inner if activation == "swiglu" else n_inner
    shapes = [(M, C), (rows, C), (rows,), (C, n_inner), (C,), (M, C)]
    x, w_in, b_in, w_out, b_out, residual = (torch.randn(s, device=device) for s in shapes)
    tensors = (x, w_in / C**0.5, b_in, w_out / n_inner**0.5, b_out, residual)
    return [t.to(dtype) for t in tensors]


def call(activation: str, dropout_p: float = 0.0):
    def mlp(x, w_in, b_in, w_out, b_out, residual):
        return ops.mlp(
            x, w_in, b_in, w_out, b_out, activation, residual=residual, dropout_p=dropout_p
        )

    return mlp


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("dtype", "activation"), CASES, ids=str)
def test_values_and_gradients(dtype, activation, seed, device):
    torch.manual_seed(seed)
    check_op(call(activation), make(ALIGNED, dtype, activation, device), "triton")


@pytest.mark.parametrize("seed", [0, 1])
def test_odd_sizes(seed, device):
    torch.manual_seed(seed)
    check_op(call("swiglu"), make(ODD, BF16, "swiglu", device), "triton")


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_neither_biases_nor_residual(activation, device):
    x, w_in, _, w_out, _, _ = make(ALIGNED, BF16, activation, device)
    check_op(
        lambda x, w_in, w_out: ops.mlp(x, w_in, None, w_out, None, activation),
        [x, w_in, w_out],
        "triton",
    )


def test_sizes_of_one(device):
    check_op(call("swiglu"), make((1, 1, 1), BF16, "swiglu", device), "triton")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(M=st.integers(1, 300), C=st.integers(1, 9), inner=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_size(M, C, inner, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = make((M, 16 * C, 16 * inner), BF16, "gelu_tanh", device)
    check_op(call("gelu_tanh"), tensors, "triton")


@pytest.mark.parametrize("index", range(len(triton_linear.configurations())))
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("dtype", CONFIGURATION_DTYPES, ids=str)
def test_configurations(dtype, activation, index, device, monkeypatch):
    forward, backward = triton_linear.configurations(), triton_mlp.configurations()
    monkeypatch.setattr(triton_linear._linear_kernel, "configs", [forward[index]])
    monkeypatch.setattr(triton_mlp._mlp_bwd_kernel, "configs", [backward[index % len(backward)]])
    check_op(call(activation), make((131, 144, 272), dtype, activation, device), "triton")


def test_large_inputs_saturate(device):
    """No infinity meets a zero."""
    for activation in ACTIVATIONS:
        x, w_in, *rest = make(ALIGNED, BF16, activation, device)
        check_op(call(activation), [100 * x, w_in, *rest], "triton")


def test_nan_is_passed_on(device):
    for activation in ACTIVATIONS:
        x, *rest = make(ALIGNED, BF16, activation, device)
        x[7] = torch.nan
        with use_backend("triton"):
            rows = call(activation)(x, *rest).isnan().any(1)
        assert rows.nonzero().tolist() == [[7]]


def test_any_strides(device):
    """Views of x and the residual, transposed weights, biases with gaps, a gradient that one number stands for."""
    x, w_in, b_in, w_out, b_out, residual = make(ALIGNED, BF16, "swiglu", device)
    tensors = [
        torch.cat((x, x), dim=1)[:, 16:96],
        w_in.T.contiguous().T,
        b_in.repeat_interleave(2)[::2],
        w_out.T.contiguous().T,
        b_out.repeat_interleave(2)[::2],
        residual.T.contiguous().T,
    ]
    check_op(call("swiglu"), tensors, "triton")
    check_op(lambda *tensors: call("swiglu")(*tensors).sum(), tensors, "triton")


def test_any_number_of_dimensions(device):
    x, w_in, b_in, w_out, b_out, residual = make((6, 80, 112), BF16, "gelu", device)
    weights = (w_in, b_in, w_out, b_out)
    with use_backend("triton"):
        rows = call("gelu")(x, *weights, residual)
        assert torch.equal(call("gelu")(x[0], *weights, residual[0]), rows[0])
        cube = call("gelu")(x.view(3, 2, 80), *weights, residual.view(3, 2, 80))
        assert torch.equal(cube, rows.view(3, 2, 80))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_empty_batch(dropout_p, device):
    tensors = make((0, 80, 112), BF16, "swiglu", device)
    leaves = [t.requires_grad_() for t in tensors]
    with use_backend("triton"):
        out = call("swiglu", dropout_p)(*leaves)
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (0, 80)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("trained", range(6))
def test_frozen_tensors(trained, device):
    """A gradient for one tensor alone is the one that it has among all."""
    tensors = make(ALIGNED, BF16, "gelu_tanh", device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with use_backend("triton"):
        expected = torch.autograd.grad(call("gelu_tanh")(*leaves).sum(), leaves)[trained]
        tensors[trained] = leaves[trained]
        (gradient,) = torch.autograd.grad(call("gelu_tanh")(*tensors).sum(), [tensors[trained]])
    assert torch.equal(gradient, expected)


def test_without_gradients_nothing_is_kept(device):
    x, w_in, b_in, w_out, b_out, residual = make(ALIGNED, BF16, "gelu_tanh", device)
    arguments = (x, w_in, b_in, w_out, b_out, residual, None, "gelu_tanh", 0.0)
    out, h = torch.ops.leangpt_triton.mlp(*arguments, False)
    kept_out, kept_h = torch.ops.leangpt_triton.mlp(*arguments, True)
    assert h.numel() == 0 and kept_h.shape == (x.shape[0], w_in.shape[0])
    assert torch.equal(out, kept_out)


def dropout_mask(M: int, C: int, dropout_p: float, device: str) -> Tensor:
    """0 or 1 / (1 - p): what backward makes of ones, with the seed that torch's generator gives next."""
    seed = triton_dropout.dropout_seed(torch.empty(0, device=device), dropout_p)
    ones = torch.ones(M, C, device=device)
    return torch.ops.leangpt_triton.mlp_dropout_backward(ones, seed, dropout_p, ones.dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "activation"),
    [
        (ALIGNED, BF16, "gelu_tanh"),
        (ALIGNED, FP16, "gelu_tanh"),
        (ALIGNED, FP32, "gelu_tanh"),
        (ODD, BF16, "swiglu"),
    ],
    ids=str,
)
def test_dropout(shape, dtype, activation, device):
    """Against the reference under the same mask, outputs and gradients."""
    torch.manual_seed(3)
    mask = dropout_mask(shape[0], shape[1], 0.3, device)
    assert ((mask == 0) | ((mask - 1 / 0.7).abs() < 1e-6)).all()

    def dropped(x, w_in, b_in, w_out, b_out, residual):
        if dispatch.forced_backend() == "triton":
            torch.manual_seed(3)
            return call(activation, 0.3)(x, w_in, b_in, w_out, b_out, residual)
        return residual + mask.to(x.dtype) * call(activation)(x, w_in, b_in, w_out, b_out, None)

    check_op(dropped, make(shape, dtype, activation, device), "triton")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [ALIGNED, ODD], ids=str)
def test_autocast(shape, dropout_p, device):
    """Float32 tensors, products in bfloat16, and a residual that is added without being rounded."""
    torch.manual_seed(3)
    mask = dropout_mask(shape[0], shape[1], dropout_p, device) if dropout_p else None

    def dropped(x, w_in, b_in, w_out, b_out, residual):
        weights = (w_in, b_in, w_out, b_out)
        with torch.autocast(device, torch.bfloat16):
            if mask is None or dispatch.forced_backend() == "triton":
                torch.manual_seed(3)
                return call("gelu_tanh", dropout_p)(x, *weights, residual)
            return residual + mask * call("gelu_tanh")(x, *weights, None)

    tensors = make(shape, FP32, "gelu_tanh", device)
    check_op(dropped, tensors, "triton")
    with use_backend("triton"), torch.autocast(device, torch.bfloat16):
        out = call("gelu_tanh", 1.0)(*tensors)
    assert out.dtype == FP32 and torch.equal(out, tensors[-1])


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_is_even(dropout_p, device):
    """Rows, columns, places modulo 4 and neighbours all drop about as often as asked for; another seed, other elements."""
    M, C = 192, 131
    torch.manual_seed(1)
    first, second = (dropout_mask(M, C, dropout_p, device) == 0 for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(dropout_mask(M, C, dropout_p, device) == 0, first)

    def check(drops: Tensor, p: float) -> None:
        """The shares along the last dimension are within 5 standard deviations of p."""
        limit = 5 * (p * (1 - p) / drops.shape[-1]) ** 0.5
        assert (drops.double().mean(-1) - p).abs().max() < limit

    for drops in (first, second):
        check(drops.flatten(), dropout_p)
        check(drops, dropout_p)
        check(drops.T, dropout_p)
        for place in range(4):
            check(drops[:, place::4].flatten(), dropout_p)
    for pairs in (first & second, first[1:] & first[:-1], first[:, 1:] & first[:, :-1]):
        check(pairs.flatten(), dropout_p**2)


def test_all_dropped(device):
    x, w_in, b_in, w_out, b_out, residual = make(ALIGNED, BF16, "gelu_tanh", device)
    x.requires_grad_()
    with use_backend("triton"):
        out = call("gelu_tanh", 1.0)(x, w_in, b_in, w_out, b_out, residual)
        (dx,) = torch.autograd.grad(out.sum(), [x])
    assert torch.equal(out, residual) and torch.equal(dx, torch.zeros_like(x))


def test_results_are_reproducible(device):
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in make(ALIGNED, BF16, "swiglu", device)]
        out = call("swiglu", 0.1)(*leaves)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    with use_backend("triton"):
        assert all(map(torch.equal, run(), run()))


def test_float32_is_left_to_the_library():
    with FakeTensorMode():
        for dtype, is_triton in [(BF16, True), (FP16, True), (FP32, False)]:
            backend = dispatch.select("mlp", torch.empty(1, device="cuda", dtype=dtype))
            assert (backend is not reference) == is_triton


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_opcheck(activation, device):
    x, w_in, b_in, w_out, b_out, residual = make((5, 80, 112), BF16, activation, device)
    seed = torch.tensor([5], device=device)
    tensors = [t.requires_grad_() for t in (x, w_in, b_in, w_out, b_out, residual)]
    ops_ = torch.ops.leangpt_triton
    torch.library.opcheck(ops_.mlp, (*tensors, seed, activation, 0.5, True))
    torch.library.opcheck(ops_.mlp, (*tensors, None, activation, 0.0, True))
    wide_residual = residual.detach().float().requires_grad_()
    arguments = (*tensors[:-1], wide_residual, seed, activation, 0.5, True)
    torch.library.opcheck(ops_.mlp, arguments)
    h = F.linear(x, w_in, b_in).detach()
    for needs_db in (True, False):
        arguments = (residual.detach(), w_out.detach(), h, activation, needs_db)
        torch.library.opcheck(ops_.mlp_backward, arguments)
    torch.library.opcheck(ops_.mlp_dropout_backward, (residual.detach(), seed, 0.5, FP32))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, device):
    compiled = torch.compile(call("swiglu"), fullgraph=True, backend=backend)
    check_op(compiled, make(ALIGNED, BF16, "swiglu", device), "triton")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_dropout(backend, device):
    def run(mlp) -> list[Tensor]:
        torch.manual_seed(2)
        leaves = [t.requires_grad_() for t in make(ALIGNED, BF16, "gelu_tanh", device)]
        out = mlp(*leaves)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    mlp = call("gelu_tanh", 0.2)
    with use_backend("triton"):
        compiled = run(torch.compile(mlp, fullgraph=True, backend=backend))
        assert all(map(torch.equal, compiled, run(mlp)))


def test_fake_tensors():
    """Of forward and backward; autograd itself needs a build of torch with CUDA."""
    with FakeTensorMode(), use_backend("triton"):
        x, w_in, b_in, w_out, b_out, residual = make(ALIGNED, BF16, "swiglu", "cuda")
        out = call("swiglu", 0.1)(x, w_in, b_in, w_out, b_out, residual)
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        d = torch.ops.leangpt_triton.mlp_dropout_backward(out, seed, 0.1, BF16)
        h = F.linear(x, w_in)
        dh, a, db_in = torch.ops.leangpt_triton.mlp_backward(d, w_out, h, "swiglu", True)
    shapes = [x.shape, x.shape, h.shape, (133, 112), b_in.shape]
    for result, shape in zip((out, d, dh, a, db_in), shapes, strict=True):
        assert result.shape == shape and result.dtype == BF16 and result.is_cuda
