"""Cached decoding equals the full forward pass, whatever way the tokens come in."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from leangpt import GPT, GPTConfig
from leangpt.decoder import TorchDecoder, prefill

BASE = {"vocab_size": 53, "max_seq_len": 48, "n_layer": 3, "n_head": 4, "n_embd": 24}
LLAMA = {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "bias": False}
CONFIGS = {
    "gpt2": GPTConfig(**BASE),
    "llama": GPTConfig(**BASE, **LLAMA, n_kv_head=2, tie_embeddings=False),
    "one key head": GPTConfig(**BASE, **LLAMA, n_kv_head=1, head_dim=10),
    "qk norm": GPTConfig(**BASE, **LLAMA, n_kv_head=2, qk_norm=True, qkv_bias=True),
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
    return decoder.forward(tokens, sequences, positions, torch.arange(len(tokens)), **kwargs)


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
            torch.stack([texts[i][position] for i, position in rows]),
            torch.tensor([sequences[i] for i, _ in rows]),
            torch.tensor([position for _, position in rows]),
            torch.arange(len(rows)),
        )
        assert_close(out, torch.stack([expected[i][position] for i, position in rows]))


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
    rows = torch.tensor([9, 0, 4, 4])
    arguments = text, torch.arange(10), rows
    logits = full_logits(model, text)

    def run(sequence: int, **kwargs) -> Tensor:
        tokens, positions, output_rows = arguments
        column = torch.full_like(tokens, sequence)
        return decoder.forward(tokens, column, positions, output_rows, **kwargs)

    assert_close(run(sequences[0]), logits[rows])
    hidden = run(sequences[1], output="hidden")
    assert hidden.shape == (4, 24)
    assert_close(hidden @ model.head_weight.detach().T, logits[rows])
    targets = torch.tensor([3, 1, 4, 1])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_of_the_model_is_kept(dtype):
    model = make_model(CONFIGS["llama"]).to(dtype)
    decoder = TorchDecoder(model)
    [text] = texts_of(10)
    out = feed(decoder, (decoder.add_sequence(), 0, text))
    assert out.dtype == decoder.cache.keys[0].dtype == dtype
    targets = {"output": "logprob_of", "targets": text}
    assert feed(decoder, (decoder.add_sequence(), 0, text), **targets).dtype == torch.float32


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
        for use in (decoder.drop, decoder.fork, lambda s: feed(decoder, (s, 0, torch.arange(2)))):
            with pytest.raises(ValueError, match=f"no sequence {sequence}"):
                use(sequence)

    def test_shapes_and_options(self, decoder):
        sequence = decoder.add_sequence()
        one = torch.zeros(1, dtype=torch.int64)
        none = one[:0]
        with pytest.raises(ValueError, match=r"tokens and sequences must be \(N,\) with N > 0"):
            decoder.forward(none, none, none, none)
        with pytest.raises(ValueError, match="tokens and positions"):
            decoder.forward(one, one, torch.arange(2), one)
        with pytest.raises(ValueError, match="output must be one of"):
            feed(decoder, (sequence, 0, one), output="loss")
        with pytest.raises(ValueError, match="targets go with"):
            feed(decoder, (sequence, 0, one), output="logprob_of")
        with pytest.raises(ValueError, match="targets go with"):
            feed(decoder, (sequence, 0, one), targets=one)
        with pytest.raises(ValueError, match=r"targets must be \(1,\)"):
            feed(decoder, (sequence, 0, one), output="logprob_of", targets=torch.arange(2))
        feed(decoder, (sequence, 0, one))

    def test_a_failing_forward_appends_nothing(self, decoder):
        sequence = decoder.add_sequence()
        with pytest.raises(IndexError):
            feed(decoder, (sequence, 0, torch.tensor([1, 53])))
        out = feed(decoder, (sequence, 0, torch.tensor([1, 2])))
        assert_close(out, full_logits(decoder.model, torch.tensor([1, 2])))
