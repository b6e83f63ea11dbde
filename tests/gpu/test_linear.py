"""The matrix product on Triton: values, gradients and hazards of the compiled kernel, also by tensor descriptors."""

import pytest
import torch
import triton
from helpers import CONFIGURATION_DTYPES, assert_as_accurate, check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from leangpt.kernels import dispatch, ops, reference, triton_linear, use_backend
from leangpt.kernels.triton_recorder import Recorder

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (M, K, N): sizes that are no multiple of a tile, with 16-byte loads and without
SHAPES = [(65, 80, 112), (127, 37, 67)]
CONFIGS = triton_linear.configurations()


def tile_name(config: triton.Config) -> str:
    return "x".join(str(config.kwargs[f"BLOCK_{side}"]) for side in "MNK")


def make(M: int, K: int, N: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x, weight, bias."""
    return [torch.randn(shape, device=device).to(dtype) for shape in [(M, K), (N, K), (N,)]]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(shape, dtype, seed, device):
    torch.manual_seed(seed)
    check_op(ops.linear, make(*shape, dtype, device), "triton")


def test_no_bias(device):
    check_op(ops.linear, make(*SHAPES[0], torch.bfloat16, device)[:2], "triton")


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (1, 5, 3)], ids=str)
def test_sizes_of_one(shape, device):
    check_op(ops.linear, make(*shape, torch.bfloat16, device), "triton")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(M=st.integers(1, 200), K=st.integers(1, 9), N=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_size(M, K, N, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = make(M, 16 * K, 16 * N, torch.bfloat16, device)
    check_op(ops.linear, tensors, "triton", with_gradients=False)


def test_groups_of_tiles(device):
    """More rows of tiles than a group has, the last group not full."""
    tensors = make(64 * 10 + 1, 16, 144, torch.bfloat16, device)
    check_op(ops.linear, tensors, "triton", with_gradients=False)


@pytest.mark.parametrize("dtype", CONFIGURATION_DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=tile_name)
def test_configurations(config, dtype, device, monkeypatch):
    monkeypatch.setattr(triton_linear._linear_kernel, "configs", [config])
    tensors = make(129, 208, 272, dtype, device)
    check_op(ops.linear, tensors, "triton", with_gradients=False)


@pytest.mark.parametrize(("arch", "step"), [("sm_80", 32), ("sm_90", 64), ("sm_100", 64), ("sm_120", 32)])  # fmt: skip
def test_the_largest_tile_of_an_architecture(arch, step):
    with Recorder(arch).recording():
        configs = triton_linear._of_architecture(CONFIGS, {})
    tiles = [tuple(config.kwargs[f"BLOCK_{x}"] for x in "MNK") for config in configs]
    assert tiles == [(64, 64, 32), (128, 128, 64), (128, 256, step)]


def test_any_strides(device):
    x, weight, bias = make(2 * 33, 80, 112, torch.bfloat16, device)
    wide = torch.cat((x, x), dim=1)
    check_op(ops.linear, [wide[:, 16:96], weight, bias], "triton")
    check_op(ops.linear, [x.T.contiguous().T, weight.T.contiguous().T, bias], "triton")
    check_op(ops.linear, [x.view(2, 33, 80).transpose(0, 1), weight, bias], "triton")
    check_op(ops.linear, [x[::2, ::2], weight[:, :40], bias.repeat(2)[::2]], "triton")
    check_op(ops.linear, [x[:1].expand(33, 80), weight, bias], "triton", with_gradients=False)


def test_any_number_of_dimensions(device):
    x, weight, bias = make(6, 80, 112, torch.bfloat16, device)
    with use_backend("triton"):
        rows = ops.linear(x, weight, bias)
        assert torch.equal(ops.linear(x[0], weight, bias), rows[0])
        assert torch.equal(ops.linear(x.view(3, 2, 80), weight, bias), rows.view(3, 2, 112))
        assert ops.linear(x[:0].view(3, 0, 80), weight, bias).shape == (3, 0, 112)


def check_descriptors(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    out = triton_linear.fused_linear(x, weight, bias, use_descriptors=True)
    truth = reference.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate(out, truth, reference.linear(x, weight, bias))


@pytest.mark.parametrize("config", CONFIGS, ids=tile_name)
def test_descriptors(config, device, monkeypatch):
    """Sizes beyond tiles, strides that are multiples of 16 bytes only, a view."""
    monkeypatch.setattr(triton_linear._linear_kernel, "configs", [config])
    x, weight, bias = make(129, 232, 270, torch.bfloat16, device)
    check_descriptors(x, weight, bias)
    check_descriptors(x[1:, 8:224], weight[:, :216], bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_descriptors_of_other_dtypes(dtype, device):
    check_descriptors(*make(65, 40, 70, dtype, device))


def test_tf32_only_where_torch_may(device):
    x, weight, _ = make(65, 80, 112, torch.float32, device)
    short = [x.bfloat16().float(), weight.bfloat16().float()]  # TF32 does not round these
    with use_backend("triton"):
        exact = ops.linear(x, weight)
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            rounded = ops.linear(x, weight)
            check_op(ops.linear, short, "triton", with_gradients=False)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    assert 1e-5 < (rounded - exact).abs().max() < 0.1


def test_only_where_asked_for(device):
    x, weight, _ = make(*SHAPES[0], torch.bfloat16, device)
    with FakeTensorMode():
        fake = torch.empty(1, device="cuda", dtype=torch.bfloat16)
        assert dispatch.select("linear", fake) is reference
    with use_backend("triton"):
        assert dispatch.select("linear", x, weight) is not reference


def test_opcheck(device):
    tensors = [t.requires_grad_() for t in make(5, 80, 112, torch.bfloat16, device)]
    torch.library.opcheck(torch.ops.leangpt_triton.linear, tensors)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, device):
    compiled = torch.compile(ops.linear, fullgraph=True, backend=backend)
    check_op(compiled, make(65, 80, 112, torch.bfloat16, device), "triton")


def test_fake_tensors():
    with FakeTensorMode(), use_backend("triton"):
        y = ops.linear(*make(65, 80, 112, torch.float16, "cuda"))
        assert y.shape == (65, 112) and y.dtype == torch.float16 and y.device.type == "cuda"
