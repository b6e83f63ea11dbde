"""`Generator`: text from a model. It completes and streams prompts, scores texts, ranks candidates, and chats.

It stands on any `Decoder`. What it gives depends on the prompt, the parameters and the seed alone, neither on the other
prompts of a call nor on their order (up to the rounding of the decoder, see there).
"""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from numbers import Integral
from typing import Any, Literal, Self, get_args

import torch

from .chat import ChatTemplate, Message
from .completion import Completion, Request
from .config import SamplingParams
from .data.tokenizer import Tokenizer
from .decoder import Decoder, TorchDecoder, prefill
from .model import GPT
from .scheduler import Scheduler

Prompt = str | Sequence[int]
Overflow = Literal["error", "truncate"]

_DEFAULT_PARAMS = SamplingParams()


@dataclass(frozen=True)
class Score:
    """What a model thinks of a text."""

    token_ids: list[int]
    logprobs: list[float | None]  # in nats; None: nothing stands before the token

    @property
    def total_logprob(self) -> float:
        return math.fsum(logprob for logprob in self.logprobs if logprob is not None)

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-probability; NaN where no token has one."""
        count = len(self.logprobs) - self.logprobs.count(None)
        return math.exp(-self.total_logprob / count) if count else math.nan


@dataclass(frozen=True)
class Ranked:
    """A candidate, and how probable it is after the context."""

    candidate: Prompt
    index: int  # place among the candidates
    token_ids: list[int]
    logprobs: list[float]  # of each token

    @property
    def total_logprob(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def mean_logprob(self) -> float:
        """Log-probability a token: does not favour short candidates."""
        return self.total_logprob / len(self.logprobs)


class Generator:
    """Generates with a model.

    One thread at a time may use it; several open streams are fine.

    Args:
        model: a `GPT`, used in its dtype and on its device; or a decoder.
        tokenizer: needed for text; without it, prompts are token ids and completions have no text.
        chat_template: needed for `chat`.
        max_batch_size: completions that are in work at a time; more take more memory.
        max_batch_tokens: tokens in one step of the model; longer prompts are read in pieces.
    """

    def __init__(
        self,
        model: GPT | Decoder,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_batch_tokens", max_batch_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.decoder: Decoder = TorchDecoder(model) if isinstance(model, GPT) else model
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Load a model with its tokenizer and chat template: `name` is a hub id, or a folder (see `resolve_model`)."""
        from .data.tokenizer import load_tokenizer
        from .pretrained import load_model, resolve_model

        path = resolve_model(name)
        model = load_model(path, dtype=dtype, device=device)
        folder = path if path.is_dir() else path.parent
        return cls(model, load_tokenizer(folder), ChatTemplate.load(folder))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = _DEFAULT_PARAMS,
        *,
        overflow: Overflow = "error",
        on_completion: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many.

        Args:
            prompts: a text, token ids, or a list of these. A text gets the tokenizer's bos token in front, if it has one;
                an empty prompt starts from the bos or end-of-text token.
            params: for all prompts, or one for each. With one seed for all, equal prompts give equal texts.
            overflow: a prompt that does not fit the context with max_new_tokens after it is an error, or loses its left.
            on_completion: called with each completion as soon as it is done, in any order.

        Returns:
            `params.n` completions for each prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt is too long, empty without a token to start from, or has a token that the model does not.
            TypeError: a prompt is neither text nor token ids.
        """
        requests = self._requests(prompts, params, overflow)
        done: dict[tuple[int, int], Completion] = {}
        with closing(self._scheduler(requests)) as scheduler:
            while scheduler.has_work:
                for draft in scheduler.step():
                    if draft.finish_reason is None:
                        continue
                    completion = draft.completion()
                    done[completion.prompt_index, completion.index] = completion
                    if on_completion is not None:
                        on_completion(completion)
        return [done[key] for key in sorted(done)]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams = _DEFAULT_PARAMS,
        *,
        overflow: Overflow = "error",
    ) -> Iterator[str]:
        """Complete a prompt and yield its text as it becomes certain; the pieces make `Completion.text`.

        A piece never ends within a character, and never shows a part of a stop string. Closing the iterator, or leaving
        its loop, ends the work.

        Args, Raises: as `generate`; wrong arguments raise here, not at the first piece.
        """
        if params.n != 1:
            raise ValueError(f"a stream has one completion, got n={params.n}")
        self._need_tokenizer("streaming text")
        return self._stream(self._requests([prompt], params, overflow))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams = _DEFAULT_PARAMS,
        *,
        overflow: Overflow = "error",
        **variables: Any,
    ) -> Completion:
        """The assistant's next message, in the form that the model's chat template gives to a conversation.

        Args:
            messages: such as `[{"role": "user", "content": "Hello"}]`; roles as in `leangpt.chat.ROLES`.
            variables: for the template, such as `enable_thinking=False`.
            params, overflow: as in `generate`, with n = 1.

        Raises:
            ValueError: the model has no chat template, it refuses the conversation, or as `generate`.
        """
        if params.n != 1:
            raise ValueError(f"a chat has one answer, got n={params.n}")
        prompt = self._conversation(messages, variables)
        return self.generate([prompt], params, overflow=overflow)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams = _DEFAULT_PARAMS,
        *,
        overflow: Overflow = "error",
        **variables: Any,
    ) -> Iterator[str]:
        """`chat`, as `stream` yields it."""
        return self.stream(self._conversation(messages, variables), params, overflow=overflow)

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[Score]:
        """Log-probability of each token of each text, given those before it.

        Raises:
            ValueError: a text is longer than the model's context, or has a token that the model does not.
        """
        scores = []
        parts = [self._encode(text) for text in _as_list(texts)]
        for i, tokens in enumerate(parts):
            self._check_fits(f"text {i}", len(tokens))
        for start in range(0, len(parts), self.max_batch_size):
            batch = parts[start : start + self.max_batch_size]
            with self._sequences() as sequences:
                sequences += [self.decoder.add_sequence() for _ in batch]
                known = self._logprobs([(s, 0, t) for s, t in zip(sequences, batch, strict=True)])
            for tokens, logprobs in zip(batch, known, strict=True):
                has_bos = self.tokenizer is not None and tokens[:1] == [self.tokenizer.bos_id]
                first: list[float | None] = [] if has_bos or not tokens else [None]
                scores.append(Score(tokens[1:] if has_bos else tokens, [*first, *logprobs]))
        return scores

    def rank(self, context: Prompt, candidates: Sequence[Prompt]) -> list[Ranked]:
        """Log-probability of each candidate after a context, which is run once for all.

        Context and candidates are tokenized apart: no token reaches over their border. Where words are tokenized with the
        space before them, the space belongs to the candidate: `rank("The sky is", [" blue", " green"])`.

        Returns:
            The candidates, the one of highest `total_logprob` first, of equals the first given.

        Raises:
            ValueError: a candidate is empty, context and candidate do not fit the model, or as `generate`.
        """
        prompt = self._prompt_tokens(context)
        parts = [self._encode(candidate, with_bos=False) for candidate in candidates]
        for i, tokens in enumerate(parts):
            if not tokens:
                raise ValueError(f"candidate {i} is empty: it must have at least one token")
            self._check_fits(f"the context with candidate {i}", len(prompt) + len(tokens))
        known: list[list[float]] = []
        with self._sequences() as shared:
            shared.append(self.decoder.add_sequence())
            prefill(self.decoder, shared[0], prompt[:-1], self.max_batch_tokens)
            for start in range(0, len(parts), self.max_batch_size):
                batch = parts[start : start + self.max_batch_size]
                with self._sequences() as forks:
                    forks += [self.decoder.fork(shared[0]) for _ in batch]
                    known += self._logprobs(
                        [
                            (fork, len(prompt) - 1, [prompt[-1], *tokens])
                            for fork, tokens in zip(forks, batch, strict=True)
                        ]
                    )
        ranked = [
            Ranked(candidate, i, parts[i], known[i]) for i, candidate in enumerate(candidates)
        ]
        return sorted(ranked, key=lambda r: -r.total_logprob)

    @contextmanager
    def _sequences(self) -> Iterator[list[int]]:
        """A list whose sequences are dropped at the end."""
        sequences: list[int] = []
        try:
            yield sequences
        finally:
            for sequence in sequences:
                self.decoder.drop(sequence)

    def _logprobs(self, parts: Sequence[tuple[int, int, list[int]]]) -> list[list[float]]:
        """Log-probability of each token but the first, for some (sequence, position of the first token, tokens)."""
        rows = [
            (token, sequence, start + i, target)
            for sequence, start, part in parts
            for i, (token, target) in enumerate(pairwise(part))
        ]
        found: list[float] = []
        for start in range(0, len(rows), self.max_batch_tokens):
            batch = torch.tensor(rows[start : start + self.max_batch_tokens])
            tokens, sequences, positions, targets = batch.unbind(1)
            found += self.decoder.forward(
                tokens, sequences, positions, torch.arange(len(batch)), "logprob_of", targets
            ).tolist()
        remaining = iter(found)
        return [list(islice(remaining, max(0, len(part) - 1))) for _, _, part in parts]

    def _scheduler(self, requests: Sequence[Request]) -> Scheduler:
        scheduler = Scheduler(self.decoder, self.max_batch_size, self.max_batch_tokens)
        for request in requests:
            scheduler.add(request)
        return scheduler

    def _stream(self, requests: Sequence[Request]) -> Iterator[str]:
        with closing(self._scheduler(requests)) as scheduler:
            while scheduler.has_work:
                for draft in scheduler.step():
                    if draft.new_text:
                        yield draft.new_text

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        overflow: Overflow,
    ) -> list[Request]:
        if overflow not in get_args(Overflow):
            raise ValueError(f"overflow must be one of {get_args(Overflow)}, got {overflow!r}")
        prompts = _as_list(prompts)
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
            self._need_tokenizer("a stop string")
        self._check_tokens(params.stop_token_ids, "stop_token_ids")
        tokens = self._prompt_tokens(prompt)
        limit = self.decoder.config.max_seq_len
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
        return Request(
            prompt_index=index,
            tokens=tokens,
            params=params,
            seed=secrets.randbits(53) if params.seed is None else params.seed,  # 53: exact in JSON
            max_new_tokens=params.max_new_tokens or limit - len(tokens),
            tokenizer=self.tokenizer,
        )

    def _conversation(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        tokenizer = self._need_tokenizer("chat")
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template (chat_template in tokenizer_config.json): "
                "it was not trained to chat; use generate, or give Generator a ChatTemplate"
            )
        return self.chat_template.encode(messages, tokenizer, **variables)

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, at least one."""
        tokens = self._encode(prompt)
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

    def _encode(self, prompt: Prompt, with_bos: bool = True) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer("a text")
            bos = [tokenizer.bos_id] if with_bos and tokenizer.bos_id is not None else []
            tokens = bos + tokenizer.encode(prompt)
        elif isinstance(prompt, Sequence) and all(isinstance(token, Integral) for token in prompt):
            tokens = [int(token) for token in prompt]
        else:
            raise TypeError(f"a prompt must be text or a list of token ids, got {prompt!r:.80}")
        self._check_tokens(tokens, "the prompt")
        return tokens

    def _check_tokens(self, tokens: Sequence[int], name: str) -> None:
        vocab_size = self.decoder.config.vocab_size
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name}: token ids must be in [0, {vocab_size}), got {token}: is this the model's tokenizer?"
                )

    def _check_fits(self, name: str, length: int) -> None:
        limit = self.decoder.config.max_seq_len
        if length > limit:
            raise ValueError(
                f"{name} has {length} tokens, the model's context only {limit}: shorten it"
            )

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer: Generator(model, tokenizer)")
        return self.tokenizer


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be text, token ids or a list of these, got {prompts!r:.80}")
    if prompts and isinstance(prompts[0], Integral):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
