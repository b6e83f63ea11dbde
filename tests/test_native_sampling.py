"""Draws of the native engine: the same tokens as the reference's, from the same logits and settings."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import LLAMA, append, make_model, text_of
from sampling_helpers import GREEDY, PLAIN, native_draw, random_row

from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.decoding.torch_sampling import draw as reference_draw

pytestmark = pytest.mark.usefixtures("native_engine")


@pytest.mark.parametrize("kind", ["normal", "peaked", "ties", "equal"])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 16, 33, 100, 1003])
def test_draws_are_those_of_the_reference(vocab_size, kind):
    rng = np.random.default_rng([vocab_size, len(kind)])
    logits = rng.standard_normal((150, vocab_size), np.float32) * 3
    if kind == "peaked":
        logits[np.arange(150), rng.integers(vocab_size, size=150)] += 30
    elif kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = 1.5
    rows = [random_row(rng, vocab_size) for _ in logits]
    expected = reference_draw(torch.from_numpy(logits), rows)
    for one, row, wanted in zip(logits, rows, expected, strict=True):
        drawn = native_draw(one, row)
        assert drawn.token == wanted.token, row
        assert (drawn.logprob is None) == (row.logprobs is None)
        if row.logprobs is None:
            assert drawn.top_logprobs is None
            continue
        logprobs = torch.from_numpy(one).double().log_softmax(-1).numpy()
        assert drawn.logprob == pytest.approx(logprobs[drawn.token], abs=1e-12)
        top = drawn.top_logprobs
        assert list(top.values()) == pytest.approx([logprobs[t] for t in top], abs=1e-12)
        # the most probable first, of equals the first token
        order = np.argsort(-one, kind="stable")[: row.logprobs].tolist()
        assert list(top) == order


def test_noise_of_every_token_is_that_of_the_reference():
    """Equal logits: the token of least noise is drawn, and that is a different one for each seed, sample and position."""
    logits = np.zeros(50257, np.float32)
    rng = np.random.default_rng(1)
    rows = [
        dataclasses.replace(
            PLAIN,
            seed=int(rng.integers(2**64, dtype=np.uint64)),
            sample_index=int(rng.integers(4)),
            position=int(rng.integers(1024)),
        )
        for _ in range(40)
    ]
    expected = reference_draw(torch.zeros(40, 50257), rows)
    tokens = [native_draw(logits, row).token for row in rows]
    assert tokens == [one.token for one in expected]
    assert len(set(tokens)) == 40


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_logits(data):
    """Subnormal, huge, and those whose differences are near a filter's threshold."""
    values = st.sampled_from((0.0, -0.0, 1e-40, 1.0, 1.0 + 2**-23, -1.0, 1e38, -1e38, 88.0, -104.0))
    logits = np.array(data.draw(st.lists(values, min_size=1, max_size=40)), np.float32)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    row = dataclasses.replace(
        random_row(rng, len(logits)), top_p=data.draw(st.sampled_from((0.3, 1.0)))
    )
    [expected] = reference_draw(torch.from_numpy(logits)[None], [row])
    assert native_draw(logits, row).token == expected.token


@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_penalties_that_overflow(value, temperature, top_p):
    row = dataclasses.replace(
        PLAIN,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=2.0 if value < 0 else 0.5,
        context=range(5),
    )
    assert native_draw(np.full(5, value, np.float32), row).token in range(5)


@pytest.mark.parametrize(
    "row", [GREEDY, PLAIN, dataclasses.replace(PLAIN, top_k=3, vocab_limit=20)]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("at", [0, 15, 16, 32, 34])
def test_what_is_not_finite_is_not_drawn_from(at, value, row):
    logits = np.zeros(35, np.float32)
    logits[at] = value
    assert native_draw(logits, row).token == -1


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_a_step_draws_from_its_logits(format):
    torch.manual_seed(0)
    model = make_model(n_head=4, n_embd=64, vocab_size=301, **LLAMA)
    decoder = NativeDecoder.from_model(model, format)
    text = text_of(60, vocab_size=301)
    rng = np.random.default_rng(0)
    rows = [random_row(rng, 301) for _ in text]
    a, b = decoder.add_sequence(), decoder.add_sequence()
    logits = append(decoder, (a, 0, text))
    order = rng.permutation(60)
    drawn = decoder.sample(text, [b] * 60, range(60), order, [rows[i] for i in order])
    assert drawn == [native_draw(logits[i], rows[i]) for i in order]


@pytest.mark.parametrize("twins", [0.0, 1e-7, 1e-3], ids=["equal", "nearly equal", "alike"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_a_screened_head_draws_what_the_full_one_does(format, scale, twins):
    """Also where rows of the head are so alike that their order is in the last bits."""
    torch.manual_seed(0)
    model = make_model(n_head=4, n_embd=64, vocab_size=1001, tie_embeddings=False, **LLAMA)
    weight = model.head.weight
    weight *= torch.rand(1001, 1) * scale
    weight[500:1000] = weight[:500] * (1 + twins * torch.randn(500, 64))
    decoders = [NativeDecoder.from_model(model, format + s) for s in ("", "_screen")]
    rng = np.random.default_rng(0)
    num_greedy = 0
    for seed in range(60):
        row = dataclasses.replace(
            random_row(rng, 1001), repetition_penalty=1.0, presence_penalty=0.0, logprobs=None
        )
        kind = seed % 3
        if kind == 0:
            row = dataclasses.replace(row, temperature=0.0)
        elif kind == 1:
            row = dataclasses.replace(row, temperature=1.0, top_k=int(rng.integers(1, 50)))
        else:
            row = dataclasses.replace(row, temperature=0.8, top_k=0, top_p=1.0, min_p=0.05)
        num_greedy += row.temperature == 0
        text = text_of(3, seed, 1001)
        draws = []
        for decoder in decoders:
            sequence = decoder.add_sequence()
            append(decoder, (sequence, 0, text[:2]), rows=[])
            draws.append(decoder.sample(text[2:], [sequence], [2], [0], [row]))
            decoder.drop(sequence)
        assert draws[0] == draws[1]
    assert num_greedy == 20


def test_nan_passes_a_screened_head():
    model = make_model(n_head=4, n_embd=64, tie_embeddings=False, **LLAMA)
    model.head.weight[17, 3] = torch.nan
    decoder = NativeDecoder.from_model(model, "fp32_screen")
    with pytest.raises(RuntimeError, match="logits are NaN"):
        decoder.sample([1], [decoder.add_sequence()], [0], [0], [GREEDY])
