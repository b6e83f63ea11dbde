"""Draws on CUDA: the same tokens as the reference's and the CPU engine's, from the same logits and settings."""

import dataclasses
import functools
from collections.abc import Sequence
from ctypes import CDLL, c_char_p, c_int64
from pathlib import Path

import cuda_device as cuda
import numpy as np
import pytest
import torch
from helpers import assert_as_accurate
from sampling_helpers import GREEDY, PLAIN, native_draw, random_row
from torch import Tensor

from leangpt.decoding.native_decoder import _fill
from leangpt.decoding.sampling import Draw, RowSampling
from leangpt.decoding.torch_sampling import draw as reference_draw
from leangpt.kernels import decode

pytestmark = pytest.mark.usefixtures("cuda")

HERE = Path(__file__).parent


@functools.cache
def library() -> CDLL:
    sources = [HERE / "sampling_launchers.cpp", HERE.parents[1] / "csrc/cuda/sampling.cu"]
    loaded = cuda.library("sampling_launchers", sources)
    loaded.call_sample_scratch_bytes.restype = c_int64
    loaded.call_sample.restype = loaded.call_log_probs.restype = c_char_p
    return loaded


def cuda_draw(logits: Tensor, rows: Sequence[RowSampling]) -> list[Draw]:
    """A token from each row of `logits`, `(R, V)` float32."""
    num_rows, vocab_size = logits.shape
    settings = (decode.DrawSettings * num_rows)()
    tops = []
    for setting, row in zip(settings, rows, strict=True):
        arrays = _fill(setting, row, vocab_size)
        # to the device, in the order in which they were made
        names = [name for name in ("context", "text") if getattr(row, name)]
        for name, array in zip(names, arrays, strict=False):
            setattr(setting, name, cuda.to_device(torch.from_numpy(array), name).address)
        top = None
        if row.logprobs:
            count = min(row.logprobs, vocab_size)
            top = (
                cuda.empty(count, torch.int64, "top_tokens"),
                cuda.empty(count, torch.float64, "top_logprobs"),
            )
            setting.top_tokens, setting.top_logprobs = (part.address for part in top)
        tops.append(top)
    as_bytes = torch.frombuffer(bytearray(settings), dtype=torch.uint8)
    out = cuda.empty(16 * num_rows, torch.uint8, "drawn")
    scratch = library().call_sample_scratch_bytes(vocab_size, num_rows)
    message = library().call_sample(
        cuda.to_device(logits, "logits"), c_int64(logits.stride(0)), vocab_size,
        cuda.to_device(as_bytes, "settings"), out,
        cuda.empty(scratch, torch.uint8, "scratch"), num_rows,
    )  # fmt: skip
    assert message is None, message
    drawn = (decode.Drawn * num_rows).from_buffer_copy(out.cpu().numpy().tobytes())
    draws = []
    for one, row, top in zip(drawn, rows, tops, strict=True):
        most = dict(zip(*(part.cpu().tolist() for part in top), strict=True)) if top else {}
        has_logprobs = row.logprobs is not None
        draws.append(
            Draw(one.token, one.logprob, most) if has_logprobs else Draw(one.token, None, None)
        )
    return draws


def check(logits: Tensor, rows: Sequence[RowSampling]) -> None:
    """The reference's tokens and log-probabilities."""
    expected = reference_draw(logits, rows)
    for one, drawn, row, wanted in zip(
        logits, cuda_draw(logits, rows), rows, expected, strict=True
    ):
        assert drawn.token == wanted.token, row
        assert (drawn.logprob is None) == (row.logprobs is None)
        if row.logprobs is None:
            continue
        logprobs = one.double().log_softmax(-1).numpy()
        assert drawn.logprob == pytest.approx(logprobs[drawn.token], abs=1e-6)
        # the most probable first, of equals the first token
        order = np.argsort(-one.numpy(), kind="stable")[: row.logprobs].tolist()
        assert list(drawn.top_logprobs) == order
        assert list(drawn.top_logprobs.values()) == pytest.approx(logprobs[order], abs=1e-6)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("kind", ["normal", "peaked", "ties", "equal"])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 33, 1003, 2100])
def test_draws_are_those_of_the_reference(vocab_size, kind):
    rng = np.random.default_rng([vocab_size, len(kind)])
    num_rows = 60 if vocab_size < 1000 else 12
    logits = rng.standard_normal((num_rows, vocab_size), np.float32) * 3
    if kind == "peaked":
        logits[np.arange(num_rows), rng.integers(vocab_size, size=num_rows)] += 30
    elif kind == "ties":
        logits = np.round(logits)
    elif kind == "equal":
        logits[:] = 1.5
    check(torch.from_numpy(logits), [random_row(rng, vocab_size) for _ in logits])


@pytest.mark.usefixtures("native_engine")
def test_draws_are_those_of_the_cpu_engine():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((40, 700), np.float32) * 2
    rows = [random_row(rng, 700) for _ in logits]
    drawn = cuda_draw(torch.from_numpy(logits), rows)
    expected = [native_draw(one, row) for one, row in zip(logits, rows, strict=True)]
    assert [one.token for one in drawn] == [one.token for one in expected]


def test_noise_of_every_token_is_that_of_the_reference():
    """Equal logits: the token of least noise is drawn."""
    rng = np.random.default_rng(1)
    rows = [
        dataclasses.replace(
            PLAIN,
            seed=int(rng.integers(2**64, dtype=np.uint64)),
            sample_index=int(rng.integers(4)),
            position=int(rng.integers(1024)),
        )
        for _ in range(6)
    ]
    check(torch.zeros(6, 20000), rows)


@pytest.mark.parametrize("top_p", [0.0, 1e-3, 0.5, 0.9, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_top_p(spread, top_p):
    """Also where the first tokens that are tried are mostly not kept."""
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.standard_normal((12, 3000), np.float32) * spread)
    rows = [dataclasses.replace(PLAIN, top_p=top_p, seed=seed) for seed in range(12)]
    check(logits, rows)
    check(logits, [dataclasses.replace(row, top_k=100, temperature=0.7) for row in rows])


@pytest.mark.parametrize("top_k", [1, 2, 511, 512, 513, 2999])
def test_top_k(top_k):
    """Of as many as there are threads, and of more; where it ends among equals."""
    rng = np.random.default_rng(6)
    logits = torch.from_numpy(rng.standard_normal((8, 3000), np.float32))
    rows = [dataclasses.replace(PLAIN, top_k=top_k, temperature=50, seed=s) for s in range(8)]
    check(logits, rows)
    check(logits.round(), rows)
    check(-logits.abs(), rows)


def test_any_logits():
    """Subnormal, huge, and those whose differences are near a filter's threshold."""
    values = [0.0, -0.0, 1e-40, 1.0, 1.0 + 2**-23, -1.0, 1e38, -1e38, 88.0, -104.0]
    rng = np.random.default_rng(7)
    for length in (1, 3, 17, 40):
        logits = torch.from_numpy(rng.choice(np.float32(values), size=(25, length)))
        rows = [
            dataclasses.replace(random_row(rng, length), top_p=float(rng.choice([0.3, 1.0])))
            for _ in logits
        ]
        check(logits, [dataclasses.replace(row, logprobs=None) for row in rows])


@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("value", [3e38, -3e38])
def test_penalties_that_overflow(value, temperature, top_p):
    row = dataclasses.replace(
        PLAIN,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=2.0 if value < 0 else 0.5,
        context=list(range(5)),
    )
    [drawn] = cuda_draw(torch.full((1, 5), value), [row])
    assert drawn.token in range(5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_is_not_drawn_from(value):
    """Wherever it is, also where no token is drawn from; other rows are."""
    logits = torch.zeros(6, 35)
    places = [0, 15, 19, 20, 34]
    for row, place in enumerate(places):
        logits[row, place] = value
    for settings in (GREEDY, PLAIN, dataclasses.replace(PLAIN, top_k=3, vocab_limit=20)):
        drawn = cuda_draw(logits, [settings] * 6)
        assert [one.token for one in drawn[:5]] == [-1] * 5
        assert drawn[5].token in range(20 if settings.vocab_limit == 20 else 35)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("vocab_size", [1, 7, 513, 5000])
def test_log_probs(vocab_size):
    logits = torch.randn(5, vocab_size) * 8 + 20
    targets = torch.randint(vocab_size, (5,))
    out = cuda.empty(5, torch.float32, "logprobs")
    message = library().call_log_probs(
        cuda.to_device(logits, "logits"), c_int64(vocab_size), vocab_size,
        cuda.to_device(targets, "targets"), out, 5,
    )  # fmt: skip
    assert message is None, message

    def expected(x):
        return x.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    assert_as_accurate(out.cpu(), expected(logits.double()), expected(logits))


def test_log_probs_of_nan():
    logits = torch.randn(2, 40)
    logits[0, 7] = torch.nan
    out = cuda.empty(2, torch.float32, "logprobs")
    targets = cuda.to_device(torch.tensor([3, 3]), "targets")
    message = library().call_log_probs(
        cuda.to_device(logits, "logits"), c_int64(40), 40, targets, out, 2
    )
    assert message is None, message
    assert out.cpu().isnan().tolist() == [True, False]
