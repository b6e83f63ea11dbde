"""From what a user gives as prompts to checked token ids and `Request`s."""

import secrets
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

from ..config import GPTConfig, SamplingParams
from ..data.tokenizer import Tokenizer
from .completion import Request

Prompt = str | Sequence[int]
Overflow = Literal["error", "truncate"]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be text, token ids or a list of these, got {prompts!r:.80}")
    if prompts and isinstance(prompts[0], Integral):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


class PromptReader:
    """Reads prompts for a model of this shape; the tokenizer is needed for text."""

    def __init__(self, config: GPTConfig, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer: Generator(model, tokenizer)")
        return self.tokenizer

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        overflow: Overflow,
    ) -> list[Request]:
        if overflow not in get_args(Overflow):
            raise ValueError(f"overflow must be one of {get_args(Overflow)}, got {overflow!r}")
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"there must be one params for all, or {len(prompts)}: got {len(params)}"
            )
        return [
            self._request(i, prompt, p, overflow)
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def _request(
        self, index: int, prompt: Prompt, params: SamplingParams, overflow: Overflow
    ) -> Request:
        if params.stop:
            self.need_tokenizer("a stop string")
        self._check_tokens(params.stop_token_ids, "stop_token_ids")
        tokens = self.prompt_tokens(prompt)
        limit = self.config.max_seq_len
        room = limit - (params.max_new_tokens or 1)
        if room < 1:
            raise ValueError(
                f"max_new_tokens must be less than the model's context of {limit} tokens, got {params.max_new_tokens}"
            )
        if len(tokens) > room:
            if overflow == "error":
                raise ValueError(
                    f"prompt {index} has {len(tokens)} tokens, and {params.max_new_tokens or 1} new ones do not fit after "
                    f"it into the model's context of {limit}: lower max_new_tokens, shorten the prompt, or say "
                    f"overflow='truncate' to lose its left"
                )
            has_bos = self.tokenizer is not None and tokens[0] == self.tokenizer.bos_id
            kept = 1 if has_bos and room > 1 else 0
            tokens = tokens[:kept] + tokens[kept - room :]
        known = self.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        return Request(
            prompt_index=index,
            tokens=tokens,
            params=params,
            seed=secrets.randbits(53) if params.seed is None else params.seed,  # 53: exact in JSON
            max_new_tokens=params.max_new_tokens or limit - len(tokens),
            vocab_limit=min(known, self.config.vocab_size),  # 50257 of 50304, say
            tokenizer=self.tokenizer,
        )

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, at least one."""
        tokens = self.encode(prompt)
        if not tokens and self.tokenizer is not None:
            start = (
                self.tokenizer.bos_id
                if self.tokenizer.bos_id is not None
                else self.tokenizer.eos_id
            )
            tokens = [] if start is None else [start]
        if not tokens:
            raise ValueError(
                "the prompt is empty, and there is no bos or end-of-text token to start from"
            )
        return tokens

    def encode(self, prompt: Prompt, with_bos: bool = True) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self.need_tokenizer("a text")
            bos = [tokenizer.bos_id] if with_bos and tokenizer.bos_id is not None else []
            tokens = bos + tokenizer.encode(prompt)
        elif isinstance(prompt, Sequence) and all(isinstance(token, Integral) for token in prompt):
            tokens = [int(token) for token in prompt]
        else:
            raise TypeError(f"a prompt must be text or a list of token ids, got {prompt!r:.80}")
        self._check_tokens(tokens, "the prompt")
        return tokens

    def _check_tokens(self, tokens: Sequence[int], name: str) -> None:
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"{name}: token ids must be in [0, {self.config.vocab_size}), got {token}: is this the model's "
                    "tokenizer?"
                )

    def check_fits(self, name: str, length: int) -> None:
        limit = self.config.max_seq_len
        if length > limit:
            raise ValueError(
                f"{name} has {length} tokens, the model's context only {limit}: shorten it"
            )
