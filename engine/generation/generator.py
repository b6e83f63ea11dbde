"""`Generator`: text from a model. It completes and streams prompts, scores texts, ranks candidates, and chats.

It stands on any `Decoder`. What it gives depends on the prompt, the parameters and the seed alone, neither on what else is in
work nor on the order (up to the rounding of the decoder, see there).
"""

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from ..config import SamplingParams
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..decoding.choice import decoder_of, load_decoder
from ..decoding.decoder import Decoder
from .batcher import Batcher
from .chat import ChatTemplate, Message, trim_history
from .completion import Completion, Draft
from .handle import Handle
from .job import Computation, Generation
from .prompt import Overflow, Prompt, PromptReader, as_list
from .scheduler import Scheduler
from .score import Ranked, Score, Scorer

if TYPE_CHECKING:  # a packed model runs without torch
    import torch

    from ..model import GPT

_DEFAULT_PARAMS = SamplingParams()


class Generator:
    """Generates with a model, for any number of threads at once: all that is in work shares the steps of the decoder.

    It needs no closing; `close`, or a `with` block, ends what is in work.

    Args:
        model: a `GPT`, used on its device and in the dtype of its weights (see `decoder_of`); or a decoder, which nobody
            else may use meanwhile.
        tokenizer: needed for text; without it, prompts are token ids and completions have no text.
        chat_template: needed for `chat`.
        max_batch_size: completions that are in work at a time; more take more memory.
        max_batch_tokens: tokens in one step of the model; longer prompts are read in pieces.
        max_waiting: prompts that may wait for their start before `submit` blocks; those of one `generate` come in together.
        speculate: guess up to this many tokens at a time from what the text has repeated, and check them in one step. The
            text is the same, and comes sooner where it repeats itself or its prompt.
    """

    def __init__(
        self,
        model: "GPT | Decoder",
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        max_waiting: int = 1024,
        speculate: int = 0,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_batch_tokens", max_batch_tokens),
            ("max_waiting", max_waiting),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if speculate < 0:
            raise ValueError(f"speculate must be at least 0, got {speculate}")
        self.decoder: Decoder = model if isinstance(model, Decoder) else decoder_of(model)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        scheduler = Scheduler(self.decoder, max_batch_size, max_batch_tokens, speculate)
        self._budget = scheduler.budget
        self._batcher = Batcher(scheduler, max_waiting)
        self._reader = PromptReader(self.decoder.config, tokenizer)
        self._scorer = Scorer(self.decoder, self._budget, max_batch_size, max_batch_tokens)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        format: str | None = None,
        dtype: "torch.dtype | str | None" = None,
        device: "torch.device | str" = "cpu",
        num_blocks: int | None = None,
        exact: bool = True,
        **options: Any,
    ) -> Self:
        """Load a model with its tokenizer and chat template.

        Args:
            name, format, dtype, device, num_blocks, exact: see `load_decoder`.
            options: of `Generator`.
        """
        decoder, folder = load_decoder(
            name, format=format, dtype=dtype, device=device, num_blocks=num_blocks, exact=exact
        )
        return cls(decoder, load_tokenizer(folder), ChatTemplate.load(folder), **options)

    def close(self) -> None:
        """End all that is in work, in whatever thread, with an error."""
        self._batcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams = _DEFAULT_PARAMS,
        *,
        overflow: Overflow = "error",
        timeout: float | None = None,
    ) -> Handle:
        """Put a prompt to work and return at once, with a handle from which its text comes.

        Args:
            prompt, params, overflow: as in `generate`.
            timeout: seconds to wait for a place, where `max_waiting` prompts wait already; None: as long as it takes.

        Raises:
            TimeoutError: there was no place in time.
            ValueError, TypeError: as `generate`.
        """
        [job] = self._generations([prompt], params, overflow)
        handle = Handle(job, self._batcher)
        self._batcher.submit([job], timeout)
        return handle

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = _DEFAULT_PARAMS,
        *,
        overflow: Overflow = "error",
        on_completion: Callable[[Completion], None] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Complete one prompt or many.

        Args:
            prompts: a text, token ids, or a list of these. A text gets the tokenizer's bos token in front, if it has one;
                an empty prompt starts from the bos or end-of-text token.
            params: for all prompts, or one for each. With one seed for all, equal prompts give equal texts.
            overflow: a prompt that does not fit the context with max_new_tokens after it is an error, or loses its left.
            on_completion: called with each completion as soon as it is done, in any order.
            progress: show on standard error how many are done.

        Returns:
            `params.n` completions for each prompt, in the order of the prompts.

        Raises:
            ValueError: a prompt is too long, empty without a token to start from, or has a token that the model does not.
            TypeError: a prompt is neither text nor token ids.
        """
        finished: SimpleQueue[Draft | BaseException] = SimpleQueue()
        jobs = self._generations(as_list(prompts), params, overflow, finished.put)
        done: dict[tuple[int, int], Completion] = {}
        num_completions = sum(job.request.params.n for job in jobs)
        with (
            self._batcher.running(jobs),
            tqdm(total=num_completions, unit="text", disable=not progress) as bar,
        ):
            while len(done) < num_completions:
                draft = finished.get()
                if isinstance(draft, BaseException):
                    raise draft
                completion = draft.completion()
                done[completion.prompt_index, completion.index] = completion
                bar.update()
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
        self._reader.need_tokenizer("streaming text")
        return _pieces(self.submit(prompt, params, overflow=overflow))

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
            messages: such as `[{"role": "user", "content": "Hello"}]`; roles as in `leangpt.generation.chat.ROLES`.
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

    def trim_history(
        self, messages: Sequence[Message], params: SamplingParams = _DEFAULT_PARAMS
    ) -> list[Message]:
        """Leave out the oldest turns of a conversation that is too long to be answered; see `chat.trim_history`.

        Raises:
            ValueError: the model has no chat template, or it refuses the conversation.
        """
        tokenizer, template = self._chat_parts()
        room = self.decoder.config.max_seq_len - (params.max_new_tokens or 1)
        return trim_history(messages, template, tokenizer, room)

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[Score]:
        """Log-probability of each token of each text, given those before it.

        Raises:
            ValueError: a text is longer than the model's context, or has a token that the model does not.
        """
        parts = [self._reader.encode(text) for text in as_list(texts)]
        for i, tokens in enumerate(parts):
            self._reader.check_fits(f"text {i}", len(tokens))
        known: list[list[float]] = []
        self._compute(self._scorer.texts(parts, known))
        scores = []
        for tokens, logprobs in zip(parts, known, strict=True):
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
        prompt = self._reader.prompt_tokens(context)
        parts = [self._reader.encode(candidate, with_bos=False) for candidate in candidates]
        for i, tokens in enumerate(parts):
            if not tokens:
                raise ValueError(f"candidate {i} is empty: it must have at least one token")
            self._reader.check_fits(f"the context with candidate {i}", len(prompt) + len(tokens))
        known: list[list[float]] = []
        self._compute(self._scorer.candidates(prompt, parts, known))
        ranked = [
            Ranked(candidate, i, parts[i], known[i]) for i, candidate in enumerate(candidates)
        ]
        return sorted(ranked, key=lambda r: -r.total_logprob)

    def _generations(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        overflow: Overflow,
        report: Callable[[Draft | BaseException], None] | None = None,
    ) -> list[Generation]:
        jobs = []
        for request in self._reader.requests(prompts, params, overflow):
            num_blocks = self._budget.blocks_of_prompt(request)
            num_blocks += self._budget.blocks_of_draft(request)
            self._budget.check(f"prompt {request.prompt_index}", num_blocks)
            jobs.append(Generation(request, report))
        return jobs

    def _compute(self, computation: Computation) -> None:
        with self._batcher.running([computation]):
            computation.wait()
        computation.raise_error()

    def _conversation(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        tokenizer, template = self._chat_parts()
        return template.encode(messages, tokenizer, **variables)

    def _chat_parts(self) -> tuple[Tokenizer, ChatTemplate]:
        tokenizer = self._reader.need_tokenizer("chat")
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template (chat_template in tokenizer_config.json): "
                "it was not trained to chat; use generate, or give Generator a ChatTemplate"
            )
        return tokenizer, self.chat_template


def _pieces(handle: Handle) -> Iterator[str]:
    try:
        yield from handle
    finally:
        handle.cancel()
