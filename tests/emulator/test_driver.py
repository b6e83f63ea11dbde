"""Triton kernels of every kind run on CPU tensors, are right, and are never reported, whatever the order of threads."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from emulator import driver
from torch import Tensor
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

OPTIONS = [
    {},
    {"seed": 1, "race": 1},
    {"seed": 2, "preempt": 5, "resident": 3},
    {"seed": 3, "early_async": True},
    {"order": "forward", "preempt": 0},
    {"order": "reverse", "resident": 100},
]


@pytest.fixture(autouse=True)
def _installed():
    driver.install()


def for_all_options(function):
    for options in OPTIONS:
        with driver.options(**options):
            function()


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, stride_a, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inner = k + tl.arange(0, BLOCK_K)
        a_mask = (rows[:, None] < M) & (inner[None, :] < K)
        b_mask = (inner[:, None] < K) & (columns[None, :] < N)
        a = tl.load(a_ptr + rows[:, None] * stride_a + inner[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + inner[:, None] * stride_b + columns[None, :], mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total, mask=mask)


@pytest.mark.parametrize(
    ("dtype", "precision", "shape"),
    [
        (torch.bfloat16, "ieee", (64, 64, 64)), (torch.bfloat16, "ieee", (37, 29, 83)), (torch.float16, "ieee", (32, 48, 160)),
        (torch.float32, "tf32", (32, 64, 64)), (torch.float32, "ieee", (17, 31, 41)),
    ],
    ids=str,
)  # fmt: skip
def test_matmul(dtype, precision, shape):
    """cp.async or plain loads by the strides, ldmatrix, mma or FMA by the dtype."""
    m, n, k = shape
    generator = np.random.default_rng(0)
    a, b = (torch.from_numpy(generator.integers(-8, 8, s) / 4).to(dtype) for s in ((m, k), (k, n)))

    def check():
        out = torch.full((m, n), torch.nan)
        grid = (triton.cdiv(m, 32), triton.cdiv(n, 32))
        _matmul_kernel[grid](a, b, out, m, n, k, a.stride(0), b.stride(0), 32, 32, 32, 3, precision)
        assert (out == (a.double() @ b.double())).all()  # all sums are exact

    for_all_options(check)


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, num_columns, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    mask = columns < num_columns
    x = tl.load(x_ptr + row * num_columns + columns, mask=mask, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x))
    tl.store(
        out_ptr + row * num_columns + columns,
        (e / tl.sum(e)).to(out_ptr.dtype.element_ty),
        mask=mask,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reductions(dtype):
    x = torch.randn(5, 300).to(dtype)

    def check():
        out = torch.full_like(x, torch.nan)
        _softmax_kernel[(5,)](x, out, 300, 512)
        torch.testing.assert_close(out, x.softmax(-1))

    for_all_options(check)


@triton.jit
def _scan_kernel(x_ptr, order_ptr, sums_ptr, histogram_ptr, counter_ptr, BLOCK: tl.constexpr):
    """Scans, sorting, atomics, layouts that go through shared memory."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(order_ptr + at, tl.sort(x))
    tl.store(sums_ptr + at, tl.cumsum(x, 0))
    tl.atomic_add(histogram_ptr + x, 1)
    tl.atomic_max(counter_ptr, tl.program_id(0))


def test_scans_and_atomics():
    x = torch.randint(0, 10, (4, 128), dtype=torch.int32)

    def check():
        order, sums = torch.empty_like(x), torch.empty_like(x)
        histogram, counter = torch.zeros(10, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        _scan_kernel[(4,)](x, order, sums, histogram, counter, 128)
        assert (order == x.sort(-1).values).all() and (sums == x.cumsum(-1)).all()
        assert (histogram == x.flatten().bincount(minlength=10)).all() and counter.item() == 3

    for_all_options(check)


@triton.jit
def _last_program_kernel(x_ptr, parts_ptr, counter_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each program adds up a part; the one that finishes last, by an atomic counter, adds up the parts."""
    part = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    tl.store(parts_ptr + tl.program_id(0), part)
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(out_ptr, tl.sum(tl.load(parts_ptr + tl.arange(0, 8))))


def test_programs_that_synchronise():
    x = torch.arange(8 * 256.0).view(8, 256)

    def check():
        counter, out = torch.zeros(1, dtype=torch.int32), torch.empty(1)
        _last_program_kernel[(8,)](x, torch.empty(8), counter, out, 256)
        assert out.item() == x.sum()

    for_all_options(check)


@triton.jit
def _device_descriptor_kernel(x_ptr, out_ptr, M, N, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, BLOCK])
    out = tl.make_tensor_descriptor(
        out_ptr, shape=[N, M], strides=[M, 1], block_shape=[BLOCK, BLOCK]
    )
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    out.store([column, row], x.load([row, column]).T)


@triton.jit
def _host_descriptor_kernel(x, out, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    out.store([row, 0], x.load([row, 0]) * 2)


def test_tensor_descriptors():
    x = torch.randn(40, 72)
    out = torch.empty(72, 40)
    _device_descriptor_kernel[(3, 5)](x, out, 40, 72, 16)
    assert (out == x.T).all()
    twice = torch.empty_like(x)
    blocks = [TensorDescriptor.from_tensor(t, [16, 128]) for t in (x, twice)]
    _host_descriptor_kernel[(3,)](*blocks, 16)
    assert (twice == x * 2).all()


@triton.jit
def _math_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, libdevice.tanh(x))
    tl.store(out_ptr + BLOCK + at, tl.math.erf(x))
    tl.store(
        out_ptr + 2 * BLOCK + at, tl.sin(x * 1e6)
    )  # far enough for the slow path, with an array in local memory
    y = tl.inline_asm_elementwise(
        "{ .reg .f32 t; add.f32 t, $1, $1; mul.f32 $0, t, t; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    tl.store(out_ptr + 3 * BLOCK + at, y)
    tl.store(out_ptr + 4 * BLOCK + at, tl.rand(7, at))


def test_libdevice_and_inline_assembly():
    x, out = torch.randn(128), torch.empty(5, 128)
    _math_kernel[(1,)](x, out, 128)
    expected = torch.stack(
        [x.double().tanh(), x.double().erf(), (x * 1e6).double().sin(), (2 * x.double()) ** 2]
    )
    torch.testing.assert_close(out[:4].double(), expected, rtol=1e-6, atol=1e-6)
    assert out[4].min() >= 0 and out[4].max() < 1 and out[4].unique().numel() > 120


@triton.jit
def _arguments_kernel(tensors, scalars, none_ptr, flag, small, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.load(tensors[0] + at) + tl.load(tensors[1][0] + at) * scalars[0] + scalars[1] + small
    if flag:
        total = -total
    if none_ptr is None:
        tl.store(out_ptr + at, total)


def test_arguments():
    """Tuples, nested ones, None, booleans, floats and integers of all widths."""
    x, y, out = torch.randn(32), torch.randn(32), torch.empty(32)
    for flag in (True, False):
        for big in (3, -5, 2**31, 2**40, -(2**40)):
            _arguments_kernel[(1,)]((x, (y,)), (0.5, big), None, flag, 1, out, 32)
            expected = x + y * 0.5 + big + 1
            assert (out == (-expected if flag else expected)).all()


def test_strided_views_are_known_to_their_last_element():
    x = torch.randn(8, 300)
    out = torch.empty(3, 300)
    _softmax_kernel[(3,)](x[5:], out, 300, 512)
    with pytest.raises(driver.Fault, match="out of bounds"):
        _softmax_kernel[(4,)](x[5:], out, 300, 512)


def test_autotuning_runs_all_configurations_and_takes_the_first():
    ran = []

    @triton.autotune(
        [triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 256}, num_warps=8)], key=["n"]
    )
    @triton.jit
    def kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)

    def grid(meta):
        ran.append(meta["BLOCK"])
        return (triton.cdiv(1000, meta["BLOCK"]),)

    x, out = torch.randn(1000), torch.empty(1000)
    kernel[grid](x, out, 1000)
    assert (out == x + 1).all() and set(ran) == {128, 256} and ran[-1] == 128
    assert kernel.best_config is kernel.configs[0]


def test_too_much_shared_memory_is_refused():
    a = torch.zeros(256, 256, dtype=torch.float16)
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        _matmul_kernel[(1, 1)](a, a, a, 256, 256, 256, 256, 256, 128, 128, 128, 5, "ieee")


def test_reports_name_kernel_thread_and_line():
    x: Tensor = torch.randn(100)
    with pytest.raises(driver.Fault) as fault:
        _softmax_kernel[(1,)](x, torch.empty(50), 100, 128)
    message = str(fault.value)
    assert message.startswith("_softmax_kernel(1,1,1): global write")
    assert "'out_ptr'" in message and "thread (" in message and "block (0,0,0)" in message
    assert "test_driver.py:" in message and "st.global" in message
