"""Log-probabilities of given texts: `Score` of a text, `Ranked` of a candidate after a context."""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise

from ..decoding.decoder import Decoder, prefill
from .budget import CacheBudget
from .job import Computation
from .prompt import Prompt

Steps = Generator[None, None, None]


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


class Scorer:
    """Makes the computations of one decoder: each fills a list with the log-probabilities of each part's tokens.

    Args:
        decoder, max_batch_size, max_batch_tokens: as of a `Scheduler`.
        budget: says how many pages the cache has.
    """

    def __init__(
        self, decoder: Decoder, budget: CacheBudget, max_batch_size: int, max_batch_tokens: int
    ) -> None:
        self.decoder = decoder
        self.budget = budget
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens

    def texts(self, texts: Sequence[list[int]], found: list[list[float]]) -> Computation:
        """Of every token of a text but its first."""
        costs = [self.budget.blocks_of(max(0, len(text) - 1)) for text in texts]
        for i, cost in enumerate(costs):
            self.budget.check(f"text {i}", cost)
        batches, num_blocks = self._batches(texts, costs, self.budget.num_blocks)

        def steps() -> Steps:
            for batch in batches:
                with self._sequences() as sequences:
                    sequences += [self.decoder.add_sequence() for _ in batch]
                    starts = [(s, 0, text) for s, text in zip(sequences, batch, strict=True)]
                    yield from self._logprobs(starts, found)

        return Computation(steps(), num_blocks)

    def candidates(
        self, context: list[int], candidates: Sequence[list[int]], found: list[list[float]]
    ) -> Computation:
        """Of every token of a candidate, after a context, which is run once for all."""
        num_read = len(context) - 1  # the last token of the context is read with each candidate
        shared = self.budget.blocks_of(num_read)
        costs = [
            self.budget.blocks_of_fork(num_read + len(candidate), num_read)
            for candidate in candidates
        ]
        for i, cost in enumerate(costs):
            self.budget.check(f"the context with candidate {i}", shared + cost)
        room = None if self.budget.num_blocks is None else self.budget.num_blocks - shared
        batches, num_blocks = self._batches(candidates, costs, room)

        def steps() -> Steps:
            with self._sequences() as prompt:
                prompt.append(self.decoder.add_sequence())
                prefill(self.decoder, prompt[0], context[:-1], self.max_batch_tokens)
                for batch in batches:
                    with self._sequences() as forks:
                        forks += [self.decoder.fork(prompt[0]) for _ in batch]
                        starts = [
                            (fork, num_read, [context[-1], *candidate])
                            for fork, candidate in zip(forks, batch, strict=True)
                        ]
                        yield from self._logprobs(starts, found)

        return Computation(steps(), shared + num_blocks)

    @contextmanager
    def _sequences(self) -> Iterator[list[int]]:
        """A list whose sequences are dropped at the end."""
        sequences: list[int] = []
        try:
            yield sequences
        finally:
            for sequence in sequences:
                self.decoder.drop(sequence)

    def _batches(
        self, parts: Sequence[list[int]], costs: Sequence[int], room: int | None
    ) -> tuple[list[list[list[int]]], int]:
        """Parts that run together, and the most pages that such a batch takes."""
        batches: list[list[list[int]]] = []
        num_blocks = most = 0
        for part, cost in zip(parts, costs, strict=True):
            is_full = room is not None and num_blocks + cost > room
            if not batches or len(batches[-1]) == self.max_batch_size or is_full:
                batches.append([])
                num_blocks = 0
            batches[-1].append(part)
            num_blocks += cost
            most = max(most, num_blocks)
        return batches, most

    def _logprobs(
        self, parts: Sequence[tuple[int, int, list[int]]], found: list[list[float]]
    ) -> Steps:
        """Of each token but the first, for some (sequence, position of the first token, tokens)."""
        rows = [
            (token, sequence, start + i, target)
            for sequence, start, part in parts
            for i, (token, target) in enumerate(pairwise(part))
        ]
        logprobs: list[float] = []
        for start in range(0, len(rows), self.max_batch_tokens):
            batch = rows[start : start + self.max_batch_tokens]
            tokens, sequences, positions, targets = zip(*batch, strict=True)
            logprobs += self.decoder.forward(
                tokens, sequences, positions, range(len(batch)), "logprob_of", targets
            ).tolist()
            yield
        remaining = iter(logprobs)
        found += [list(islice(remaining, max(0, len(part) - 1))) for _, _, part in parts]
