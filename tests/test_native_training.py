"""Whole steps of training on the CPU's own ops: the losses of two hundred are those of the reference."""

import pytest
import torch

from leangpt import GPT, GPTConfig
from leangpt.kernels import native, ops, use_backend

CLASSIC = {"n_head": 4}
MODERN = {
    "n_head": 4,
    "n_kv_head": 2,
    "norm": "rms_norm",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
    "qk_norm": True,
    "value_residual": True,
}


@pytest.fixture(autouse=True)
def _extension(in_ci):
    if native.unavailable_reason:
        assert not in_ci, f"CI must test the extension: {native.unavailable_reason}"
        pytest.skip(native.unavailable_reason)


def train(options, with_muon: bool, steps: int = 200) -> list[float]:
    """The losses of steps on noisy sequences of a congruential generator: clipped gradients, AdamW, and Muon for matrices if asked for."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=32, max_seq_len=32, n_layer=2, n_embd=48, **options))
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and with_muon]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in others] for _ in range(2))
    buffers = [torch.zeros_like(p) for p in matrices]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(1, steps + 1):
        text = torch.randint(32, (8, 33), generator=generator)
        follows = torch.rand(8, 33, generator=generator) < 0.9
        for t in range(1, 33):
            text[:, t] = torch.where(follows[:, t], (5 * text[:, t - 1] + 3) % 32, text[:, t])
        loss = model(text[:, :-1], text[:, 1:])
        loss.backward()
        scale = (1.0 / (ops.grad_norm([p.grad for p in model.parameters()]) + 1e-6)).clamp(max=1.0)
        common = {"lr": 2e-3, "weight_decay": 0.1, "grad_scale": scale}
        grads = [p.grad for p in others]
        ops.adamw_step(
            others, grads, exp_avgs, exp_avg_sqs, step=step, betas=(0.9, 0.95), eps=1e-8, **common
        )
        ops.muon_step(matrices, [p.grad for p in matrices], buffers, momentum=0.95, **common)
        model.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("with_muon", [False, True], ids="muon={}".format)
@pytest.mark.parametrize("options", [CLASSIC, MODERN], ids=["classic", "modern"])
def test_two_hundred_losses_are_those_of_the_reference(options, with_muon):
    """Roundings grow from step to step: to less than 1e-4 nats, while the loss falls by more than two."""
    losses = train(options, with_muon)
    with use_backend("reference"):
        expected = train(options, with_muon)
    assert expected[-1] < expected[0] - 2
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-4


@pytest.mark.parametrize("with_muon", [False, True], ids="muon={}".format)
def test_the_same_losses_on_any_number_of_threads(with_muon):
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(train(MODERN, with_muon, steps=20))
    torch.set_num_threads(before)
    assert runs[0] == runs[1]
