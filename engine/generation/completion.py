"""A completion: what was asked for (`Request`), what is being drawn (`Draft`), and what the user gets (`Completion`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..config import SamplingParams
from ..data.text import Detokenizer
from ..data.tokenizer import Tokenizer
from ..decoding.sampling import Draw, RowSampling
from .stop import StopText

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """A text that was generated.

    `token_ids` is all that was drawn, including the token or the stop string that ended it; `text` is without these. The
    same prompt and parameters with this `seed` give it again.
    """

    text: str  # "" where the generator has no tokenizer
    token_ids: list[int]
    logprobs: (
        list[float] | None
    )  # of each token, by the model alone: before penalties, temperature and filters
    finish_reason: FinishReason  # "stop": end of text, stop token or string; "length": max_new_tokens or full context
    prompt_index: int  # place of its prompt in the call
    index: int  # which of the prompt's n
    seed: int
    top_logprobs: list[dict[int, float]] | None = None  # for each token: the most probable ones


@dataclass(frozen=True)
class Request:
    """A prompt, and everything else that its completions depend on; checked, with nothing left open."""

    prompt_index: int
    tokens: list[int]  # the prompt, at least one
    params: SamplingParams
    seed: int
    max_new_tokens: int
    vocab_limit: int  # tokens from here on have no text, and are never drawn
    tokenizer: Tokenizer | None

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        ends = () if self.tokenizer is None or self.params.ignore_eos else self.tokenizer.eos_ids
        return frozenset((*self.params.stop_token_ids, *ends))


class Draft:
    """A completion in the making: its tokens, its text, and whether it has ended."""

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.tokens = list(request.tokens)  # of the prompt, then drawn
        self.pieces: list[str] = []  # of the text that is certain
        self.finish_reason: FinishReason | None = None
        self._draws: list[Draw] = []
        tokenizer = request.tokenizer
        self._detokenizer: Detokenizer | None = tokenizer.detokenizer() if tokenizer else None
        self._stop_text = StopText(request.params.stop)

    @property
    def drawn(self) -> list[int]:
        return self.tokens[len(self.request.tokens) :]

    @property
    def num_left(self) -> int:
        """Tokens that may still be drawn."""
        return self.request.max_new_tokens - len(self._draws)

    @property
    def is_penalized(self) -> bool:
        """Whether a token can only be drawn where those before it are known."""
        params = self.request.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0

    def sampling(self, guesses: Sequence[int] = (), num_unread: int = 0) -> RowSampling:
        """How the next token is drawn; with guesses, the one after these; with unread tokens, which only the decoder knows, after them."""
        params = self.request.params
        return RowSampling(
            temperature=params.temperature,
            top_k=params.top_k or 0,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=self.request.seed,
            sample_index=self.index,
            position=len(self.tokens) + num_unread + len(guesses),
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            context=[*self.tokens, *guesses] if params.repetition_penalty != 1 else (),
            text=[*self.drawn, *guesses] if params.presence_penalty != 0 else (),
            vocab_limit=self.request.vocab_limit,
            logprobs=params.logprobs,
        )

    def append(self, draw: Draw) -> None:
        """Take the next token, and decide whether it is the last."""
        self.tokens.append(draw.token)
        self._draws.append(draw)
        is_stop_token = draw.token in self.request.stop_token_ids
        text = "" if is_stop_token else self._push(draw.token)
        if is_stop_token or self._stop_text.is_stopped:
            self.finish_reason = "stop"
        elif not self.num_left:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self._flush()
        if text:
            self.pieces.append(text)

    def _push(self, token: int) -> str:
        return self._stop_text.push(self._detokenizer.push(token)) if self._detokenizer else ""

    def _flush(self) -> str:
        rest = self._stop_text.push(self._detokenizer.flush()) if self._detokenizer else ""
        if self._stop_text.is_stopped:  # by text that the detokenizer had held until now
            self.finish_reason = "stop"
        return rest + self._stop_text.flush()

    def completion(self) -> Completion:
        assert self.finish_reason is not None, "the draft is not finished"
        logprobs = [draw.logprob for draw in self._draws if draw.logprob is not None]
        top_logprobs = [draw.top_logprobs for draw in self._draws if draw.top_logprobs is not None]
        wanted = self.request.params.logprobs
        return Completion(
            text="".join(self.pieces),
            token_ids=self.drawn,
            logprobs=None if wanted is None else logprobs,
            finish_reason=self.finish_reason,
            prompt_index=self.request.prompt_index,
            index=self.index,
            seed=self.request.seed,
            top_logprobs=top_logprobs if wanted else None,
        )
