"""`adamw_step` on Triton: many tensors of odd sizes, dtypes, strides; as torch.compile and FakeTensor see it."""

import pytest
import torch
from helpers import assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from leangpt.kernels import ops, triton_adamw, use_backend

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "fp32": (FP32, FP32, False),
    "fp16": (FP16, FP16, False),
    "bf16": (BF16, BF16, False),
    "bf16 with masters": (BF16, BF16, True),
    "bf16 with masters, fp32 gradients": (BF16, FP32, True),
}
BLOCK = triton_adamw.BLOCK
# more than a launch takes; whole chunks, one element more and less; none, and scalars
SHAPES = [(1,), (3, 7), (BLOCK,), (0, 4), (BLOCK - 1,), (2, BLOCK), (BLOCK + 1,), (), (13, 17)] * 2
HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make(
    kind: tuple[torch.dtype, torch.dtype, bool], shapes: list[tuple[int, ...]], device: str
) -> dict[str, list[Tensor]]:
    dtype, grad_dtype, has_masters = kind
    masters = [torch.randn(shape, device=device) for shape in shapes]
    lists = {
        "params": [master.to(dtype) for master in masters],
        "grads": [torch.randn(shape, device=device).to(grad_dtype) for shape in shapes],
        "exp_avgs": [torch.randn(shape, device=device) for shape in shapes],
        "exp_avg_sqs": [torch.rand(shape, device=device) for shape in shapes],
    }
    return lists | ({"masters": masters} if has_masters else {})


def copy(lists: dict[str, list[Tensor]], dtype: torch.dtype | None = None):
    """The same values and strides; in `dtype` where one is given."""
    return {
        name: [torch.empty_like(t, dtype=dtype or t.dtype).copy_(t) for t in tensors]
        for name, tensors in lists.items()
    }


def check_step(lists: dict[str, list[Tensor]], **options) -> None:
    """Hold the error rule for all that a step changes; gradients stay as they are."""
    results, baselines, truths = lists, copy(lists), copy(lists, torch.float64)
    grads = copy(lists)["grads"]
    options = HYPER | {"step": 3} | options
    with use_backend("reference"):
        ops.adamw_step(**baselines, **options)
        ops.adamw_step(**truths, **options)
    with use_backend("triton"):
        ops.adamw_step(**results, **options)
    assert all(map(torch.equal, results["grads"], grads))
    for name in results.keys() - {"grads"}:
        for triple in zip(results[name], truths[name], baselines[name], strict=True):
            if triple[0].numel():
                assert_as_accurate(*triple)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_step(kind, seed, device):
    torch.manual_seed(seed)
    check_step(make(kind, SHAPES, device))


def test_gradients_are_scaled_by_a_tensor(device):
    check_step(make(KINDS["fp32"], SHAPES[:7], device), grad_scale=torch.tensor(0.037).to(device))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 3 * BLOCK), max_size=20),
    step=st.sampled_from((1, 2, 1000, 10**6)),
    lr=st.floats(1e-6, 1.0),
    weight_decay=st.sampled_from((0.0, 1e-3, 1.0)),
    eps=st.sampled_from((1e-8, 1e-3)),
)
def test_any_sizes_and_factors(sizes, step, lr, weight_decay, eps):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lists = make(KINDS["fp32"], [(size,) for size in sizes], device)
    check_step(lists, step=step, lr=lr, weight_decay=weight_decay, eps=eps)


def test_dtypes_may_be_mixed(device):
    lists = make(KINDS["fp32"], SHAPES, device)
    for name, tensors in make(KINDS["bf16"], SHAPES, device).items():
        lists[name] += tensors
    order = torch.randperm(2 * len(SHAPES)).tolist()
    check_step({name: [tensors[i] for i in order] for name, tensors in lists.items()})


def test_any_strides(device):
    """All transposed as `zeros_like` does it, then each list in its own way; memory between the elements stays as it is."""
    transposed = {
        name: [t.t() for t in tensors]
        for name, tensors in make(KINDS["fp32"], [(33, 65)], device).items()
    }
    check_step(copy(transposed))
    wide = make(KINDS["fp32"], [(65, 70)], device)
    before = copy(wide)
    views = {name: [t[:, 1:34] for t in tensors] for name, tensors in wide.items()}
    views["exp_avgs"] = [torch.randn(33, 65, device=device).t()]
    check_step(views)
    for name in ("params", "exp_avg_sqs"):
        assert torch.equal(wide[name][0][:, 34:], before[name][0][:, 34:])
        assert torch.equal(wide[name][0][:, 0], before[name][0][:, 0])


def test_unaligned_tensors(device):
    lists = make(KINDS["bf16"], [(BLOCK + 9,)] * 2, device)
    check_step({name: [t[1:] for t in tensors] for name, tensors in lists.items()})


def test_opcheck(device):
    lists = make(KINDS["bf16 with masters"], SHAPES[:3], device)
    arguments = (3, 0.01, 0.9, 0.95, 1e-8, 0.1, None)
    torch.library.opcheck(torch.ops.leangpt_triton.adamw_step, (*lists.values(), *arguments))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, device):
    lists = make(KINDS["fp32"], SHAPES[:3], device)
    expected = copy(lists)

    @torch.compile(fullgraph=True, backend=backend)
    def step(lists):
        ops.adamw_step(**lists, step=3, **HYPER)

    with use_backend("triton"):
        ops.adamw_step(**expected, step=3, **HYPER)
        step(lists)
    for name, tensors in lists.items():
        assert all(map(torch.equal, tensors, expected[name]))


def test_fake_tensors():
    with FakeTensorMode(), use_backend("triton"):
        lists = make(KINDS["bf16 with masters"], SHAPES, "cuda")
        ops.adamw_step(**lists, step=3, **HYPER)
        assert lists["params"][2].device.type == "cuda"
