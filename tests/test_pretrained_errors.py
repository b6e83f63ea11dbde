"""Model files that are damaged, hostile or not for this engine: one clear error each, and no code of theirs runs."""

import contextlib
import json
import os
import pickle
import random
import struct
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from leangpt import GPT, GPTConfig
from leangpt.pretrained import load_model, resolve_model, save_pretrained

GPT2 = GPTConfig(vocab_size=37, max_seq_len=8, n_layer=2, n_head=2, n_embd=8)
LLAMA = GPTConfig(
    vocab_size=37,
    max_seq_len=8,
    n_layer=2,
    n_head=2,
    n_embd=8,
    n_inner=12,
    norm="rms_norm",
    position="rotary",
    activation="swiglu",
    bias=False,
)


def save(config: GPTConfig, folder: Path, **options: str) -> Path:
    save_pretrained(GPT(config), folder, **options)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def gpt2(tmp_path):
    return save(GPT2, tmp_path / "gpt2")


@pytest.fixture
def llama(tmp_path):
    return save(LLAMA, tmp_path / "llama")


@pytest.fixture
def native(tmp_path):
    return save(GPT2, tmp_path / "native", format="native")


def edit(folder: Path, **changes: object) -> None:
    """Change config.json: `...` removes a key; in the own format the options are those of the model."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    target = values.get("config", values)
    target.update(changes)
    for key in [k for k, v in changes.items() if v is ...]:
        del target[key]
    path.write_text(json.dumps(values))


# options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx must be False",
        ),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn must be False, got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"activation_function": "silu"}, "activation_function must be one of .*got 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None, got"),
        ({"n_layer": ...}, "n_layer is missing"),
        ({"n_layer": "2"}, "n_layer must be int, got '2'"),
        ({"n_layer": True}, "n_layer must be int, got True"),
        ({"n_layer": 2.0}, "n_layer must be int, got 2.0"),
        ({"n_head": 3}, r"config.json: n_embd \(8\) must be a multiple of n_head \(3\)"),
        ({"n_embd": -8}, "config.json: n_embd must be positive, got -8"),
        ({"n_layer": 10**12}, "n_layer is 1000000000000, but there are 28 tensors"),
        ({"vocab_size": 10**30}, "no model can be built from its config"),
        ({"n_embd": 10**15}, "no model can be built from its config"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be bool, got 'yes'"),
        ({"layer_norm_epsilon": []}, r"layer_norm_epsilon must be float, got \[\]"),
        ({"vocab_size": 38}, r"transformer.wte.weight must be \(38, 8\), got \(37, 8\)"),
        ({"n_positions": 9}, r"transformer.wpe.weight must be \(9, 8\), got \(8, 8\)"),
        ({"n_layer": 1}, r"unexpected tensor transformer.h.1.attn.* and 7 more"),
        ({"n_layer": 3}, r"missing tensor transformer.h.2.attn.* and 7 more"),
        ({"tie_word_embeddings": False}, "missing tensor lm_head.weight"),
        ({"architectures": ["BertModel"]}, "must be one of GPT2LMHeadModel, .*got 'BertModel'"),
        ({"architectures": [["x"]]}, "must be one of GPT2LMHeadModel, .*got "),
        ({"architectures": [], "model_type": "t5"}, "must be one of GPT2LMHeadModel, .*got 't5'"),
        ({"architectures": ..., "model_type": ...}, "must be one of GPT2LMHeadModel, .*got ''"),
        ({"architectures": "GPT2LMHeadModel"}, "architectures must be list, got 'GPT2"),
    ],
    ids=str,
)
def test_gpt2_config(changes, message, gpt2):
    edit(gpt2, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_model(gpt2)
    assert str(gpt2) in str(error.value)


QWEN = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        ({"attention_bias": True}, "mlp_bias must be True, got False"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
            "attention_bias must be False, got True",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "num_key_value_heads": ...},
            "num_key_value_heads is missing",
        ),
        ({"num_key_value_heads": 3}, r"n_head \(2\) must be a multiple of n_kv_head \(3\)"),
        ({"head_dim": 3}, "rotary positions need an even head_dim, got 3"),
        ({"head_dim": 6}, r"q_proj.weight must be \(12, 8\), got \(8, 8\)"),
        ({"intermediate_size": 14}, r"mlp.gate_proj.weight must be \(14, 8\), got \(12, 8\)"),
        ({**QWEN, "max_window_layers": 1}, "the same for all layers, got 1 of 2 layers with it"),
        ({**QWEN, "layer_types": ["full_attention", "sliding_attention"]}, "got 1 of 2 layers"),
        ({"rope_theta": "big"}, "rope_theta must be float, got 'big'"),
        ({"rope_theta": 0}, "rope_theta must be positive, got 0"),
        ({"rope_scaling": [1]}, r"rope_scaling must be dict, got \[1\]"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling: rope_type must be one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        ({"rope_parameters": {"type": "longrope"}}, "rope_parameters: rope_type .*got 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be float, got '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1, got 0.5"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}},
            "rope_scaling: mscale has no meaning for yarn",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate must be True, got False",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0},
            "no model can be built from its config",
        ),
        (
            {"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}},
            "rope_parameters must be the same for all layers",
        ),
    ],
    ids=str,
)
def test_llama_config(changes, message, llama):
    edit(llama, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_model(llama)
    assert str(llama) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": "2"}, "config.json: config: n_layer must be int, got '2'"),
        ({"n_kv_head": 1.0}, r"n_kv_head must be int \| None, got 1.0"),
        ({"bias": "false"}, "bias must be bool, got 'false'"),
        ({"norm": "batch_norm"}, "norm must be .*got 'batch_norm'"),
        ({"norm": ["rms_norm"]}, "norm must be "),
        ({"colour": "red"}, "unknown model option: colour"),
        ({"dropout": 2}, r"dropout must be in \[0, 1\), got 2"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling: factor must be float"),
        ({"rope_scaling": {"type": "linear"}}, "config.json: config: .*factor"),
        ({"rope_scaling": 3}, "rope_scaling must be "),
        ({"n_inner": 7}, r"blocks.0.mlp_in.weight must be \(7, 8\), got \(32, 8\)"),
    ],
    ids=str,
)
def test_native_config(changes, message, native):
    edit(native, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(native)


@pytest.mark.parametrize("version", [None, 2, "1"])
def test_format_version_of_the_future(version, native):
    values = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps(values | {"format_version": version}))
    with pytest.raises(ValueError, match=f"format_version must be 1, got {version!r}"):
        load_model(native)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\xff\xfe"])
def test_config_that_is_no_json_object(text, gpt2):
    (gpt2 / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"config.json: (not a valid JSON|must hold named options)"
    ):
        load_model(gpt2)


def test_embedding_and_head_that_are_tied_but_differ(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight must equal model.embed_tokens.weight"):
        load_model(llama)


# weights


def header(values: object) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n"
FILES = {
    "empty": b"",
    "absurd header": struct.pack("<Q", 2**63) + b"{}",
    "huge header": struct.pack("<Q", 10**9) + b"{}" * 100,
    "header is no JSON": struct.pack("<Q", 4) + b"abcd",
    "header is a list": header([1]),
    "offsets beyond the end": header(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    ),
    "offsets below zero": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "shape overflows": header(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}
    ),
    "unknown dtype": header({"a": {"dtype": "X1", "shape": [1], "data_offsets": [0, 4]}}) + b"abcd",
    "Git LFS pointer": LFS,
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_safetensors(kind, gpt2):
    (gpt2 / "model.safetensors").write_bytes(FILES[kind])
    with pytest.raises(
        ValueError, match=r"model.safetensors: truncated, damaged or not a safetens"
    ):
        load_model(gpt2)


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.999])
def test_truncated_safetensors(part, native):
    content = (native / "model.safetensors").read_bytes()
    (native / "model.safetensors").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated, damaged"):
        load_model(native)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.ln_f.weight": None}, "missing tensor transformer.ln_f.weight"),
        ({"transformer.x": torch.zeros(1)}, "unexpected tensor transformer.x"),
        (
            {"transformer.h.1.attn.c_attn.weight": torch.zeros(24, 8)},
            r"transformer.h.1.attn.c_attn.weight must be \(8, 24\), got \(24, 8\)",
        ),
        ({"transformer.ln_f.weight": torch.zeros(())}, r"must be \(8,\), got \(\)"),
        ({"transformer.ln_f.weight": torch.zeros(8, dtype=torch.int8)}, "got torch.int8"),
        (
            {"transformer.ln_f.weight": torch.zeros(8).to(torch.float8_e4m3fn)},
            "ln_f.weight must be a dense tensor .* got torch.float8_e4m3fn",
        ),
    ],
    ids=str,
)
def test_wrong_tensors(change, message, gpt2):
    tensors = load_file(gpt2 / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, gpt2 / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_model(gpt2)
    assert str(gpt2) in str(error.value)


def test_no_weights(gpt2):
    (gpt2 / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights, looked for model.safetensors, .*bin"):
        load_model(gpt2)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([], ValueError, "weight_map must give each tensor's file in this folder"),
        ({"weight_map": ["a"]}, ValueError, "weight_map must give"),
        ({"weight_map": {"a": 3}}, ValueError, "weight_map must give"),
        ({"weight_map": {"a": "../x.safetensors"}}, ValueError, "weight_map must give"),
        ({"weight_map": {"a": "/etc/passwd"}}, ValueError, "weight_map must give"),
        ({"weight_map": {"a": ".."}}, FileNotFoundError, "missing"),
        ({"weight_map": {"a": "gone.safetensors"}}, FileNotFoundError, "gone.safetensors: missing"),
        ({"weight_map": {"a": "x.safetensors"}}, ValueError, "no file holds a"),
    ],
    ids=str,
)
def test_wrong_index(index, error, message, gpt2):
    (gpt2 / "model.safetensors").rename(gpt2 / "x.safetensors")
    (gpt2 / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        load_model(gpt2)


def test_bytes_flipped_anywhere(native):
    """Damage is an error that a user is meant to see, or it is not noticeable in the file; it is never a crash."""
    path = native / "model.safetensors"
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        damaged[draw.randrange(size)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            load_model(native)


# pickles


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def hostile(path: Path, marker: Path, content: object, kind: str) -> None:
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content | {"x": Bomb(marker)}))
    else:
        torch.save(
            content | {"x": Bomb(marker)}, path, _use_new_zipfile_serialization=kind == "zip"
        )


@pytest.mark.parametrize("kind", ["zip", "before-1.6", "plain pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_no_pickle_is_executed(name, kind, tmp_path):
    marker = tmp_path / "executed"
    folder = tmp_path / "model"
    if name == "ckpt.pt":
        folder.mkdir()
    else:
        save(GPT2, folder)
        (folder / "model.safetensors").unlink()
    hostile(folder / name, marker, {"model_args": {}, "model": {}}, kind)
    with pytest.raises(ValueError, match=rf"{name}: (refused|truncated or damaged)") as error:
        load_model(folder)
    assert "weights_only=False" not in str(error.value)  # PyTorch's advice
    assert not marker.exists()
    # the bomb is live: only weights_only stops it
    if kind == "plain pickle":
        pickle.loads((folder / name).read_bytes())
    else:
        torch.load(folder / name, weights_only=False)
    assert marker.exists()


def test_refusal_says_what_the_pickle_asked_for(tmp_path):
    hostile(tmp_path / "ckpt.pt", tmp_path / "executed", {"model": {}}, "zip")
    with pytest.raises(ValueError, match=r"refused, it asks for \w+\.mkdir;.*convert it to safete"):
        load_model(tmp_path)


NANOGPT = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 37}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ([1], "must hold named options, got list"),
        ({"model": {}}, "model_args is missing"),
        ({"model_args": NANOGPT}, "model is missing"),
        ({"model_args": NANOGPT, "model": [1]}, "model must be dict, got"),
        ({"model_args": NANOGPT, "model": {"a": 1}}, "'a' must be a tensor, got int"),
        ({"model_args": NANOGPT, "model": {3: torch.ones(1)}}, "3 must be a tensor"),
        ({"model_args": {"n_layer": 2}, "model": {}}, "model_args: vocab_size is missing"),
        ({"model_args": NANOGPT | {"n_head": "2"}, "model": {}}, "n_head must be int, got '2'"),
        (
            {"model_args": NANOGPT | {"n_head": 3}, "model": {}},
            r"must be a multiple of n_head \(3\)",
        ),
        (
            {"model_args": NANOGPT, "model": {f"x{i}": torch.ones(1) for i in range(3)}},
            "missing tensor transformer.h.0.attn.* and 23 more",
        ),
    ],
    ids=str,
)
def test_wrong_nanogpt_checkpoint(checkpoint, message, tmp_path):
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert str(tmp_path / "ckpt.pt") in str(error.value)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before-1.6"])
def test_bytes_of_a_pickle_flipped_anywhere(is_zip, gpt2):
    path = gpt2 / "pytorch_model.bin"
    torch.save(load_file(gpt2 / "model.safetensors"), path, _use_new_zipfile_serialization=is_zip)
    (gpt2 / "model.safetensors").unlink()
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(
            damaged[: draw.randrange(len(damaged))] if draw.random() < 0.3 else damaged
        )
        with contextlib.suppress(ValueError):
            load_model(gpt2)


# names


def test_name_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("./gone", "/gone/model", "a/b/c", "what is this", "../x"):
        with pytest.raises(FileNotFoundError, match="no such folder, nor a name of the hub"):
            resolve_model(name)
    for name in ("org/gone", "gone", "org/--x..y"):
        with pytest.raises(
            FileNotFoundError, match=f"^{name}: no such folder, and the Hugging Face hub did not"
        ):
            resolve_model(name)


def test_folder_of_nothing(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"holds none of config.json, best.json, checkpoints"
    ):
        resolve_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="a run without a checkpoint yet"):
        resolve_model(tmp_path)
    (tmp_path / "best.json").write_text('{"checkpoint": "checkpoints/step-00000003"}')
    with pytest.raises(
        FileNotFoundError, match="step-00000003: a checkpoint must hold config.json"
    ):
        resolve_model(tmp_path)
    (tmp_path / "best.json").write_text('{"checkpoint": 3}')
    with pytest.raises(ValueError, match="best.json: checkpoint must be str, got 3"):
        resolve_model(tmp_path)


def test_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes.txt: (refused|truncated or damaged)"):
        load_model(tmp_path / "notes.txt")


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "float", "cuda", "nn"])
def test_dtype_that_is_none(dtype, gpt2):
    with pytest.raises(
        ValueError, match="dtype must be one of float64, float32, bfloat16, float16"
    ):
        load_model(gpt2, dtype=dtype)


def test_save_errors(tmp_path):
    with pytest.raises(ValueError, match="format must be 'auto', 'hf' or 'native', got 'onnx'"):
        save(GPT2, tmp_path / "x", format="onnx")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file: must be a folder, got a file"):
        save(GPT2, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_attention_dropout_is_lost_with_a_warning(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(llama)
    edit(llama, attention_dropout=0.1)
    with pytest.warns(UserWarning, match="attention_dropout alone cannot be expressed"):
        load_model(llama)
