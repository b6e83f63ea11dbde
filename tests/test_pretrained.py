"""Model folders: formats, names, and what saving leaves alone. Parity with transformers is in test_parity.py."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from leangpt import GPT, GPTConfig, RopeScaling
from leangpt.kernels import use_backend
from leangpt.pretrained import load_model, resolve_model, save_pretrained
from leangpt.pretrained.huggingface import GPT2_MODULES
from leangpt.pretrained.layout import Names, parts

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GPT2 = GPTConfig(vocab_size=97, max_seq_len=24, n_layer=2, n_head=3, n_embd=24)
LLAMA = GPTConfig(
    vocab_size=97,
    max_seq_len=24,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=24,
    head_dim=8,
    n_inner=40,
    norm="rms_norm",
    position="rotary",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
ODD = dataclasses.replace(
    LLAMA, activation="relu2", sliding_window=5, qk_norm=True, bias=True, qkv_bias=False
)
TOKENS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For such small models the threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def _on_the_reference() -> Iterator[None]:
    """What is read is tested, on the ops of transformers: with weights of mean 0.5, float32 errs by as much as the bounds."""
    with use_backend("reference"):
        yield


def random_model(config: GPTConfig) -> GPT:
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def logits(name: object, **options: object) -> torch.Tensor:
    return load_model(name, **options)(TOKENS).detach()  # type: ignore[arg-type]


def their_logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits.detach()


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        values.pop(key, None)
        if value is not ...:
            values[key] = value
    (folder / "config.json").write_text(json.dumps(values))


# the own format, and which format is chosen


@pytest.mark.parametrize("config", [GPT2, LLAMA, ODD], ids=["gpt2", "llama", "odd"])
def test_native_round_trip(config, tmp_path):
    model = random_model(config)
    save_pretrained(model, tmp_path / "new" / "model", format="native")
    assert json.loads((tmp_path / "new/model/config.json").read_text())["model_type"] == "leangpt"
    back = GPT.from_pretrained(str(tmp_path / "new" / "model"))
    assert back.config == config
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())
    assert torch.equal(back(TOKENS), model(TOKENS))


def test_native_keeps_rope_scaling(tmp_path):
    scaling = RopeScaling("yarn", 4.0, original_max_seq_len=8, attention_factor=1.5)
    config = dataclasses.replace(LLAMA, rope_scaling=scaling)
    save_pretrained(random_model(config), tmp_path, format="native")
    assert load_model(tmp_path).config == config


NATIVE_ONLY = {
    "position='learned'": dataclasses.replace(LLAMA, position="learned"),
    "activation='relu2'": dataclasses.replace(LLAMA, activation="relu2"),
    "bias=True": dataclasses.replace(LLAMA, bias=True, qk_norm=True),
    "qkv_bias=True": dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True),
    "sliding_window=5": dataclasses.replace(LLAMA, bias=True, sliding_window=5),
    "head_dim=8": dataclasses.replace(LLAMA, bias=True, n_embd=22),
    "position='rotary'": dataclasses.replace(GPT2, position="rotary"),
    "activation='swiglu'": dataclasses.replace(GPT2, activation="swiglu"),
    "n_kv_head=1": dataclasses.replace(GPT2, n_kv_head=1),
    "head_dim=16": dataclasses.replace(GPT2, head_dim=16),
    "qk_norm=True": dataclasses.replace(GPT2, qk_norm=True),
    "value_residual=True": dataclasses.replace(LLAMA, value_residual=True),
}


@pytest.mark.parametrize("option", NATIVE_ONLY)
def test_hf_names_the_option_in_the_way_and_auto_goes_native(option, tmp_path):
    model = random_model(NATIVE_ONLY[option])
    with pytest.raises(ValueError, match=f"no Hugging Face architecture has {option} .*'native'"):
        save_pretrained(model, tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()
    save_pretrained(model, tmp_path / "auto")
    assert torch.equal(logits(tmp_path / "auto"), model(TOKENS))


HF_TOO = {
    "GPT2LMHeadModel": GPT2,
    "GPT2LMHeadModel-without-biases": dataclasses.replace(GPT2, bias=False),
    "GPT2LMHeadModel-qkv-bias": dataclasses.replace(GPT2, bias=False, qkv_bias=True),
    "GPT2LMHeadModel-relu2-untied": dataclasses.replace(
        GPT2, activation="relu2", tie_embeddings=False
    ),
    "LlamaForCausalLM": LLAMA,
    "LlamaForCausalLM-biases-but-qkv": dataclasses.replace(LLAMA, bias=True, qkv_bias=False),
    "MistralForCausalLM": dataclasses.replace(LLAMA, sliding_window=5),
    "MistralForCausalLM-odd-n_embd": dataclasses.replace(LLAMA, n_embd=22),
    "Qwen2ForCausalLM": dataclasses.replace(LLAMA, qkv_bias=True, sliding_window=5),
    "Qwen3ForCausalLM": dataclasses.replace(LLAMA, qk_norm=True, sliding_window=5),
}


@pytest.mark.parametrize("name", HF_TOO)
def test_auto_chooses_an_architecture_with_the_same_logits(name, tmp_path):
    model = random_model(HF_TOO[name])
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [name.split("-")[0]]
    torch.testing.assert_close(their_logits(tmp_path), model(TOKENS), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(tmp_path), model(TOKENS), rtol=0, atol=0)


# saving


class FakeTokenizer:
    eos_id, eos_ids, bos_id = 5, (5, 6), 1

    def save(self, folder):
        (folder / "tokenizer.json").write_text("new")


def test_token_ids_of_the_tokenizer_are_written(tmp_path):
    save_pretrained(random_model(LLAMA), tmp_path, FakeTokenizer(), format="hf")
    assert (tmp_path / "tokenizer.json").read_text() == "new"
    generation = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (1, [5, 6])


def test_without_a_tokenizer_no_token_ids_are_invented(tmp_path):
    save_pretrained(random_model(LLAMA), tmp_path, format="hf")
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_keeps_its_other_files(link, tmp_path):
    folder = tmp_path / "real"
    (folder / "sub").mkdir(parents=True)
    for name in ("notes.txt", "sub/data.bin", "vocab.json"):
        (folder / name).write_text("mine")
    stale = (
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "generation_config.json",
        "tokenizer_leangpt.json",
        "tokenizer.json",
    )
    for name in stale:
        (folder / name).write_text("stale")
    if link:
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"

    save_pretrained(random_model(GPT2), folder, FakeTokenizer(), format="native")
    model = random_model(LLAMA)
    save_pretrained(model, folder, FakeTokenizer(), format="native")
    assert torch.equal(logits(folder), model(TOKENS))
    kept = {
        str(p.relative_to(folder)): p.read_text()
        for p in folder.rglob("*")
        if p.is_file() and "model" not in p.name and p.name != "config.json"
    }
    assert kept == {
        "notes.txt": "mine",
        "sub/data.bin": "mine",
        "vocab.json": "mine",
        "tokenizer.json": "new",
    }
    assert not any("index" in p.name or "-of-" in p.name for p in folder.iterdir())
    assert folder.is_symlink() == link


def test_tokenizer_files_stay_where_none_is_given(tmp_path):
    (tmp_path / "tokenizer.json").write_text("mine")
    save_pretrained(random_model(GPT2), tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_failed_save_leaves_the_old_model(tmp_path):
    model = random_model(GPT2)
    save_pretrained(model, tmp_path)

    class Broken(FakeTokenizer):
        def save(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_pretrained(random_model(LLAMA), tmp_path, Broken())
    assert torch.equal(logits(tmp_path), model(TOKENS))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_are_written_and_read_in_the_dtype_asked_for(dtype, tmp_path):
    model = random_model(LLAMA).to(dtype)
    save_pretrained(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    assert load_model(tmp_path).wte.weight.dtype == torch.float32
    for asked in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
        back = load_model(tmp_path, dtype=asked)
        assert {p.dtype for p in back.parameters()} == {dtype}
        assert torch.equal(back(TOKENS), model(TOKENS))


def test_loading_draws_no_random_numbers(tmp_path):
    save_pretrained(random_model(LLAMA), tmp_path)
    before = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_outlives_its_files(tmp_path):
    model = random_model(LLAMA)
    save_pretrained(model, tmp_path / "x")
    back = load_model(tmp_path / "x")
    size = (tmp_path / "x" / "model.safetensors").stat().st_size
    (tmp_path / "x" / "model.safetensors").write_bytes(bytes(size))
    assert torch.equal(back(TOKENS), model(TOKENS))


# Hugging Face's files, new and old


@pytest.fixture
def theirs(tmp_path):
    """A GPT-2 of transformers, its logits, and its folder."""
    config = GPT2Config(vocab_size=97, n_positions=24, n_layer=2, n_head=3, n_embd=24)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    return model, model(TOKENS).logits.detach(), tmp_path / "theirs"


def assert_same_logits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_sharded_safetensors(theirs, tmp_path):
    model, expected, _ = theirs
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert_same_logits(logits(tmp_path / "shards"), expected)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before-1.6"])
def test_pickled_weights(is_zip, theirs):
    model, expected, folder = theirs
    (folder / "model.safetensors").unlink()
    torch.save(
        model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip
    )
    assert_same_logits(logits(folder), expected)


def test_sharded_pickled_weights(theirs):
    model, expected, folder = theirs
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    weight_map = {}
    for number, names in enumerate((list(state)[:9], list(state)[9:])):
        torch.save({n: state[n] for n in names}, folder / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(names, f"pytorch_model-{number}.bin")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_logits(logits(folder), expected)


def test_old_files_without_prefix_and_with_buffers(theirs):
    _, expected, folder = theirs
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(24, 24).tril()[None, None].byte()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, architectures=...)  # then model_type decides
    assert_same_logits(logits(folder), expected)


ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
SPELLINGS = {
    "transformers 4": {"rope_theta": 500.0, "rope_scaling": ROPE},
    "transformers 5": {"rope_parameters": {**ROPE, "rope_theta": 500.0}},
    "for each layer type": {
        "rope_parameters": {
            layer_type: {**ROPE, "rope_theta": 500}
            for layer_type in ("full_attention", "sliding_attention")
        }
    },
    "null and defaults": {
        "rope_theta": 500,
        "rope_scaling": {**ROPE, "attention_factor": None, "partial_rotary_factor": 1.0},
        "rope_parameters": None,
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rope_of_both_major_versions(spelling, tmp_path):
    model = random_model(LLAMA)
    save_pretrained(model, tmp_path)
    removed = {"rope_theta": ..., "rope_scaling": ...}
    edit_config(tmp_path, **(removed | SPELLINGS[spelling]))
    config = load_model(tmp_path).config
    assert config.rope_theta == 500.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 16, 1.0, 4.0)
    if spelling != "for each layer type":  # transformers' Llama has none
        assert_same_logits(logits(tmp_path), their_logits(tmp_path))


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        (
            {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
            None,
        ),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 2,
                "layer_types": ["sliding_attention"] * 2,
            },
            5,
        ),
        ({"use_sliding_window": False, "layer_types": ["full_attention"] * 2}, None),
    ],
    ids=str,
)
def test_sliding_window_of_qwen(changes, window, tmp_path):
    save_pretrained(random_model(dataclasses.replace(LLAMA, qkv_bias=True)), tmp_path)
    edit_config(tmp_path, **changes)
    assert load_model(tmp_path).config.sliding_window == window
    assert_same_logits(logits(tmp_path), their_logits(tmp_path))


def test_options_that_a_config_leaves_out_are_those_of_transformers(tmp_path):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=24,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    kept = ("architectures", *sizes, "num_attention_heads", "max_position_embeddings")
    values = json.loads((tmp_path / "config.json").read_text())
    bare = {key: values[key] for key in kept}
    (tmp_path / "config.json").write_text(json.dumps({**bare, "model_type": "llama"}))
    assert_same_logits(logits(tmp_path), their_logits(tmp_path))


def test_yarn_without_an_original_length_takes_that_of_the_model(tmp_path):
    save_pretrained(random_model(LLAMA), tmp_path)
    edit_config(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0})
    scaling = load_model(tmp_path).config.rope_scaling
    assert scaling == RopeScaling("yarn", 4.0, original_max_seq_len=24, beta_fast=2.0)
    assert_same_logits(logits(tmp_path), their_logits(tmp_path))


def test_head_dim_that_qwen3_leaves_out_is_128(tmp_path):
    save_pretrained(random_model(dataclasses.replace(LLAMA, qk_norm=True, head_dim=128)), tmp_path)
    edit_config(tmp_path, head_dim=...)
    assert load_model(tmp_path).config.head_dim == 128
    assert_same_logits(logits(tmp_path), their_logits(tmp_path))


def test_dropout_of_gpt2(theirs):
    _, _, folder = theirs
    assert load_model(folder).config.dropout == 0.1
    edit_config(folder, attn_pdrop=0.0)
    with pytest.warns(UserWarning, match="attn_pdrop and resid_pdrop differ"):
        assert load_model(folder).config.dropout == 0.0


# nanoGPT


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("has_bias", [True, False])
def test_nanogpt_checkpoint(prefix, has_bias, tmp_path):
    """The oracle is a GPT-2 of transformers with the same weights: its matrices stand the other way."""
    config = GPT2Config(
        vocab_size=97, n_positions=24, n_layer=2, n_head=3, n_embd=24, activation_function="gelu"
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    state = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not has_bias:
                parameter.zero_()
                continue
            parameter.normal_(0.5, 0.2)
            is_matrix = ".h." in name and parameter.ndim == 2
            state[prefix + name] = (parameter.T if is_matrix else parameter).detach().clone()
        state[prefix + "lm_head.weight"] = state[prefix + "transformer.wte.weight"]
        state[prefix + "transformer.h.0.attn.bias"] = torch.ones(24, 24).tril()[None, None]
    args = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 24, "vocab_size": 97}
    checkpoint = {
        "model": state,
        "model_args": {**args, "bias": has_bias, "dropout": 0.0},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "x"},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    expected = model(TOKENS).logits.detach()
    assert_same_logits(logits(tmp_path / "ckpt.pt"), expected)
    assert_same_logits(logits(tmp_path), expected)


def test_nanogpt_keeps_a_padded_vocabulary(tmp_path):
    model = random_model(GPTConfig(50304, 8, 1, 1, 2, bias=False, activation="gelu"))
    state = dict(parts(model.state_dict(), model.config, Names(GPT2_MODULES)))
    args = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 8, "vocab_size": 50304}
    torch.save({"model": state, "model_args": {**args, "bias": False}}, tmp_path / "ckpt.pt")
    assert load_model(tmp_path).config.vocab_size == 50304


# names


def make_run(folder: Path) -> dict[str, GPT]:
    models = {}
    for step in (2, 10, 9):
        name = f"step-{step:08d}"
        models[name] = random_model(GPT2)
        save_pretrained(models[name], folder / "checkpoints" / name, format="native")
    (folder / "checkpoints" / ".step-00000011.7.tmp").mkdir()
    return models


def test_run_folder_gives_its_best_checkpoint(tmp_path):
    models = make_run(tmp_path)
    best = {"step": 9, "val_loss": 1.0, "checkpoint": "checkpoints/step-00000009"}
    (tmp_path / "best.json").write_text(json.dumps(best))
    assert resolve_model(tmp_path) == tmp_path / "checkpoints/step-00000009"
    assert torch.equal(logits(tmp_path), models["step-00000009"](TOKENS))


def test_run_folder_without_a_best_gives_its_latest_checkpoint(tmp_path):
    make_run(tmp_path)
    assert resolve_model(str(tmp_path)).name == "step-00000010"


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["some-org/some.model_1", "gpt2x"])
def test_hub_name_in_the_cache(kind, name, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model, expected, folder = theirs
    repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    commit = "0123456789" * 4
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    if kind == "pytorch_model.bin":
        (repository / "snapshots" / commit / "model.safetensors").unlink()
        torch.save(model.state_dict(), repository / "snapshots" / commit / kind)
    assert_same_logits(logits(name), expected)


def test_hub_pickles_are_asked_for_only_without_safetensors(theirs, monkeypatch):
    _, _, folder = theirs
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve_model("org/name")
    assert len(asked) == 1
    assert not any(".bin" in pattern for pattern in asked[0])
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    resolve_model("org/name")
    assert len(asked) == 3
    assert "pytorch_model.bin" in asked[2]
