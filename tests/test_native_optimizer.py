"""The steps of optimizers on the CPU: the error rule, all tensors at once, the same bits on any number of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_as_accurate
from torch import Tensor

from leangpt.kernels import decode, native, ops, use_backend

# nothing, scalars, less than a vector, whole vectors, and more than a thread takes at a time
SHAPES = [(0, 3), (), (1,), (3, 5), (16,), (4, 16), (33, 1000), (7, 5000)]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
# short and long sides, below a tile and a panel, of none of them, and more inputs than a block of a product has
MATRICES = [
    (1, 1),
    (7, 1),
    (5, 33),
    (17, 16),
    (64, 64),
    (100, 70),
    (96, 384),
    (300, 112),
    (20, 1100),
]
MUON = {"momentum": 0.9, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _extension(in_ci):
    if native.unavailable_reason:
        assert not in_ci, f"CI must test the extension: {native.unavailable_reason}"
        pytest.skip(native.unavailable_reason)


@pytest.fixture(params=[1, 2], ids="threads={}".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def on_threads(run):
    """What `run()` returns on one thread, and on three."""
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run())
    torch.set_num_threads(before)
    return results


def make(shapes, dtype=torch.float32, has_masters=False) -> dict[str, list[Tensor]]:
    lists = {name: [torch.randn(shape) for shape in shapes] for name in LISTS}
    lists["exp_avg_sqs"] = [t.square() for t in lists["exp_avg_sqs"]]
    if has_masters:
        lists["masters"] = [t.clone() for t in lists["params"]]
    lists["params"] = [t.to(dtype) for t in lists["params"]]
    lists["grads"] = [t.to(dtype) for t in lists["grads"]]
    return lists


def copy(lists, dtype=None):
    """A copy with the same strides."""
    return {
        name: [t.clone() if dtype is None else t.to(dtype, copy=True) for t in tensors]
        for name, tensors in lists.items()
    }


def check_adamw(lists, **options):
    options = HYPER | {"step": 3} | options
    doubles, baseline = copy(lists, torch.float64), copy(lists)
    scale = options.get("grad_scale")
    with use_backend("reference"):
        ops.adamw_step(
            **doubles, **options | {"grad_scale": None if scale is None else scale.double()}
        )
        ops.adamw_step(**baseline, **options)
    with use_backend("native"):
        ops.adamw_step(**lists, **options)
    for name in lists.keys() - {"grads"}:
        for out, ref, base in zip(lists[name], doubles[name], baseline[name], strict=True):
            if out.numel():
                assert_as_accurate(out, ref, base)


class TestAdamW:
    @pytest.mark.parametrize("step", [1, 2, 100_000])
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, step):
        check_adamw(make(SHAPES), step=step)

    @pytest.mark.parametrize("has_masters", [False, True], ids="masters={}".format)
    def test_bf16(self, has_masters):
        check_adamw(make(SHAPES, torch.bfloat16, has_masters))

    def test_scaled_gradients(self):
        check_adamw(make(SHAPES), grad_scale=torch.tensor(0.037))

    def test_mixed_dtypes(self):
        lists = make(SHAPES)
        lists["grads"][::2] = [t.bfloat16() for t in lists["grads"][::2]]
        lists["params"][1::3] = [t.bfloat16() for t in lists["params"][1::3]]
        check_adamw(lists)
        lists["grads"][0] = lists["grads"][0].half()  # the reference takes it
        check_adamw(lists)

    def test_any_strides(self):
        """Memory between the elements of a view stays as it is."""
        whole = make([(40, 50)])
        before = copy(whole)
        views = {name: [t[:, 1:34] for t in tensors] for name, tensors in whole.items()}
        views["exp_avgs"] = [torch.randn(33, 40).t()]
        check_adamw(views)
        for name in ("params", "exp_avg_sqs"):
            assert torch.equal(whole[name][0][:, 34:], before[name][0][:, 34:])
            assert torch.equal(whole[name][0][:, 0], before[name][0][:, 0])

    def test_the_same_bits_on_any_number_of_threads(self):
        lists = make(SHAPES)

        def run():
            stepped = copy(lists)
            with use_backend("native"):
                ops.adamw_step(**stepped, step=3, **HYPER)
            return [t for name in LISTS for t in stepped[name]]

        assert all(map(torch.equal, *on_threads(run)))

    def test_a_gradient_of_a_parameter_before_the_step_is_refused(self):
        """The step counts as a change in place, of which autograd tells."""
        weight = torch.ones(40).requires_grad_()
        out = (weight * weight).sum()
        states = [[torch.zeros(40)] for _ in range(2)]
        with use_backend("native"):
            ops.adamw_step([weight], [torch.ones(40)], *states, step=1, **HYPER)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


class TestGradNorm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self, dtype):
        grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
        with use_backend("native"):
            norm = ops.grad_norm(grads)
        elements = torch.cat([g.flatten() for g in grads]).double()
        baseline = torch.nn.utils.get_total_norm([g.float() for g in grads])
        assert_as_accurate(norm, elements.square().sum().sqrt(), baseline)

    @pytest.mark.parametrize("scale", [1e-30, 1e-40, 1e30])
    def test_squares_leave_the_range_of_float32(self, scale):
        grads = [torch.full((3, 7), scale), torch.full((4, 5), scale).t()]
        with use_backend("native"):
            norm = ops.grad_norm(grads)
        torch.testing.assert_close(
            norm.item(), 41**0.5 * grads[0][0, 0].item(), rtol=1e-6, atol=1e-45
        )

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
    def test_what_is_not_finite_shows(self, value):
        grads = [torch.ones(100), torch.ones(50_000)]
        grads[1][-3] = value
        with use_backend("native"):
            assert not ops.grad_norm(grads).isfinite()

    def test_the_same_bits_on_any_number_of_threads(self):
        grads = [torch.randn(shape) for shape in SHAPES]
        with use_backend("native"):
            one, three = on_threads(lambda: ops.grad_norm(grads))
        assert torch.equal(one, three)


def steps_of_muon(params, grads, backend, dtype, lr, **options):
    """The parameters after a step for each list of gradients."""
    params = [p.to(dtype, copy=True) for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    with use_backend(backend):
        for step_grads in grads:
            step_grads = [g.to(dtype) for g in step_grads]
            ops.muon_step(params, step_grads, buffers, lr=lr, **MUON | options)
    return params, buffers


class TestMuon:
    @pytest.mark.usefixtures("threads")
    def test_as_accurate_as_torch(self):
        params = [torch.randn(shape) for shape in MATRICES]
        grads = [[torch.randn(shape) for shape in MATRICES] for _ in range(3)]
        stepped, buffers = steps_of_muon(params, grads, "native", torch.float32, 0.02)
        truths, true_buffers = steps_of_muon(params, grads, "reference", torch.float64, 0.02)
        leaves = [p.clone().requires_grad_() for p in params]
        optimizer = torch.optim.Muon(leaves, lr=0.02, adjust_lr_fn="match_rms_adamw", **MUON)
        for step_grads in grads:
            for leaf, grad in zip(leaves, step_grads, strict=True):
                leaf.grad = grad.clone()
            optimizer.step()
        for i, leaf in enumerate(leaves):
            assert_as_accurate(stepped[i], truths[i], leaf.detach())
            assert_as_accurate(
                buffers[i], true_buffers[i], optimizer.state[leaf]["momentum_buffer"]
            )

    @pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48)], ids=str)
    @pytest.mark.parametrize("rank", [1, 8, 48])
    def test_updates_are_float32(self, shape, rank):
        """However small most singular values are: a hundredth of the roundings of bfloat16, which torch's own has."""
        grad = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
        grad += 1e-4 * torch.randn(shape)
        lr = 5 / max(shape) ** 0.5  # the update is the orthogonalized matrix
        arguments = [torch.zeros(shape)], [[grad]]
        options = {"weight_decay": 0.0, "lr": lr}
        [update], _ = steps_of_muon(*arguments, "native", torch.float32, **options)
        [truth], _ = steps_of_muon(*arguments, "reference", torch.float64, **options)
        assert (update - truth).abs().max() < 2e-4
        values = torch.linalg.svdvals(update)
        assert values.max() < 1.3 and values[:rank].min() > 0.6

    def test_scaled_gradients_and_strides(self):
        params = [torch.randn(60, 40), torch.randn(40, 60).t(), torch.randn(60, 50)[:, 3:43]]
        grads = [torch.randn(60, 40), torch.randn(60, 40), torch.randn(40, 60).t()]
        scale = torch.tensor(0.25)
        stepped, _ = steps_of_muon(params, [grads], "native", torch.float32, 0.1, grad_scale=scale)
        scaled = [[g * scale for g in grads]]
        truths, _ = steps_of_muon(params, scaled, "reference", torch.float64, 0.1)
        for out, truth in zip(stepped, truths, strict=True):
            torch.testing.assert_close(out, truth.float(), rtol=0, atol=1e-6)

    def test_no_gradient_leaves_the_decay(self):
        for shape in ((40, 40), (0, 5)):
            [param], _ = steps_of_muon(
                [torch.ones(shape)], [[torch.zeros(shape)]], "native", torch.float32, 0.5
            )
            torch.testing.assert_close(param, torch.full(shape, 0.95))

    def test_narrow_parameters_are_left_to_the_reference(self):
        params, grads = [torch.randn(9, 5).bfloat16()], [torch.randn(9, 5).bfloat16()]
        expected = [p.clone() for p in params]
        with use_backend("native"):
            ops.muon_step(params, grads, [torch.zeros(9, 5)], lr=0.1, **MUON)
        with use_backend("reference"):
            ops.muon_step(expected, grads, [torch.zeros(9, 5)], lr=0.1, **MUON)
        assert torch.equal(params[0], expected[0])

    def test_the_same_bits_on_any_number_of_threads(self):
        params = [torch.randn(shape) for shape in MATRICES]
        grads = [[torch.randn(shape) for shape in MATRICES]]
        one, three = on_threads(
            lambda: steps_of_muon(params, grads, "native", torch.float32, 0.1)[0]
        )
        assert all(map(torch.equal, one, three))


OPS = torch.ops.leangpt
ARGUMENTS = {
    "adamw_step": lambda: (*make([(3, 5), (70,)], torch.bfloat16, True).values(), 3, 0.01, 0.9, 0.95, 1e-8, 0.1, None),
    "muon_step": lambda: (*([torch.randn(20, 30)] for _ in range(3)), 0.1, 0.95, 0.1, None),
    "grad_norm": lambda: ([torch.randn(20, 30), torch.randn(7)],),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    """The schema tells what changes, fakes have the shapes and dtypes of results."""
    torch.library.opcheck(getattr(OPS, name).default, ARGUMENTS[name]())


OTHER_ISAS = [
    isa for isa in ("portable", "avx2", "avx512", "avx512_bf16") if isa != decode.cpu_isa()
]


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa):
    """What holds for the best one holds for the others."""
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", "AdamW or GradNorm or Muon", __file__),
        ],
        env=os.environ | {"LEANGPT_CPU_ISA": isa},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if "not supported by this CPU" in process.stdout + process.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert process.returncode == 0, process.stdout
    assert " passed" in process.stdout
