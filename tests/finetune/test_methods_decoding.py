"""Adapters and prefixes in the decoders: the logits of the full forward pass of the model that they hang on, and bits that
do not depend on what else is in the batch.
"""

import copy

import numpy as np
import pytest
import torch
from native_helpers import (
    LLAMA,
    append,
    have_same_bits,
    logits_of,
    make_model,
    one_by_one,
    text_of,
    whole,
)

from leangpt import GPT
from leangpt.decoding.adapter import Adapter, Bottleneck, LowRank, Prefix
from leangpt.decoding.decoder import CacheFull, Decoder
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.decoding.torch_decoder import TorchDecoder
from leangpt.finetune import methods

GPT2_STYLE = {"n_head": 3, "n_embd": 30, "n_inner": 75}  # no multiples of 16
LLAMA_STYLE = {
    **{"n_head": 4, "n_kv_head": 2, "n_embd": 40, "n_inner": 75, **LLAMA},
    **{"qk_norm": True, "value_residual": True},
}
CASES = {
    "lora": ("lora", {"rank": 3}),
    "lora_of_some": ("lora", {"rank": 17, "targets": ("mlp_in", "attn_out")}),
    "adalora": ("adalora", {"rank": 4}),
    "adapter": ("adapter", {"width": 7}),
    "prefix": ("prefix", {"length": 5}),
    "long_prefix": ("prefix", {"length": 33, "reparametrization": 12}),
}


@pytest.fixture(params=[GPT2_STYLE, LLAMA_STYLE], ids=["gpt2", "llama"])
def base(request) -> GPT:
    return make_model(**request.param)


@pytest.fixture(params=["native", "torch"])
def decoder(request, base) -> Decoder:
    if request.param == "torch":
        return TorchDecoder(base)
    request.getfixturevalue("native_engine")
    return NativeDecoder.from_model(base)


def adapt(base: GPT, case: str) -> methods.Adapted:
    """A copy of the base with a method whose every parameter is far from its start."""
    name, options = CASES[case]
    adapted = methods.create(name, **options).attach(copy.deepcopy(base))
    with torch.no_grad():
        for p in adapted.trainable_parameters().values():
            p.normal_(std=0.2)
    return adapted


def add(decoder: Decoder, adapted: methods.Adapted) -> int:
    prefix, adapter = adapted.additions()
    number = None if adapter is None else decoder.add_adapter(adapter)
    return decoder.add_sequence(prefix=prefix, adapter=number)


def assert_close(actual: np.ndarray, expected: torch.Tensor) -> None:
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=limit)


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_gives_the_logits_of_the_full_pass(case, base, decoder):
    adapted = adapt(base, case)
    text = text_of(40)
    expected = logits_of(adapted.model, text)
    assert (expected - logits_of(base, text)).abs().max() > 0.1, "the case changes nothing"
    sequence = add(decoder, adapted)
    pieces = [append(decoder, (sequence, 0, text[:7])), append(decoder, (sequence, 7, text[7:30]))]
    pieces += [append(decoder, (sequence, i, text[i : i + 1])) for i in range(30, 40)]
    assert_close(np.concatenate(pieces), expected)


def test_many_in_one_batch(base, decoder):
    """Base, adapters and prefixes side by side, forked, cut and dropped."""
    everyone = {case: adapt(base, case) for case in CASES}
    texts = {case: text_of(20 + i, seed=i) for i, case in enumerate([*CASES, "base"])}
    sequences = {case: add(decoder, adapted) for case, adapted in everyone.items()}
    sequences["base"] = decoder.add_sequence()
    models = {case: adapted.model for case, adapted in everyone.items()} | {"base": base}
    append(decoder, *((sequences[case], 0, text[:9]) for case, text in texts.items()))
    forks = {case: decoder.fork(sequence) for case, sequence in sequences.items()}
    for case, text in texts.items():
        decoder.truncate(sequences[case], 4)
        append(decoder, (forks[case], 9, text[9:12]))
    out = append(decoder, *((sequences[case], 4, text[4:]) for case, text in texts.items()))
    start = 0
    for case, text in texts.items():
        end = start + len(text) - 4
        assert_close(out[start:end], logits_of(models[case], text)[4:])
        decoder.drop(sequences[case])
        start = end
    for case, text in texts.items():
        out = append(decoder, (forks[case], 12, text[12:]))
        assert_close(out, logits_of(models[case], text)[12:])


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4_dynamic", "int8_g32"])
def test_bits_do_not_depend_on_the_batch(format, base, native_engine):
    everyone = [adapt(base, case) for case in CASES]
    text = text_of(24)
    decoder = NativeDecoder.from_model(base, format)
    assert have_same_bits(whole(decoder, text), whole(NativeDecoder.from_model(base, format), text))
    plain = whole(decoder, text)
    alone = []
    for adapted in everyone:
        sequence = add(decoder, adapted)
        alone.append(append(decoder, (sequence, 0, text)))
        decoder.drop(sequence)
    sequences = [decoder.add_sequence(), *(add(decoder, adapted) for adapted in everyone)]
    twins = [decoder.fork(sequence) for sequence in sequences]
    steps = [
        append(decoder, *((s, first, text[first:end]) for s in (*reversed(twins), *sequences)))
        for first, end in ((0, 5), (5, 6), (6, 24))
    ]
    for i, expected in enumerate([plain, *alone]):
        for place in (len(twins) - 1 - i, len(twins) + i):
            parts = [out.reshape(2 * len(twins), -1, out.shape[1])[place] for out in steps]
            assert have_same_bits(np.concatenate(parts), expected)


def test_hidden_and_logprobs(base, decoder):
    adapted = adapt(base, "lora")
    text = text_of(20)
    tokens = torch.tensor([text])
    with torch.no_grad():
        hidden = adapted.model.hidden(tokens)[0]
        logprobs = adapted.model(tokens)[0].log_softmax(-1)
    assert_close(append(decoder, (add(decoder, adapted), 0, text), output="hidden"), hidden)
    targets = text[1:] + text[:1]
    sequence = add(decoder, adapted)
    out = append(decoder, (sequence, 0, text), output="logprob_of", targets=targets)
    assert_close(out, logprobs[torch.arange(20), targets])


def test_matrices_that_lost_all_their_ranks(base, decoder, tmp_path):
    trained = adapt(base, "adalora")
    with torch.no_grad():
        for name, singular in trained.trainable_parameters().items():
            if name.endswith("singular"):
                trained.is_kept[name.removesuffix(".delta.singular")][:] = ".1." in name
                singular.mul_(".1." in name)
    trained.save(tmp_path)
    loaded = methods.load(tmp_path, copy.deepcopy(base))
    text = text_of(20)
    expected = logits_of(trained.model, text)
    assert_close(logits_of(loaded.model, text).numpy(), expected)
    assert_close(append(decoder, (add(decoder, loaded), 0, text)), expected)


def test_a_prefix_takes_no_positions(base, decoder):
    """A sequence with a prefix holds as many tokens as one without."""
    adapted = adapt(base, "long_prefix")
    text = text_of(base.config.max_seq_len)
    sequence = add(decoder, adapted)
    assert_close(append(decoder, (sequence, 0, text)), logits_of(adapted.model, text))
    with pytest.raises(ValueError, match="at most 64"):
        append(decoder, (sequence, len(text), [1]))
    with pytest.raises(ValueError, match="64"):
        decoder.truncate(sequence, 65)


def test_a_sliding_window_counts_a_prefix(native_engine):
    base = make_model(**LLAMA_STYLE, sliding_window=9)
    adapted = adapt(base, "prefix")
    text = text_of(30)
    expected = logits_of(adapted.model, text)
    for decoder in (NativeDecoder.from_model(base), TorchDecoder(base)):
        assert_close(append(decoder, (add(decoder, adapted), 0, text)), expected)


def test_a_torch_decoder_of_the_model_itself(base):
    """As samples are drawn while it trains."""
    text = text_of(20)
    for case in CASES:
        adapted = adapt(base, case)
        decoder = TorchDecoder(adapted.model)
        assert_close(one_by_one(decoder, text), logits_of(adapted.model, text))
        with pytest.raises(ValueError, match="fine-tuning has additions"):
            decoder.add_adapter(Adapter({}))


def test_errors(base, decoder):
    C = base.config.n_embd
    thin = np.zeros((2, C), np.float32)
    for adapter, message in (
        ({"blocks.9.qkv": LowRank(thin, thin.T)}, "blocks.9.qkv, which the model does not have"),
        ({"blocks.0.attn_out": LowRank(thin, thin)}, r"blocks.0.attn_out.up must be \(\d+, 2\)"),
        ({"blocks.0.qkv": Bottleneck(thin, thin[0], thin.T, thin[0])}, "for attn_out and mlp_out"),
        (
            {"blocks.0.mlp_out": Bottleneck(thin, thin[0], thin.T, thin[0])},
            r"down_bias must be \(2,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.add_adapter(Adapter(adapter))
    with pytest.raises(ValueError, match="there is no adapter 0: add_adapter gives its number"):
        decoder.add_sequence(adapter=0)
    with pytest.raises(ValueError, match="prefix: keys must be"):
        decoder.add_sequence(prefix=Prefix(np.zeros((1, 2, 3, 4)), np.zeros((1, 2, 3, 4))))


def test_a_prefix_for_which_there_is_no_page(base, native_engine):
    decoder = NativeDecoder.from_model(base, num_blocks=2)
    prefix, _ = adapt(base, "long_prefix").additions()
    with pytest.raises(CacheFull):
        decoder.add_sequence(prefix=prefix)
    assert decoder.num_free_blocks == 2
    text = text_of(32)
    assert_close(whole(decoder, text), logits_of(base, text))
