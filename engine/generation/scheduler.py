"""Continuous batching: which drafts are in the decoder, and which tokens go into its next step.

Drafts join as others finish, in the order in which they came. Each step takes all tokens that a draft's sequence does not hold
yet: a piece of the prompt at first, then the one drawn last, and guesses of what follows it; decoding is nothing else. A prompt
of several completions runs once, and they fork from it.

With an `AsyncDecoder` a step starts before the draws of the one before are read, so that the device works while they are: the
tokens drawn last are left for it to fill in. A draft that these end has then taken part in one step too many, whose draw is
forgotten.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from ..decoding.decoder import AsyncDecoder, Decoder
from ..decoding.sampling import Draw, RowSampling
from .budget import CacheBudget
from .completion import Draft
from .job import Generation
from .speculation import PromptLookup


@dataclass(eq=False)
class _Growing:
    """A sequence of the decoder, which holds the first `length` of `tokens`: those of a draft, or of a prompt to fork."""

    job: Generation
    sequence: int
    tokens: Sequence[int]  # a draft's own list, which grows
    length: int = 0
    draft: Draft | None = None
    lookup: PromptLookup | None = None
    unread: "_Piece | None" = None  # of the step that is on its way, which draws the next token
    is_dropped: bool = False


@dataclass(eq=False)
class _Piece:
    """What a sequence takes in a step."""

    owner: _Growing
    tokens: Sequence[int]
    draft: Draft | None  # whose next token is drawn, because the sequence then holds all before it
    guesses: list[int] = field(default_factory=list)
    first_draw: int = 0  # of the step

    @property
    def is_alive(self) -> bool:
        return not (self.owner.is_dropped or self.owner.job.is_done)


@dataclass
class _Step:
    """A step of the decoder that is on its way."""

    pieces: list[_Piece]
    read: Callable[[], list[Draw]]


class Scheduler:
    """Runs generations on a decoder. One thread may use it.

    Args:
        decoder: nobody else may use it between `step`s that leave work.
        max_batch_size: drafts in work at a time.
        max_batch_tokens: tokens in a step.
        speculate: tokens guessed at a time (see `PromptLookup`); 0: none.
    """

    def __init__(
        self, decoder: Decoder, max_batch_size: int, max_batch_tokens: int, speculate: int = 0
    ) -> None:
        self.decoder = decoder
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.speculate = speculate
        self.budget = CacheBudget(decoder)
        self._waiting: deque[Generation] = deque()
        self._running: list[_Growing] = []  # of a draft each
        # of several completions: their prompt but its last token; None once the last of them has taken the sequence over
        self._prompts: dict[Generation, _Growing | None] = {}
        self._step: _Step | None = None  # whose draws are not read yet

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._step)

    @property
    def num_waiting(self) -> int:
        """Generations of which not all completions have started."""
        return len(self._waiting)

    @property
    def jobs(self) -> list[Generation]:
        """All that are not done, in order."""
        return list(dict.fromkeys([r.job for r in self._running] + list(self._waiting)))

    def add(self, job: Generation) -> None:
        self._waiting.append(job)

    def end(self, job: Generation, error: BaseException | None = None) -> None:
        """Forget a job, in whatever state it is, and tell those who wait for it."""
        if job in self._waiting:
            self._waiting.remove(job)
        for running in [r for r in self._running if r.job is job]:
            self._drop(running)
        if job in self._prompts:
            prompt = self._prompts.pop(job)
            self.budget.give_back(self.budget.blocks_of_prompt(job.request))
            if prompt is not None:
                prompt.is_dropped = True
                self.decoder.drop(prompt.sequence)
        job.finish(error)

    def step(self, may_begin: bool = True) -> None:
        """Start what there is room for, and run the decoder once. What goes wrong ends the jobs that it happened to.

        Args:
            may_begin: whether jobs may start of which nothing has; those that hold a prompt must come to their end.
        """
        self._start_waiting(may_begin)
        before, self._step = self._step, None
        pieces = self._pieces()
        if pieces:
            self._attempt(pieces, self._start)
        if before is not None:
            self._finish(before)
        if self._step is not None and not self._may_run_ahead():
            step, self._step = self._step, None
            self._finish(step)

    def _may_run_ahead(self) -> bool:
        """Whether the next step can be told without the draws of this one."""
        if self.speculate or not isinstance(self.decoder, AsyncDecoder):
            return False
        return not any(r.draft is not None and r.draft.is_penalized for r in self._running)

    def _attempt(self, pieces: list[_Piece], work: Callable[[list[_Piece]], None]) -> bool:
        """Whether the work on pieces went well; what went wrong ends their jobs."""
        try:
            work(pieces)
        except BaseException as error:  # not ours: whoever waits for the text shall see it
            for job in _jobs(pieces):
                self.end(job, error)
            return False
        return True

    def _finish(self, step: _Step) -> None:
        """Take a step's draws, and tell those who wait for them."""
        jobs = _jobs(step.pieces)
        if not self._attempt(step.pieces, lambda pieces: self._take_all(pieces, step.read())):
            return
        for job in jobs:
            is_complete = len(job.drafts) == job.request.params.n
            if is_complete and all(draft.finish_reason for draft in job.drafts):
                self.end(job)
            else:
                job.notify()

    def _start_waiting(self, may_begin: bool) -> None:
        while self._waiting and len(self._running) < self.max_batch_size:
            job = self._waiting[0]
            if not may_begin and job not in self._prompts:
                return
            try:
                if not self._start_draft(job):
                    return
            except BaseException as error:
                self.end(job, error)
                continue
            if len(job.drafts) == job.request.params.n:
                self._waiting.popleft()

    def _start_draft(self, job: Generation) -> bool:
        """Start the next draft of a job; whether that could be done now."""
        request = job.request
        if request.params.n > 1 and not self._has_prompt(job):
            return False
        num_blocks = self.budget.blocks_of_draft(request)
        if not self.budget.has_room(num_blocks):
            return False
        if request.params.n == 1:
            sequence, length = self.decoder.add_sequence(), 0
        else:
            sequence, length = self._fork(job), len(request.tokens) - 1
        self.budget.promise(num_blocks)
        draft = Draft(request, len(job.drafts))
        job.drafts.append(draft)
        lookup = PromptLookup(self.speculate) if self.speculate else None
        self._running.append(_Growing(job, sequence, draft.tokens, length, draft, lookup))
        return True

    def _has_prompt(self, job: Generation) -> bool:
        """Whether the prompt is read, so that drafts can fork from it; it is started where it is not."""
        if job not in self._prompts:
            num_blocks = self.budget.blocks_of_prompt(job.request)
            if not self.budget.has_room(num_blocks):
                return False
            tokens = job.request.tokens[:-1]
            self._prompts[job] = _Growing(job, self.decoder.add_sequence(), tokens)
            self.budget.promise(num_blocks)
        prompt = self._prompts[job]
        return prompt is not None and prompt.length == len(prompt.tokens)

    def _fork(self, job: Generation) -> int:
        prompt = self._prompts[job]
        assert prompt is not None, "all completions have started"
        if len(job.drafts) < job.request.params.n - 1:
            return self.decoder.fork(prompt.sequence)
        self._prompts[job] = None  # nobody forks from it any more
        return prompt.sequence

    def _pieces(self) -> list[_Piece]:
        """What goes into the next step: what the sequences lack first, and guesses where there is room left."""
        room = self.max_batch_tokens
        pieces = []
        for owner in (*self._running, *filter(None, self._prompts.values())):
            tokens = owner.tokens[owner.length : owner.length + room]
            if owner.unread is not None and room and owner.draft and owner.draft.num_left > 1:
                tokens = [-1 - owner.unread.first_draw]
            if tokens:
                is_all = owner.length + len(tokens) >= len(owner.tokens)
                pieces.append(_Piece(owner, tokens, owner.draft if is_all else None))
                room -= len(tokens)
        for piece in pieces:
            if piece.owner.lookup is not None and piece.draft is not None:
                limit = min(room, piece.draft.num_left - 1)
                piece.guesses = piece.owner.lookup.guess(piece.owner.tokens, limit)
                room -= len(piece.guesses)
        return pieces

    def _start(self, pieces: list[_Piece]) -> None:
        tokens: list[int] = []
        sequences: list[int] = []
        positions: list[int] = []
        output_rows: list[int] = []
        rows: list[RowSampling] = []
        for piece in pieces:
            owner = piece.owner
            new_tokens = [*piece.tokens, *piece.guesses]
            sequences += [owner.sequence] * len(new_tokens)
            positions += range(owner.length, owner.length + len(new_tokens))
            tokens += new_tokens
            if piece.draft is not None:
                count = len(piece.guesses) + 1
                piece.first_draw = len(rows)
                output_rows += range(len(tokens) - count, len(tokens))
                num_unread = int(owner.unread is not None)
                rows += [piece.draft.sampling(piece.guesses[:i], num_unread) for i in range(count)]
        step = tokens, sequences, positions, output_rows, rows
        if isinstance(self.decoder, AsyncDecoder):
            read = self.decoder.start_sample(*step)
        else:
            draws = self.decoder.sample(*step)
            read = lambda: draws  # noqa: E731
        self._step = _Step(pieces, read)
        for piece in pieces:
            piece.owner.length += len(piece.tokens)
            if piece.draft is not None:
                piece.owner.unread = piece

    def _take_all(self, pieces: list[_Piece], draws: list[Draw]) -> None:
        for piece in pieces:
            if piece.owner.unread is piece:
                piece.owner.unread = None
            if piece.draft is not None and piece.is_alive:
                end = piece.first_draw + len(piece.guesses) + 1
                self._take(piece, piece.draft, draws[piece.first_draw : end])

    def _take(self, piece: _Piece, draft: Draft, draws: Sequence[Draw]) -> None:
        """Append what was drawn after the last token, and after each guess as long as these were right."""
        owner = piece.owner
        num_right = 0
        for draw, guess in zip_longest(draws, piece.guesses):
            draft.append(draw)
            if draft.finish_reason or draw.token != guess:
                break
            num_right += 1
        if draft.finish_reason:
            self._drop(owner)
            owner.job.report(draft)
            return
        if owner.lookup is not None and piece.guesses:
            owner.lookup.learn(len(piece.guesses), num_right)
            if num_right < len(piece.guesses):
                self.decoder.truncate(owner.sequence, owner.length + num_right)
        owner.length += num_right

    def _drop(self, running: _Growing) -> None:
        self._running.remove(running)
        running.is_dropped = True
        self.decoder.drop(running.sequence)
        self.budget.give_back(self.budget.blocks_of_draft(running.job.request))


def _jobs(pieces: list[_Piece]) -> list[Generation]:
    """Those that are not done."""
    return list(dict.fromkeys(piece.owner.job for piece in pieces if piece.is_alive))
