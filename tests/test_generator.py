"""The generator: batching, stopping, streaming, scoring; on a decoder that is a rule, and on small models."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_decoder import (
    EOS,
    RuleDecoder,
    by_hash,
    endless,
    generator_of,
    one_step_at_a_time,
    saying,
    small_model,
)
from torch import Tensor

from leangpt import GPT, SamplingParams
from leangpt.data.tokenizer import BPETokenizer, ByteTokenizer
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.decoding.torch_decoder import TorchDecoder
from leangpt.generation.generator import Generator
from leangpt.generation.stop import StopText
from leangpt.kernels import decode, use_backend
from leangpt.pretrained import save_pretrained


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For such small models the threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


GREEDY = {"temperature": 0.0}
PROMPTS = ["a", "Once upon", "你好世界", "", "x" * 40, "🙂🙃", "Once upon"]


class TestTheSameText:
    """A text depends on the prompt, the parameters and the seed; on nothing else."""

    PARAMS = SamplingParams(max_new_tokens=16, temperature=1.0, seed=11)

    @pytest.fixture(
        params=[by_hash, small_model, lambda: small_model(position="rotary", norm="rms_norm")],
        ids=["rule", "gpt2", "rotary"],
    )
    def make(self, request) -> Callable[..., Generator]:
        """Makes generators of one model with these options."""
        if request.param is by_hash:
            return lambda **options: generator_of(by_hash, **options)
        model = request.param()
        return lambda **options: Generator(model, ByteTokenizer(), **options)

    def test_in_any_batch_and_order(self, make):
        alone = [make().generate(p, self.PARAMS)[0].token_ids for p in PROMPTS]
        assert alone[-1] == alone[1]  # the same prompt
        assert len(set(map(tuple, alone))) > 3  # prompts matter, though noise may outweigh some
        for max_batch_size, max_batch_tokens in ((1, 1), (2, 3), (3, 512), (32, 20), (32, 512)):
            generator = make(max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens)
            together = generator.generate(PROMPTS, self.PARAMS)
            assert [c.token_ids for c in together] == alone
            backwards = generator.generate(PROMPTS[::-1], self.PARAMS)
            assert [c.token_ids for c in backwards] == alone[::-1]
            assert [c.prompt_index for c in backwards] == list(range(len(PROMPTS)))

    def test_in_any_company(self, make):
        """Other parameters next to it, other lengths, other n."""
        alone = make().generate("Once upon", self.PARAMS)
        others = [
            SamplingParams(max_new_tokens=3, temperature=0.0),
            self.PARAMS,
            SamplingParams(max_new_tokens=9, top_k=3, n=3, repetition_penalty=1.5),
            SamplingParams(max_new_tokens=20, top_p=0.5, logprobs=2, presence_penalty=1.0),
        ]
        together = make(max_batch_size=3).generate(["a", "Once upon", "bc", "d"], others)
        assert next(c for c in together if c.prompt_index == 1).token_ids == alone[0].token_ids

    def test_in_a_stream(self, make):
        [completion] = make().generate("Once upon", self.PARAMS)
        assert "".join(make().stream("Once upon", self.PARAMS)) == completion.text

    def test_among_n(self, make):
        params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=4, n=5)
        five = make().generate(["Once upon", "b"], params)
        assert [(c.prompt_index, c.index) for c in five] == [
            (p, i) for p in (0, 1) for i in range(5)
        ]
        assert len({tuple(c.token_ids) for c in five}) == 10
        for n, batch in ((1, 32), (3, 2), (4, 1), (2, 32)):
            few = make(max_batch_size=batch, max_batch_tokens=5).generate(
                ["Once upon", "b"], SamplingParams(max_new_tokens=12, temperature=1.0, seed=4, n=n)
            )
            assert [c.token_ids for c in few] == [c.token_ids for c in five if c.index < n]

    def test_with_the_seed_that_was_drawn(self, make):
        params = SamplingParams(max_new_tokens=12, temperature=1.0)
        first, second = make().generate(["Once upon"] * 2, params)
        assert first.seed != second.seed
        assert first.token_ids != second.token_ids
        for completion in (first, second):
            again = make().generate(
                "Once upon",
                SamplingParams(max_new_tokens=12, temperature=1.0, seed=completion.seed),
            )
            assert again[0].token_ids == completion.token_ids
            assert again[0].seed == completion.seed

    def test_as_tokens_or_text(self, make):
        tokens = ByteTokenizer().encode("Once upon")
        expected = make().generate("Once upon", self.PARAMS)
        assert make().generate(tokens, self.PARAMS) == expected
        assert make().generate([tokens], self.PARAMS) == expected

    def test_longer_text_begins_with_the_shorter(self, make):
        [short] = make().generate("a", SamplingParams(max_new_tokens=5, seed=1, ignore_eos=True))
        [long] = make().generate("a", SamplingParams(max_new_tokens=15, seed=1, ignore_eos=True))
        assert long.token_ids[:5] == short.token_ids


def test_batched_logprobs_equal_those_of_the_full_forward():
    """Not only the tokens: the numbers behind them, through ragged batches and forks."""
    model = small_model(n_kv_head=2, position="rotary", qk_norm=True)
    generator = Generator(model, ByteTokenizer(), max_batch_size=3, max_batch_tokens=7)
    prompts = ["a", "Once upon", "你好"]
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, logprobs=3, n=2)
    for completion in generator.generate(prompts, params):
        prompt = ByteTokenizer().encode(prompts[completion.prompt_index])
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids[:-1]]))[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 :]
        chosen = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(completion.logprobs, dtype=torch.float64), chosen, rtol=0, atol=1e-12
        )
        for step, top in enumerate(completion.top_logprobs):
            assert list(top) == expected[step].topk(3).indices.tolist()


class TestScheduling:
    def test_drafts_join_as_others_finish(self):
        generator = generator_of(by_hash, max_batch_size=4)
        params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (9, 1, 2, 3, 3, 2, 1)]
        generator.generate([[65]] * 7, params)
        assert generator.decoder.most_sequences == 4
        assert generator.decoder.num_rows == [4, 4, 4, 4, 1, 1, 1, 1, 1]

    def test_prompts_are_read_in_pieces_beside_running_drafts(self):
        generator = generator_of(by_hash, max_batch_tokens=10)
        params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (5, 2)]
        generator.generate([[65], [66] * 30], params)
        assert generator.decoder.num_rows == [10, 10, 10, 4, 2]

    def test_a_prompt_of_several_completions_runs_once(self):
        generator = generator_of(by_hash)
        generator.generate([[65] * 50], SamplingParams(max_new_tokens=3, n=4, ignore_eos=True))
        assert generator.decoder.num_rows == [49, 4, 4, 4]

    @pytest.mark.parametrize("max_batch_size", [1, 2, 3, 32])
    def test_all_sequences_are_dropped(self, max_batch_size):
        generator = generator_of(by_hash, max_batch_size=max_batch_size)
        generator.generate(PROMPTS, SamplingParams(max_new_tokens=4, n=3))
        assert generator.decoder.sequences == {}
        assert (
            generator.decoder.most_sequences <= max_batch_size + 1
        )  # and the prompt that is forked

    @pytest.mark.parametrize("step", range(12))
    def test_an_interrupt_leaves_nothing_behind(self, step):
        generator = generator_of(by_hash, max_batch_size=3, max_batch_tokens=4)
        expected = generator.generate("Once upon", SamplingParams(max_new_tokens=4, seed=1))
        generator.decoder.fails_at_step = len(generator.decoder.num_rows) + step
        for work in (
            lambda: generator.generate(PROMPTS, SamplingParams(max_new_tokens=4, n=2)),
            lambda: list(generator.stream("x" * 50, SamplingParams(max_new_tokens=9))),
            lambda: generator.score(["x" * 30] * 4),
            lambda: generator.rank("x" * 30, ["y" * 30] * 2),
        ):
            generator.decoder.num_rows.clear()
            generator.decoder.fails_at_step = step
            with pytest.raises(KeyboardInterrupt):
                work()
            assert generator.decoder.sequences == {}
        generator.decoder.fails_at_step = None
        assert generator.generate("Once upon", SamplingParams(max_new_tokens=4, seed=1)) == expected

    def test_completions_are_told_as_they_finish(self):
        told = []
        params = [SamplingParams(max_new_tokens=n, ignore_eos=True, n=2) for n in (4, 1, 2)]
        returned = generator_of(by_hash).generate(
            ["a", "b", "c"], params, on_completion=told.append
        )
        assert [c.prompt_index for c in told] == [1, 1, 2, 2, 0, 0]
        assert sorted(told, key=lambda c: (c.prompt_index, c.index)) == returned

    def test_no_prompts(self):
        assert generator_of(by_hash).generate([]) == []


class TestEnd:
    def test_end_of_text(self):
        [completion] = generator_of(saying(*b"Hello")).generate("x", SamplingParams(**GREEDY))
        assert completion.text == "Hello"
        assert completion.token_ids == [*b"Hello", EOS]
        assert completion.finish_reason == "stop"

    def test_ignore_eos(self):
        params = SamplingParams(**GREEDY, ignore_eos=True, max_new_tokens=4)
        [completion] = generator_of(saying(*b"Hi")).generate("x", params)
        assert completion.token_ids == [*b"Hi", EOS, EOS]
        assert completion.text == "Hi<|endoftext|><|endoftext|>"
        assert completion.finish_reason == "length"

    def test_every_end_token_of_the_tokenizer(self):
        tokenizer = ByteTokenizer()
        tokenizer.eos_ids = (EOS, ord("l"))
        generator = Generator(RuleDecoder(saying(*b"Hello")), tokenizer)
        assert generator.generate("x", SamplingParams(**GREEDY))[0].text == "He"

    def test_stop_tokens(self):
        params = SamplingParams(**GREEDY, stop_token_ids=(ord("l"),), logprobs=0)
        [completion] = generator_of(saying(*b"Hello")).generate("x", params)
        assert (completion.text, completion.token_ids) == ("He", list(b"Hel"))
        assert completion.finish_reason == "stop"
        assert len(completion.logprobs) == 3 and completion.top_logprobs is None

    def test_max_new_tokens(self):
        params = SamplingParams(**GREEDY, max_new_tokens=4)
        [completion] = generator_of(saying(*b"Hello")).generate("x", params)
        assert (completion.text, completion.finish_reason) == ("Hell", "length")

    def test_until_the_context_is_full(self):
        generator = generator_of(saying(*b"a" * 99), max_seq_len=12)
        [completion] = generator.generate("x", SamplingParams(**GREEDY, max_new_tokens=None))
        assert (len(completion.token_ids), completion.finish_reason) == (11, "length")

    def test_the_context_of_a_model_can_be_filled(self):
        generator = Generator(small_model(), ByteTokenizer())
        params = SamplingParams(max_new_tokens=None, ignore_eos=True, seed=0)
        [completion] = generator.generate([1] * 10, params)
        assert len(completion.token_ids) == 54

    def test_half_a_character_at_the_end_is_shown_as_such(self):
        params = SamplingParams(**GREEDY, max_new_tokens=4)
        generator = generator_of(saying(*"é好".encode()))
        assert generator.generate("x", params)[0].text == "é\ufffd"
        assert list(generator.stream("x", params)) == ["é", "\ufffd"]

    @pytest.mark.parametrize(
        ("stop", "text"),
        [
            (("lo, w",), "hel"),
            (("lo, w", "l"), "he"),
            (("world",), "hello, "),
            (("h",), ""),
            (("xyz",), "hello, world"),
            (("ld!",), "hello, world"),
            (("lo, x", "o, w", "orl"), "hell"),
            (("hello, world",), ""),
        ],
    )
    def test_stop_strings_span_tokens(self, stop, text):
        params = SamplingParams(**GREEDY, stop=stop)
        generator = generator_of(saying(*b"hello, world"))
        [completion] = generator.generate("x", params)
        assert completion.text == text
        assert "".join(generator.stream("x", params)) == text
        assert completion.finish_reason == "stop"  # the end of text, where no string is found

    def test_a_stop_string_ends_the_work(self):
        generator = generator_of(saying(*b"hello, world"))
        [completion] = generator.generate("x", SamplingParams(**GREEDY, stop=("lo",)))
        assert completion.token_ids == list(b"hello")
        assert len(generator.decoder.num_rows) == 5

    def test_a_stop_string_is_not_looked_for_in_the_prompt(self):
        params = SamplingParams(**GREEDY, stop=("xh",))
        assert generator_of(saying(*b"hello")).generate("x", params)[0].text == "hello"

    def test_a_stop_string_inside_a_token(self):
        tokenizer = BPETokenizer([*ByteTokenizer().tokens, b"hello, world", b"!?"])
        decoder = RuleDecoder(saying(256, 257, num_added=2), vocab_size=259)
        generator = Generator(decoder, tokenizer)
        params = SamplingParams(**GREEDY, max_new_tokens=2, stop=("wor",))
        [completion] = generator.generate([1], params)
        assert (completion.text, completion.token_ids) == ("hello, ", [256])
        params = SamplingParams(**GREEDY, max_new_tokens=2, stop=("d!",))
        assert generator.generate([1], params)[0].text == "hello, worl"

    def test_a_stop_string_in_what_the_detokenizer_held(self):
        """Its last piece comes when there are no more tokens: it must not pass unseen."""
        params = SamplingParams(**GREEDY, max_new_tokens=3, stop=("\ufffd",))
        [completion] = generator_of(saying(*"é好".encode())).generate("x", params)
        assert (completion.text, completion.finish_reason) == ("é", "stop")


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


class TestStopText:
    @settings(deadline=None)
    @given(text=st.text("abc", max_size=30), stop=STOPS, data=st.data())
    def test_it_cuts_at_the_first_complete_one_however_the_text_is_cut(self, text, stop, data):
        stop_text = StopText(stop)
        pieces, rest, shown = [], text, ""
        while rest:
            size = data.draw(st.integers(1, 5))
            pieces.append(rest[:size])
            rest = rest[size:]
        for piece in pieces:
            shown += stop_text.push(piece)
            assert text.startswith(shown)
        shown += stop_text.flush()

        for end in range(
            len(text) + 1
        ):  # the definition: the shortest text that ends with a stop string
            found = [s for s in stop if text[:end].endswith(s)]
            if found:
                assert stop_text.is_stopped
                assert shown == text[: end - max(map(len, found))]
                return
        assert not stop_text.is_stopped
        assert shown == text

    @settings(deadline=None)
    @given(text=st.text("abc", max_size=20), stop=STOPS)
    def test_it_shows_what_cannot_become_a_stop_string_at_once(self, text, stop):
        stop_text = StopText(stop)
        shown = ""
        for i, character in enumerate(text):
            shown += stop_text.push(character)
            if stop_text.is_stopped:
                return
            held = text[len(shown) : i + 1]
            assert not held or any(s.startswith(held) for s in stop)


class TestStream:
    @settings(deadline=None, max_examples=50)
    @given(text=st.text(max_size=12), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2))
    def test_it_never_shows_half_a_character_or_a_stop_string(self, text, stop):
        tokens = text.encode()
        generator = generator_of(saying(*tokens))
        params = SamplingParams(**GREEDY, max_new_tokens=200, stop=tuple(stop))
        shown = ""
        for piece in generator.stream([1], params):
            assert piece
            shown += piece
            assert text.startswith(shown)  # half a character would be U+FFFD
            assert not any(s in shown for s in stop)
        assert shown == generator.generate([1], params)[0].text
        if not stop:
            assert shown == text

    def test_characters_of_several_tokens_come_whole(self):
        pieces = generator_of(saying(*"你好🙂e\u0301".encode())).stream(
            "x", SamplingParams(**GREEDY)
        )
        assert list(pieces) == ["你", "好", "🙂", "e", "\u0301"]

    def test_text_comes_while_it_is_drawn(self):
        generator = generator_of(saying(*b"abc"))
        with one_step_at_a_time(generator.decoder) as allow_step:
            pieces = generator.stream("x", SamplingParams(**GREEDY))
            for i in range(3):
                allow_step()
                assert next(pieces) == "abc"[i]
                assert len(generator.decoder.num_rows) == i + 1

    def test_closing_it_ends_the_work(self):
        generator = generator_of(endless, max_seq_len=sys.maxsize)
        params = SamplingParams(**GREEDY, max_new_tokens=None)
        pieces = generator.stream("x", params)
        next(pieces)
        assert len(generator.decoder.sequences) == 1
        pieces.close()
        assert generator.decoder.sequences == {}
        for _ in generator.stream("x", params):
            break
        assert generator.decoder.sequences == {}

    def test_several_streams_at_once_and_work_between(self):
        model = small_model()
        params = [SamplingParams(max_new_tokens=20, seed=i, ignore_eos=True) for i in range(3)]
        expected = ["".join(Generator(model, ByteTokenizer()).stream("ab", p)) for p in params]
        generator = Generator(model, ByteTokenizer())
        streams = [generator.stream("ab", p) for p in params]
        shown = ["", "", ""]
        for round_ in itertools.zip_longest(*streams, fillvalue=""):
            for i, piece in enumerate(round_):
                shown[i] += piece
            generator.score("in between")
        assert shown == expected

    def test_wrong_arguments_raise_at_the_call(self):
        generator = generator_of(by_hash, max_seq_len=20)
        with pytest.raises(ValueError, match="one completion, got n=2"):
            generator.stream("x", SamplingParams(n=2))
        with pytest.raises(ValueError, match="max_new_tokens"):
            generator.stream("x", SamplingParams(max_new_tokens=99))
        with pytest.raises(ValueError, match="tokenizer"):
            Generator(RuleDecoder(by_hash)).stream([1])


class TestPrompts:
    class WithBos(ByteTokenizer):
        bos_id = 7

    def prompt_seen(self, prompt, tokenizer=None, max_seq_len=1000, **options) -> list[int]:
        """What the decoder read before it drew the one token."""
        seen = []

        def rule(text: list[int]) -> Tensor:
            seen[:] = text
            return torch.zeros(257)

        generator = Generator(RuleDecoder(rule, max_seq_len), tokenizer or ByteTokenizer())
        params = SamplingParams(max_new_tokens=options.pop("max_new_tokens", 1))
        generator.generate([prompt], params, **options)
        return seen

    def test_bos_comes_before_text_and_not_before_tokens(self):
        assert self.prompt_seen("ab") == [97, 98]
        assert self.prompt_seen("ab", self.WithBos()) == [7, 97, 98]
        assert self.prompt_seen([97, 98], self.WithBos()) == [97, 98]

    def test_an_empty_prompt_starts_a_text(self):
        for empty in ("", []):
            assert self.prompt_seen(empty) == [EOS]
            assert self.prompt_seen(empty, self.WithBos()) == [7]

    def test_an_empty_prompt_without_a_token_to_start_from(self):
        tokenizer = ByteTokenizer()
        tokenizer.eos_id = None
        with pytest.raises(ValueError, match="prompt is empty"):
            Generator(RuleDecoder(by_hash), tokenizer).generate("")
        with pytest.raises(ValueError, match="prompt is empty"):
            Generator(RuleDecoder(by_hash)).generate([[]])

    def test_special_tokens_in_a_prompt_are_text(self):
        assert self.prompt_seen("<|endoftext|>") == list(b"<|endoftext|>")

    def test_too_long_is_an_error_that_tells_the_numbers(self):
        generator = generator_of(by_hash, max_seq_len=20)
        with pytest.raises(ValueError, match=r"prompt 1 has 11 tokens, and 10 .* 20.*truncate"):
            generator.generate(["a", "b" * 11], SamplingParams(max_new_tokens=10))
        with pytest.raises(ValueError, match="prompt 0 has 20 tokens, and 1 "):
            generator.generate("b" * 20, SamplingParams(max_new_tokens=None))
        generator.generate("b" * 10, SamplingParams(max_new_tokens=10))

    def test_truncated_on_the_left(self):
        text = "abcdefghijklmnopqrstuvwxyz"
        limits = {"max_seq_len": 20, "overflow": "truncate"}
        assert self.prompt_seen(text, **limits) == list(text.encode())[-19:]
        assert self.prompt_seen(text, max_new_tokens=None, **limits) == list(text.encode())[-19:]
        seen = self.prompt_seen(text, self.WithBos(), **limits)
        assert seen == [7, *text.encode()[-18:]]
        assert self.prompt_seen("abc", self.WithBos(), **limits) == [7, *b"abc"]
        generator = generator_of(by_hash, max_seq_len=20)
        params = SamplingParams(max_new_tokens=19, ignore_eos=True)
        [completion] = generator.generate("abcde", params, overflow="truncate")
        assert len(completion.token_ids) == 19

    @pytest.mark.parametrize("overflow", ["error", "truncate"])
    def test_more_new_tokens_than_the_context_has(self, overflow):
        with pytest.raises(ValueError, match="less than the model's context of 20 tokens, got 20"):
            generator_of(by_hash, max_seq_len=20).generate(
                "a", SamplingParams(max_new_tokens=20), overflow=overflow
            )

    def test_tokens_that_the_model_does_not_have(self):
        for bad in (257, -1):
            with pytest.raises(ValueError, match=rf"\[0, 257\), got {bad}"):
                generator_of(by_hash).generate([[1, bad]])
        with pytest.raises(ValueError, match="stop_token_ids.*got 300"):
            generator_of(by_hash).generate("a", SamplingParams(stop_token_ids=(300,)))

    def test_what_is_not_a_prompt(self):
        generator = generator_of(by_hash)
        for wrong in (5, None, torch.tensor([1, 2]), [1.5], [None], [["a"]], {"a": 1}):
            with pytest.raises(TypeError, match="prompt"):
                generator.generate(wrong)

    def test_text_needs_a_tokenizer(self):
        generator = Generator(RuleDecoder(by_hash))
        with pytest.raises(ValueError, match="text needs a tokenizer"):
            generator.generate("a")
        with pytest.raises(ValueError, match="stop string needs a tokenizer"):
            generator.generate([1], SamplingParams(stop=("a",)))
        [completion] = generator.generate([1], SamplingParams(max_new_tokens=3))
        assert completion.text == "" and len(completion.token_ids) == 3

    def test_other_errors(self):
        generator = generator_of(by_hash)
        with pytest.raises(ValueError, match="overflow must be one of"):
            generator.generate("a", overflow="slide")
        with pytest.raises(ValueError, match="one params for all, or 2: got 3"):
            generator.generate(["a", "b"], [SamplingParams()] * 3)
        for option in ("max_batch_size", "max_batch_tokens"):
            with pytest.raises(ValueError, match=f"{option} must be positive"):
                Generator(RuleDecoder(by_hash), **{option: 0})


def reference_logprobs(model: GPT, tokens: Sequence[int]) -> list[float]:
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
    return [logprobs[i, token].item() for i, token in enumerate(tokens[1:])]


class TestScore:
    TEXTS = ("Once upon a time", "", "a", "你好", "x" * 64, "Once", "z" * 30)

    @pytest.mark.parametrize(("max_batch_size", "max_batch_tokens"), [(32, 512), (2, 5), (1, 1)])
    def test_it_equals_the_full_forward(self, max_batch_size, max_batch_tokens):
        model = small_model()
        generator = Generator(
            model,
            ByteTokenizer(),
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
        )
        scores = generator.score(self.TEXTS)
        assert [s.token_ids for s in scores] == [list(t.encode()) for t in self.TEXTS]
        for score in scores:
            expected = reference_logprobs(model, score.token_ids) if score.token_ids else []
            assert score.logprobs[:1] == [None] * bool(score.token_ids)
            assert score.logprobs[1:] == pytest.approx(expected, abs=1e-11)
        mean = sum(scores[0].logprobs[1:]) / 15
        assert scores[0].total_logprob == pytest.approx(15 * mean)
        assert scores[0].perplexity == pytest.approx(2.718281828459045**-mean)
        assert scores[1].total_logprob == 0 and scores[1].perplexity != scores[1].perplexity
        assert generator.decoder._sequences == {}

    def test_with_a_bos_token_every_token_has_one(self):
        model = small_model()
        generator = Generator(model, TestPrompts.WithBos())
        [score] = generator.score("Once")
        assert score.token_ids == list(b"Once")
        assert score.logprobs == pytest.approx(reference_logprobs(model, [7, *b"Once"]), abs=1e-11)

    def test_tokens(self):
        generator = Generator(small_model())
        assert len(generator.score([1, 2, 3])) == 1
        assert [len(s.logprobs) for s in generator.score([[1, 2, 3], [4, 5]])] == [3, 2]

    def test_too_long(self):
        with pytest.raises(ValueError, match="text 1 has 65 tokens, the model's context only 64"):
            Generator(small_model(), ByteTokenizer()).score(["a", "b" * 65])


class TestRank:
    @pytest.mark.parametrize(("max_batch_size", "max_batch_tokens"), [(32, 512), (2, 3), (1, 1)])
    def test_it_equals_the_full_forward(self, max_batch_size, max_batch_tokens):
        model = small_model(position="rotary")
        generator = Generator(
            model,
            ByteTokenizer(),
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
        )
        candidates = [" blue", " green", "!", " a long one, which is less probable", " 蓝"]
        ranked = generator.rank("The sky is", candidates)
        assert sorted(r.index for r in ranked) == [0, 1, 2, 3, 4]
        for r in ranked:
            assert r.candidate == candidates[r.index]
            assert r.token_ids == list(r.candidate.encode())
            full = reference_logprobs(model, [*b"The sky is", *r.token_ids])[9:]
            assert r.logprobs == pytest.approx(full, abs=1e-11)
            assert r.total_logprob == pytest.approx(sum(full))
            assert r.mean_logprob == pytest.approx(sum(full) / len(full))
        totals = [r.total_logprob for r in ranked]
        assert totals == sorted(totals, reverse=True)
        assert generator.decoder._sequences == {}

    def test_the_context_runs_once(self):
        generator = generator_of(by_hash)
        generator.rank("x" * 100, ["ab", "cde", "f"])
        assert generator.decoder.num_rows == [99, 2 + 3 + 1]

    def test_equals_keep_their_order(self):
        ranked = generator_of(by_hash).rank("x", ["b", "a", "b"])
        assert [r.index for r in ranked if r.candidate == "b"] == [0, 2]

    def test_an_empty_context_starts_a_text(self):
        model = small_model()
        generator = Generator(model, ByteTokenizer())
        [ranked] = generator.rank("", ["ab"])
        assert ranked.logprobs == pytest.approx(reference_logprobs(model, [EOS, *b"ab"]), abs=1e-11)

    def test_no_bos_between_context_and_candidate(self):
        generator = Generator(small_model(), TestPrompts.WithBos())
        assert generator.rank("a", ["b"])[0].token_ids == [98]

    def test_errors(self):
        generator = Generator(small_model(), ByteTokenizer())
        with pytest.raises(ValueError, match="candidate 1 is empty"):
            generator.rank("a", ["b", ""])
        with pytest.raises(ValueError, match="context with candidate 0 has 65 tokens"):
            generator.rank("a" * 60, ["b" * 5])
        assert generator.rank("a", []) == []


class TestFromPretrained:
    def test_a_folder_of_the_project(self, tmp_path):
        model = small_model()
        save_pretrained(model, tmp_path, ByteTokenizer(), format="native")
        generator = Generator.from_pretrained(str(tmp_path), dtype="float64")
        params = SamplingParams(max_new_tokens=9, seed=1)
        expected = Generator(model, ByteTokenizer()).generate("Once", params)
        assert generator.generate("Once", params) == expected
        assert generator.chat_template is None

    def test_a_folder_of_hugging_face_with_a_chat_template(self, tmp_path):
        tokenizer = BPETokenizer(ByteTokenizer().tokens)
        save_pretrained(small_model(), tmp_path, tokenizer, format="hf")
        (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
        generator = Generator.from_pretrained(str(tmp_path))
        params = SamplingParams(max_new_tokens=9, seed=1)
        answer = generator.chat([{"role": "user", "content": "Once"}], params)
        assert [answer] == generator.generate("Once", params)

    def test_without_a_tokenizer(self, tmp_path):
        save_pretrained(small_model(), tmp_path, format="native")
        with pytest.raises(FileNotFoundError, match="no tokenizer"):
            Generator.from_pretrained(str(tmp_path))


class TestDecoderChoice:
    @pytest.fixture
    def native(self, in_ci):
        if decode.unavailable_reason:
            assert not in_ci, f"CI must test the engine: {decode.unavailable_reason}"
            pytest.skip(decode.unavailable_reason)

    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize(
        ("dtype", "format"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")], ids=str
    )
    def test_native_on_a_cpu_in_the_dtype_of_the_weights(self, dtype, format):
        decoder = Generator(small_model().to(dtype)).decoder
        assert isinstance(decoder, NativeDecoder)
        assert decoder.packed.format.kind == format

    @pytest.mark.usefixtures("native")
    def test_a_format_and_a_cache(self, tmp_path):
        save_pretrained(small_model().float(), tmp_path, ByteTokenizer(), format="native")
        options = {"format": "int8", "num_blocks": 7, "device": "auto", "max_batch_size": 3}
        generator = Generator.from_pretrained(str(tmp_path), **options)
        assert generator.decoder.packed.format.kind == "int8"
        assert generator.decoder.num_blocks == 7
        with pytest.raises(ValueError, match="int7"):
            Generator.from_pretrained(str(tmp_path), format="int7")

    def test_torch_where_the_reference_is_asked_for(self):
        with use_backend("reference"):
            assert isinstance(Generator(small_model().float()).decoder, TorchDecoder)

    def test_torch_for_what_the_native_one_does_not_know(self):
        for dtype in (torch.float64, torch.float16):
            assert isinstance(Generator(small_model().to(dtype)).decoder, TorchDecoder)

    @pytest.mark.parametrize("option", [{"format": "int8"}, {"num_blocks": 9}], ids=str)
    def test_what_torch_does_not_know(self, tmp_path, option):
        save_pretrained(small_model(), tmp_path, ByteTokenizer(), format="native")
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* needs the native decoder"):
            Generator.from_pretrained(str(tmp_path), dtype="float64", **option)

    @pytest.mark.usefixtures("native")
    @pytest.mark.parametrize("speculate", [0, 5])
    def test_native_gives_the_same_bits_in_any_company(self, speculate):
        """Text and numbers, with a cache that all but one request at a time overflow."""
        model = small_model(position="rotary", n_kv_head=2).float()
        params = [
            SamplingParams(max_new_tokens=24, temperature=t, seed=s, logprobs=3, n=2)
            for s, t in enumerate((0.0, 0.4, 0.8, 1.0, 0.4, 0.7, 0.2))
        ]
        generator = Generator(model, ByteTokenizer())
        alone = [generator.generate(p, q) for p, q in zip(PROMPTS, params, strict=True)]
        decoder = NativeDecoder.from_model(model, num_blocks=8)
        crowded = Generator(decoder, ByteTokenizer(), max_batch_tokens=9, speculate=speculate)
        together = crowded.generate(PROMPTS, params)
        for i, completions in enumerate(alone):
            expected = [dataclasses.replace(c, prompt_index=i) for c in completions]
            assert [c for c in together if c.prompt_index == i] == expected
        assert decoder.num_free_blocks == 8
