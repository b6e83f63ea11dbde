"""The references of `muon_step` and `grad_norm`: what their formulas say, and torch's own."""

import pytest
import torch

from leangpt.kernels import ops, reference, use_backend


@pytest.fixture(autouse=True)
def _on_the_reference():
    with use_backend("reference"):
        yield


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)], ids=str)
def test_orthogonalize_moves_singular_values_alone(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(reference.orthogonalize(matrix), u @ torch.diag(values) @ v)


def test_steps_are_those_of_torch_but_for_its_bfloat16():
    hyper = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    params = [torch.randn(shape) for shape in ((20, 50), (50, 20), (30, 30))]
    buffers = [torch.zeros_like(p) for p in params]
    expected = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.Muon(expected, adjust_lr_fn="match_rms_adamw", **hyper)
    for _ in range(5):
        grads = [torch.randn_like(p) for p in params]
        for p, grad in zip(expected, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        ops.muon_step(params, grads, buffers, **hyper)
    for p, buffer, e in zip(params, buffers, expected, strict=True):
        # the steps have a root mean square of about 0.2 lr = 4e-3
        torch.testing.assert_close(p, e.detach(), rtol=0, atol=1e-3)
        torch.testing.assert_close(buffer, optimizer.state[e]["momentum_buffer"])


def test_gradients_are_scaled():
    grads = [torch.randn(5, 8)]
    results = []
    for factor, scale in ((0.25, None), (1.0, torch.tensor(0.25))):
        params, buffers = [torch.ones(5, 8)], [torch.zeros(5, 8)]
        scaled = [factor * grads[0]]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "grad_scale": scale}
        ops.muon_step(params, scaled, buffers, **options)
        results.append(params + buffers)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads must be 1 tensors, got 0"),
        ({"grads": [torch.ones(3)]}, r"each of grads must be \(2, 3\), got \(3,\)"),
        ({"momentum_buffers": [torch.ones(2, 3).half()]}, "each of momentum_buffers must be"),
        ({"grad_scale": torch.ones(1)}, r"grad_scale must be \(\), got \(1,\)"),
    ],
)
def test_errors(change, message):
    lists = {name: [torch.ones(2, 3)] for name in ("params", "grads", "momentum_buffers")}
    with pytest.raises(ValueError, match=f"muon_step: {message}"):
        ops.muon_step(**lists | {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0} | change)


def test_only_matrices_and_any_number_of_them():
    vectors = [[torch.ones(3)] for _ in range(3)]
    with pytest.raises(ValueError, match=r"each of params must be \(rows, columns\), got \(3,\)"):
        ops.muon_step(*vectors, lr=0.1, momentum=0.9, weight_decay=0.0)
    ops.muon_step([], [], [], lr=0.1, momentum=0.9, weight_decay=0.0)


def test_grad_norm():
    grads = [torch.tensor([[3.0, 4.0]]), torch.tensor(12.0), torch.zeros(0)]
    assert torch.equal(ops.grad_norm(grads), torch.tensor(13.0))
    assert ops.grad_norm([g.double() for g in grads]).dtype == torch.float64
    with pytest.raises(ValueError, match="grad_norm: grads must be at least 1 tensor, got none"):
        ops.grad_norm([])
