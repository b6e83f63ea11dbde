"""What a new model holds: each weight from the distribution that it starts with."""

import math

import pytest
import torch

from leangpt import GPT, GPTConfig
from leangpt.kernels import use_backend


@pytest.fixture
def _fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@pytest.mark.parametrize("is_modern", [False, True])
def test_initial_weights(is_modern):
    options = {"n_layer": 3, "n_embd": 96, "n_head": 4, "vocab_size": 300, "max_seq_len": 64}
    if is_modern:
        options |= {"norm": "rms_norm", "position": "rotary", "activation": "swiglu"}
        options |= {"qk_norm": True, "tie_embeddings": False}
    assert torch.empty(8).isnan().all()  # nothing below is by chance
    for name, weight in GPT(GPTConfig(**options)).named_parameters():
        if weight.dim() == 2:
            is_residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
            std = 0.02 / math.sqrt(2 * 3) if is_residual else 0.02
            # of n normal numbers, a standard deviation is off by 1 / sqrt(2 n) of it
            tolerance = 5 * std / math.sqrt(2 * weight.numel())
            assert abs(weight.std() - std) < tolerance, name
            assert abs(weight.mean()) < 5 * std / math.sqrt(weight.numel()), name
        else:
            assert (weight == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_value_residual(position):
    """Every block but the first attends to its own values, which are the last heads of qkv, and the first block's."""
    model = GPT(
        GPTConfig(
            **{"n_layer": 3, "n_embd": 24, "n_head": 4, "n_kv_head": 2, "vocab_size": 30},
            max_seq_len=8,
            position=position,
            value_residual=True,
        )
    ).double()
    own, attended = [], []
    for block in model.blocks:
        block.qkv.register_forward_hook(lambda _, inputs, qkv: own.append(qkv[..., -12:]))

    def attend(layer, q, k, v):
        attended.append(v.flatten(2))
        return model.attend(layer, q, k, v)

    with use_backend("reference"):
        model.hidden(torch.randint(30, (2, 8)), attend=attend)
    assert torch.equal(attended[0], own[0])
    for i in (1, 2):
        assert torch.equal(attended[i], own[i] + own[0])
