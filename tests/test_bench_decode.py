"""The benchmark of decoding: it measures what it says, compares like with like, and does not time what is wrong."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from leangpt import GPT, GPTConfig
from leangpt.decoding.native_decoder import NativeDecoder
from leangpt.kernels import decode
from leangpt.pretrained import save_pretrained

sys.path.append(str(ROOT / "benchmarks"))
import bench_decode
import peers

GPT2 = GPTConfig(vocab_size=300, max_seq_len=64, n_layer=2, n_head=2, n_embd=32)
LLAMA = GPTConfig(
    vocab_size=300,
    max_seq_len=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    n_inner=40,  # no multiple of a panel
    norm="rms_norm",
    position="rotary",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
PROMPT = list(range(3, 35))


@pytest.fixture
def engine(in_ci):
    if decode.unavailable_reason:
        assert not in_ci, f"CI must test the engine: {decode.unavailable_reason}"
        pytest.skip(decode.unavailable_reason)


def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_dequantised_model_is_the_model_in_fp32_and_near_it_in_int8(config):
    model = GPT(config).eval()
    for format, tolerance in (("fp32", 0.0), ("int8", 0.01)):
        packed = NativeDecoder.from_model(model, format=format).packed
        result = bench_decode.dequantised(packed, model)
        for (name, old), new in zip(model.named_parameters(), result.parameters(), strict=True):
            assert (old - new).abs().max() <= tolerance * old.abs().max(), name
        changed = any(
            not torch.equal(a, b)
            for a, b in zip(model.parameters(), result.parameters(), strict=True)
        )
        assert changed == (format == "int8")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("format", bench_decode.FORMATS)
def test_logit_error_tells_right_from_wrong(format):
    model = GPT(GPT2).eval()
    decoder = NativeDecoder.from_model(model, format=format.removesuffix("_screen"))
    reference = bench_decode.dequantised(decoder.packed, model)
    limit = bench_decode.own_limit(format)
    assert bench_decode.logit_error(decoder, reference, PROMPT) <= limit
    damaged = copy.deepcopy(reference)
    with torch.no_grad():
        damaged.blocks[1].attn_out.weight.mul_(-20)
    assert bench_decode.logit_error(decoder, damaged, PROMPT) > limit


def test_greedy_gap_is_zero_for_the_greedy_text_only():
    model = GPT(GPT2).eval()
    text = greedy(model, PROMPT, 6)
    assert bench_decode.greedy_gap(model, PROMPT, text) <= 1e-5
    text[3] = (text[3] + 1) % GPT2.vocab_size
    assert bench_decode.greedy_gap(model, PROMPT, text) > 1e-2


def test_plain_pytorch_peer_gives_the_greedy_text(tmp_path):
    model = GPT(GPT2).eval()
    save_pretrained(model, tmp_path / "hf", format="hf")
    prompts = [PROMPT, PROMPT[::-1]]
    peer = peers.PyTorch("fp32", tmp_path, 1)
    _, _, texts = peer.generate(prompts, 6)
    assert texts == [greedy(model, prompt, 6) for prompt in prompts]
    C, V = GPT2.n_embd, GPT2.vocab_size
    assert peer.weight_bytes == 4 * (V * C + GPT2.n_layer * 12 * C * C)


def test_safetensors_are_read_without_the_package(tmp_path):
    model = GPT(GPT2)
    save_pretrained(model, tmp_path, format="hf")
    tensors = peers.read_safetensors(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("wte.weight"))
    assert np.array_equal(tensors[name], model.wte.weight.detach().numpy())


def test_every_variant_has_a_precision():
    for engine in peers.ENGINES.values():
        for variant in engine.variants:
            assert bench_decode.precision_of(variant) in bench_decode.PEER_GAPS
    for format in ("fp32", "bf16", "int8_g64_dynamic", "int4_asym_g128"):
        assert bench_decode.precision_of(format) == format.partition("_")[0]


def test_ratios_are_to_the_fastest_peer_of_the_same_precision():
    speeds = [
        ("leangpt", "int8", 30.0),
        ("a", "int8", 10.0),
        ("b", "int8", 20.0),
        ("a", "fp32", 100.0),
        ("leangpt", "int4", 50.0),
    ]
    rows = bench_decode._ranked([{"engine": e, "weights": w, "speed": s} for e, w, s in speeds])
    ratios = {(row["engine"], row["weights"]): row["vs peer"] for row in rows}
    assert ratios["leangpt", "int8"] == 1.5
    assert ratios["b", "int8"] == 1.0
    assert np.isnan(ratios["leangpt", "int4"])  # no peer ran


@pytest.mark.usefixtures("engine")
def test_run_ends_with_one_json_document(tmp_path):
    options = [
        "--model",
        "tiny",
        "--formats",
        "int8_dynamic,fp32_screen",
        "--cases",
        "start,decode-32,ragged",
    ]
    options += ["--rounds", "1", "--threads", "1", "--plot", tmp_path / "bars.png"]
    script = ROOT / "benchmarks" / "bench_decode.py"
    run = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    found = [(row["case"], row["variant"]) for row in document["rows"]]
    assert sorted(found) == [
        ("decode-32", "fp32_screen"),
        ("decode-32", "int8_dynamic"),
        ("ragged", "int8_dynamic"),
        ("start", "fp32_screen"),
        ("start", "int8_dynamic"),
    ]
    assert all(row.get("tokens/s", 1) > 0 for row in document["rows"])
    assert document["errors"] == {}
    assert document["checks"]["leangpt int8_dynamic"]["greedy_gap"] < 0.6
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
