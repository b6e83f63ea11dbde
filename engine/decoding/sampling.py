"""What a draw needs to know (`RowSampling`), and what it gives (`Draw`).

How a token is drawn is said by `leangpt.kernels.ops.sample` and `penalize`; each decoder does it in its own way.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How the token after one row of a batch is drawn."""

    temperature: float  # 0: greedy
    top_k: int  # 0: all
    top_p: float
    min_p: float
    seed: int  # 64 bits, without sign
    sample_index: int  # which of the request's n
    position: int  # of the token that is drawn
    repetition_penalty: float
    presence_penalty: float
    context: Sequence[int]  # prompt and text so far; read only where repetition_penalty is not 1
    text: Sequence[int]  # the text so far; read only where presence_penalty is not 0
    vocab_limit: int  # tokens from here on are never drawn: they pad the vocabulary
    logprobs: int | None  # as in SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """One drawn token."""

    token: int
    logprob: float | None  # by the model alone, before penalties, temperature and filters
    top_logprobs: dict[int, float] | None
