"""The native decoder: what the torch model says, with the same bits in whatever company and pieces its tokens come."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from native_helpers import (
    FORMATS,
    LLAMA,
    append,
    dequantized,
    have_same_bits,
    logits_of,
    make_model,
    multiplies_bf16,
    one_by_one,
    text_of,
    whole,
)

from leangpt import Generator, RopeScaling, SamplingParams
from leangpt.decoding.decoder import CacheFull
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.decoding.sampling import RowSampling
from leangpt.kernels import decode, reference

pytestmark = pytest.mark.usefixtures("native_engine")

GREEDY = RowSampling(0.0, 0, 1.0, 0.0, 0, 0, 0, 1.0, 0.0, (), (), 1 << 30, None)

LONG = {"max_seq_len": 700, "n_layer": 1}
CONFIGS = {
    "gpt2": {"n_head": 4, "n_embd": 64},
    "llama": {"n_head": 4, "n_embd": 64, **LLAMA},
    "one head of 40": {"n_head": 1, "n_embd": 40},
    "5 heads of 16": {"n_head": 5, "n_embd": 80, "activation": "gelu"},
    "12 heads of 80": {"n_head": 12, "n_embd": 48, "head_dim": 80, **LLAMA},
    "odd widths": {"n_head": 3, "n_embd": 51, "n_inner": 77, "vocab_size": 131},
    "odd gated width": {"n_head": 3, "n_embd": 30, **LLAMA, "n_inner": 37, "bias": True},
    "head_dim 2": {"n_head": 3, "n_embd": 6, **LLAMA, "qk_norm": True},
    "one key head": {"n_head": 12, "n_embd": 96, "n_kv_head": 1, **LLAMA},
    "grouped heads": {"n_head": 12, "n_embd": 96, "n_kv_head": 4, **LLAMA},
    "sliding window": {"n_head": 2, "n_embd": 32, "sliding_window": 5, **LLAMA},
    "window of learned positions": {"n_head": 2, "n_embd": 32, "sliding_window": 1},
    "qk norm": {
        "n_head": 4,
        "n_embd": 64,
        "n_kv_head": 2,
        **LLAMA,
        "qk_norm": True,
        "qkv_bias": True,
    },
    "value residual": {"n_head": 6, "n_embd": 60, "n_kv_head": 3, **LLAMA, "value_residual": True},
    "explicit head_dim": {"n_head": 3, "n_embd": 50, "head_dim": 24, **LLAMA},
    "untied head": {"n_head": 2, "n_embd": 32, "tie_embeddings": False},
    "relu2 without bias": {"n_head": 2, "n_embd": 32, "activation": "relu2", "bias": False},
    "layer norm, rotary": {"n_head": 2, "n_embd": 32, **LLAMA, "norm": "layer_norm"},
    "rms norm, learned": {"n_head": 2, "n_embd": 32, "norm": "rms_norm"},
    "linear rope": {"n_head": 2, "n_embd": 64, **LLAMA, "rope_scaling": RopeScaling("linear", 3.0)},
    "llama3 rope": {
        **{"n_head": 2, "n_embd": 64, **LLAMA},
        "rope_scaling": RopeScaling("llama3", 8.0, original_max_seq_len=32),
    },
    "yarn": {
        **{"n_head": 2, "n_embd": 64, **LLAMA},
        "rope_scaling": RopeScaling("yarn", 4.0, original_max_seq_len=16),
    },
    "wide vocabulary": {"n_head": 2, "n_embd": 32, "vocab_size": 1001},
    "long": {"n_head": 2, "n_embd": 32, **LONG},
    "long, grouped": {"n_head": 4, "n_embd": 64, "n_kv_head": 1, **LLAMA, **LONG},
    "long, window": {"n_head": 2, "n_embd": 32, "sliding_window": 300, **LLAMA, **LONG},
}
# what the parts of the engine that matter to bits go through: grouped heads, windows, and several chunks of keys
MIXED = ("gpt2", "grouped heads", "sliding window", "long, grouped", "long, window")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def threads() -> Iterator[None]:
    """Threads of the engine are as before afterwards."""
    before = decode.num_threads()
    yield
    decode.set_num_threads(before)


def make(name: str = "llama", format: str = "fp32", **options) -> NativeDecoder:
    torch.manual_seed(1)
    return NativeDecoder.from_model(make_model(**CONFIGS[name]), format, **options)


def text_for(decoder: NativeDecoder, length: int | None = None, seed: int = 0) -> list[int]:
    config = decoder.config
    return text_of(config.max_seq_len if length is None else length, seed, config.vocab_size)


class TestAccuracy:
    """Against the float64 torch model, by the error rule; four times where errors add up over a model's layers."""

    @pytest.mark.parametrize("name", CONFIGS)
    def test_logits(self, name):
        torch.manual_seed(1)
        model = make_model(**CONFIGS[name])
        decoder = NativeDecoder.from_model(model)
        text = text_for(decoder)
        baseline = logits_of(model, text)
        out = torch.from_numpy(whole(decoder, text))
        assert_as_accurate(out, logits_of(model.double(), text), baseline, factor=4)

    @pytest.mark.parametrize("format", [f for f in FORMATS if "dynamic" not in f])
    @pytest.mark.parametrize("name", ["gpt2", "llama", "odd widths", "odd gated width"])
    def test_formats(self, name, format):
        """Against the model of the weights as they were rounded."""
        decoder = make(name, format, kv_dtype="float32")
        model = dequantized(decoder)
        text = text_for(decoder, 40)
        if format == "bf16" and multiplies_bf16():
            baseline = logits_of(dequantized(decoder).bfloat16(), text).float()
        else:
            baseline = logits_of(model, text)
        out = torch.from_numpy(whole(decoder, text))
        assert_as_accurate(out, logits_of(model.double(), text), baseline, factor=4)

    @pytest.mark.parametrize("format", [f for f in FORMATS if "dynamic" in f])
    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_8_bit_activations(self, name, format, monkeypatch):
        """No further from the exact ones than the definition of the format is."""
        decoder = make(name, format, kv_dtype="float32")
        model = dequantized(decoder).double()
        text = text_for(decoder, 40)
        expected = logits_of(model, text)
        linear, group = F.linear, decoder.packed.format.group

        def rounded_linear(x, weight, bias=None):
            k = x.shape[-1]
            size = group or k
            groups = F.pad(x, (0, -k % size)).unflatten(-1, (-1, size))
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
            rounded = ((groups / scale).round() * scale).flatten(-2)[..., :k]
            return linear(rounded, weight, bias)

        monkeypatch.setattr(F, "linear", rounded_linear)
        by_definition = logits_of(model, text)
        out = torch.from_numpy(whole(decoder, text)).double()
        assert (by_definition - expected).abs().max() > 1e-3  # the patch is seen
        assert_as_accurate(out, expected, by_definition)

    @pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["gpt2", "llama", "long, grouped"])
    def test_of_a_bfloat16_model(self, name, kv_dtype):
        torch.manual_seed(1)
        model = make_model(**CONFIGS[name]).bfloat16()
        decoder = NativeDecoder.from_model(model, "bf16", kv_dtype=kv_dtype)
        text = text_for(decoder)
        baseline = logits_of(model, text).float()
        out = torch.from_numpy(whole(decoder, text))
        assert_as_accurate(out, logits_of(model.double(), text), baseline)

    @pytest.mark.parametrize("name", ["gpt2", "llama", "long, grouped"])
    def test_int8_cache(self, name):
        """No further from the exact ones than rounding each key and value of a head is."""
        decoder = make(name, kv_dtype="int8")
        text = text_for(decoder)
        model = dequantized(decoder).double()
        expected = logits_of(model, text)

        def attend(layer, q, k, v):
            return model.attend(
                layer, q, reference.round_activations(k), reference.round_activations(v)
            )

        by_definition = model.logits(model.hidden(torch.tensor([text]), attend=attend))[0]
        out = torch.from_numpy(whole(decoder, text)).double()
        assert (by_definition - expected).abs().max() > 1e-4
        assert_as_accurate(out, expected, by_definition)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_hidden_states(self, name):
        torch.manual_seed(1)
        model = make_model(**CONFIGS[name])
        decoder = NativeDecoder.from_model(model)
        text = text_for(decoder, 40)
        tokens = torch.tensor([text])
        out = torch.from_numpy(whole(decoder, text, output="hidden"))
        baseline = model.hidden(tokens)[0]
        assert_as_accurate(out, model.double().hidden(tokens)[0], baseline, factor=4)

    @pytest.mark.parametrize("name", ["gpt2", "llama", "wide vocabulary"])
    def test_logprobs_of_targets(self, name):
        decoder = make(name)
        text = text_for(decoder, 40)
        targets = text_for(decoder, 40, seed=1)
        logits = torch.from_numpy(whole(decoder, text))
        wanted = torch.tensor(targets)[:, None]
        ref = logits.double().log_softmax(-1).gather(1, wanted)[:, 0]
        baseline = logits.log_softmax(-1).gather(1, wanted)[:, 0]
        out = whole(decoder, text, output="logprob_of", targets=targets)
        assert_as_accurate(torch.from_numpy(out), ref, baseline)

    def test_positions_that_were_padded_in_memory_do_not_leak(self):
        """Sequences of 1 to 40 tokens, in pages that were full of others before."""
        decoder = make("llama", num_blocks=4)
        for length in (40, 1, 17, 33, 2, 40):
            text = text_for(decoder, length, seed=length)
            out = torch.from_numpy(whole(decoder, text))
            model = dequantized(decoder)
            baseline = logits_of(model, text)
            assert_as_accurate(out, logits_of(model.double(), text), baseline, factor=4)


class TestBits:
    """The logits of a sequence have the same bits whatever happens around it."""

    @pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
    @pytest.mark.parametrize("format", FORMATS)
    def test_formats(self, format, kv_dtype, threads):
        decode.set_num_threads(1)
        decoder = make("grouped heads", format, kv_dtype=kv_dtype)
        text, other = text_for(decoder, 50), text_for(decoder, 50, seed=1)
        expected = one_by_one(decoder, text)
        for num_threads in (1, 2, 3):
            decode.set_num_threads(num_threads)
            assert have_same_bits(whole(decoder, text), expected)
        a, b = decoder.add_sequence(), decoder.add_sequence()
        start = 0
        for i, end in enumerate((1, 8, 9, 31, 50)):
            pieces = [(a, start, text[start:end]), (b, start, other[start:end])]
            out = append(decoder, *(pieces if i % 2 else pieces[::-1]))
            out = out[: end - start] if i % 2 else out[end - start :]
            assert have_same_bits(out, expected[start:end])
            start = end

    @pytest.mark.parametrize("name", MIXED)
    def test_token_by_token_and_at_once_on_any_number_of_threads(self, name, threads):
        decode.set_num_threads(1)
        decoder = make(name)
        text = text_for(decoder)
        expected = one_by_one(decoder, text)
        for num_threads in (1, 2, 3):
            decode.set_num_threads(num_threads)
            assert have_same_bits(whole(decoder, text), expected)
            assert have_same_bits(one_by_one(decoder, text[:40]), expected[:40])

    @pytest.mark.parametrize("output", ["hidden", "logprob_of"])
    def test_of_other_outputs(self, output):
        decoder = make("grouped heads")
        text = text_for(decoder, 40)
        targets = {"targets": text} if output == "logprob_of" else {}
        one = [{"targets": [token]} if targets else {} for token in text]
        sequence = decoder.add_sequence()
        steps = [
            append(decoder, (sequence, i, [token]), output=output, **one[i])
            for i, token in enumerate(text)
        ]
        assert have_same_bits(whole(decoder, text, output=output, **targets), np.concatenate(steps))

    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def test_any_pieces_in_any_company(self, data):
        """Rows of a sequence need not be neighbours, and any may be asked for, in any order."""
        decoder = _mixed_decoder(data.draw(st.sampled_from(MIXED)))
        num_sequences = data.draw(st.integers(1, 5))
        lengths = [
            data.draw(st.integers(1, decoder.config.max_seq_len)) for _ in range(num_sequences)
        ]
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        most = data.draw(st.sampled_from((1, 5, 40, 300)))
        decode.set_num_threads(data.draw(st.integers(1, 3)))
        texts = [text_for(decoder, n, seed) for seed, n in enumerate(lengths)]
        sequences = [decoder.add_sequence() for _ in texts]
        done = [0] * num_sequences
        while done != lengths:
            counts = [
                int(rng.integers(0, min(most, n - d) + 1))
                for n, d in zip(lengths, done, strict=True)
            ]
            rows = [(i, done[i] + j) for i, count in enumerate(counts) for j in range(count)]
            if not rows:
                continue
            if rng.random() < 0.5:  # a token of each in turn
                rows.sort(key=lambda row: (row[1] - done[row[0]], row[0]))
            wanted = rng.permutation(len(rows))[: rng.integers(0, len(rows) + 1)]
            out = decoder.forward(
                [texts[i][position] for i, position in rows],
                [sequences[i] for i, _ in rows],
                [position for _, position in rows],
                wanted,
            )
            expected = [_expected(decoder, rows[w][0])[rows[w][1]] for w in wanted]
            assert have_same_bits(out, np.array(expected, np.float32).reshape(out.shape))
            done = [d + count for d, count in zip(done, counts, strict=True)]
        for sequence in sequences:
            decoder.drop(sequence)
        assert decoder.num_free_blocks == decoder.num_blocks


_DECODERS: dict[str, NativeDecoder] = {}
_EXPECTED: dict[tuple[int, int], np.ndarray] = {}


def _mixed_decoder(name: str) -> NativeDecoder:
    if name not in _DECODERS:
        _DECODERS[name] = make(name)
    return _DECODERS[name]


def _expected(decoder: NativeDecoder, seed: int) -> np.ndarray:
    """Logits of the longest text of that seed, token by token on one thread; shorter ones begin like it."""
    key = (id(decoder), seed)
    if key not in _EXPECTED:
        before = decode.num_threads()
        decode.set_num_threads(1)
        _EXPECTED[key] = one_by_one(decoder, text_for(decoder, seed=seed))
        decode.set_num_threads(before)
    return _EXPECTED[key]


class TestCache:
    def test_forks_share_pages_and_copy_the_one_they_write_to(self):
        decoder = make("grouped heads", num_blocks=20)
        text = text_for(decoder, 40)
        parent = decoder.add_sequence()
        append(decoder, (parent, 0, text))
        assert decoder.num_free_blocks == 17
        forks = [decoder.fork(parent), decoder.fork(parent)]
        assert decoder.num_free_blocks == 17
        ends = {s: text_for(decoder, 20, seed) for seed, s in enumerate((parent, *forks), 1)}
        for sequence, end in ends.items():
            expected = one_by_one(decoder, text + end)[40:]
            assert have_same_bits(append(decoder, (sequence, 40, end)), expected)
        # the two full pages are shared; the third and fourth are each one's own
        assert decoder.num_free_blocks == 20 - 2 - 3 * 2
        decoder.drop(parent)
        assert decoder.num_free_blocks == 20 - 2 - 2 * 2
        for sequence in forks:
            decoder.drop(sequence)
        assert decoder.num_free_blocks == 20

    def test_forks_that_part_in_one_step(self):
        decoder = make("grouped heads")
        text = text_for(decoder, 21)
        sequences = [decoder.add_sequence()]
        append(decoder, (sequences[0], 0, text))
        sequences += [decoder.fork(sequences[0]) for _ in range(3)]
        sequences.append(decoder.fork(sequences[2]))
        ends = [text_for(decoder, 15, seed) for seed in range(1, 6)]
        out = append(decoder, *((s, 21, end) for s, end in zip(sequences, ends, strict=True)))
        expected = [one_by_one(decoder, text + end)[21:] for end in ends]
        assert have_same_bits(out, np.concatenate(expected))

    @pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 39, 40])
    def test_truncated_sequences_go_on_as_new_ones(self, length):
        decoder = make("grouped heads", num_blocks=10)
        text, end = text_for(decoder, 40), text_for(decoder, 20, seed=1)
        sequence = decoder.add_sequence()
        append(decoder, (sequence, 0, text))
        fork = decoder.fork(sequence)
        decoder.truncate(sequence, length)
        out = append(decoder, (sequence, length, end))
        assert have_same_bits(
            append(decoder, (fork, 40, end)), one_by_one(make("grouped heads"), text + end)[40:]
        )
        decoder.drop(fork)
        assert decoder.num_free_blocks == 10 - -(-(length + 20) // 16)
        assert have_same_bits(out, one_by_one(decoder, text[:length] + end)[length:])

    def test_a_full_cache_changes_nothing(self):
        decoder = make("grouped heads", num_blocks=4)
        a, b = decoder.add_sequence(), decoder.add_sequence()
        text, other = text_for(decoder, 34), text_for(decoder, 34, seed=1)
        append(decoder, (a, 0, text[:16]), (b, 0, other[:20]))
        with pytest.raises(
            CacheFull, match=r"needs 3 more pages of 16 tokens, 1 of 4 are free.*num_blocks"
        ):
            append(decoder, (a, 16, text[16:]), (b, 20, other[20:]))
        assert decoder.num_free_blocks == 1
        out = append(decoder, (a, 16, text[16:32]))
        assert have_same_bits(out, one_by_one(make("grouped heads"), text)[16:32])
        with pytest.raises(CacheFull):
            append(decoder, (a, 32, text[32:33]))
        fork = decoder.fork(b)
        with pytest.raises(CacheFull):  # the copy of a page that is shared
            append(decoder, (fork, 20, [1]))
        decoder.drop(fork)
        decoder.drop(a)
        out = append(decoder, (b, 20, other[20:]))
        assert have_same_bits(out, one_by_one(make("grouped heads"), other)[20:])

    def test_sequences_that_part_take_a_page_each_but_the_last_one(self):
        """The one that remains alone on the shared page keeps it."""
        decoder = make("grouped heads", num_blocks=2)
        a = decoder.add_sequence()
        append(decoder, (a, 0, [1, 2, 3]))
        b = decoder.fork(a)
        append(decoder, (a, 3, [4]), (b, 3, [5]))
        assert decoder.num_free_blocks == 0

    @settings(deadline=None, max_examples=60)
    @given(data=st.data())
    def test_random_use(self, data):
        """Adding, forking, truncating, dropping and appending, against texts that are kept beside it."""
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        format = data.draw(
            st.sampled_from(("fp32", "bf16", "int8", "int4", "int4_asym_g64_dynamic"))
        )
        decode.set_num_threads(data.draw(st.integers(1, 3)))
        decoder = make("grouped heads", format, num_blocks=data.draw(st.integers(4, 30)))
        fresh = make("grouped heads", format)
        texts: dict[int, list[int]] = {}
        for _ in range(40):
            action = rng.choice(
                ["add", "fork", "truncate", "drop", "append"], p=[0.15, 0.15, 0.1, 0.1, 0.5]
            )
            chosen = int(rng.choice(list(texts))) if texts else None
            if action == "add":
                texts[decoder.add_sequence()] = []
            elif chosen is None:
                continue
            elif action == "fork":
                texts[decoder.fork(chosen)] = list(texts[chosen])
            elif action == "truncate":
                length = int(rng.integers(0, len(texts[chosen]) + 1))
                decoder.truncate(chosen, length)
                del texts[chosen][length:]
            elif action == "drop":
                decoder.drop(chosen)
                del texts[chosen]
            else:
                grown = rng.permutation(list(texts))[: rng.integers(1, 4)].tolist()
                room = {s: decoder.config.max_seq_len - len(texts[s]) for s in grown}
                pieces = [
                    (
                        s,
                        len(texts[s]),
                        rng.integers(53, size=rng.integers(1, 20)).tolist()[: room[s]],
                    )
                    for s in grown
                    if room[s]
                ]
                if not pieces:
                    continue
                free = decoder.num_free_blocks
                try:
                    out = append(decoder, *pieces)
                except CacheFull:
                    assert decoder.num_free_blocks == free
                    continue
                parts = np.split(out, np.cumsum([len(piece) for _, _, piece in pieces])[:-1])
                for (s, start, piece), part in zip(pieces, parts, strict=True):
                    texts[s] += piece
                    assert have_same_bits(part, whole(fresh, texts[s])[start:])
            used = decoder.num_blocks - decoder.num_free_blocks
            assert used <= sum(-(-len(text) // 16) for text in texts.values())
        for sequence in texts:
            decoder.drop(sequence)
        assert decoder.num_free_blocks == decoder.num_blocks


class TestGenerator:
    def test_ten_thousand_requests_some_of_them_cancelled_leave_nothing(self):
        """From several threads, at any point of their life."""
        model = make_model(n_head=2, n_embd=16, n_layer=1, vocab_size=31, **LLAMA)
        decoder = NativeDecoder.from_model(model, "int8", num_blocks=40)
        generator = Generator(decoder, max_batch_size=8, max_waiting=30)

        def work(seed: int) -> int:
            rng = np.random.default_rng(seed)
            num_cancelled = 0
            for _ in range(125):
                handles = []
                for _ in range(10):
                    length, most, n = (int(rng.integers(1, end)) for end in (40, 4, 3))
                    params = SamplingParams(max_new_tokens=most, n=n, seed=seed)
                    handles.append(generator.submit(text_of(length, seed, 31), params))
                for handle in handles:
                    if rng.random() < 0.5:
                        handle.cancel()
                        num_cancelled += 1
                    else:
                        handle.result(timeout=60)
            return num_cancelled

        with ThreadPoolExecutor(8) as pool:
            assert 4000 < sum(pool.map(work, range(8))) < 6000
        assert decoder.num_free_blocks == decoder.num_blocks

    @pytest.mark.parametrize("num_blocks", [5, 6, 9])
    def test_completions_of_a_prompt_fit_where_their_pages_do(self, num_blocks):
        """They part from the prompt's last page in one step."""
        options = {"max_new_tokens": 12, "n": 3, "seed": 1, "temperature": 1.0}
        prompt = text_of(20)
        completions = [
            Generator(make("llama", num_blocks=n)).generate(prompt, SamplingParams(**options))
            for n in (num_blocks, 1000)
        ]
        assert [c.token_ids for c in completions[0]] == [c.token_ids for c in completions[1]]


class TestErrors:
    @pytest.fixture
    def decoder(self) -> NativeDecoder:
        return make("gpt2", num_blocks=10)

    @pytest.mark.parametrize(
        ("tokens", "sequences", "positions", "rows", "message"),
        [
            ([1], [7], [3], [], "there is no sequence 7: it was dropped, or never added"),
            ([1], [-1], [3], [], "there is no sequence -1"),
            ([1], [0], [2], [], "the next position of sequence 0 is 3, got 2"),
            ([1], [0], [4], [], "the next position of sequence 0 is 3, got 4"),
            ([1, 1], [0, 0], [3, 3], [], "the next position of sequence 0 is 4, got 3"),
            ([1, 1], [0, 1], [3, 1], [], "the next position of sequence 1 is 0, got 1"),
            ([1, 53], [0, 0], [3, 4], [], r"token ids must be in \[0, 53\), got 53"),
            ([-1], [0], [3], [], r"token ids must be in \[0, 53\), got -1"),
            ([1] * 62, [0] * 62, range(3, 65), [], "holds at most 64 tokens, got 65"),
            ([1], [0], [3], [1], r"output rows must be in \[0, 1\), got 1"),
            ([1], [0], [3], [-1], r"output rows must be in \[0, 1\), got -1"),
            ([], [], [], [], r"must be \(N,\) with N > 0, got \(0,\)"),
            ([1, 2], [0], [3, 4], [], r"tokens and sequences must be \(N,\)"),
            ([1], [0], [3, 4], [], r"tokens and positions must be \(N,\)"),
            ([[1]], [[0]], [[3]], [], r"must be \(N,\)"),
            ([1], [0], [3], [[0]], r"output_rows must be \(R,\), got \(1, 1\)"),
        ],
    )
    def test_of_a_batch_change_nothing(self, decoder, tokens, sequences, positions, rows, message):
        for text in ([1, 2, 3], []):
            sequence = decoder.add_sequence()
            if text:
                append(decoder, (sequence, 0, text))
        with pytest.raises(ValueError, match=message):
            decoder.forward(tokens, sequences, positions, rows)
        assert decoder.num_free_blocks == 9
        out = append(decoder, (0, 3, [4]), (1, 0, [5]))
        expected = one_by_one(decoder, [1, 2, 3, 4])[3:], one_by_one(decoder, [5])
        assert have_same_bits(out, np.concatenate(expected))

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            ([53], r"targets must be in \[0, 53\), got 53"),
            ([-1], r"targets must be in \[0, 53\), got -1"),
            ([1, 2], r"targets must be \(1,\) as output_rows, got \(2,\)"),
            (None, "targets go with output='logprob_of'"),
        ],
    )
    def test_of_targets_change_nothing(self, decoder, targets, message):
        sequence = decoder.add_sequence()
        with pytest.raises(ValueError, match=message):
            append(decoder, (sequence, 0, [1]), output="logprob_of", targets=targets)
        assert decoder.num_free_blocks == 10

    def test_of_output(self, decoder):
        sequence = decoder.add_sequence()
        with pytest.raises(ValueError, match="output must be one of"):
            append(decoder, (sequence, 0, [1]), output="probabilities")
        with pytest.raises(ValueError, match="targets go with"):
            append(decoder, (sequence, 0, [1]), targets=[1])
        with pytest.raises(ValueError, match="rows must be 1 as output_rows, got 2"):
            decoder.sample([1], [sequence], [0], [0], [GREEDY] * 2)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda d: d.fork(5), "there is no sequence 5"),
            (lambda d: d.drop(5), "there is no sequence 5"),
            (lambda d: d.truncate(5, 0), "there is no sequence 5"),
            (lambda d: d.truncate(0, 4), "sequence 0 holds 3 tokens: cannot keep the first 4"),
            (lambda d: d.truncate(0, -1), "sequence 0 holds 3 tokens: cannot keep the first -1"),
        ],
        ids=["fork", "drop", "truncate", "too many", "negative"],
    )
    def test_of_sequences(self, decoder, call, message):
        append(decoder, (decoder.add_sequence(), 0, [1, 2, 3]))
        with pytest.raises(ValueError, match=message):
            call(decoder)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_blocks": 0}, "num_blocks must be positive and below 2.*31, got 0"),
            ({"num_blocks": -3}, "num_blocks must be positive and below 2.*31, got -3"),
            ({"num_blocks": 2**31}, "num_blocks must be positive and below 2.*31, got 2147483648"),
            ({"num_blocks": 2**32 + 5}, "num_blocks must be positive and below 2.*31"),
            (
                {"kv_dtype": "float16"},
                "kv_dtype must be one of float32, bfloat16, int8, got 'float16'",
            ),
            ({"format": "int5"}, "format must be fp32"),
        ],
        ids=str,
    )
    def test_of_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            NativeDecoder.from_model(make_model(**CONFIGS["gpt2"]), **options)

    def test_of_a_cache_that_no_system_gives(self):
        with pytest.raises(RuntimeError, match="the system refuses: lower num_blocks"):
            NativeDecoder.from_model(
                make_model(n_head=8, n_embd=8, head_dim=256), num_blocks=2**31 - 1
            )

    def test_of_what_the_engine_cannot_run(self):
        with pytest.raises(ValueError, match="not float64"):
            NativeDecoder.from_model(make_model(**CONFIGS["gpt2"]).double())
        with pytest.raises(ValueError, match="head_dim of at most 512, got 514"):
            NativeDecoder.from_model(make_model(n_head=1, n_embd=8, head_dim=514))

    @pytest.mark.parametrize("format", FORMATS)
    def test_nan_weights_are_noticed(self, format):
        model = make_model(**CONFIGS["llama"])
        model.blocks[1].mlp_in.weight[70, 5] = torch.nan
        decoder = NativeDecoder.from_model(model, format)
        sequence = decoder.add_sequence()
        with pytest.raises(RuntimeError, match="the model's logits are NaN"):
            decoder.sample([1, 2], [sequence] * 2, [0, 1], [1], [GREEDY])

    def test_nan_of_one_sequence_stays_there(self):
        """Neither its neighbours have it, nor the next one on its pages."""
        model = make_model(**CONFIGS["grouped heads"], tie_embeddings=False)
        model.wte.weight[7] = torch.nan
        decoder = NativeDecoder.from_model(model, num_blocks=6)
        text = [token for token in text_of(40) if token != 7]
        expected = one_by_one(decoder, text)
        a, b = decoder.add_sequence(), decoder.add_sequence()
        out = append(decoder, (a, 0, [7, *text[:20]]), (b, 0, text))
        assert np.isnan(out[:21]).all()
        assert have_same_bits(out[21:], expected)
        decoder.drop(a)
        decoder.drop(b)
        assert have_same_bits(whole(decoder, text), expected)


class TestProcess:
    def test_several_decoders_at_once(self):
        decoders = [
            make(name, format)
            for name, format in (("gpt2", "fp32"), ("llama", "int8"), ("llama", "int4"))
        ]
        text = text_of(30)
        expected = [
            one_by_one(make(name, format), text)
            for name, format in (("gpt2", "fp32"), ("llama", "int8"), ("llama", "int4"))
        ]
        sequences = [decoder.add_sequence() for decoder in decoders]
        for i, token in enumerate(text):
            for decoder, sequence, rows in zip(decoders, sequences, expected, strict=True):
                assert have_same_bits(append(decoder, (sequence, i, [token])), rows[i : i + 1])

    def test_several_threads_one_after_another(self):
        decoder = make("llama")
        text = text_of(30)
        expected = one_by_one(decoder, text)
        sequence, steps = decoder.add_sequence(), []
        for i, token in enumerate(text):
            thread = threading.Thread(
                target=lambda i=i, token=token: steps.append(
                    append(decoder, (sequence, i, [token]))
                )
            )
            thread.start()
            thread.join()
        assert have_same_bits(np.concatenate(steps), expected)

    @pytest.mark.parametrize("num_threads", [1, 2, 3])
    def test_several_threads_each_with_its_decoder(self, num_threads, threads):
        """They take turns."""
        decode.set_num_threads(num_threads)
        text = text_of(40)
        decoders = [make("llama") for _ in range(4)]
        expected = one_by_one(decoders[0], text)
        results: list[bool] = []

        def work(decoder: NativeDecoder) -> None:
            results.extend(have_same_bits(one_by_one(decoder, text), expected) for _ in range(20))

        workers = [threading.Thread(target=work, args=(decoder,)) for decoder in decoders]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert results == [True] * 80

    def test_a_generator_each_in_several_threads(self):
        prompts = [text_of(n, seed=n) for n in range(1, 9)]
        params = SamplingParams(max_new_tokens=20, seed=3)
        generators = [Generator(make("grouped heads", "int8"), max_batch_size=4) for _ in range(3)]
        expected = [c.token_ids for c in generators[0].generate(prompts, params)]
        results = []

        def work(generator: Generator) -> None:
            results.append([c.token_ids for c in generator.generate(prompts, params)])

        workers = [threading.Thread(target=work, args=(generator,)) for generator in generators]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert results == [expected] * 3

    def test_the_child_of_a_fork_goes_on(self):
        """With a team of its own, whatever the parent's threads were doing."""
        run_program(
            """
            before = one_by_one(decoder, text)
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    ok = have_same_bits(one_by_one(decoder, text), before) and decode.num_threads() == 3
                    os._exit(0 if ok else 1)
                assert have_same_bits(one_by_one(decoder, text), before)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            print("done")
            """,
            LEANGPT_THREADS="3",
        )

    def test_a_fork_while_another_thread_is_in_a_step(self):
        run_program(
            """
            import threading
            other = make_decoder()
            before = one_by_one(decoder, text)
            is_over = threading.Event()
            def work():
                while not is_over.is_set():
                    one_by_one(other, text)
            thread = threading.Thread(target=work)
            thread.start()
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    os._exit(0 if have_same_bits(one_by_one(decoder, text), before) else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            is_over.set()
            thread.join()
            print("done")
            """,
            LEANGPT_THREADS="2",
        )

    def test_ctrl_c_between_steps(self):
        run_program(
            """
            expected = one_by_one(decoder, text)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            try:
                while True:
                    one_by_one(decoder, text)
            except KeyboardInterrupt:
                pass
            assert have_same_bits(one_by_one(decoder, text), expected)
            print("done")
            """
        )

    def test_the_process_ends_with_work_behind_it(self):
        run_program("one_by_one(decoder, text); print('done')", LEANGPT_THREADS="3")

    @pytest.mark.parametrize("value", ["0", "-1", "two", ""])
    def test_a_wrong_number_of_threads(self, value):
        program = "from leangpt.kernels import decode; decode.library()"
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"LEANGPT_THREADS": value},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 1
        assert f"LEANGPT_THREADS must be a positive number, got {value!r}" in run.stderr


PREAMBLE = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.append({tests!r})
from leangpt.kernels import decode
from leangpt.decoding.native_decoder import NativeDecoder
from native_helpers import LLAMA, have_same_bits, make_model, one_by_one, text_of
def make_decoder():
    torch.manual_seed(0)
    return NativeDecoder.from_model(make_model(n_head=4, n_embd=64, n_kv_head=2, **LLAMA))
decoder, text = make_decoder(), text_of(30)
"""


def run_program(program: str, **env: str) -> None:
    import textwrap

    preamble = PREAMBLE.format(tests=os.path.dirname(__file__))
    run = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(program)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr
