"""Adapters and prefixes on the CUDA engine: the logits of the model that they hang on, with the same bits in whatever company."""

import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate
from native_helpers import LLAMA, append, have_same_bits, logits_of, make_model, text_of, whole

from leangpt.decoding.adapter import Adapter, LowRank
from leangpt.decoding.cuda_decoder import CudaDecoder
from leangpt.decoding.decoder import CacheFull
from leangpt.decoding.native_decoder import pack_model
from leangpt.finetune import methods
from leangpt.kernels import decode

pytestmark = pytest.mark.usefixtures("native_engine")

BASES = {
    "gpt2": {"n_head": 3, "n_embd": 30, "n_inner": 75},  # no multiples of 16
    "llama": {
        **{"n_head": 4, "n_kv_head": 2, "n_embd": 40, "n_inner": 75, **LLAMA},
        **{"qk_norm": True, "value_residual": True},
    },
}
CASES = {
    "lora": ("lora", {"rank": 3}),
    "lora_of_some": ("lora", {"rank": 17, "targets": ("mlp_in", "attn_out")}),
    "adapter": ("adapter", {"width": 7}),
    "prefix": ("prefix", {"length": 5}),
    "long_prefix": ("prefix", {"length": 33, "reparametrization": 12}),
}


@pytest.fixture(autouse=True)
def _engine(request) -> None:
    if decode.cuda_obstacle() is not None:
        request.getfixturevalue("emulated")


@pytest.fixture(params=BASES)
def base(request):
    """Its weights are those of bfloat16."""
    return make_model(**BASES[request.param]).bfloat16().float()


def make(base, format: str = "bf16", **options) -> CudaDecoder:
    return CudaDecoder(pack_model(base, format), **{"num_blocks": 90} | options)


def adapt(base, case: str) -> methods.Adapted:
    """A copy of the base with a method whose every parameter is far from its start."""
    name, options = CASES[case]
    adapted = methods.create(name, **options).attach(copy.deepcopy(base))
    with torch.no_grad():
        for p in adapted.trainable_parameters().values():
            p.normal_(std=0.2)
    return adapted


def add(decoder: CudaDecoder, adapted: methods.Adapted) -> int:
    prefix, adapter = adapted.additions()
    number = None if adapter is None else decoder.add_adapter(adapter)
    return decoder.add_sequence(prefix=prefix, adapter=number)


def logits_in(adapted: methods.Adapted, text: list[int], dtype: torch.dtype) -> torch.Tensor:
    return logits_of(copy.deepcopy(adapted).model.to(dtype), text)


@pytest.mark.parametrize("case", CASES)
def test_accuracy(case, base):
    """By the error rule, against the adapted model in float64."""
    adapted, text = adapt(base, case), text_of(40)
    assert (logits_of(adapted.model, text) - logits_of(base, text)).abs().max() > 0.1
    decoder = make(base)
    sequence = add(decoder, adapted)
    pieces = [append(decoder, (sequence, 0, text[:7])), append(decoder, (sequence, 7, text[7:36]))]
    pieces += [append(decoder, (sequence, i, text[i : i + 1])) for i in range(36, 40)]
    truth = logits_in(adapted, text, torch.float64)
    baseline = logits_in(adapted, text, torch.bfloat16).float()
    assert_as_accurate(torch.from_numpy(np.concatenate(pieces)), truth, baseline)


@pytest.mark.parametrize("format", ["bf16", "int4_asym"])
def test_bits_do_not_depend_on_the_batch(format, base):
    """Base, adapters and prefixes side by side, in steps of many tokens and of one each, with graphs and without."""
    everyone = [adapt(base, case) for case in CASES]
    text = text_of(20)
    plain_decoder, decoder = make(base, format), make(base, format)
    plain = whole(plain_decoder, text)
    assert have_same_bits(whole(decoder, text), plain)
    alone = []
    for adapted in everyone:
        sequence = add(decoder, adapted)
        alone.append(append(decoder, (sequence, 0, text)))
        decoder.drop(sequence)
    assert have_same_bits(whole(decoder, text), plain)
    sequences = [decoder.add_sequence(), *(add(decoder, adapted) for adapted in everyone)]
    twins = [decoder.fork(sequence) for sequence in sequences]
    cuts = [0, 5, 6, 15, 16, 17, 20]
    steps = [
        append(decoder, *((s, first, text[first:end]) for s in (*reversed(twins), *sequences)))
        for first, end in itertools.pairwise(cuts)
    ]
    assert decoder.num_graphs > 0
    for i, expected in enumerate([plain, *alone]):
        for place in (len(twins) - 1 - i, len(twins) + i):
            parts = [out.reshape(2 * len(twins), -1, out.shape[1])[place] for out in steps]
            assert have_same_bits(np.concatenate(parts), expected)


@pytest.mark.usefixtures("schedule")
def test_order_of_threads():
    base = make_model(**BASES["llama"])
    adapted = [adapt(base, case) for case in ("lora", "adapter")]
    text, decoder = text_of(9), make(base)
    alone = [append(decoder, (add(decoder, a), 0, text)) for a in adapted]
    a, b = (add(decoder, a) for a in adapted)
    together = [append(decoder, (a, i, [token]), (b, i, [token])) for i, token in enumerate(text)]
    assert have_same_bits(np.stack(together, axis=1)[0], alone[0])
    assert have_same_bits(np.stack(together, axis=1)[1], alone[1])


def test_graphs_know_of_adapters_that_come_later():
    base = make_model(**BASES["llama"])
    adapted, text, decoder = adapt(base, "adapter"), text_of(12), make(base)
    expected = append(decoder, (add(decoder, adapted), 0, text))
    sequence = add(decoder, adapt(base, "lora"))
    for i in range(4):
        append(decoder, (sequence, i, [text[i]]))
    late = add(decoder, adapted)
    for i, token in enumerate(text):
        out = append(decoder, (late, i, [token]), (sequence, 4 + i, [token]), rows=[0])
        assert have_same_bits(out, expected[i : i + 1])


@pytest.mark.parametrize("kv_dtype", ["float16", "int8", "float8_e4m3"])
def test_prefixes_in_other_caches(kv_dtype):
    """A prefix has the bits that its keys and values have as tokens' own: in one piece or forked."""
    base = make_model(**BASES["gpt2"])
    adapted, text = adapt(base, "long_prefix"), text_of(20)
    decoder = make(base, kv_dtype=kv_dtype)
    sequence = add(decoder, adapted)
    twin = decoder.fork(sequence)
    out = append(decoder, (sequence, 0, text))
    assert (torch.from_numpy(out) - logits_of(adapted.model, text)).abs().max() < 1.0
    steps = [append(decoder, (twin, i, [token])) for i, token in enumerate(text)]
    assert have_same_bits(np.concatenate(steps), out)


def test_a_prefix_takes_no_positions(base):
    adapted, text = adapt(base, "long_prefix"), text_of(base.config.max_seq_len)
    decoder = make(base)
    sequence = add(decoder, adapted)
    out = append(decoder, (sequence, 0, text[:60]))
    steps = [append(decoder, (sequence, i, [text[i]])) for i in range(60, 64)]
    truth = logits_in(adapted, text, torch.float64)
    baseline = logits_in(adapted, text, torch.bfloat16).float()
    assert_as_accurate(torch.from_numpy(np.concatenate([out, *steps])), truth, baseline)
    with pytest.raises(ValueError, match="at most 64"):
        append(decoder, (sequence, len(text), [1]))
    decoder.truncate(sequence, 30)
    assert have_same_bits(append(decoder, (sequence, 30, text[30:60])), out[30:])


def test_a_sliding_window_counts_a_prefix():
    base = make_model(**BASES["llama"], sliding_window=9).bfloat16().float()
    adapted, text, decoder = adapt(base, "prefix"), text_of(30), make(base)
    out = torch.from_numpy(append(decoder, (add(decoder, adapted), 0, text)))
    baseline = logits_in(adapted, text, torch.bfloat16).float()
    assert_as_accurate(out, logits_in(adapted, text, torch.float64), baseline)


def test_errors():
    base = make_model(**BASES["gpt2"])
    decoder = make(base, num_blocks=2)
    thin = np.zeros((2, 30), np.float32)
    with pytest.raises(ValueError, match="blocks.9.qkv, which the model does not have"):
        decoder.add_adapter(Adapter({"blocks.9.qkv": LowRank(thin, thin.T)}))
    with pytest.raises(ValueError, match="there is no adapter 0: add_adapter gives its number"):
        decoder.add_sequence(adapter=0)
    prefix, _ = adapt(base, "long_prefix").additions()
    with pytest.raises(CacheFull):
        decoder.add_sequence(prefix=prefix)
    assert decoder.num_free_blocks == 2


@pytest.mark.usefixtures("emulated")
def test_an_adapter_for_which_there_is_no_memory(cuda):
    base = make_model(**BASES["gpt2"])
    decoder = make(base)
    _, adapter = adapt(base, "lora").additions()
    with cuda.settings(memory_bytes=1 << 10), pytest.raises(RuntimeError, match="out of memory"):
        decoder.add_adapter(adapter)
    number, text = decoder.add_adapter(adapter), text_of(5)
    assert number == 0
    append(decoder, (decoder.add_sequence(adapter=number), 0, text))
