import os
import subprocess
import sys

import pytest
import torch

from leangpt.kernels import describe_backends, dispatch, native, ops, reference, use_backend

X, W = torch.randn(3, 8), torch.ones(8)


class Recorder:
    """A backend that says which of its ops ran."""

    def __init__(self):
        self.calls = []

    def rms_norm(self, x, weight, eps):
        self.calls.append("rms_norm")
        return reference.rms_norm(x, weight, eps)


@pytest.fixture
def native_rms_norm(monkeypatch):
    backend = Recorder()
    monkeypatch.setitem(dispatch._modules, "native", backend)
    monkeypatch.setattr(native, "unavailable_reason", None)
    monkeypatch.setattr(native, "OPS", frozenset({"rms_norm"}))
    monkeypatch.setattr(native, "DIFFERENTIABLE", frozenset())
    return backend


def test_prefers_native_where_it_has_the_op(native_rms_norm):
    ops.rms_norm(X, W)
    ops.layer_norm(X, W)
    assert native_rms_norm.calls == ["rms_norm"]


def test_needs_a_backward_where_any_tensor_needs_a_gradient(native_rms_norm, monkeypatch):
    weight = W.clone().requires_grad_()
    ops.rms_norm(X, weight).sum().backward()
    assert native_rms_norm.calls == [] and weight.grad is not None
    with torch.no_grad():
        ops.rms_norm(X, weight)
    assert native_rms_norm.calls == ["rms_norm"]
    monkeypatch.setattr(native, "DIFFERENTIABLE", frozenset({"rms_norm"}))
    ops.rms_norm(X, weight)
    assert native_rms_norm.calls == ["rms_norm"] * 2


def test_use_backend_forces_and_restores(native_rms_norm):
    with use_backend("reference"):
        ops.rms_norm(X, W)
    assert native_rms_norm.calls == []
    ops.rms_norm(X, W)
    assert native_rms_norm.calls == ["rms_norm"]


@pytest.mark.usefixtures("native_rms_norm")
def test_forced_backend_says_what_it_cannot_run():
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"rms_norm: .*Triton .*no GPU"):
        ops.rms_norm(X, W)
    with use_backend("native"), pytest.raises(RuntimeError, match=r"layer_norm: .*native"):
        ops.layer_norm(X, W)


def test_rejects_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend must be one of .*got 'fast'"),
        use_backend("fast"),
    ):
        pass


def test_environment_forces_a_backend():
    program = "import torch; from leangpt.kernels import ops; ops.rms_norm(torch.ones(1, 2), torch.ones(2))"
    for backend, expected in (
        ("triton", "there is no GPU"),
        ("fast", "LEANGPT_BACKEND must be one of"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"LEANGPT_BACKEND": backend},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 1 and expected in run.stderr


def test_description_names_every_backend():
    assert list(describe_backends("cpu")) == ["native", "triton", "reference"]


@pytest.fixture
def triton_on_cpu(monkeypatch):
    backend = Recorder()
    backend.linear = lambda *arguments: backend.calls.append("linear")
    monkeypatch.setattr(native, "OPS", frozenset())
    monkeypatch.setitem(dispatch._modules, "triton", backend)
    monkeypatch.setattr(dispatch, "triton_devices", {"cpu"})
    monkeypatch.setattr(dispatch, "triton_unavailable_reason", None)
    return backend


def test_triton_runs_on_its_devices(triton_on_cpu, monkeypatch):
    ops.rms_norm(X, W)
    assert triton_on_cpu.calls == ["rms_norm"]
    with use_backend("triton"), pytest.raises(RuntimeError, match="no Triton kernel of layer_norm"):
        ops.layer_norm(X, W)
    monkeypatch.setattr(dispatch, "triton_devices", {"cuda"})
    with use_backend("triton"), pytest.raises(RuntimeError, match="run on cuda, not on cpu"):
        ops.rms_norm(X, W)


def test_doubles_are_left_to_the_reference(triton_on_cpu):
    ops.rms_norm(X.double(), W.double())
    assert triton_on_cpu.calls == []
    with use_backend("triton"), pytest.raises(RuntimeError, match="not in float64"):
        ops.rms_norm(X.double(), W.double())


def test_plain_products_are_left_to_the_library(triton_on_cpu):
    ops.linear(X, W[None])
    assert triton_on_cpu.calls == []
    with use_backend("triton"):
        ops.linear(X, W[None])
    assert triton_on_cpu.calls == ["linear"]


def test_a_gpu_without_triton_is_logged_once(caplog, monkeypatch):
    dispatch.log_backend.cache_clear()
    monkeypatch.setattr(dispatch, "triton_unavailable_reason", "not installed")
    for device in ("cpu", "cuda", "cuda"):
        dispatch.log_backend(device)
    assert [r.message for r in caplog.records] == [
        "Triton is not installed: all ops run on the PyTorch reference"
    ]


def test_compiles_whole():
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, W), ops.rms_norm(X, W))
