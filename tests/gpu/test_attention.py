"""Attention on Triton: values, gradients, masks, dropout and hazards of the compiled kernels."""

import functools

import pytest
import torch
import triton
from helpers import check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from leangpt.kernels import dispatch, ops, triton_attention, use_backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {
    "fwd": (triton_attention._attention_fwd_kernel, triton_attention._FWD_TILES),
    "dq": (triton_attention._attention_dq_kernel, triton_attention._DQ_TILES),
    "dkv": (triton_attention._attention_dkv_kernel, triton_attention._DKV_TILES),
}


def make_qkv(B, T, S, H, H_kv, D, device, dtype=BF16, seed=0) -> list[Tensor]:
    """q, k and v; views of packed qkv where they have the same length."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, S, H + 2 * H_kv, D, generator=generator).to(device, dtype)
    q, k, v = qkv.split((H, H_kv, H_kv), dim=2)
    return [q[:, S - T :], k, v]


def check(tensors: list[Tensor], **options) -> None:
    check_op(functools.partial(ops.attention, **options), tensors, "triton")


# B, T, S, H, H_kv, D: sizes of 1, primes, tiles and one more or less, fewer queries than keys, groups of heads
SHAPES = [
    (1, 1, 1, 1, 1, 64),
    (2, 32, 32, 2, 2, 64),
    (1, 67, 67, 3, 1, 64),
    (3, 1, 33, 2, 1, 64),
    (1, 15, 31, 4, 2, 64),
    (2, 17, 65, 2, 2, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    for seed in (1, 2):
        check(make_qkv(*shape, device, seed=seed))


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_dtypes(dtype, device):
    for seed in (1, 2):
        check(make_qkv(2, 35, 41, 2, 1, 32, device, dtype, seed))


@pytest.mark.parametrize("head_dim", [8, 40, 80, pytest.param(96, marks=pytest.mark.full)])
def test_head_dims(head_dim, device):
    check(make_qkv(2, 37, 37, 3, 1, head_dim, device))


def test_head_dim_without_alignment(device):
    """Rows that are read element by element."""
    check(make_qkv(1, 19, 37, 3, 3, 15, device))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 70),
    more_keys=st.integers(0, 40),
    H_kv=st.integers(1, 2),
    group=st.integers(1, 3),
    window=st.integers(1, 110),
    seed=st.integers(0, 99),
)
def test_masks(B, T, more_keys, H_kv, group, window, seed):
    """Windows, padding keys, fewer queries than keys and groups of heads at once: all of them run-time arguments."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    S = T + more_keys
    generator = torch.Generator().manual_seed(seed)
    seqlens_k = torch.randint(T, S + 1, (B,), generator=generator).to(device)
    tensors = make_qkv(B, T, S, H_kv * group, H_kv, 16, device, seed=seed)
    check(tensors, seqlens_k=seqlens_k, sliding_window=window)


def test_padding_keys_are_not_read(device):
    q, k, v = make_qkv(2, 5, 70, 2, 1, 16, device)
    seqlens_k = torch.tensor([5, 37], device=device)
    is_padding = torch.arange(70, device=device) >= seqlens_k[:, None]
    results = []
    for padding in (0.0, torch.nan):
        q_, k_, v_ = (t.clone().requires_grad_() for t in (q, k, v))
        k__, v__ = (torch.where(is_padding[..., None, None], padding, t) for t in (k_, v_))
        with use_backend("triton"):
            out = ops.attention(q_, k__, v__, seqlens_k=seqlens_k, sliding_window=9)
        results.append((out, *torch.autograd.grad(out, (q_, k__, v__), torch.ones_like(out))))
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)
    assert all(not grad[is_padding].any() for grad in results[0][2:])


@pytest.mark.parametrize("lengths", [(5, 0, 33, 1, 64), (40,), (0, 7)], ids=str)
def test_packed_sequences(lengths, device):
    ends = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    tensors = [t[0] for t in make_qkv(1, sum(lengths), sum(lengths), 4, 2, 16, device)]

    def call(q, k, v, window):
        return ops.attention_varlen(q, k, v, ends, max(lengths) + 3, sliding_window=window)

    for window in (1, 21):
        check_op(functools.partial(call, window=window), tensors, "triton")


def test_packed_sequences_are_those_of_a_batch(device):
    """The same bits: sequences of equal length, packed or not."""
    q, k, v = make_qkv(3, 37, 37, 2, 1, 64, device)
    ends = torch.arange(4, dtype=torch.int32, device=device) * 37
    with use_backend("triton"):
        out = ops.attention(q, k, v)
        packed = ops.attention_varlen(*(t.flatten(0, 1) for t in (q, k, v)), ends, 37)
    assert torch.equal(out.flatten(0, 1), packed)


@pytest.mark.parametrize("scale", [3.0, 0.01])
def test_softmax_scale(scale, device):
    check(make_qkv(1, 35, 35, 2, 2, 64, device), softmax_scale=scale)


def test_transposed_and_expanded(device):
    """`(B, H, T, D)` in memory, keys shared by the batch, and heads that lie strided: whatever has strides."""
    q, k, v = make_qkv(2, 37, 37, 2, 2, 64, device)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k[:1].expand(2, -1, -1, -1)
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    check([q, k, v])


def test_expanded_gradient(device):
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 19, 19, 1, 1, 64, device))
    with use_backend("triton"):
        out = ops.attention(q, k, v)
        expanded = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for a, b in zip(expanded, ones, strict=True):
        assert torch.equal(a, b)


def kept_weights(B, T, H, dropout_p, device) -> Tensor:
    """The mask `(B, H, T, T)` of seed 3: with equal scores and values of one-hot rows, outputs are the weights."""
    D = 16
    zeros = torch.zeros(B, T, H, D, dtype=FP32, device=device)
    parts = []
    for first in range(0, T, D):
        values = torch.zeros(T, D, device=device)
        values[first : first + D] = torch.eye(D, device=device)[: T - first]
        torch.manual_seed(3)
        parts.append(
            ops.attention(
                zeros.to(BF16),
                zeros.to(BF16),
                values.to(BF16)[None, :, None].expand(B, -1, H, -1),
                dropout_p=dropout_p,
            )
        )
    return torch.cat(parts, dim=-1)[..., :T].transpose(1, 2) > 0


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, is_kept: Tensor, dropout_p: float) -> Tensor:
    """Attention with a given dropout mask, sums in float32 or wider."""
    wide = torch.promote_types(q.dtype, FP32)
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    T = q.shape[1]
    is_visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    p = scores.masked_fill(~is_visible, -torch.inf).softmax(-1)
    p = torch.where(is_kept, p / (1 - dropout_p), 0.0)
    return torch.einsum("bhts,bshd->bthd", p.to(q.dtype).to(wide), v.to(wide)).to(q.dtype)


def test_dropout(device):
    """The mask of a seed, read off an output, is the mask of the same seed in forward and backward."""
    B, T, H, p = 2, 37, 4, 0.3
    with use_backend("triton"):
        is_kept = kept_weights(B, T, H, p, device)
    is_visible = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    assert not is_kept[..., ~is_visible].any()
    drawn = is_kept[..., is_visible].double()
    for mean in (drawn.mean(), drawn[0].mean(), drawn[:, 1].mean()):
        assert abs(mean - (1 - p)) < 5 * (p * (1 - p) / T**2) ** 0.5
    for other in (drawn[1, 0], drawn[0, 1]):  # no two heads or sequences have the same mask
        assert 0.3 < (drawn[0, 0] == other).double().mean() < 0.8

    def call(q, k, v):
        if dispatch.forced_backend() == "reference":
            return dropped_attention(q, k, v, is_kept, p)
        torch.manual_seed(3)
        return ops.attention(q, k, v, dropout_p=p)

    check_op(call, make_qkv(B, T, T, H, 2, 16, device), "triton")


def test_dropout_of_everything(device):
    q, k, v = (t.requires_grad_() for t in make_qkv(1, 19, 19, 1, 1, 16, device))
    with use_backend("triton"):
        out = ops.attention(q, k, v, dropout_p=1.0)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not any(t.any() for t in (out, *grads))


CONFIGURATIONS = [
    pytest.param(name, head_dim, tile, dtype, marks=() if dtype == BF16 else pytest.mark.full)
    for name, (_, tiles) in KERNELS.items()
    for (head_dim, itemsize), choice in tiles.items()
    for tile in choice
    for dtype in (BF16, torch.float16, torch.float32)
    if dtype.itemsize == itemsize
]


@pytest.mark.parametrize(("name", "head_dim", "tile", "dtype"), CONFIGURATIONS)
def test_configurations(name, head_dim, tile, dtype, device, monkeypatch):
    block_m, block_n, num_warps, num_stages = tile
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
    config = triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)
    monkeypatch.setattr(KERNELS[name][0], "configs", [config])
    T = 2 * max(block_m, block_n) + 1
    check(make_qkv(1, T - 5, T, 1, 1, head_dim, device, dtype))


def test_autotuning(device, monkeypatch):
    """The tiles of a class of head_dim and dtype are tried and no others; of these the leaner where registers are short."""
    kernel, tiles = KERNELS["fwd"]
    q, k, v = make_qkv(1, 70, 70, 1, 1, 64, device)
    arguments = {
        "BLOCK_D": 64,
        "q_ptr": q,
        "seed_ptr": None,
        "window": None,
        "cu_seqlens_ptr": None,
    }
    choice = kernel.early_config_prune(kernel.configs, arguments)
    blocks = [(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_warps, c.num_stages) for c in choice]
    assert blocks == tiles[64, 2]
    seed = torch.tensor([1], device=device)
    assert kernel.early_config_prune([], arguments | {"seed_ptr": seed}) == choice[:1]
    assert kernel.early_config_prune([], arguments | {"window": 9}) == choice[:2]
    assert kernel.early_config_prune([], arguments | {"cu_seqlens_ptr": seed}) == choice[:2]
    packed_window = arguments | {"cu_seqlens_ptr": seed, "window": 9}
    assert kernel.early_config_prune([], packed_window) == choice[1:2]
    assert kernel.early_config_prune([], packed_window | {"seed_ptr": seed}) == choice[:1]
    monkeypatch.setattr(kernel, "configs", choice)
    monkeypatch.setattr(kernel, "cache", {})
    check_op(ops.attention, [q, k, v], "triton", with_gradients=False)
    assert kernel.best_config in choice
    tried = []
    monkeypatch.setattr(
        kernel, "early_config_prune", lambda *_, **__: tried.append(1) or choice[:1]
    )
    with use_backend("triton"):
        ops.attention(q, k, v, sliding_window=9)
        ops.attention(q, k, v, sliding_window=19)
    assert tried == [1]  # a window is another class, whatever its size
    lengths = torch.tensor([70], device=device)
    with use_backend("triton"):
        ops.attention(q, k, v, seqlens_k=lengths)
        ops.attention(q, k, v, dropout_p=0.1)
    assert tried == [1] * 3  # and so is dropout, though its seed looks like lengths


def test_a_choice_is_kept_on_disk(device, monkeypatch, tmp_path):
    """Another process, whose memory of choices is empty, tries nothing."""
    kernel, _ = KERNELS["fwd"]
    q, k, v = make_qkv(1, 20, 20, 1, 1, 16, device)
    arguments = {"BLOCK_D": 16, "q_ptr": q, "seed_ptr": None, "window": None}
    choice = kernel.early_config_prune(kernel.configs, arguments | {"cu_seqlens_ptr": None})
    tried = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel, "configs", choice)
    monkeypatch.setattr(kernel, "cache_results", True)
    monkeypatch.setattr(kernel, "_bench", lambda *_, config, **__: [tried.append(config) or 1.0])
    for _ in range(2):
        monkeypatch.setattr(kernel, "cache", {})
        with use_backend("triton"):
            ops.attention(q, k, v)
    assert tried == choice and len(choice) > 1


def test_same_bits_in_every_run(device, thread_orders):
    """Whatever the order of threads and blocks: no result has two writers."""
    q, k, v = (t.requires_grad_() for t in make_qkv(2, 37, 37, 4, 2, 64, device))
    runs = []
    for order in thread_orders:
        with use_backend("triton"), order():
            out = ops.attention(q, k, v)
            runs.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 0, 0)], ids=str)
def test_empty(shape, device):
    q, k, v = (t.requires_grad_() for t in make_qkv(*shape, 2, 1, 16, device))
    with use_backend("triton"):
        out = ops.attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert out.shape == dq.shape == q.shape
    assert dk.shape == k.shape and not dk.any() and not dv.any()


def test_nothing_packed(device):
    q, k, v = (t[0].requires_grad_() for t in make_qkv(1, 0, 0, 2, 1, 16, device))
    for ends in ([0], [0, 0, 0]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        with use_backend("triton"):
            assert ops.attention_varlen(q, k, v, cu_seqlens, 0).shape == (0, 2, 16)


def test_head_dim_that_is_too_large(device):
    q = torch.zeros(1, 1, 1, 257, device=device)
    with use_backend("triton"), pytest.raises(ValueError, match="head_dim must be at most 256"):
        ops.attention(q, q, q)


def test_opcheck(device):
    q, k, v = (t.requires_grad_() for t in make_qkv(2, 5, 7, 2, 1, 16, device))
    seqlens_k = torch.tensor([5, 7], device=device)
    seed = torch.tensor([5], device=device)
    arguments = (q, k, v, seqlens_k, None, 7, 3, 0.25, 0.5, seed)
    torch.library.opcheck(triton_attention._attention, arguments)
    saved = [t.detach() for t in (*triton_attention._attention(*arguments), q, k, v)]
    torch.library.opcheck(
        triton_attention._attention_backward, (torch.ones_like(saved[0]), *saved, *arguments[3:])
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend, device):
    inputs = make_qkv(2, 19, 19, 2, 1, 16, device)
    ends = torch.tensor([0, 5, 19], dtype=torch.int32, device=device)

    def call(q, k, v):
        out = ops.attention(q, k, v, dropout_p=0.25)
        return out + ops.attention_varlen(q[0], k[0], v[0], ends, 14, sliding_window=4)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in inputs]
        torch.manual_seed(3)
        with use_backend("triton"):
            out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_fake_tensors_on_cuda():
    with FakeTensorMode(), use_backend("triton"):
        q = torch.empty(2, 3, 4, 40, dtype=BF16, device="cuda")
        k = torch.empty(2, 5, 2, 40, dtype=BF16, device="cuda")
        out = ops.attention(q, k, k, sliding_window=2, dropout_p=0.1)
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        row = torch.empty(3, 4, 40, dtype=BF16, device="cuda")
        packed = ops.attention_varlen(row, row, row, ends, 3)
        lse = torch.empty(4, 6, device="cuda")
        dq, dk, dv = triton_attention._attention_backward(
            out, out, lse, q, k, k, None, None, 5, None, 1.0, 0.0, None
        )
    for tensor, like in ((out, q), (packed, row), (dq, q), (dk, k), (dv, k)):
        assert tensor.is_cuda and tensor.dtype == BF16 and tensor.shape == like.shape
