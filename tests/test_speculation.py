"""Guessing ahead changes how many steps a text takes, and nothing else."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_decoder import Rule, RuleDecoder, by_hash, generator_of, saying, small_model
from torch import Tensor

from leangpt import Completion, Generator, SamplingParams
from leangpt.data.tokenizer import ByteTokenizer
from leangpt.generation.speculation import PromptLookup

SONG = b"the cat sat on the mat, the cat sat on the hat, the cat sat on the mat."


def definition(tokens: Sequence[int], count: int) -> list[int]:
    """What followed the latest earlier occurrence of the last three tokens, else of the last two; periods go on."""
    for n in (3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                longer = list(tokens)
                for i in range(count):
                    longer.append(longer[end + i])
                return longer[len(tokens) :]
    return []


class TestPromptLookup:
    @settings(deadline=None)
    @given(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40),
        start=st.integers(1, 40),
        count=st.integers(1, 6),
    )
    def test_it_guesses_by_the_definition_while_the_text_grows(self, tokens, start, count):
        lookup = PromptLookup(count)
        for length in range(start, len(tokens) + 1):
            assert lookup.guess(tokens[:length], 99) == definition(tokens[:length], count)

    def test_the_limit(self):
        lookup = PromptLookup(8)
        tokens = [1, 2, 3, 4, 5, 1, 2]
        assert lookup.guess(tokens, 2) == [3, 4]
        assert lookup.guess(tokens, 0) == []

    def test_it_guesses_as_many_as_were_right_lately(self):
        lookup = PromptLookup(8)
        tokens = [*range(10), *range(3)]

        def count() -> int:
            return len(lookup.guess(tokens, 99))

        assert count() == 8
        lookup.learn(8, 2)
        assert count() == 3
        lookup.learn(3, 3)
        assert count() == 6
        lookup.learn(2, 2)  # where the limit was lower
        assert count() == 6
        lookup.learn(6, 6)
        assert count() == 8

    def test_it_rests_after_useless_steps(self):
        lookup = PromptLookup(4)
        tokens = [*range(10), *range(3)]
        pauses = []
        for _ in range(20):
            lookup.learn(1, 0)
            pauses.append(0)
            while not lookup.guess(tokens, 99):
                pauses[-1] += 1
        assert pauses == [*range(17), 16, 16, 16]
        lookup.learn(1, 1)
        assert len(lookup.guess(tokens, 99)) == 2


def both(
    rule: Rule, prompts, params, speculate: int = 5, **options
) -> tuple[list[Completion], Generator, Generator]:
    """The completions, with guesses and without, which must be equal; and both generators."""
    plain = generator_of(rule, **options)
    guessing = generator_of(rule, speculate=speculate, **options)
    expected = plain.generate(prompts, params)
    assert guessing.generate(prompts, params) == expected
    assert guessing.decoder.sequences == {}
    return expected, guessing, plain


def periodic(period: int) -> Rule:
    """Says again what it said `period` tokens before, or, now and then, something else."""

    def rule(text: list[int]) -> Tensor:
        logits = by_hash(text)
        if len(text) % 7:
            logits[text[-period] if len(text) >= period else 65] += 9
        return logits

    return rule


class TestTheSameText:
    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def test_whatever_is_asked_for(self, data):
        prompts = data.draw(
            st.lists(st.text("ab ", min_size=1, max_size=9), min_size=1, max_size=4)
        )
        params = [
            SamplingParams(
                max_new_tokens=data.draw(st.integers(1, 30)),
                temperature=data.draw(st.sampled_from((0.0, 0.7, 1.5))),
                top_k=data.draw(st.sampled_from((None, 5))),
                top_p=data.draw(st.sampled_from((1.0, 0.8))),
                repetition_penalty=data.draw(st.sampled_from((1.0, 1.3))),
                presence_penalty=data.draw(st.sampled_from((0.0, 2.0))),
                stop=data.draw(st.sampled_from(((), ("ab",), ("b a", "q")))),
                stop_token_ids=data.draw(st.sampled_from(((), (97,)))),
                ignore_eos=data.draw(st.booleans()),
                seed=data.draw(st.integers(0, 2**64 - 1)),
                logprobs=data.draw(st.sampled_from((None, 0, 3))),
                n=data.draw(st.integers(1, 3)),
            )
            for _ in prompts
        ]
        both(
            periodic(data.draw(st.integers(1, 5))),
            prompts,
            params,
            speculate=data.draw(st.integers(1, 9)),
            max_batch_size=data.draw(st.integers(1, 4)),
            max_batch_tokens=data.draw(st.integers(1, 20)),
            kv_block_size=data.draw(st.integers(1, 4)),
        )

    @pytest.mark.parametrize("options", [{}, {"position": "rotary", "n_kv_head": 2}], ids=str)
    def test_of_a_model(self, options):
        """In float64: there the logits of a batch are those of one token up to what decides nothing."""
        model = small_model(**options)
        prompts = ["abcabcab", "Once upon", "你好你好你", "x" * 30]
        generators = [
            Generator(model, ByteTokenizer(), speculate=speculate, max_batch_tokens=19)
            for speculate in (0, 6)
        ]
        for seed in range(12):
            params = [
                SamplingParams(
                    max_new_tokens=24,
                    temperature=temperature,
                    seed=seed,
                    logprobs=2,
                    n=1 + seed % 3,
                    repetition_penalty=penalty,
                    stop=("ab",),
                )
                for temperature, penalty in ((0.0, 1.0), (0.3, 1.0), (0.8, 1.2), (1.0, 0.7))
            ]
            plain, guessed = (generator.generate(prompts, params) for generator in generators)
            for a, b in zip(plain, guessed, strict=True):
                assert (a.token_ids, a.text, a.finish_reason) == (
                    b.token_ids,
                    b.text,
                    b.finish_reason,
                )
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-10)
                assert [list(top) for top in a.top_logprobs] == [list(t) for t in b.top_logprobs]
        assert generators[1].decoder._sequences == {}

    def test_in_a_stream(self):
        params = SamplingParams(max_new_tokens=60, seed=2, ignore_eos=True)
        plain = list(generator_of(periodic(3)).stream("abab", params))
        guessed = list(generator_of(periodic(3), speculate=4).stream("abab", params))
        assert guessed == plain

    def test_until_the_context_is_full(self):
        params = SamplingParams(max_new_tokens=None, seed=2, ignore_eos=True)
        [completion], *_ = both(periodic(2), ["abab"], params, max_seq_len=40)
        assert len(completion.token_ids) == 36


class TestSteps:
    def test_a_repetition_takes_fewer(self):
        params = SamplingParams(temperature=0.0, seed=0, max_new_tokens=len(SONG))
        [completion], guessing, plain = both(saying(*SONG), [[1]], params, speculate=8)
        assert completion.token_ids == list(SONG)
        assert len(plain.decoder.num_rows) == len(SONG)
        assert len(guessing.decoder.num_rows) < 0.7 * len(SONG)

    def test_a_text_without_repetition_takes_no_more_rows(self):
        params = SamplingParams(temperature=0.0, seed=0, max_new_tokens=30)
        _, guessing, plain = both(saying(*range(65, 95)), [[1]], params)
        assert guessing.decoder.num_rows == plain.decoder.num_rows

    @pytest.mark.parametrize("max_batch_tokens", [3, 4, 7])
    def test_guesses_take_only_the_room_that_is_left(self, max_batch_tokens):
        params = SamplingParams(temperature=0.0, seed=0, max_new_tokens=40, ignore_eos=True)
        _, guessing, plain = both(
            periodic(1), [[65]] * 3, params, max_batch_tokens=max_batch_tokens
        )
        assert max(guessing.decoder.num_rows) == max_batch_tokens
        assert len(guessing.decoder.num_rows) <= len(plain.decoder.num_rows)
        if max_batch_tokens == 3:  # none
            assert guessing.decoder.num_rows == plain.decoder.num_rows

    def test_no_more_than_can_be_drawn_are_guessed(self):
        seen = []

        class Watched(RuleDecoder):
            def sample(self, tokens, sequences, positions, output_rows, rows):
                seen.extend(positions)
                return super().sample(tokens, sequences, positions, output_rows, rows)

        generator = Generator(Watched(periodic(1)), ByteTokenizer(), speculate=9)
        params = SamplingParams(temperature=0.0, seed=0, max_new_tokens=12, ignore_eos=True)
        generator.generate([[65] * 5], params)
        assert max(seen) == 5 + 12 - 2  # the last token that is drawn is never appended

    def test_it_must_not_be_negative(self):
        with pytest.raises(ValueError, match="speculate must be at least 0, got -1"):
            generator_of(by_hash, speculate=-1)
