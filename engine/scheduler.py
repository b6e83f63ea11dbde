"""Continuous batching: which drafts are in the decoder, and which tokens go into its next step.

Drafts join as others finish. Each step takes all tokens that a draft's sequence does not hold yet: a piece of the prompt at
first, then the one drawn last; decoding is nothing else. A prompt of several completions runs once, and they fork from it.
"""

from collections import deque

import torch

from .completion import Draft, Request
from .decoder import Decoder, prefill
from .sampling import draw


class _Running:
    """A draft and its sequence, which holds the first `length` of its tokens."""

    def __init__(self, draft: Draft, sequence: int, length: int) -> None:
        self.draft = draft
        self.sequence = sequence
        self.length = length


class Scheduler:
    """Runs requests on a decoder, at most `max_batch_size` drafts and `max_batch_tokens` tokens a step.

    `close` drops the sequences of drafts that have not finished; call it in any case (`contextlib.closing`).
    """

    def __init__(self, decoder: Decoder, max_batch_size: int, max_batch_tokens: int) -> None:
        self.decoder = decoder
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self._waiting: deque[Draft] = deque()
        self._running: list[_Running] = []
        self._prompts: dict[
            int, int
        ] = {}  # sequence of a prompt (but its last token) to fork, by prompt_index

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        self._waiting += [Draft(request, index) for index in range(request.params.n)]

    def step(self) -> list[Draft]:
        """Run the decoder once; return the drafts that got a token, which is the last one if they have finished."""
        while self._waiting and len(self._running) < self.max_batch_size:
            self._start(self._waiting.popleft())

        tokens: list[int] = []
        sequences: list[int] = []
        positions: list[int] = []
        output_rows: list[int] = []
        drawing: list[_Running] = []
        for running in self._running:
            room = self.max_batch_tokens - len(tokens)
            if not room:
                break
            new_tokens = running.draft.tokens[running.length :][:room]
            tokens += new_tokens
            sequences += [running.sequence] * len(new_tokens)
            positions += range(running.length, running.length + len(new_tokens))
            running.length += len(new_tokens)
            if running.length == len(running.draft.tokens):
                output_rows.append(len(tokens) - 1)
                drawing.append(running)
        logits = self.decoder.forward(
            torch.tensor(tokens),
            torch.tensor(sequences),
            torch.tensor(positions),
            torch.tensor(output_rows, dtype=torch.int64),
        )
        if not drawing:
            return []
        drafts = [running.draft for running in drawing]
        for running, drawn in zip(drawing, draw(logits, drafts), strict=True):
            running.draft.append(drawn)
            if running.draft.finish_reason:
                self._running.remove(running)
                self.decoder.drop(running.sequence)
        return drafts

    def close(self) -> None:
        for sequence in (*(running.sequence for running in self._running), *self._prompts.values()):
            self.decoder.drop(sequence)
        self._running.clear()
        self._prompts.clear()
        self._waiting.clear()

    def _start(self, draft: Draft) -> None:
        request = draft.request
        if request.params.n == 1:
            self._running.append(_Running(draft, self.decoder.add_sequence(), 0))
            return
        if draft.index == 0:
            self._prompts[request.prompt_index] = self.decoder.add_sequence()
            prompt = self._prompts[request.prompt_index]
            prefill(self.decoder, prompt, request.tokens[:-1], self.max_batch_tokens)
        if draft.index == request.params.n - 1:
            sequence = self._prompts.pop(request.prompt_index)  # nobody forks from it any more
        else:
            sequence = self.decoder.fork(self._prompts[request.prompt_index])
        self._running.append(_Running(draft, sequence, len(request.tokens) - 1))
