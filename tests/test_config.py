import dataclasses

import pytest

from leangpt import GPT, GPTConfig, RopeScaling, SamplingParams, TrainConfig


def test_presets_have_the_known_sizes():
    sizes = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    import torch

    for name, size in sizes.items():
        with torch.device("meta"):
            assert GPT(GPTConfig.preset(name)).num_parameters == size


def test_unknown_preset_lists_the_names():
    with pytest.raises(ValueError, match=r"preset must be one of tiny, mini, small, gpt2.*'gpt3'"):
        GPTConfig.preset("gpt3")


def test_derived_values():
    config = GPTConfig(n_embd=96, n_head=6, n_kv_head=2, activation="swiglu")
    assert (config.head_size, config.kv_heads, config.inner_size) == (16, 2, 256)
    wider = dataclasses.replace(config, n_embd=192)
    assert (wider.head_size, wider.inner_size) == (32, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_head": 5}, r"n_embd \(768\) must be a multiple of n_head \(5\)"),
        ({"n_kv_head": 5}, r"n_head \(12\) must be a multiple of n_kv_head \(5\)"),
        ({"n_layer": 0}, "n_layer must be positive, got 0"),
        ({"norm": "batch"}, "norm must be one of .*'batch'"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"position": "rotary", "head_dim": 5}, "rotary positions need an even head_dim, got 5"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling needs position='rotary'"),
    ],
    ids=str,
)
def test_model_config_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_model_config_round_trips_through_a_dict():
    config = GPTConfig(position="rotary", rope_scaling=RopeScaling("yarn", 4.0), sliding_window=7)
    assert GPTConfig.from_dict(dataclasses.asdict(config)) == config
    with pytest.raises(ValueError, match="unknown model option: n_layers"):
        GPTConfig.from_dict({"n_layers": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be finite, got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k must be positive"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\]"),
        ({"seed": 2**64}, "seed must be in"),
        ({"stop": ("",)}, "a stop string must not be empty"),
        ({"n": 0}, "n must be positive"),
    ],
    ids=str,
)
def test_sampling_params_reject(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_stop_must_not_be_a_bare_string():
    with pytest.raises(TypeError, match="stop must be a tuple of strings"):
        SamplingParams(stop="end")


def test_train_config_rejects():
    with pytest.raises(ValueError, match=r"seq_len \(300\) must not exceed"):
        TrainConfig(seq_len=300)
    with pytest.raises(ValueError, match="schedule must be one of"):
        TrainConfig(schedule="linear")
