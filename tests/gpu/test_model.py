"""A whole model on the Triton kernels: it trains as on the reference, compiles whole, and exports for a GPU that is not there."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from leangpt import GPT, GPTConfig
from leangpt.config import TrainConfig
from leangpt.finetune.methods.deltas import LowRank
from leangpt.kernels import use_backend
from leangpt.training.optimizer import make_optimizer

SMALL = {"vocab_size": 97, "n_layer": 2, "n_head": 4, "n_embd": 48, "max_seq_len": 64}
CONFIGS = {
    "gpt2": GPTConfig(**SMALL),
    "llama": GPTConfig(
        **SMALL,
        n_kv_head=2,
        norm="rms_norm",
        position="rotary",
        activation="swiglu",
        bias=False,
        qk_norm=True,
        value_residual=True,
        sliding_window=24,
        tie_embeddings=False,
    ),
}


def make_model(name: str, device: str, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIGS[name]).to(device, dtype)


def batch(device: str, B: int = 2, T: int = 37) -> tuple[Tensor, Tensor]:
    text = torch.randint(
        SMALL["vocab_size"], (B, T + 1), generator=torch.Generator().manual_seed(1)
    )
    return text[:, :-1].to(device), text[:, 1:].to(device)


def losses(name: str, device: str, backend: str, steps: int) -> list[float]:
    model = make_model(name, device)
    optimizer = make_optimizer(model, TrainConfig(optimizer="adamw", learning_rate=3e-3))
    tokens, targets = batch(device)
    found = []
    with use_backend(backend):
        for _ in range(steps):
            loss = model(tokens, targets)
            found.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_as_the_reference_does(name, device):
    expected = losses(name, device, "reference", 6)
    assert expected[-1] < expected[0] - 0.5  # it learns
    torch.testing.assert_close(
        torch.tensor(losses(name, device, "triton", 6)), torch.tensor(expected), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_on_the_mlp(name, device):
    """They come between a product and the activation, which then is an op of its own."""
    grads = {}
    for backend in ("reference", "triton"):
        model = make_model(name, device)
        mlp_in = model.blocks[0].mlp_in
        mlp_in.delta = LowRank(mlp_in, rank=2, scale=1.0, dropout_p=0.0)
        torch.nn.init.constant_(mlp_in.delta.up, 0.1)
        with use_backend(backend):
            model(*batch(device)).backward()
        grads[backend] = [p.grad for p in model.parameters()]
    for gradient, expected in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_in_bfloat16(name, device):
    """No further from those in float64 than four times the reference's in bfloat16."""
    tokens, targets = batch(device)
    grads = {}
    for label, backend, dtype in (
        ("truth", "reference", torch.float64),
        ("baseline", "reference", torch.bfloat16),
        ("triton", "triton", torch.bfloat16),
    ):
        # the same weights in all: those that bfloat16 can hold
        model = make_model(name, device, torch.bfloat16).to(dtype)
        with use_backend(backend):
            model(tokens, targets).backward()
        grads[label] = {n: p.grad.double() for n, p in model.named_parameters()}
    for parameter, truth in grads["truth"].items():
        limit = 4 * (grads["baseline"][parameter] - truth).abs().max()
        limit += torch.finfo(torch.bfloat16).eps * max(1.0, truth.abs().max().item())
        assert (grads["triton"][parameter] - truth).abs().max() <= limit, parameter


@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(name, backend, device):
    """As training in bfloat16 runs: float32 parameters and residual stream, products in bfloat16."""
    tokens, targets = batch(device)
    truth = make_model(name, device).double()
    with use_backend("reference"):
        truth(tokens, targets).backward()
    grads = {}
    for label in ("reference", backend):
        model = make_model(name, device)
        with (
            use_backend(label) if label else nullcontext(),
            torch.autocast(device, torch.bfloat16),
        ):
            loss = model(tokens, targets)
            assert loss.dtype == torch.float32 and model.hidden(tokens).dtype == torch.bfloat16
        loss.backward()
        grads[label] = {n: p.grad.double() for n, p in model.named_parameters()}
    for parameter, tensor in truth.named_parameters():
        limit = 4 * (grads["reference"][parameter] - tensor.grad).abs().max()
        limit += torch.finfo(torch.bfloat16).eps * max(1.0, tensor.grad.abs().max().item())
        assert (grads[backend][parameter] - tensor.grad).abs().max() <= limit, parameter


def test_dropout_is_repeated_by_its_seed(device):
    config = GPTConfig(**SMALL, dropout=0.2)
    torch.manual_seed(0)
    model = GPT(config).to(device)
    tokens, targets = batch(device)
    with use_backend("triton"), torch.no_grad():
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(model(tokens, targets).item())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_compiles_whole_with_inductor(name, device):
    """One graph of a block, forward and backward, on the kernels."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIGS[name], n_layer=1)).to(device)
    tokens, targets = batch(device)
    # torch's cache on disk knows no signatures of backward ops: what it kept may be of an older version of them
    with fresh_cache(), use_backend("triton"):
        compiled = torch.compile(model, fullgraph=True)
        expected, loss = model(tokens, targets), compiled(tokens, targets)
        torch.testing.assert_close(loss, expected)
        parameters = list(model.parameters())
        for grad, ref in zip(
            torch.autograd.grad(loss, parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            torch.testing.assert_close(grad, ref)


@pytest.mark.parametrize("name", CONFIGS)
def test_exports(name, device):
    model = make_model(name, device).eval()
    tokens, _ = batch(device)
    with use_backend("triton"), torch.no_grad():
        program = torch.export.export(model, (tokens,))
        ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any(op.startswith("leangpt_triton.") for op in ops)
        torch.testing.assert_close(program.module()(tokens), model(tokens))
