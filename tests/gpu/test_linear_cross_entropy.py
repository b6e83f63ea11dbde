"""Head and cross-entropy on Triton: values, gradients and hazards of the compiled kernels."""

import pytest
import torch
from helpers import check_op
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leangpt.kernels import ops, triton_linear_cross_entropy, use_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


def make_inputs(N, C, V, dtype, device, seed=0):
    """Hidden states, a vocabulary matrix whose logits have a spread of a few nats, and targets, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator).to(device, dtype)
    weight = (torch.randn(V, C, generator=generator) * 3 / C**0.5).to(device, dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < 0.2] = IGNORED
    targets[0] = V - 1
    return hidden, weight, targets.to(device)


def check(hidden, weight, targets, **options):
    check_op(
        lambda h, w: ops.linear_cross_entropy(h, w, targets, **options), [hidden, weight], "triton"
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of the least number of rows, 128."""
    monkeypatch.setattr(triton_linear_cross_entropy, "LOGITS_BYTES", 0)


SHAPES = [(1, 1, 1), (2, 33, 1024), (6, 33, 4099), (130, 131, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    for seed in (1, 2):
        check(*make_inputs(*shape, torch.bfloat16, device, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_values(reduction, dtype, device, small_chunks):
    """One chunk and two, a whole row in one tile."""
    for seed, N, V in ((1, 3, 7), (2, 129, 37)):
        check(*make_inputs(N, 48, V, dtype, device, seed), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_several_tiles(dtype, device):
    check(*make_inputs(67, 48, 1031, dtype, device))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3)])
def test_settings(reduction, smoothing, z_loss, device):
    hidden, weight, targets = make_inputs(9, 48, 47, torch.bfloat16, device)
    targets[targets == IGNORED] = 46
    targets[3:5] = 2
    options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss}
    check(hidden, weight, targets, ignore_index=2, **options)


@settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    N=st.integers(1, 300),
    V=st.integers(1, 90),
    smoothing=st.floats(0, 1, width=32),
    z_loss=st.floats(0, 0.125, width=32),
    seed=st.integers(0, 9),
)
def test_drawn(device, small_chunks, N, V, smoothing, z_loss, seed):
    inputs = make_inputs(N, 48, V, torch.bfloat16, device, seed)
    check(*inputs, label_smoothing=smoothing, z_loss=z_loss)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that was made."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


def test_no_tensor_is_as_large_as_all_logits(device, small_chunks):
    hidden, weight, targets = make_inputs(300, 48, 90, torch.bfloat16, device)
    with LargestTensor() as largest:
        triton_linear_cross_entropy._losses_and_gradients(
            hidden, weight, targets, None, IGNORED, 0.0, 0.0, True, True
        )
    assert largest.num_bytes == max(hidden.nbytes, weight.float().nbytes, 128 * 96 * 2)


def test_strides_and_shapes(device):
    hidden, weight, _ = make_inputs(48, 48, 33, torch.bfloat16, device)
    targets = torch.arange(24, device=device).view(4, 6).t()
    check(hidden.view(6, 8, 48)[:, ::2], weight, targets)
    check(hidden.t().reshape(8, 6, 48)[..., :33].transpose(1, 2)[:6, :4], weight[:, :6], targets)
    check(hidden[:24].view(6, 4, 48), weight.t().contiguous().t(), targets)
    check(hidden[0].expand(6, 4, 48), weight, targets, reduction="none")
    check(hidden[:4], weight, targets[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_alone(reduction, device):
    hidden, weight, targets = make_inputs(5, 48, 7, torch.bfloat16, device)

    def of_hidden(hidden):
        return ops.linear_cross_entropy(hidden, weight.to(hidden), targets, reduction=reduction)

    def of_weight(weight):
        return ops.linear_cross_entropy(hidden.to(weight), weight, targets, reduction=reduction)

    check_op(of_hidden, [hidden], "triton")
    check_op(of_weight, [weight], "triton")


def test_no_gradient_work_without_need(device, monkeypatch):
    monkeypatch.delattr(triton_linear_cross_entropy, "_add_weight_gradient_kernel")
    hidden, weight, targets = make_inputs(5, 48, 7, torch.bfloat16, device)
    for reduction in ("mean", "sum", "none"):
        with use_backend("triton"), torch.no_grad():
            ops.linear_cross_entropy(hidden, weight.requires_grad_(), targets, reduction=reduction)
    check_op(lambda *t: ops.linear_cross_entropy(*t, targets), [hidden, weight], "triton", False)


def test_upstream_gradient_and_second_backward(device):
    """Gradients are scaled, not overwritten: a second backward pass gives them again."""
    hidden, weight, targets = make_inputs(5, 48, 7, torch.float32, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with use_backend("triton"):
        loss = ops.linear_cross_entropy(*leaves, targets)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss * 4, leaves)
    for one, four in zip(first, second, strict=True):
        assert torch.equal(four, 4 * one)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(reduction, device):
    for N in (0, 3):
        hidden, weight, _ = make_inputs(max(N, 1), 48, 7, torch.bfloat16, device)
        leaves = hidden[:N].requires_grad_(), weight.requires_grad_()
        targets = torch.full((N,), IGNORED, device=device)
        with use_backend("triton"):
            loss = ops.linear_cross_entropy(*leaves, targets, reduction=reduction)
        expected = (
            torch.zeros(N, device=device) if reduction == "none" else torch.zeros((), device=device)
        )
        torch.testing.assert_close(
            loss, expected / 0 if reduction == "mean" else expected, equal_nan=True
        )
        for gradient in torch.autograd.grad(loss.sum(), leaves):
            assert (gradient == 0).all()


def test_out_of_range_target_is_nan(device):
    hidden, weight, _ = make_inputs(4, 48, 7, torch.bfloat16, device)
    targets = torch.tensor([0, 7, -1, 2**40], device=device)
    with use_backend("triton"):
        losses = ops.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert losses.isnan().tolist() == [False, True, True, True]


def test_deterministic(device):
    hidden, weight, targets = make_inputs(67, 48, 37, torch.bfloat16, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with use_backend("triton"):
        runs = [ops.linear_cross_entropy(*leaves, targets) for _ in range(2)]
    for one, two in zip(*(torch.autograd.grad(loss, leaves) for loss in runs), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck(needs, device):
    hidden, weight, targets = make_inputs(5, 48, 7, torch.float32, device)
    leaves = [t.requires_grad_(need) for t, need in zip((hidden, weight), needs, strict=True)]
    numbers = (IGNORED, 0.1, 1e-3)
    for op, extra in (
        (triton_linear_cross_entropy._token_losses, ()),
        (triton_linear_cross_entropy._loss_sum, needs),
    ):
        torch.library.opcheck(op, (*leaves, targets, *numbers, *extra))
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(
        triton_linear_cross_entropy._token_losses_backward,
        (torch.ones(5, device=device), *plain, targets, *numbers, *needs),
    )
    torch.library.opcheck(
        triton_linear_cross_entropy._scale,
        (plain[0], torch.ones((), device=device), torch.bfloat16),
    )


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compile(compiler, reduction, device):
    hidden, weight, targets = make_inputs(5, 48, 7, torch.bfloat16, device)
    torch._dynamo.reset()

    def call(hidden, weight):
        return ops.linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, label_smoothing=0.1, z_loss=1e-3
        )

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with use_backend("triton"):
        losses = [f(*leaves) for f in (call, torch.compile(call, backend=compiler, fullgraph=True))]
    gradients = [torch.autograd.grad(loss.sum(), leaves) for loss in losses]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_fake_tensors_on_a_gpu():
    with FakeTensorMode(), use_backend("triton"):
        hidden, weight = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            for shape in ((2, 5, 16), (7, 16))
        )
        targets = torch.empty(2, 5, dtype=torch.int64, device="cuda")
        for reduction, shape in (("mean", ()), ("none", (2, 5))):
            loss = ops.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
            assert loss.shape == shape and loss.dtype == torch.float32 and loss.is_cuda
