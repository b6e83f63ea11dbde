"""Products of the native engine, in every weight format: how weights are rounded, and how accurate the product is."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from native_helpers import (
    DYNAMIC,
    FORMATS,
    WEIGHT_ONLY,
    PackedMatrix,
    have_same_bits,
    multiplies_bf16,
)

from leangpt.kernels import decode

pytestmark = pytest.mark.usefixtures("native_engine")

SHAPES = [
    (1, 1),
    (7, 16),
    (16, 7),
    (63, 97),
    (64, 64),
    (65, 200),
    (97, 63),
    (200, 65),
    (48, 2100),
    (5, 9000),
    (600, 1100),
]
ROWS = (1, 2, 3, 5, 6, 7, 8, 13, 100, 131)
FULL_RANGE = ("fp32", "bf16", "int8", "int8_dynamic")  # others hold their scales in 16 bits


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make(format: str, n: int, k: int, *, has_bias: bool = False) -> PackedMatrix:
    return PackedMatrix(format, normal(n, k), normal(n, seed=2) if has_bias else None)


def in_groups(values: np.ndarray, size: int) -> np.ndarray:
    """(rows, k) to (rows, groups, size), zeros behind the end; one group where size is 0."""
    size = size or -(-values.shape[1] // 16) * 16
    num_groups = -(-values.shape[1] // size)
    padded = np.zeros((len(values), num_groups * size))
    padded[:, : values.shape[1]] = values
    return padded.reshape(len(values), num_groups, size)


def levels(packed: PackedMatrix) -> np.ndarray:
    """The values that a weight of each group can have, (n, groups, levels)."""
    integers = np.arange(-8, 8) if packed.format.kind == "int4" else np.arange(-127, 128)
    scales, minimums = packed.by_group("scales"), packed.by_group("minimums")
    return scales[..., None] * integers + minimums[..., None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", WEIGHT_ONLY)
def test_weights_are_rounded_to_the_nearest_that_the_format_has(format, shape):
    weight = normal(*shape)
    packed = PackedMatrix(format, weight)
    unpacked = packed.unpacked()
    if format == "fp32":
        assert have_same_bits(unpacked, weight)
    elif format == "bf16":
        assert have_same_bits(unpacked, torch.from_numpy(weight).bfloat16().float().numpy())
    else:
        error = np.abs(in_groups(weight - unpacked, packed.format.group))
        distances = in_groups(weight, packed.format.group)[..., None] - levels(packed)[:, :, None]
        least = np.abs(distances).min(-1)
        is_padding = in_groups(np.ones(shape), packed.format.group) == 0
        assert np.all((error <= least + 1e-6) | is_padding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", [f for f in WEIGHT_ONLY if f.startswith("int8")])
def test_int8_reaches_to_the_largest_weight(format, shape):
    weight = normal(*shape)
    packed = PackedMatrix(format, weight)
    largest = np.abs(in_groups(weight, packed.format.group)).max(-1)
    scale_error = 2.0**-11 if packed.format.group else 2.0**-22
    least = 2.0**-25 if packed.format.group else 0  # half of the least float16
    np.testing.assert_allclose(
        packed.by_group("scales"), largest / 127, rtol=scale_error, atol=least
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", [f for f in WEIGHT_ONLY if f.startswith("int4")])
def test_int4_is_no_worse_than_plain_rounding(format, shape):
    """To 16 even steps from the least to the largest weight; symmetric: with the largest magnitude at -8.

    Its scale is stretched, so that weights do not shrink: an error of e squared weights x becomes e / (1 - e / x), and the
    rounding of the scale to 11 bits changes that by up to 2**-10 of it.
    """
    weight = normal(*shape)
    packed = PackedMatrix(format, weight)
    groups = in_groups(weight, packed.format.group)
    if packed.format.is_asymmetric:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        step = (high - low) / 15
        plain = low + step * np.round((groups - low) / step)
    else:
        at = np.abs(groups).argmax(-1)[..., None]
        step = np.take_along_axis(groups, at, -1) / -8
        plain = step * np.clip(np.round(groups / step), -8, 7)
    error = np.square(in_groups(weight - packed.unpacked(), packed.format.group))
    # scale and minimum are rounded to 11 bits after the fit
    rounding = (np.abs(groups).max(-1) * 2.0**-11) ** 2 * groups.shape[-1]
    if packed.format.is_asymmetric:
        groups, plain = (
            groups - groups.mean(-1, keepdims=True),
            plain - groups.mean(-1, keepdims=True),
        )
    plain_error = np.square(groups - plain).sum(-1)
    squares = np.square(groups).sum(-1)
    allowed = plain_error / (
        1 - np.divide(plain_error, squares, where=squares > 0, out=0 * squares)
    )
    assert np.all(error.sum(-1) <= allowed * (1 + 2.0**-10) + rounding)


def test_bfloat16_weights_are_packed_from_their_bits():
    bits = (normal(20, 33).view(np.uint32) >> 16).astype(np.uint16)
    weight = (bits.astype(np.uint32) << 16).view(np.float32)
    for format in WEIGHT_ONLY:
        a, b = PackedMatrix(format, bits), PackedMatrix(format, weight)
        assert have_same_bits(a.unpacked(), b.unpacked())


def test_bfloat16_is_rounded_to_nearest_even():
    ties = np.arange(0x3F80_8000, 0x3F90_0000, 0x8000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, 3.4e38, np.inf, -np.inf, np.nan, 1e-40], np.float32)
    weight = np.concatenate((ties, -ties, special))[None]
    expected = torch.from_numpy(weight).bfloat16().float().numpy()
    np.testing.assert_array_equal(PackedMatrix("bf16", weight).unpacked(), expected)


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", WEIGHT_ONLY)
def test_product_is_as_accurate_as_float32(format, shape, has_bias):
    """With bf16 weights: of activations rounded to bf16, where the CPU multiplies these."""
    packed = make(format, *shape, has_bias=has_bias)
    x = torch.from_numpy(normal(max(ROWS), shape[1], seed=1))
    out = torch.from_numpy(packed.linear(x.numpy()))
    if format == "bf16" and multiplies_bf16():
        x = x.bfloat16().float()
    weight = torch.from_numpy(packed.unpacked())
    bias = torch.from_numpy(normal(shape[0], seed=2)) if has_bias else None
    ref = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_as_accurate(out, ref, F.linear(x, weight, bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", DYNAMIC)
def test_product_of_8_bit_activations(format, shape):
    """Each is off by up to half a step, 1/127 of the largest of its group."""
    packed = make(format, *shape, has_bias=True)
    x, weight = normal(100, shape[1], seed=1), packed.unpacked().astype(np.float64)
    error = packed.linear(x) - (x.astype(np.float64) @ weight.T + normal(shape[0], seed=2))
    steps = np.abs(in_groups(x, packed.format.group)).max(-1) / 127  # (rows, groups)
    reach = np.abs(in_groups(weight, packed.format.group)).sum(-1)  # (n, groups)
    assert np.all(np.abs(error) <= 0.5 * steps @ reach.T * (1 + 1e-5) + 1e-5)
    assert np.abs(error).max() > 0 or shape[1] == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_alone_and_among_others(format, shape):
    packed = make(format, *shape, has_bias=True)
    x = normal(max(ROWS), shape[1], seed=1)
    alone = np.concatenate([packed.linear(row[None]) for row in x])
    for rows in ROWS:
        assert have_same_bits(packed.linear(x[:rows]), alone[:rows])


@pytest.mark.parametrize("k", [2048, 8192, 8208], ids=str)
@pytest.mark.parametrize("format", [f for f in FORMATS if f.startswith("int")])
def test_largest_sums(format, k):
    """All weights and activations at the end of their range, where sums in narrow integers would overflow."""
    weight, x = np.full((64, k), -1, np.float32), np.full((9, k), -1, np.float32)
    weight[::2], x[1::2] = 1, 1
    packed = PackedMatrix(format, weight)
    expected = x.astype(np.float64) @ packed.unpacked().astype(np.float64).T
    np.testing.assert_allclose(packed.linear(x), expected, rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros(format):
    bias = normal(65, seed=2)
    packed = PackedMatrix(format, normal(65, 97), bias)
    np.testing.assert_array_equal(packed.linear(np.zeros((3, 97), np.float32)), [bias] * 3)
    zero = PackedMatrix(format, np.zeros((65, 97), np.float32), bias)
    assert not zero.unpacked().any()
    np.testing.assert_array_equal(zero.linear(normal(3, 97)), [bias] * 3)


@pytest.mark.parametrize("magnitude", [1e30, 1e-35], ids=["huge", "tiny"])
@pytest.mark.parametrize("format", FORMATS)
def test_activations_of_any_magnitude(format, magnitude):
    """They give the same as ordinary ones, up to the rounding of their scale, and of the least normal number."""
    packed = make(format, 65, 97)
    x = normal(7, 97, seed=1)
    out = packed.linear(x * np.float32(magnitude)).astype(np.float64) / magnitude
    tolerance = 0.02 if "dynamic" in format or format == "bf16" else 1e-5
    least = np.abs(packed.unpacked()).sum(1).max() * 1.2e-38 / magnitude
    np.testing.assert_allclose(out, packed.linear(x), rtol=0, atol=tolerance * 30 + least)


@pytest.mark.parametrize("magnitude", [1e30, 1e-30], ids=["huge", "tiny"])
@pytest.mark.parametrize("format", FULL_RANGE)
def test_weights_of_any_magnitude(format, magnitude):
    weight, x = normal(65, 97), normal(7, 97, seed=1)
    packed = PackedMatrix(format, weight * np.float32(magnitude))
    out = packed.linear(x).astype(np.float64) / magnitude
    tolerance = 0.02 if format == "bf16" else 1e-5
    expected = PackedMatrix(format, weight).linear(x)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * 30)


@pytest.mark.parametrize("format", [f for f in FORMATS if f not in FULL_RANGE])
def test_weights_beyond_the_range_of_the_scales(format):
    """Too large ones are heard of, too small ones are 0."""
    x = normal(7, 97, seed=1)
    assert not np.isfinite(PackedMatrix(format, normal(65, 97) * np.float32(1e30)).linear(x)).any()
    tiny = PackedMatrix(format, normal(65, 97) * np.float32(1e-35))
    np.testing.assert_array_equal(tiny.linear(x), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("format", FORMATS)
class TestWhatIsNotFinite:
    @pytest.mark.parametrize("at", [0, 5, 40, 96])
    def test_in_an_activation_stays_in_its_row(self, format, value, at):
        packed = make(format, 65, 97, has_bias=True)
        x = normal(7, 97, seed=1)
        expected = packed.linear(x)
        x[3, at] = value
        out = packed.linear(x)
        assert not np.isfinite(out[3]).any()
        if np.isnan(value):
            assert np.isnan(out[3]).all()
        assert have_same_bits(np.delete(out, 3, 0), np.delete(expected, 3, 0))

    @pytest.mark.parametrize("at", [0, 5, 40, 96])
    def test_in_a_weight_stays_in_its_output(self, format, value, at):
        weight = normal(65, 97)
        x = normal(7, 97, seed=1)
        expected = PackedMatrix(format, weight).linear(x)
        weight[33, at] = value
        packed = PackedMatrix(format, weight)
        out = packed.linear(x)
        assert not np.isfinite(out[:, 33]).any()
        assert not np.isfinite(packed.unpacked()[33]).all()
        if np.isnan(value):
            assert np.isnan(out[:, 33]).all()
        assert have_same_bits(np.delete(out, 33, 1), np.delete(expected, 33, 1))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_nothing(num_threads):
    before = decode.num_threads()
    x = normal(130, 97, seed=1)
    products = [make(format, 200, 97, has_bias=True) for format in FORMATS]
    expected = [packed.linear(x) for packed in products]
    try:
        decode.set_num_threads(num_threads)
        assert decode.num_threads() == num_threads
        for packed, out in zip(products, expected, strict=True):
            assert have_same_bits(packed.linear(x), out)
            assert have_same_bits(
                PackedMatrix(str(packed.format), normal(200, 97)).unpacked(), packed.unpacked()
            )
    finally:
        decode.set_num_threads(before)
