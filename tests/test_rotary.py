"""Rotary positions of a model: no table of them, whatever the context that a config names."""

import dataclasses

import torch

from leangpt import GPT, GPTConfig


def test_a_long_context_takes_no_memory():
    config = GPTConfig(
        vocab_size=11, max_seq_len=16, n_layer=1, n_head=2, n_embd=16, position="rotary"
    )
    models = []
    for max_seq_len in (16, 10**15):
        torch.manual_seed(0)
        models.append(GPT(dataclasses.replace(config, max_seq_len=max_seq_len)))
    tokens = torch.randint(11, (2, 16))
    assert torch.equal(models[0](tokens), models[1](tokens))


def test_angles_stay_float32_in_a_model_of_another_dtype():
    config = GPTConfig(
        vocab_size=11, max_seq_len=4096, n_layer=1, n_head=2, n_embd=64, position="rotary"
    )
    torch.manual_seed(0)
    model = GPT(config).eval()
    tokens, positions = torch.randint(11, (1, 8)), torch.arange(4000, 4008)[None]
    expected = model.hidden(tokens, positions)
    actual = model.bfloat16().hidden(tokens, positions)
    # rounded frequencies would turn distant positions by whole radians
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()
