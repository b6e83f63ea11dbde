"""A decoder that is a rule, for tests of what stands on decoders; it holds them to the protocol."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Semaphore

import numpy as np
import torch
from torch import Tensor

from leangpt import GPT, GPTConfig
from leangpt.data.tokenizer import ByteTokenizer
from leangpt.decoding.decoder import CacheFull
from leangpt.decoding.torch_sampling import draw
from leangpt.generation.generator import Generator

EOS = ByteTokenizer().eos_id
Rule = Callable[[list[int]], Tensor]


class RuleDecoder:
    """A decoder whose logits are a function of the text so far.

    Its cache has `num_blocks` pages, which are counted as if forks shared none but the full pages they had in common.
    """

    def __init__(
        self,
        rule: Rule,
        max_seq_len: int = 1000,
        vocab_size: int = 257,
        kv_block_size: int = 4,
        num_blocks: int | None = None,
    ) -> None:
        self.config = GPTConfig(vocab_size=vocab_size, max_seq_len=max_seq_len)
        self.kv_block_size = kv_block_size
        self.num_blocks = num_blocks
        self.rule = rule
        self.sequences: dict[int, list[int]] = {}
        self.pages: dict[int, list[object]] = {}  # of each sequence
        self.numbers = itertools.count(100)
        self.num_rows: list[int] = []  # of each step
        self.most_sequences = 0
        self.most_pages = 0
        self.fails_at_step: int | None = None  # and then no more
        self.error: type[BaseException] = KeyboardInterrupt
        self.permits: Semaphore | None = None  # one for each step; None: as many as it likes
        self.is_waiting = False  # for one

    def add_adapter(self, adapter: object) -> int:
        raise ValueError("there are no weights to add to")

    def add_sequence(self) -> int:
        number = next(self.numbers)
        self.sequences[number] = []
        self.pages[number] = []
        self.most_sequences = max(self.most_sequences, len(self.sequences))
        return number

    def fork(self, sequence: int) -> int:
        number = self.add_sequence()
        self.sequences[number] += self.sequences[sequence]
        self.pages[number] += self.pages[sequence]
        return number

    def truncate(self, sequence: int, length: int) -> None:
        assert 0 <= length <= len(self.sequences[sequence])
        del self.sequences[sequence][length:]
        del self.pages[sequence][-(-length // self.kv_block_size) :]

    def drop(self, sequence: int) -> None:
        del self.sequences[sequence]
        del self.pages[sequence]

    def forward(self, tokens, sequences, positions, output_rows, output="logits", targets=None):
        logits = self._step(tokens, sequences, positions, output_rows)
        if output == "logits":
            return logits.numpy()
        assert output == "logprob_of"
        return logits.log_softmax(-1)[range(len(targets)), targets].numpy()

    def sample(self, tokens, sequences, positions, output_rows, rows):
        assert len(rows) == len(output_rows)
        logits = self._step(tokens, sequences, positions, output_rows)
        return draw(logits, rows) if rows else []

    def _step(self, tokens, sequences, positions, output_rows) -> Tensor:
        if self.permits is not None:
            self.is_waiting = True
            self.permits.acquire()
            self.is_waiting = False
        if len(self.num_rows) == self.fails_at_step:
            self.fails_at_step = None
            raise self.error("as the test wants it")
        self.num_rows.append(len(tokens))
        columns = [np.asarray(column) for column in (tokens, sequences, positions)]
        assert all(column.shape == (len(tokens),) for column in columns) and len(tokens) > 0
        found = {}
        for row, (token, sequence, position) in enumerate(zip(*columns, strict=True)):
            text = self.sequences[sequence]
            assert position == len(text) < self.config.max_seq_len
            text.append(int(token))
            self._take_page(sequence)
            if row in output_rows:
                found[row] = self.rule(text).double()
        logits = [found[row] for row in output_rows]
        return torch.stack(logits) if logits else torch.empty(0, self.config.vocab_size)

    def _take_page(self, sequence: int) -> None:
        """A page for the last token, of the sequence alone."""
        pages = self.pages[sequence]
        place = (len(self.sequences[sequence]) - 1) // self.kv_block_size
        is_shared = place < len(pages) and sum(pages[place] in p for p in self.pages.values()) > 1
        if place == len(pages) or is_shared:
            pages[place:] = [object()]
        num_pages = len(set(itertools.chain(*self.pages.values())))
        self.most_pages = max(self.most_pages, num_pages)
        if self.num_blocks is not None and num_pages > self.num_blocks:
            raise CacheFull("the scheduler has promised too much")


def by_hash(text: list[int]) -> Tensor:
    """Any logits, but always the same ones for the same text."""
    return 4 * torch.randn(257, generator=torch.Generator().manual_seed(hash(tuple(text)) % 2**40))


def saying(*tokens: int, num_added: int = 0) -> Rule:
    """After a prompt of one token, these tokens and then the end of text."""

    def rule(text: list[int]) -> Tensor:
        logits = torch.zeros(257 + num_added)
        logits[(*tokens, EOS)[min(len(text) - 1, len(tokens))]] = 100.0
        return logits

    return rule


def endless(text: list[int]) -> Tensor:
    """The letter a, for ever."""
    logits = torch.zeros(257)
    logits[97] = 100.0
    return logits


def generator_of(rule: Rule, **options) -> Generator:
    names = ("max_seq_len", "kv_block_size", "num_blocks")
    decoder = RuleDecoder(rule, **{k: options.pop(k) for k in names if k in options})
    return Generator(decoder, ByteTokenizer(), **options)


def small_model(**options) -> GPT:
    config = {"vocab_size": 257, "max_seq_len": 64, "n_layer": 2, "n_head": 4, "n_embd": 24}
    model = GPT(GPTConfig(**config | options)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@contextmanager
def one_step_at_a_time(decoder: RuleDecoder) -> Iterator[Callable[[], None]]:
    """The decoder waits before each step until the function that this gives is called; at the end it runs freely."""
    decoder.permits = permits = Semaphore(0)
    try:
        yield permits.release
    finally:
        decoder.permits = None
        permits.release()
