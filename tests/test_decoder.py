"""Cached decoding equals the full forward pass, whatever way the tokens come in."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from leangpt import GPT, GPTConfig, SamplingParams
from leangpt.decoding.decoder import Decoder, prefill
from leangpt.decoding.sampling import RowSampling
from leangpt.decoding.torch_decoder import TorchDecoder
from leangpt.decoding.torch_sampling import draw
from leangpt.generation.completion import Draft, Request

BASE = {"vocab_size": 53, "max_seq_len": 48, "n_layer": 3, "n_head": 4, "n_embd": 24}
LLAMA = {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False}
CONFIGS = {
    "gpt2": GPTConfig(**BASE),
    "llama": GPTConfig(**BASE, **LLAMA, n_kv_head=2, tie_embeddings=False),
    "one key head": GPTConfig(**BASE, **LLAMA, n_kv_head=1, head_dim=10),
    "qk norm": GPTConfig(**BASE, **LLAMA, n_kv_head=2, qk_norm=True, qkv_bias=True),
    "value residual": GPTConfig(**BASE, **LLAMA, n_kv_head=2, value_residual=True),
    "sliding window": GPTConfig(**BASE, **LLAMA, sliding_window=5),
    "window of learned positions": GPTConfig(**BASE, sliding_window=1),
}
TOLERANCE = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For such small models the threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=CONFIGS, ids=str)
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(CONFIGS[request.param])


def make_model(config: GPTConfig) -> GPT:
    model = GPT(config).double()
    for parameter in model.parameters():  # far from the initial one, in which attention is uniform
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def texts_of(*lengths: int) -> list[Tensor]:
    return [torch.randint(BASE["vocab_size"], (n,)) for n in lengths]


def feed(decoder: TorchDecoder, *pieces: tuple[int, int, Tensor], **kwargs) -> Tensor:
    """Append (sequence, start, tokens) in one step; the output of every row."""
    tokens = torch.cat([piece for _, _, piece in pieces])
    sequences = torch.cat([torch.full_like(piece, sequence) for sequence, _, piece in pieces])
    positions = torch.cat([start + torch.arange(len(piece)) for _, start, piece in pieces])
    columns = (tokens.numpy(), sequences.numpy(), positions.numpy())
    return torch.from_numpy(decoder.forward(*columns, range(len(tokens)), **kwargs))


def full_logits(model: GPT, text: Tensor) -> Tensor:
    with torch.no_grad():
        return model(text[None])[0]


def assert_close(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_token_by_token(model):
    decoder = TorchDecoder(model)
    [text] = texts_of(48)
    sequence = decoder.add_sequence()
    steps = [feed(decoder, (sequence, i, text[i : i + 1])) for i in range(48)]
    assert_close(torch.cat(steps), full_logits(model, text))


def test_prompt_in_pieces_of_any_length(model):
    decoder = TorchDecoder(model)
    [text] = texts_of(40)
    sequence = decoder.add_sequence()
    cuts = [0, 1, 8, 9, 25, 40]
    pieces = [feed(decoder, (sequence, a, text[a:b])) for a, b in itertools.pairwise(cuts)]
    assert_close(torch.cat(pieces), full_logits(model, text))


def test_ragged_batch_of_prompts_and_steps(model):
    """Sequences of all lengths; some read prompts while others decode; rows of a sequence need not be neighbours."""
    decoder = TorchDecoder(model)
    texts = texts_of(30, 7, 22, 30, 1)
    expected = [full_logits(model, text) for text in texts]
    sequences = [decoder.add_sequence() for _ in texts]
    done = [0] * len(texts)
    generator = torch.Generator().manual_seed(1)
    while done != [len(text) for text in texts]:
        rows = []  # (sequence, position)
        for i, text in enumerate(texts):
            most = min(4, len(text) - done[i])
            count = int(torch.randint(0, most + 1, (), generator=generator))
            rows += [(i, done[i] + j) for j in range(count)]
            done[i] += count
        rows.sort(key=lambda row: (row[1] % 3, row[0], row[1]))  # mixes the sequences ...
        rows.sort(key=lambda row: row[1])  # ... and keeps each in order
        if not rows:
            continue
        out = decoder.forward(
            [int(texts[i][position]) for i, position in rows],
            [sequences[i] for i, _ in rows],
            [position for _, position in rows],
            range(len(rows)),
        )
        assert_close(
            torch.from_numpy(out), torch.stack([expected[i][position] for i, position in rows])
        )


def test_forks_share_what_was_and_go_their_own_way(model):
    decoder = TorchDecoder(model)
    prompt, *ends = texts_of(9, 6, 6, 6)
    parent = decoder.add_sequence()
    feed(decoder, (parent, 0, prompt))
    forks = [decoder.fork(parent), decoder.fork(parent)]
    decoder.fork(forks[0])
    out = feed(decoder, *((s, 9, end) for s, end in zip([*forks, parent], ends, strict=True))).view(
        3, 6, -1
    )
    for rows, end in zip(out, ends, strict=True):
        assert_close(rows, full_logits(model, torch.cat((prompt, end)))[9:])


def test_slots_of_dropped_sequences_leave_no_trace(model):
    decoder = TorchDecoder(model)
    old = [decoder.add_sequence() for _ in range(3)]
    feed(decoder, *((s, 0, text) for s, text in zip(old, texts_of(20, 20, 20), strict=True)))
    for sequence in (old[0], old[2]):
        decoder.drop(sequence)
    texts = texts_of(12, 3)
    new = [decoder.add_sequence() for _ in texts]
    assert not set(new) & set(old)
    out = feed(decoder, *((s, 0, text) for s, text in zip(new, texts, strict=True)))
    assert_close(out, torch.cat([full_logits(model, text) for text in texts]))


def test_a_sequence_of_nan_does_not_spread():
    """Neither to its neighbours nor to the next one in its slot."""
    model = make_model(CONFIGS["llama"])
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    texts = [text.where(text != 7, 8) for text in texts_of(3, 20)]
    decoder = TorchDecoder(model)
    sick, *healthy = (decoder.add_sequence() for _ in range(3))
    bad = torch.full((15,), 7)
    out = feed(decoder, (sick, 0, bad), (healthy[0], 0, texts[0]), (healthy[1], 0, texts[1]))
    assert out[:15].isnan().all()
    assert_close(out[15:], torch.cat([full_logits(model, text) for text in texts]))
    decoder.drop(sick)
    again = decoder.add_sequence()
    feed(decoder, (again, 0, texts[1][:2]))
    step = feed(decoder, (again, 2, texts[1][2:3]), (healthy[1], 20, texts[0][:1]))
    assert_close(step[0], full_logits(model, texts[1])[2])


def test_outputs_of_some_rows(model):
    decoder = TorchDecoder(model)
    [text] = texts_of(10)
    sequences = [decoder.add_sequence() for _ in range(3)]
    rows = [9, 0, 4, 4]
    logits = full_logits(model, text)

    def run(sequence: int, **kwargs) -> Tensor:
        out = decoder.forward(text.tolist(), [sequence] * 10, range(10), rows, **kwargs)
        return torch.from_numpy(out)

    assert_close(run(sequences[0]), logits[rows])
    hidden = run(sequences[1], output="hidden")
    assert hidden.shape == (4, 24)
    assert_close(hidden @ model.head_weight.detach().T, logits[rows])
    targets = [3, 1, 4, 1]
    logprobs = run(sequences[2], output="logprob_of", targets=targets)
    expected = logits.log_softmax(-1)[rows, targets]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-11)


def test_no_rows_asked_for():
    model = make_model(CONFIGS["gpt2"])
    decoder = TorchDecoder(model)
    [text] = texts_of(20)
    sequence = decoder.add_sequence()
    prefill(decoder, sequence, text[:19].tolist(), max_batch_tokens=7)
    out = feed(decoder, (sequence, 19, text[19:]))
    assert_close(out[0], full_logits(model, text)[19])


def test_a_model_in_training_decodes_without_dropout_and_stays_in_training():
    model = make_model(GPTConfig(**BASE, dropout=0.5))
    model.eval()
    [text] = texts_of(10)
    expected = full_logits(model, text)
    model.train()
    decoder = TorchDecoder(model)
    assert_close(feed(decoder, (decoder.add_sequence(), 0, text)), expected)
    assert model.training
    assert all(module.training for module in model.modules())


def test_weights_learn_on_between_steps():
    """A generator may sample while its model trains: nothing of inference mode may stick to the weights."""
    model = make_model(CONFIGS["llama"])
    decoder = TorchDecoder(model)
    [text] = texts_of(10)
    feed(decoder, (decoder.add_sequence(), 0, text))
    model(text[None, :-1], text[None, 1:]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    out = feed(decoder, (decoder.add_sequence(), 0, text))
    assert_close(out, full_logits(model, text))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_results_are_float32_or_wider_and_the_cache_as_the_model(dtype):
    model = make_model(CONFIGS["llama"]).to(dtype)
    decoder = TorchDecoder(model)
    [text] = texts_of(10)
    wide = torch.promote_types(dtype, torch.float32)
    out = feed(decoder, (decoder.add_sequence(), 0, text))
    assert out.dtype == wide
    assert decoder.cache.keys[0].dtype == dtype
    targets = {"output": "logprob_of", "targets": text.numpy()}
    assert feed(decoder, (decoder.add_sequence(), 0, text), **targets).dtype == wide


def test_it_keeps_to_the_protocol():
    decoder = TorchDecoder(make_model(CONFIGS["gpt2"]))
    assert isinstance(decoder, Decoder)
    assert decoder.num_blocks is None and decoder.kv_block_size > 0


@pytest.mark.parametrize("length", [0, 1, 7, 12])
def test_what_is_truncated_leaves_no_trace(model, length):
    decoder = TorchDecoder(model)
    text, old, other = texts_of(20, 12, 12)
    old[:length] = text[:length]
    sequence, neighbour = decoder.add_sequence(), decoder.add_sequence()
    feed(decoder, (sequence, 0, old), (neighbour, 0, other))
    fork = decoder.fork(sequence)
    decoder.truncate(sequence, length)
    out = feed(decoder, (sequence, length, text[length:]))
    assert_close(out, full_logits(model, text)[length:])
    for untouched, tokens in ((fork, old), (neighbour, other)):
        longer = torch.cat((tokens, text[:3]))
        out = feed(decoder, (untouched, 12, text[:3]))
        assert_close(out, full_logits(model, longer)[12:])


def row_sampling(**options) -> RowSampling:
    plain = SamplingParams(temperature=1.0, seed=1, logprobs=2)
    draft = Draft(Request(0, [1] * 5, plain, 1, 9, vocab_limit=53, tokenizer=None), 0)
    return dataclasses.replace(draft.sampling(), **options)


def test_a_sample_is_a_draw_from_the_logits(model):
    decoder = TorchDecoder(model)
    [text] = texts_of(10)
    rows = [row_sampling(), row_sampling(temperature=0.0), row_sampling(position=6, top_k=3)]
    output_rows = [9, 9, 4]
    sequence = decoder.add_sequence()
    drawn = decoder.sample(text.numpy(), [sequence] * 10, range(10), output_rows, rows)
    for got, expected in zip(drawn, draw(full_logits(model, text)[output_rows], rows), strict=True):
        assert got.token == expected.token
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-11)
        assert list(got.top_logprobs) == list(expected.top_logprobs)
    assert decoder.sample([1, 2], [sequence] * 2, [10, 11], [], []) == []
    assert decoder.cache.lengths[0] == 12


class TestErrors:
    @pytest.fixture
    def decoder(self) -> TorchDecoder:
        return TorchDecoder(make_model(CONFIGS["gpt2"]))

    def test_positions_must_continue_the_sequence(self, decoder):
        sequence, other = decoder.add_sequence(), decoder.add_sequence()
        five = torch.arange(5)
        feed(decoder, (sequence, 0, five))
        for start in (0, 4, 6):
            with pytest.raises(ValueError, match=f"sequence {sequence} is 5, got {start}"):
                feed(decoder, (other, 0, five), (sequence, start, five))
        feed(decoder, (sequence, 5, five), (other, 0, five))  # nothing was appended by the errors

    def test_a_full_context(self, decoder):
        sequence = decoder.add_sequence()
        feed(decoder, (sequence, 0, torch.zeros(48, dtype=torch.int64)))
        with pytest.raises(ValueError, match="at most 48 tokens, got 49"):
            feed(decoder, (sequence, 48, torch.zeros(1, dtype=torch.int64)))

    def test_a_dropped_sequence_is_unknown_even_if_its_slot_is_in_use(self, decoder):
        sequence = decoder.add_sequence()
        decoder.drop(sequence)
        decoder.add_sequence()
        for use in (
            decoder.drop,
            decoder.fork,
            lambda s: decoder.truncate(s, 0),
            lambda s: feed(decoder, (s, 0, torch.arange(2))),
        ):
            with pytest.raises(ValueError, match=f"no sequence {sequence}"):
                use(sequence)

    def test_shapes_and_options(self, decoder):
        sequence = decoder.add_sequence()
        one = torch.zeros(1, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"tokens and sequences must be \(N,\) with N > 0"):
            decoder.forward([], [], [], [])
        with pytest.raises(ValueError, match="tokens and positions"):
            decoder.forward([0], [0], [0, 1], [0])
        with pytest.raises(ValueError, match="tokens and sequences"):
            decoder.forward(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1)), [0])
        with pytest.raises(ValueError, match="output must be one of"):
            feed(decoder, (sequence, 0, one), output="loss")
        with pytest.raises(ValueError, match="targets go with"):
            feed(decoder, (sequence, 0, one), output="logprob_of")
        with pytest.raises(ValueError, match="targets go with"):
            feed(decoder, (sequence, 0, one), targets=[0])
        with pytest.raises(ValueError, match=r"targets must be \(1,\)"):
            feed(decoder, (sequence, 0, one), output="logprob_of", targets=[0, 1])
        with pytest.raises(ValueError, match=r"rows must be as many as output_rows, 1, got 0"):
            decoder.sample([0], [sequence], [0], [0], [])
        feed(decoder, (sequence, 0, one))

    def test_what_is_out_of_range(self, decoder):
        sequence = decoder.add_sequence()
        pair = ([sequence] * 2, [0, 1])
        for wrong in (53, -1):
            with pytest.raises(ValueError, match=rf"tokens must be in \[0, 53\), got {wrong}"):
                decoder.forward([1, wrong], *pair, [])
            with pytest.raises(ValueError, match=rf"targets must be in \[0, 53\), got {wrong}"):
                decoder.forward([1, 2], *pair, [0], "logprob_of", [wrong])
        for wrong in (2, -1):
            with pytest.raises(ValueError, match=rf"output_rows must be in \[0, 2\), got {wrong}"):
                decoder.forward([1, 2], *pair, [wrong])
        decoder.forward([1, 2], *pair, [])
        for wrong in (3, -1):
            with pytest.raises(ValueError, match=rf"length must be in \[0, 2\].*got {wrong}"):
                decoder.truncate(sequence, wrong)

    def test_a_failing_step_appends_nothing(self, decoder, monkeypatch):
        sequence = decoder.add_sequence()
        with monkeypatch.context() as patch:
            patch.setattr(decoder.model.norm_f, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                feed(decoder, (sequence, 0, torch.tensor([1, 2])))
        with pytest.raises(ValueError, match="tokens must be"):
            feed(decoder, (sequence, 0, torch.tensor([1, 53])))
        out = feed(decoder, (sequence, 0, torch.tensor([1, 2])))
        assert_close(out, full_logits(decoder.model, torch.tensor([1, 2])))
