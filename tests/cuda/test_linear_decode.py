"""Products of packed weights on CUDA: every format against float64, epilogues, and one order of sums for any number of rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from linear_launchers import (
    Norm,
    call_linear_decode,
    finish_products,
    linear_decode,
    normalize,
)
from native_helpers import PackedMatrix
from torch import Tensor

pytestmark = pytest.mark.usefixtures("native_engine", "cuda")

FORMATS = (
    *("bf16", "int8", "int8_g32", "int8_g128"),
    *("int4", "int4_g128", "int4_asym", "int4_asym_g64"),
)
SHAPES = [(1, 1), (7, 16), (16, 7), (65, 97), (64, 64), (200, 130), (48, 2100), (4100, 40)]
ROWS = (1, 2, 15, 16, 17, 65, 130)
# enough of both for tiles of 128 by 128
MANY_ROWS, MANY_OUTPUTS = 4200, 520
ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "swiglu": lambda x: F.silu(gates(x)[0]) * gates(x)[1],
}


def gates(x: Tensor) -> tuple[Tensor, ...]:
    """Gate and up of outputs of which 16 of each alternate."""
    return x.unflatten(-1, (-1, 2, 16)).movedim(-2, 0).flatten(-2).unbind()


def pack(format: str, n: int, k: int, has_bias: bool = True) -> PackedMatrix:
    rng = np.random.default_rng(n + k)
    weight = rng.standard_normal((n, k), np.float32)
    return PackedMatrix(format, weight, rng.standard_normal(n, np.float32) if has_bias else None)


def product(packed: PackedMatrix, x: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's product of the weights that the format stands for."""
    weight = torch.from_numpy(packed.unpacked()).to(dtype)
    bias = packed.parts.get("bias")
    if bias is None:
        return F.linear(x.to(dtype), weight)
    bias = torch.from_numpy(bias.view(np.float32)[: packed.matrix.n])
    return F.linear(x.to(dtype), weight, bias.to(dtype))


def activations(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k).bfloat16()


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_product(format, shape):
    packed = pack(format, *shape)
    for rows in ROWS:
        x = activations(rows, shape[1])
        out = linear_decode(packed, x)
        assert_as_accurate(
            out, product(packed, x, torch.float64), product(packed, x, torch.float32)
        )


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("format", FORMATS)
def test_bits_of_a_row_do_not_depend_on_the_others(format):
    for n in (97, 4128):  # few outputs of a block of threads, and more
        packed = pack(format, n, 600, has_bias=False)
        x = activations(130, 600)
        out = linear_decode(packed, x)
        for first, end in ((0, 1), (129, 130), (3, 5), (16, 32), (100, 117), (0, 65)):
            assert torch.equal(linear_decode(packed, x[first:end]), out[first:end])


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("format", ["bf16", "int8", "int4_asym"])
def test_bits_of_a_row_do_not_depend_on_the_kernel(format):
    """Rows of a large prompt, and the same rows alone; with 9 blocks of inputs, parts of two and of one."""
    packed = pack(format, MANY_OUTPUTS, 280)
    x = activations(MANY_ROWS, 280)
    out = linear_decode(packed, x)
    assert_as_accurate(out, product(packed, x, torch.float64), product(packed, x, torch.float32))
    for first, end in ((0, 1), (4199, 4200), (63, 80), (100, 230)):
        assert torch.equal(linear_decode(packed, x[first:end]), out[first:end])


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 20])
@pytest.mark.parametrize(("is_rms", "has_bias"), [(False, True), (False, False), (True, False)])
def test_norm_in_front(is_rms, has_bias, rows):
    """The same bits as of the norm's own kernel and a product of its rows."""
    for format, n, k in (("bf16", 65, 97), ("int8", 33, 1030), ("int4", 4128, 64)):
        packed = pack(format, n, k)
        norm = Norm(torch.randn(k) + 1, torch.randn(k) if has_bias else None, is_rms)
        x = torch.randn(rows + 4, k) + 3
        row_of = torch.randperm(rows + 4)[:rows].int()
        normed = normalize(x, norm, torch.bfloat16, row_of)
        expected = linear_decode(packed, normed)
        assert torch.equal(linear_decode(packed, x, norm, row_of), expected)
        assert torch.equal(linear_decode(packed, x[row_of], norm), expected)


def test_norm_of_rows_too_long_for_shared_memory():
    packed, x = pack("bf16", 20, 4100), torch.randn(5, 4100)
    norm = Norm(torch.randn(4100))
    expected = linear_decode(packed, normalize(x, norm, torch.bfloat16))
    assert torch.equal(linear_decode(packed, x, norm), expected)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("format", ["bf16", "int8", "int4_asym"])
def test_activations(format, activation):
    """In both widths of a block of threads, with rows of one tile and of more, and in large tiles."""
    function, is_gated = ACTIVATIONS[activation], activation == "swiglu"
    for n, rows in ((96, 3), (4128, 2), (96, 20), (MANY_OUTPUTS + 24, MANY_ROWS)):
        n -= 0 if is_gated else 3
        packed, x = pack(format, n, 48), activations(rows, 48)
        out = linear_decode(packed, x, activation=activation, dtype=torch.bfloat16)
        ref = function(product(packed, x, torch.float64))
        assert_as_accurate(out, ref, function(product(packed, x, torch.float32)).bfloat16())


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("format", ["bf16", "int8", "int4_asym"])
def test_sum_with_the_stream(format):
    for n, rows in ((97, 1), (97, 33), (MANY_OUTPUTS, MANY_ROWS)):
        packed, x, residual = pack(format, n, 72), activations(rows, 72), torch.randn(rows, n)
        out = linear_decode(packed, x, residual=residual)
        assert torch.equal(out, residual + linear_decode(packed, x))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("format", ["bf16", "int8", "int4_asym"])
@pytest.mark.parametrize("n", [1, 96, 97, 520])
def test_products_of_a_library_end_as_others(format, n):
    """As the kernels' own products do; the library's have the scales in them."""
    rows, ranks = 19, torch.tensor([-1, 1, 0, *[-1] * 16], dtype=torch.int32)
    packed, x = pack(format, n, 48), torch.eye(48)[torch.randint(48, (rows,))].bfloat16()
    weight = torch.from_numpy(packed.unpacked())
    products = x.float() @ weight.T
    addends = torch.randn(2, -(-n // 64) * 64), ranks
    for options in (
        {},
        {"residual": torch.randn(rows, n)},
        {"addends": addends},
        *({"activation": a, "dtype": torch.bfloat16} for a in ACTIVATIONS),
    ):
        if options.get("activation") == "swiglu" and n % 32:
            continue
        out = finish_products(packed, products, **options)
        torch.testing.assert_close(out, linear_decode(packed, x, **options))


def test_extreme_activations_gelu_saturates():
    packed = PackedMatrix("bf16", np.eye(16, dtype=np.float32))
    x = torch.tensor([-3e38, -1e4, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 1e4, 3e38])
    rows = F.pad(x, (0, 6))[None].bfloat16()
    for activation in ("gelu_tanh", "gelu"):
        out = linear_decode(packed, rows, activation=activation, dtype=torch.bfloat16)
        torch.testing.assert_close(out[0, :10], rows[0, :10].clamp(min=0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4_asym"])
def test_nan_stays_in_its_row(format):
    packed, x = pack(format, 70, 100), activations(20, 100)
    expected = linear_decode(packed, x)
    x[3, 99] = torch.nan
    x[18, 0] = torch.inf
    out = linear_decode(packed, x)
    others = [i for i in range(20) if i not in (3, 18)]
    assert torch.equal(out[others], expected[others])
    assert out[3].isnan().all()
    assert not out[18].isfinite().any()


def test_no_rows():
    assert linear_decode(pack("bf16", 5, 7), activations(0, 7)).shape == (0, 5)


def test_weights_that_the_kernels_do_not_know_are_refused():
    with pytest.raises(ValueError, match="packed as bf16, int8 or int4 on CUDA, got kind 0"):
        linear_decode(pack("fp32", 4, 16), activations(1, 16))
    packed = pack("int4", 4, 96)
    packed.matrix.group = 48
    with pytest.raises(ValueError, match="groups must be of 32, 64, 128, .. inputs, got 48"):
        linear_decode(packed, activations(1, 96))


def test_arguments_that_do_not_fit_are_refused():
    packed, gated, plain = pack("bf16", 24, 70), {"bf16": 16, "activation": 4}, {"out": 16}
    for source, target, message in (
        ({}, plain, "input must be either float32 rows of the stream or bfloat16 rows"),
        ({"stream": 16, "rows": 16}, plain, "input must be either float32 rows of the stream or"),
        ({"stream": 16}, plain, "rows of the stream need a norm"),
        ({"rows": 16, "stride": 88}, plain, "input must have a stride .* at least 70, got 88"),
        ({"rows": 16, "stride": 64}, plain, "input must have a stride .* at least 70, got 64"),
        ({"rows": 16}, {}, "output must be one of float32 rows, the stream and bfloat16 rows"),
        ({"rows": 16}, plain | {"bf16": 16}, "output must be one of float32 rows, the stream"),
        ({"rows": 16}, plain | {"stride": 16}, "output must have a stride .* at least 24, got 16"),
        ({"rows": 16}, plain | {"activation": 2}, "what an activation gives is bfloat16"),
        ({"rows": 16}, gated, "16 outputs of gate and 16 of up in turn, got 24 outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            call_linear_decode(packed, {"stride": 80} | source, {"stride": 32} | target)
