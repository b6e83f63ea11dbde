"""Rows of a packed embedding and of learned positions on CUDA."""

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate
from linear_launchers import embed
from native_helpers import PackedMatrix

pytestmark = pytest.mark.usefixtures("native_engine", "cuda")

FORMATS = ("bf16", "int8", "int8_g64", "int4", "int4_g128", "int4_asym")


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("has_positions", [True, False], ids=["learned", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (53, 16), (70, 97), (200, 300)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_embedding(format, shape, has_positions):
    packed = PackedMatrix(format, np.random.default_rng(0).standard_normal(shape, np.float32))
    learned = torch.randn(11, shape[1]) if has_positions else torch.zeros(11, shape[1])
    for num_rows in (1, 19):
        tokens = torch.randint(shape[0], (num_rows,))
        positions = torch.randint(11, (num_rows,))
        out = embed(packed, tokens, learned if has_positions else None, positions)
        rows = torch.from_numpy(packed.unpacked())[tokens]
        ref = rows.double() + learned[positions].double()
        assert_as_accurate(out, ref, rows + learned[positions])


@pytest.mark.usefixtures("schedule")
def test_tokens_that_were_drawn_on_the_device():
    """Where logits were NaN, -1 was drawn: any row will do, of the embedding."""
    packed = PackedMatrix("bf16", np.random.default_rng(0).standard_normal((53, 20), np.float32))
    drawn = torch.tensor([7, 52, 0, -1])
    out = embed(packed, torch.tensor([3, -1, -2, 9, -3, -4]), None, torch.zeros(6), drawn)
    expected = torch.from_numpy(packed.unpacked())[[3, 7, 52, 9, 0, 0]]
    assert torch.equal(out, expected)


def test_unknown_weights_are_refused():
    packed = PackedMatrix("fp32", np.zeros((4, 16), np.float32))
    with pytest.raises(ValueError, match="embed: weights must be packed as bf16, int8 or int4"):
        embed(packed, torch.zeros(1), None, torch.zeros(1))
