"""Settings of draws, and the draws of the native CPU engine."""

import dataclasses
from ctypes import byref

import numpy as np

from leangpt.decoding.native_decoder import _draw, _fill
from leangpt.decoding.sampling import Draw, RowSampling
from leangpt.kernels import decode

PLAIN = RowSampling(1.0, 0, 1.0, 0.0, 0, 0, 0, 1.0, 0.0, (), (), 1 << 30, None)
GREEDY = dataclasses.replace(PLAIN, temperature=0.0)


def native_draw(logits: np.ndarray, row: RowSampling) -> Draw:
    """As `NativeDecoder.sample` does it, from given logits."""
    setting, drawn = decode.DrawSettings(), decode.Drawn()
    room = _fill(setting, row, len(logits))
    address = decode.address(logits)
    decode.check(decode.library().leangpt_draw(address, len(logits), byref(setting), byref(drawn)))
    return _draw(drawn, room, row)


def random_row(rng: np.random.Generator, vocab_size: int) -> RowSampling:
    def maybe(value: float, otherwise: float, likely: float = 0.4) -> float:
        return value if rng.random() < likely else otherwise

    def some_tokens() -> list[int]:
        return rng.integers(vocab_size, size=rng.integers(0, 30)).tolist()

    return RowSampling(
        temperature=maybe(float(rng.choice([1e-3, 0.3, 1.0, 3.0, 100.0])), 0.0, 0.85),
        top_k=int(maybe(int(rng.integers(1, vocab_size + 3)), 0)),
        top_p=maybe(float(rng.random()), 1.0),
        min_p=maybe(float(rng.choice([1e-6, 0.05, 0.5, 1.0])), 0.0),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
        sample_index=int(rng.integers(2**32)),
        position=int(rng.integers(2**32)),
        repetition_penalty=maybe(float(rng.choice([0.5, 1.1, 2.0])), 1.0),
        presence_penalty=maybe(float(rng.choice([-0.7, 0.3, 5.0])), 0.0),
        context=some_tokens(),
        text=some_tokens(),
        vocab_limit=int(maybe(int(rng.integers(1, vocab_size + 1)), vocab_size)),
        logprobs=[None, 0, 1, 5, vocab_size + 1][rng.integers(5)],
    )
