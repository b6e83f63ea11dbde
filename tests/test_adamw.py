"""The reference of `adamw_step`: that of torch.optim.AdamW, and what it adds."""

import pytest
import torch
from torch import Tensor

from leangpt.kernels import ops, use_backend

SHAPES = [(5,), (3, 7), (), (0, 4), (2, 1, 3)]
HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}


@pytest.fixture(autouse=True)
def _on_the_reference():
    with use_backend("reference"):
        yield


def make(dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    return params, *([torch.zeros(shape, dtype=state_dtype) for shape in SHAPES] for _ in range(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torch(dtype):
    params, exp_avgs, exp_avg_sqs = make(dtype, dtype)
    expected = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(expected, **HYPER, foreach=False)
    for step in range(1, 6):
        grads = [torch.randn_like(p) for p in params]
        for p, grad in zip(expected, grads, strict=True):
            p.grad = grad
        optimizer.step()
        ops.adamw_step(params, grads, exp_avgs, exp_avg_sqs, step=step, **HYPER)
    for p, m, v, e in zip(params, exp_avgs, exp_avg_sqs, expected, strict=True):
        torch.testing.assert_close(p, e.detach())
        torch.testing.assert_close(m, optimizer.state[e]["exp_avg"])
        torch.testing.assert_close(v, optimizer.state[e]["exp_avg_sq"])


def test_gradients_are_scaled():
    results = []
    for factor, grad_scale in ((0.25, None), (1.0, torch.tensor(0.25))):
        torch.manual_seed(0)
        params, exp_avgs, exp_avg_sqs = make(torch.float32, torch.float32)
        grads = [factor * torch.randn_like(p) for p in params]
        ops.adamw_step(params, grads, exp_avgs, exp_avg_sqs, step=1, grad_scale=grad_scale, **HYPER)
        results.append(params + exp_avgs + exp_avg_sqs)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_masters_keep_what_rounding_takes_from_the_parameters():
    """A thousand steps, each below half a rounding of the parameters."""
    params, masters = [torch.ones(4, dtype=torch.bfloat16)], [torch.ones(4)]
    alone = [torch.ones(4, dtype=torch.bfloat16)]
    states = [[torch.zeros(4)] for _ in range(4)]
    hyper = HYPER | {"lr": 1e-4, "weight_decay": 0.0}
    for step in range(1, 1001):
        grads = [torch.ones(4, dtype=torch.bfloat16)]
        ops.adamw_step(params, grads, *states[:2], masters=masters, step=step, **hyper)
        ops.adamw_step(alone, grads, *states[2:], step=step, **hyper)
    torch.testing.assert_close(masters[0], torch.full((4,), 0.9), rtol=1e-4, atol=0)
    assert torch.equal(params[0], masters[0].bfloat16())
    assert torch.equal(alone[0], torch.ones_like(alone[0]))


def test_parameters_of_a_model_are_stepped_where_they_are():
    params, exp_avgs, exp_avg_sqs = make(torch.float32, torch.float32)
    leaves = [p.clone().requires_grad_() for p in params]
    ops.adamw_step(
        leaves, [torch.ones_like(p) for p in params], exp_avgs, exp_avg_sqs, step=1, **HYPER
    )
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    assert not torch.equal(leaves[0], params[0])
    ops.adamw_step([], [], [], [], step=1, **HYPER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"grads": []}, "grads must be 1 tensors, got 0"),
        ({"grads": [torch.ones(3)]}, r"each of grads must be \(2,\), got \(3,\)"),
        ({"exp_avgs": [torch.ones(2).half()]}, "each of exp_avgs must be torch.float32"),
        ({"masters": [torch.ones(2).double()]}, "each of masters must be torch.float32"),
        ({"grad_scale": torch.ones(1)}, r"grad_scale must be \(\), got \(1,\)"),
    ],
)
def test_errors(change, message):
    lists = {name: [torch.ones(2)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ValueError, match=f"adamw_step: {message}"):
        ops.adamw_step(**(lists | {"step": 1} | HYPER | change))
