"""Layer norm and RMS norm of the stream on CUDA."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from linear_launchers import Norm, normalize

pytestmark = pytest.mark.usefixtures("cuda")

SHAPES = [(1, 1), (3, 7), (8, 16), (9, 97), (17, 128), (2, 1000)]
KINDS = [(False, True), (False, False), (True, False)]


def torch_norm(x, weight, bias, is_rms):
    if is_rms:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("is_rms", "has_bias"), KINDS)
def test_norm(is_rms, has_bias, shape, dtype):
    for offset in (0, 100):
        x, weight = torch.randn(shape) + offset, torch.randn(shape[1])
        bias = torch.randn(shape[1]) if has_bias else None
        out = normalize(x, Norm(weight, bias, is_rms), dtype)
        doubles = [t if t is None else t.double() for t in (x, weight, bias)]
        baseline = torch_norm(x, weight, bias, is_rms).to(dtype)
        assert_as_accurate(out, torch_norm(*doubles, is_rms), baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_the_stream(dtype):
    x, norm = torch.randn(20, 40), Norm(torch.randn(40), torch.randn(40))
    row_of = torch.tensor([19, 0, 7, 7, 3, 12, 1, 2, 18, 5], dtype=torch.int32)
    assert torch.equal(normalize(x, norm, dtype, row_of), normalize(x, norm, dtype)[row_of])


def test_nan_stays_in_its_row():
    x, norm = torch.randn(9, 40), Norm(torch.randn(40))
    expected = normalize(x, norm, torch.float32)
    x[4, 39] = torch.nan
    out = normalize(x, norm, torch.float32)
    assert out[4].isnan().all()
    assert torch.equal(out[[0, 1, 2, 3, 5, 6, 7, 8]], expected[[0, 1, 2, 3, 5, 6, 7, 8]])
