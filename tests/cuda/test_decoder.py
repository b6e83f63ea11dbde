"""The decode step on the CUDA engine: what the CPU engine says, with the same bits in whatever company, pieces and graphs.

On a GPU where there is one; elsewhere the library, its launch code and graphs included, runs in the emulator.
"""

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate
from native_helpers import (
    LLAMA,
    append,
    dequantized,
    draw_from,
    have_same_bits,
    logits_of,
    make_model,
    one_by_one,
    text_of,
    whole,
)

from leangpt import Generator, SamplingParams
from leangpt.data.tokenizer import ByteTokenizer
from leangpt.decoding.choice import decoder_of, load_decoder
from leangpt.decoding.cuda_decoder import CudaDecoder
from leangpt.decoding.decoder import CacheFull
from leangpt.decoding.native_decoder import NativeDecoder, _fill, pack_model
from leangpt.decoding.sampling import RowSampling
from leangpt.kernels import decode, reference
from leangpt.pretrained import save_pretrained

pytestmark = pytest.mark.usefixtures("native_engine")

FORMATS = ("bf16", "int8", "int8_g64", "int4", "int4_g128", "int4_asym")
CONFIGS = {
    "gpt2": {"n_head": 4, "n_embd": 64},
    "llama": {"n_head": 4, "n_embd": 64, "n_kv_head": 2, "qk_norm": True, **LLAMA},
    "head_dim 40, 80 inputs": {"n_head": 1, "n_embd": 80, "head_dim": 40},
    "head_dim 80": {"n_head": 6, "n_embd": 48, "n_kv_head": 2, "head_dim": 80, **LLAMA},
    "head_dim 128": {"n_head": 4, "n_embd": 32, "n_kv_head": 1, "head_dim": 128, **LLAMA},
    "odd widths": {"n_head": 3, "n_embd": 51, "n_inner": 77, "vocab_size": 131},
    "odd gated width": {"n_head": 3, "n_embd": 30, **LLAMA, "n_inner": 37, "bias": True},
    "value residual": {"n_head": 6, "n_embd": 60, "n_kv_head": 3, **LLAMA, "value_residual": True},
    "untied head, gelu": {
        **{"n_head": 2, "n_embd": 32, "tie_embeddings": False},
        "activation": "gelu",
    },
    "relu2 without bias": {"n_head": 2, "n_embd": 32, "activation": "relu2", "bias": False},
    "layer norm, rotary": {"n_head": 2, "n_embd": 32, **LLAMA, "norm": "layer_norm"},
    "sliding window": {"n_head": 2, "n_embd": 32, "sliding_window": 5, **LLAMA},
    "short": {"n_head": 2, "n_embd": 32, "max_seq_len": 7},
    "long": {"n_head": 2, "n_embd": 32, "n_layer": 1, "max_seq_len": 600, **LLAMA},
}


@pytest.fixture(autouse=True)
def _engine(request) -> None:
    if decode.cuda_obstacle() is not None:
        request.getfixturevalue("emulated")


def make(name: str = "llama", format: str = "bf16", **options) -> CudaDecoder:
    torch.manual_seed(1)
    packed = pack_model(make_model(**CONFIGS[name]), format)
    return CudaDecoder(packed, **{"num_blocks": 50} | options)


def text_for(decoder: CudaDecoder, length: int | None = None, seed: int = 0) -> list[int]:
    config = decoder.config
    return text_of(config.max_seq_len if length is None else length, seed, config.vocab_size)


class TestAccuracy:
    """Against the float64 torch model of the weights as they were rounded, by the error rule."""

    @pytest.mark.parametrize("name", CONFIGS)
    def test_logits(self, name):
        self.check(make(name))

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("name", ["gpt2", "llama", "odd gated width"])
    def test_formats(self, name, format):
        self.check(make(name, format, kv_dtype="bfloat16"), 40)

    @staticmethod
    def check(decoder, length=None):
        text = text_for(decoder, length)
        model = dequantized(decoder)
        truth = logits_of(model.double(), text)
        baseline = logits_of(model.bfloat16(), text).float()
        assert_as_accurate(torch.from_numpy(whole(decoder, text)), truth, baseline)

    @pytest.mark.parametrize("kv_dtype", ["float16", "int8", "float8_e4m3"])
    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_other_caches(self, name, kv_dtype):
        """No further from the exact ones than rounding each key and value of a head, and all activations to bfloat16, is."""
        decoder = make(name, kv_dtype=kv_dtype)
        text = text_for(decoder)
        exact = logits_of(dequantized(decoder).double(), text)
        model = dequantized(decoder).bfloat16()

        def rounded(x):
            if kv_dtype == "float16":
                return x.half().to(x.dtype)
            if kv_dtype == "int8":
                return reference.round_activations(x)
            scale = x.float().abs().amax(-1, keepdim=True) / 448
            return ((x / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)

        def attend(layer, q, k, v):
            return model.attend(layer, q, rounded(k), rounded(v))

        by_definition = model.logits(model.hidden(torch.tensor([text]), attend=attend))[0].float()
        assert_as_accurate(torch.from_numpy(whole(decoder, text)), exact, by_definition)

    def test_hidden_states(self):
        decoder = make("llama")
        text = text_for(decoder, 40)
        model, tokens = dequantized(decoder), torch.tensor([text])
        truth = model.double().hidden(tokens)[0]
        baseline = model.bfloat16().hidden(tokens)[0].float()
        out = torch.from_numpy(whole(decoder, text, output="hidden"))
        assert_as_accurate(out, truth, baseline)

    def test_logprobs_of_targets(self):
        decoder = make("gpt2")
        text, targets = text_for(decoder, 40), text_for(decoder, 40, seed=1)
        logits = torch.from_numpy(whole(decoder, text))
        wanted = torch.tensor(targets)[:, None]
        truth = logits.double().log_softmax(-1).gather(1, wanted)[:, 0]
        baseline = logits.log_softmax(-1).gather(1, wanted)[:, 0]
        out = whole(decoder, text, output="logprob_of", targets=targets)
        assert_as_accurate(torch.from_numpy(out), truth, baseline)


class TestBits:
    """The logits of a sequence have the same bits whatever happens around it."""

    @pytest.mark.parametrize(
        ("format", "kv_dtype"),
        [
            *((f, kv) for f in ("bf16", "int8", "int4_asym") for kv in ("bfloat16", "int8")),
            *(("bf16", kv) for kv in ("float16", "float8_e4m3")),
        ],
    )
    def test_pieces_and_company(self, format, kv_dtype):
        decoder = make("llama", format, kv_dtype=kv_dtype)
        text, other = text_for(decoder, 40), text_for(decoder, 40, seed=1)
        expected = one_by_one(decoder, text)
        assert have_same_bits(whole(decoder, text), expected)
        a, b = decoder.add_sequence(), decoder.add_sequence()
        start = 0
        for i, end in enumerate((1, 8, 9, 31, 40)):
            pieces = [(a, start, text[start:end]), (b, start, other[start:end])]
            out = append(decoder, *(pieces if i % 2 else pieces[::-1]))
            out = out[: end - start] if i % 2 else out[end - start :]
            assert have_same_bits(out, expected[start:end])
            start = end

    @pytest.mark.parametrize("name", ["gpt2", "sliding window", "head_dim 80", "short"])
    def test_token_by_token_and_at_once(self, name):
        decoder = make(name)
        text = text_for(decoder)
        assert have_same_bits(whole(decoder, text), one_by_one(decoder, text))

    def test_over_splits_of_keys(self):
        decoder = make("long")
        text = text_for(decoder, 520)
        expected = whole(decoder, text)
        sequence = decoder.add_sequence()
        start = 0
        for end in (250, 255, 256, 257, 511, 512, 513, 520):
            out = append(decoder, (sequence, start, text[start:end]))
            assert have_same_bits(out, expected[start:end])
            start = end

    def test_rows_of_a_sequence_apart_and_some_outputs(self):
        decoder = make("llama")
        texts = [text_for(decoder, 20, seed) for seed in range(3)]
        expected = [whole(decoder, text) for text in texts]
        sequences = [decoder.add_sequence() for _ in texts]
        rows = [(i, position) for position in range(20) for i in range(3)]
        wanted = [59, 0, 31, 4, 4]
        out = decoder.forward(
            [texts[i][position] for i, position in rows],
            [sequences[i] for i, _ in rows],
            [position for _, position in rows],
            wanted,
        )
        assert have_same_bits(out, np.stack([expected[rows[w][0]][rows[w][1]] for w in wanted]))

    @pytest.mark.parametrize("output", ["hidden", "logprob_of"])
    def test_of_other_outputs(self, output):
        decoder = make("gpt2")
        text = text_for(decoder, 20)
        targets = {"targets": text} if output == "logprob_of" else {}
        sequence = decoder.add_sequence()
        steps = [
            append(
                decoder,
                (sequence, i, [token]),
                output=output,
                **({"targets": [token]} if targets else {}),
            )
            for i, token in enumerate(text)
        ]
        assert have_same_bits(whole(decoder, text, output=output, **targets), np.concatenate(steps))

    @pytest.mark.usefixtures("schedule")
    def test_order_of_threads(self):
        """In the emulator: seeds and orders of blocks, warps and copies."""
        decoder = make("llama")
        text = text_for(decoder, 33)
        assert have_same_bits(whole(decoder, text), one_by_one(decoder, text))


class TestGraphs:
    def steps(self, decoder: CudaDecoder) -> list[np.ndarray]:
        """Batches of 1 to 5 sequences of different lengths, that grow over a page and past 256 keys."""
        lengths = (1, 15, 16, 30, 250)
        texts = [text_for(decoder, 300, seed) for seed in range(len(lengths))]
        sequences = [decoder.add_sequence() for _ in texts]
        for sequence, text, length in zip(sequences, texts, lengths, strict=True):
            decoder.forward(text[:length], [sequence] * length, range(length), [])
        outputs = []
        for step in range(8):
            chosen = range(1 + step % 5)
            pieces = [
                (sequences[i], lengths[i] + done, texts[i][lengths[i] + done :][:1])
                for i in chosen
                for done in [sum(1 + s % 5 > i for s in range(step))]
            ]
            outputs.append(append(decoder, *pieces, rows=[*chosen][::-1]))
        return outputs

    def test_a_replay_gives_the_bits_of_direct_launches(self, monkeypatch):
        decoder = make("long")
        with_graphs = self.steps(decoder) + self.steps(decoder)
        assert decoder.num_graphs >= 3
        monkeypatch.setenv("LEANGPT_CUDA_GRAPHS", "0")
        decoder = make("long")
        without = self.steps(decoder) + self.steps(decoder)
        assert decoder.num_graphs == 0
        for a, b in zip(with_graphs, without, strict=True):
            assert have_same_bits(a, b)

    def test_buffers_that_move_are_not_replayed(self):
        decoder = make("long")
        text = text_for(decoder, 400)
        sequence = decoder.add_sequence()
        before = [append(decoder, (sequence, i, [text[i]])) for i in range(4)]
        assert decoder.num_graphs == 1
        out = append(decoder, (sequence, 4, text[4:400]))  # more rows than there was room for
        assert decoder.num_graphs == 0
        out = np.concatenate([*before, out])
        assert have_same_bits(out, whole(decoder, text))

    def test_results_are_waited_for(self, emulated, cuda):
        """Streams that do nothing until they are waited for."""
        with cuda.settings(is_deferred=True):
            decoder = make("gpt2")
            text = text_for(decoder, 20)
            assert have_same_bits(one_by_one(decoder, text), whole(decoder, text))


class TestCache:
    def test_forks_share_pages_and_copy_the_one_they_write_to(self):
        decoder = make("llama", num_blocks=20)
        text, other = text_for(decoder, 60), text_for(decoder, 60, seed=1)
        parent = decoder.add_sequence()
        append(decoder, (parent, 0, text[:40]))
        forks = [decoder.fork(parent), decoder.fork(parent)]
        assert decoder.num_free_blocks == 17
        out = append(
            decoder,
            (parent, 40, text[40:45]),
            (forks[0], 40, other[40:45]),
            (forks[1], 40, text[40:45]),
        )
        assert have_same_bits(out[:5], whole(decoder, text[:45])[40:])
        assert have_same_bits(out[5:10], whole(decoder, text[:40] + other[40:45])[40:])
        assert have_same_bits(out[10:], out[:5])
        for sequence in (parent, *forks):
            decoder.drop(sequence)
        assert decoder.num_free_blocks == 20

    def test_truncated_sequences_go_on_as_if_it_had_not_been(self):
        decoder = make("gpt2")
        text, other = text_for(decoder, 40), text_for(decoder, 40, seed=1)
        sequence = decoder.add_sequence()
        append(decoder, (sequence, 0, other[:5] + text[5:40]))
        decoder.truncate(sequence, 0)
        append(decoder, (sequence, 0, text[:20] + other[:10]))
        decoder.truncate(sequence, 20)
        out = append(decoder, (sequence, 20, text[20:]))
        assert have_same_bits(out, whole(decoder, text)[20:])

    def test_full(self):
        decoder = make("llama", num_blocks=3)
        text = text_for(decoder, 40)
        a, b = decoder.add_sequence(), decoder.add_sequence()
        first = append(decoder, (a, 0, text[:30]))
        with pytest.raises(CacheFull, match="needs 3 more pages of 16 tokens, 1 of 3 are free"):
            append(decoder, (b, 0, text))
        with pytest.raises(ValueError, match="token ids must be in"):
            append(decoder, (a, 30, [99]))
        rest = append(decoder, (a, 30, text[30:]))
        decoder.drop(a)
        assert have_same_bits(np.concatenate([first, rest]), whole(decoder, text))


class TestDraws:
    def test_as_the_cpu_engine_draws_from_the_same_logits(self):
        decoder = make("odd widths")
        text = text_for(decoder, 9)
        settings = [
            (0.0, 0, 1.0, 0.0, 1.0, 0.0, None),
            (0.7, 5, 1.0, 0.0, 1.0, 0.0, 0),
            (1.3, 0, 0.8, 0.0, 1.0, 0.0, 3),
            (1.0, 0, 1.0, 0.05, 1.0, 0.0, 200),
            (0.0, 0, 1.0, 0.0, 1.7, 0.0, 2),
            (0.9, 40, 0.9, 0.01, 1.2, 0.5, 1),
        ]
        sequences = [decoder.add_sequence() for _ in settings]
        for sequence in sequences:
            append(decoder, (sequence, 0, text), rows=[])
        for step in range(3):  # the last of these is a graph's
            rows = [
                RowSampling(t, k, p, m, 77 + i, i, 9 + step, r, q, text, text[4:], 120, logprobs)
                for i, (t, k, p, m, r, q, logprobs) in enumerate(settings)
            ]
            tokens = [(step + i) % 131 for i in range(len(rows))]
            batch = tokens, sequences, [9 + step] * len(rows), range(len(rows))
            draws = decoder.sample(*batch, rows)
            for sequence in sequences:
                decoder.truncate(sequence, 9 + step)
            logits = decoder.forward(*batch)
            for row, draw, of_row in zip(rows, draws, logits, strict=True):
                setting = decode.DrawSettings()
                room = _fill(setting, row, 131)
                expected = draw_from(of_row, setting)
                assert draw.token == expected.token
                if row.logprobs is None:
                    assert draw.logprob is None
                    continue
                assert draw.logprob == pytest.approx(expected.logprob, abs=1e-5)
                if row.logprobs:
                    assert draw.top_logprobs is not None
                    assert list(draw.top_logprobs) == room[-2].tolist()
                    assert [*draw.top_logprobs.values()] == pytest.approx(room[-1], abs=1e-5)

    def test_nan(self):
        torch.manual_seed(1)
        model = make_model(**CONFIGS["gpt2"])
        model.wte.weight[3, 5] = torch.nan
        decoder = CudaDecoder(pack_model(model, "bf16"), num_blocks=4)
        sequence = decoder.add_sequence()
        row = RowSampling(0.0, 0, 1.0, 0.0, 0, 0, 1, 1.0, 0.0, (), (), 53, None)
        with pytest.raises(RuntimeError, match="logits are NaN"):
            decoder.sample([3], [sequence], [0], [0], [row])


class TestGenerator:
    PROMPTS = ("Once", "upon a time", "a")

    @pytest.fixture
    def model(self):
        torch.manual_seed(1)
        return make_model(**CONFIGS["llama"] | {"vocab_size": 257})

    def test_the_same_greedy_text_as_the_cpu_engine(self, model):
        """As far as rounding activations to bfloat16 cannot turn the order of the two best tokens."""
        params = SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True, logprobs=2)
        packed = pack_model(model, "int8")
        of_cpu, of_gpu = (
            Generator(decoder, ByteTokenizer()).generate([*"abcdefghijkl"], params)
            for decoder in (NativeDecoder(packed), CudaDecoder(packed, 30))
        )
        num_compared = 0
        for expected, completion in zip(of_cpu, of_gpu, strict=True):
            assert expected.top_logprobs is not None
            steps = zip(
                expected.token_ids, completion.token_ids, expected.top_logprobs, strict=True
            )
            for token, of_the_gpu, top in steps:
                best, second = top.values()
                if best - second < 0.5:
                    break
                assert of_the_gpu == token
                num_compared += 1
        assert num_compared >= 12

    def test_the_same_bits_in_any_company(self, model):
        params = [
            SamplingParams(max_new_tokens=12, temperature=t, seed=s, logprobs=2, n=2)
            for s, t in enumerate((0.0, 0.6, 1.0))
        ]
        packed = pack_model(model, "bf16")
        generator = Generator(CudaDecoder(packed, 30), ByteTokenizer())
        alone = [generator.generate(p, q) for p, q in zip(self.PROMPTS, params, strict=True)]
        crowded = CudaDecoder(packed, 5)
        options = {"max_batch_tokens": 5, "speculate": 3}
        together = Generator(crowded, ByteTokenizer(), **options).generate(self.PROMPTS, params)
        for i, completions in enumerate(alone):
            mine = [c for c in together if c.prompt_index == i]
            assert [c.token_ids for c in mine] == [c.token_ids for c in completions]
            assert [c.logprobs for c in mine] == [c.logprobs for c in completions]
        assert crowded.num_free_blocks == 5


class TestChoice:
    @pytest.fixture
    def folder(self, tmp_path):
        torch.manual_seed(1)
        model = make_model(**CONFIGS["llama"] | {"vocab_size": 257})
        save_pretrained(model, tmp_path, ByteTokenizer(), format="native")
        return tmp_path

    @pytest.mark.parametrize(
        ("options", "format"),
        [
            ({}, "bf16"),
            ({"dtype": "bfloat16"}, "bf16"),
            ({"format": "int4", "num_blocks": 5}, "int4"),
            ({"format": "bf16", "dtype": "float32"}, "bf16"),
        ],
        ids=str,
    )
    def test_the_cuda_decoder_on_cuda(self, folder, options, format):
        decoder, _ = load_decoder(str(folder), device="cuda", **options)
        assert isinstance(decoder, CudaDecoder)
        assert str(decoder.packed.format) == format
        assert decoder.num_blocks == options.get("num_blocks", 64 * 4)

    def test_a_packed_file(self, folder):
        decoder, _ = load_decoder(str(folder), device="cuda", format="int8")
        decoder.save(folder / "model.leangpt")
        for device in ("cuda", "cuda:0", "auto"):
            loaded, _ = load_decoder(str(folder / "model.leangpt"), device=device, num_blocks=9)
            assert isinstance(loaded, CudaDecoder)
            text = text_for(decoder, 20)
            assert have_same_bits(whole(loaded, text), whole(decoder, text))
        assert type(load_decoder(str(folder))[0]) is NativeDecoder
        with pytest.raises(ValueError, match="no device cuda:7, of"):
            load_decoder(str(folder), device="cuda:7")

    def test_float32_is_not_for_the_cuda_decoder(self, folder):
        model = make_model(**CONFIGS["gpt2"])
        with pytest.raises(
            ValueError, match="num_blocks=3 needs .* bf16, int8 and int4 weights, not fp32"
        ):
            decoder_of(model, device="cuda", num_blocks=3)
        NativeDecoder.from_model(model, "fp32").save(folder / "model.leangpt")
        with pytest.raises(ValueError, match="bf16, int8 and int4 weights, not fp32"):
            load_decoder(str(folder), device="cuda")
        assert type(load_decoder(str(folder), device="auto")[0]) is NativeDecoder


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("gpt2", {"format": "fp32"}, "packed as fp32: .* pack it as bf16"),
            (
                "gpt2",
                {"kv_dtype": "float32"},
                "kv_dtype must be one of bfloat16, float16, int8, float8_e4m3, got 'float32'",
            ),
            ("gpt2", {"device": 7}, "there is no device cuda:7"),
            ("gpt2", {"num_blocks": 0}, "num_blocks must be positive"),
        ],
        ids=str,
    )
    def test_refuses(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            make(name, **options)

    def test_wide_heads(self):
        packed = pack_model(make_model(n_head=1, n_embd=16, head_dim=258), "bf16")
        with pytest.raises(ValueError, match="head_dim must be at most 256 on CUDA, got 258"):
            CudaDecoder(packed, 3)

    def test_graphs_are_0_or_1(self, monkeypatch):
        monkeypatch.setenv("LEANGPT_CUDA_GRAPHS", "no")
        with pytest.raises(ValueError, match="LEANGPT_CUDA_GRAPHS must be 0 or 1, got 'no'"):
            make()

    @pytest.mark.usefixtures("emulated")
    def test_no_gpu(self, cuda):
        with cuda.settings(capability=(0, 0)), pytest.raises(RuntimeError, match="there is no GPU"):
            make()

    @pytest.mark.usefixtures("emulated")
    def test_an_old_gpu(self, cuda):
        with cuda.settings(capability=(7, 5)), pytest.raises(ValueError, match=r"8\.0 or higher"):
            make()

    @pytest.mark.usefixtures("emulated")
    def test_too_little_memory(self, cuda):
        with (
            cuda.settings(memory_bytes=4 << 20),
            pytest.raises(RuntimeError, match=r"needs .* MiB of GPU memory, .* lower num_blocks"),
        ):
            make(num_blocks=5000)
        with cuda.settings(memory_bytes=1 << 20):
            assert 1 <= make(num_blocks=None).num_blocks < 64 * 4
        with (
            cuda.settings(memory_bytes=1 << 10),
            pytest.raises(RuntimeError, match="out of memory"),
        ):
            make()
