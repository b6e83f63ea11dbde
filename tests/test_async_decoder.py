"""Steps that start before the draws of the one before are read: the same texts, and the device is never waited for without need."""

from collections.abc import Callable

import pytest
from rule_decoder import RuleDecoder, by_hash, generator_of, one_step_at_a_time, saying

from leangpt import Generator, SamplingParams
from leangpt.data.tokenizer import ByteTokenizer
from leangpt.decoding.decoder import AsyncDecoder, CacheFull
from leangpt.decoding.sampling import Draw


class AsyncRuleDecoder(RuleDecoder):
    """A decoder whose steps are read later; it notes when they start and are read."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.events: list[str] = []
        self.last: list[Draw] = []
        self.num_kept = 0
        self.fails_at_read: int | None = None

    def start_sample(
        self, tokens, sequences, positions, output_rows, rows
    ) -> Callable[[], list[Draw]]:
        assert self.num_kept < 2
        number = self.events.count("start") + self.events.count("ahead")
        self.events.append("ahead" if self.num_kept else "start")
        known = [token if token >= 0 else self.last[-1 - token].token for token in tokens]
        draws = self.last = super().sample(known, sequences, positions, output_rows, rows)
        self.num_kept += 1

        def read() -> list[Draw]:
            self.num_kept -= 1
            self.events.append("read")
            if number == self.fails_at_read:
                raise RuntimeError("the logits are NaN")
            return draws

        return read

    def sample(self, *_) -> list[Draw]:
        raise AssertionError("steps are started, and read")


def generator(rule, options=(), **of_decoder) -> Generator:
    return Generator(AsyncRuleDecoder(rule, **of_decoder), ByteTokenizer(), **dict(options))


def test_it_is_known_by_its_protocol():
    assert isinstance(AsyncRuleDecoder(by_hash), AsyncDecoder)
    assert not isinstance(RuleDecoder(by_hash), AsyncDecoder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_size": 2},
        {"max_batch_tokens": 3},
        {"speculate": 3},
        {"max_batch_size": 5, "max_batch_tokens": 7},
    ],
    ids=str,
)
def test_the_same_completions(options):
    """Of prompts that end in every way, and with drafts that must know their text among them."""
    params = [
        SamplingParams(max_new_tokens=1 + i, temperature=0.9, seed=i, n=1 + i % 3, logprobs=i % 2)
        for i in range(7)
    ]
    params += [
        SamplingParams(max_new_tokens=9, seed=1, stop=("e", "xy")),
        SamplingParams(max_new_tokens=12, seed=2, stop_token_ids=(97, 101, *range(128, 256))),
        SamplingParams(max_new_tokens=5, seed=3, repetition_penalty=1.5),
        SamplingParams(max_new_tokens=5, seed=4, presence_penalty=0.5, n=2),
        SamplingParams(max_new_tokens=None, seed=5, ignore_eos=True),  # until the context is full
    ]
    prompts = [chr(97 + i) * (1 + 2 * i % 5) for i in range(len(params))]
    limits = {"max_seq_len": 40, "num_blocks": 60}
    expected = generator_of(by_hash, **limits, **options).generate(prompts, params)
    mine = generator(by_hash, options, **limits)
    assert mine.generate(prompts, params) == expected
    again = mine.generate(prompts[::-1], params[::-1])
    assert sorted(c.token_ids for c in again) == sorted(c.token_ids for c in expected)
    decoder = mine.decoder
    assert not decoder.sequences and decoder.num_kept == 0
    assert ("ahead" in decoder.events) == ("speculate" not in options)


def test_every_step_starts_before_the_one_before_is_read():
    mine = generator(saying(*b"abcdef"))
    assert mine.generate("x")[0].text == "abcdef"
    # the last one drew what comes after the end
    assert mine.decoder.events == ["start", *["ahead", "read"] * 7, "read"]


def test_a_token_is_not_drawn_beyond_the_wanted_number():
    mine = generator(saying(*b"abcdef"))
    assert mine.generate("x", SamplingParams(max_new_tokens=3))[0].token_ids == [*b"abc"]
    assert mine.decoder.events == ["start", "ahead", "read", "ahead", "read", "read"]


def test_penalties_need_the_text():
    mine = generator(by_hash)
    mine.generate("x", SamplingParams(max_new_tokens=3, seed=1, presence_penalty=1.0))
    assert mine.decoder.events == ["start", "read"] * 3


def test_a_failure_that_shows_at_the_reading_ends_the_jobs_of_that_step():
    mine = generator(by_hash)
    mine.decoder.fails_at_read = 2
    with pytest.raises(RuntimeError, match="NaN"):
        mine.generate(["a", "b"], SamplingParams(max_new_tokens=9, seed=1, ignore_eos=True))
    assert not mine.decoder.sequences
    params = SamplingParams(max_new_tokens=9, seed=1)
    assert mine.generate("c", params) == generator_of(by_hash).generate("c", params)
    assert mine.decoder.num_kept == 0


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_failure_that_shows_at_the_start_ends_them_too(step):
    mine = generator(by_hash)
    mine.decoder.fails_at_step, mine.decoder.error = step, CacheFull
    with pytest.raises(CacheFull):
        mine.generate(["a", "b"], SamplingParams(max_new_tokens=9, seed=1, ignore_eos=True))
    assert not mine.decoder.sequences
    params = SamplingParams(max_new_tokens=9, seed=1)
    assert mine.generate("c", params) == generator_of(by_hash).generate("c", params)
    assert mine.decoder.num_kept == 0


def test_what_is_cancelled_while_a_step_is_on_its_way():
    mine = generator(by_hash)
    params = SamplingParams(max_new_tokens=9, seed=1, ignore_eos=True)
    with one_step_at_a_time(mine.decoder) as permit:
        handles = [mine.submit(text, params) for text in "ab"]
        for _ in range(3):
            permit()
        handles[0].cancel()
    [expected] = generator_of(by_hash).generate("b", params)
    assert handles[1].result()[0].token_ids == expected.token_ids
    mine.close()
    assert not mine.decoder.sequences and mine.decoder.num_kept == 0


def test_scores_between_steps():
    mine = generator(by_hash)
    handle = mine.submit("a", SamplingParams(max_new_tokens=30, seed=1, ignore_eos=True))
    assert mine.score("hello") == generator_of(by_hash).score("hello")
    assert len(handle.result()[0].token_ids) == 30
