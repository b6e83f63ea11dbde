"""Each op's reference against its formula, written out independently in float64, with gradients and errors."""

import math

import pytest
import torch

from leangpt.kernels import ops, use_backend

DOUBLE = torch.float64
HALF = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _on_the_reference():
    with use_backend("reference"):
        yield


def randn(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def assert_rounded(out, ref, dtype):
    """`out` is `ref` within a few roundings of `dtype`."""
    assert out.dtype == dtype
    error = (out.double() - ref).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * max(1.0, ref.abs().max().item())


def layer_norm(x, w, b, eps):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    var = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (var + eps) ** 0.5 * w + (0 if b is None else b)


def rms_norm(x, w, eps):
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5 * w


def attention(q, k, v, ends, window, scale):
    """One query at a time, each over the keys that it may see."""
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for t in range(T):
            last = ends[b] - T + t
            first = 0 if window is None else max(0, last - window + 1)
            for h in range(H):
                keys, values = (x[b, first : last + 1, h // group] for x in (k, v))
                weights = torch.exp(keys @ q[b, t, h] * scale)
                out[b, t, h] = (weights[:, None] * values).sum(0) / weights.sum()
    return out


def assert_drops(call, x, p):
    """`call(x)` is x with elements zeroed with probability p and the others divided by 1 - p."""
    out = call(x)
    is_dropped = out == 0
    torch.testing.assert_close(out, torch.where(is_dropped, 0.0, x / (1 - p)))
    assert abs(is_dropped.double().mean().item() - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5


def test_dropout_before_the_residual():
    x, zeros, ones = randn(50, 64), torch.zeros(50, 64, dtype=DOUBLE), torch.ones(64, dtype=DOUBLE)
    identity = torch.eye(64, dtype=DOUBLE)

    def mlp(x):  # relu2 of a root is what it was
        return ops.mlp(x.sqrt(), identity, None, identity, None, "relu2", dropout_p=0.3)

    assert_drops(mlp, x.abs(), 0.3)
    for add in (ops.add_layer_norm, ops.add_rms_norm):
        assert_drops(lambda x, add=add: add(x, zeros, ones, dropout_p=0.3)[1], x, 0.3)
        out, total = add(x, x, ones, dropout_p=0.3)
        alone = ops.layer_norm if add is ops.add_layer_norm else ops.rms_norm
        torch.testing.assert_close(out, alone(total, ones))


NORM_SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 129), (1, 1000)]


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm(shape, has_bias):
    x, r, w = randn(*shape), randn(*shape), randn(shape[-1])
    b = randn(shape[-1]) if has_bias else None
    torch.testing.assert_close(ops.layer_norm(x, w, b, 1e-3), layer_norm(x, w, b, 1e-3))
    out, total = ops.add_layer_norm(x, r, w, b, 1e-3)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(out, layer_norm(x + r, w, b, 1e-3))
    for dtype in HALF:
        x_, w_ = x.to(dtype), w.to(dtype)
        b_ = None if b is None else b.to(dtype)
        ref = layer_norm(x_.double(), w_.double(), None if b_ is None else b_.double(), 1e-3)
        assert_rounded(ops.layer_norm(x_, w_, b_, 1e-3), ref, dtype)


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm(shape):
    x, r, w = randn(*shape), randn(*shape), randn(shape[-1])
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-3), rms_norm(x, w, 1e-3))
    out, total = ops.add_rms_norm(x, r, w, 1e-3)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(out, rms_norm(x + r, w, 1e-3))
    for dtype in HALF:
        x_, w_ = x.to(dtype), w.to(dtype)
        assert_rounded(ops.rms_norm(x_, w_, 1e-3), rms_norm(x_.double(), w_.double(), 1e-3), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 16), (1, 7, 2, 40)], ids=str)
def test_rotary_turns_each_pair(shape):
    x = randn(*shape)
    half = shape[-1] // 2
    angles = randn(1, shape[1], half)
    out = ops.rotary(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :half], x[..., half:])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1))


def test_rotary_on_a_view_of_packed_qkv():
    qkv, angles = randn(2, 5, 4, 8), randn(2, 5, 4)
    view = qkv[:, :, :3]
    torch.testing.assert_close(
        ops.rotary(view, angles.cos(), angles.sin()),
        ops.rotary(view.contiguous(), angles.cos(), angles.sin()),
    )


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_rotary_of_packed_qkv(heads):
    H, H_kv = heads
    qkv, angles = randn(2, 5, H + 2 * H_kv, 8), randn(2, 5, 4)
    q, k, v = ops.rotary_qkv(qkv, angles.cos(), angles.sin(), H_kv)
    turned = ops.rotary(qkv, angles.cos(), angles.sin())
    torch.testing.assert_close(torch.cat((q, k), 2), turned[:, :, :-H_kv])
    assert v.shape[2] == H_kv and torch.equal(v, qkv[:, :, H + H_kv :])


def test_rotary_of_packed_qkv_with_norms():
    qkv, angles = randn(2, 5, 7, 8), randn(2, 5, 4)
    weights = randn(8), randn(8)
    rope = angles.cos(), angles.sin()
    q, k, v = ops.rotary_qkv(qkv, *rope, 2, *weights, eps=1e-3)
    for out, heads, weight in ((q, qkv[:, :, :3], weights[0]), (k, qkv[:, :, 3:5], weights[1])):
        torch.testing.assert_close(out, ops.rotary(ops.rms_norm(heads, weight, 1e-3), *rope))
    assert torch.equal(v, qkv[:, :, 5:])


ATTENTION_CASES = [  # B, T, S, H, H_kv, D, window
    (1, 1, 1, 1, 1, 16, None),
    (2, 7, 7, 2, 2, 16, None),
    (2, 5, 5, 4, 2, 40, None),
    (1, 9, 9, 5, 1, 24, 3),
    (3, 1, 11, 4, 2, 16, None),
    (2, 3, 10, 2, 1, 8, 4),
    (1, 33, 65, 1, 1, 8, 17),
]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_attention(case, is_ragged):
    B, T, S, H, H_kv, D, window = case
    q, k, v = randn(B, T, H, D), randn(B, S, H_kv, D), randn(B, S, H_kv, D)
    ends = torch.randint(T, S + 1, (B,)) if is_ragged else torch.full((B,), S)
    seqlens = ends if is_ragged else None
    ref = attention(q, k, v, ends.tolist(), window, D**-0.5)
    out = ops.attention(q, k, v, seqlens_k=seqlens, sliding_window=window)
    torch.testing.assert_close(out, ref)
    ref = attention(q, k, v, ends.tolist(), window, 0.3)
    out = ops.attention(q, k, v, seqlens_k=seqlens, sliding_window=window, softmax_scale=0.3)
    torch.testing.assert_close(out, ref)
    for dtype in HALF:
        q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
        ref = attention(q_.double(), k_.double(), v_.double(), ends.tolist(), window, D**-0.5)
        out = ops.attention(q_, k_, v_, seqlens_k=seqlens, sliding_window=window)
        assert_rounded(out, ref, dtype)


def test_attention_gradients():
    q, k, v = (randn(2, 4, h, 6).requires_grad_() for h in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, sliding_window=3), (q, k, v))
    assert torch.autograd.gradcheck(ops.attention, (q, k, v))


def test_attention_dropout_keeps_the_mean():
    q, k = randn(1, 8, 1, 4), randn(1, 8, 1, 4)
    v = torch.ones(1, 8, 1, 4, dtype=DOUBLE)
    out = torch.stack([ops.attention(q, k, v, dropout_p=0.5) for _ in range(400)])
    assert out.std(0).min() >= 0 and out.std(0)[0, -1].min() > 0.05  # something is dropped
    assert (out.mean(0) - 1).abs().max() < 0.2


@pytest.mark.parametrize("window", [None, 3])
def test_attention_varlen(window):
    lengths = [3, 0, 1, 7]
    cu_seqlens = torch.tensor([0, 3, 3, 4, 11], dtype=torch.int32)
    q, k, v = randn(11, 4, 8), randn(11, 2, 8), randn(11, 2, 8)
    out = ops.attention_varlen(q, k, v, cu_seqlens, 7, sliding_window=window)
    parts = zip(*(x[None].split(lengths, 1) for x in (q, k, v)), lengths, strict=True)
    refs = [attention(*qkv, [n], window, 8**-0.5)[0] for *qkv, n in parts]
    torch.testing.assert_close(out, torch.cat(refs))


def test_attention_varlen_of_nothing():
    empty, no_seqlens = torch.zeros(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    assert ops.attention_varlen(empty, empty, empty, no_seqlens, 0).shape == (0, 2, 8)


ERF_GELU = {"gelu": lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))}
ACTIVATIONS = ERF_GELU | {
    "gelu_tanh": lambda h: (
        h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    ),
    "relu2": lambda h: h.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_mlp(activation, has_bias):
    C, F = 5, 7
    rows = 2 * F if activation == "swiglu" else F
    x, w_in, w_out = randn(2, 3, C), randn(rows, C), randn(C, F)
    b_in, b_out = (randn(rows), randn(C)) if has_bias else (None, None)
    h = x @ w_in.T + (b_in if has_bias else 0)
    if activation == "swiglu":
        gate, up = h[..., :F], h[..., F:]
        h = gate / (1 + torch.exp(-gate)) * up
    else:
        h = ACTIVATIONS[activation](h)
    ref = h @ w_out.T + (b_out if has_bias else 0)
    torch.testing.assert_close(ops.mlp(x, w_in, b_in, w_out, b_out, activation), ref)
    out = ops.mlp(x, w_in, b_in, w_out, b_out, activation, residual=x)
    torch.testing.assert_close(out, x + ref)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
def test_activate(activation):
    h = randn(2, 3, 8)
    if activation == "swiglu":
        gate, up = h[..., :4], h[..., 4:]
        ref = gate / (1 + torch.exp(-gate)) * up
    else:
        ref = ACTIVATIONS[activation](h)
    torch.testing.assert_close(ops.activate(h, activation), ref)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)])
def test_linear_cross_entropy(reduction, smoothing, z_loss):
    hidden, weight = randn(2, 3, 5), randn(11, 5)
    targets = torch.tensor([[0, 10, -100], [3, -100, 3]])
    logits = hidden @ weight.T
    losses = torch.zeros(2, 3, dtype=DOUBLE)
    for index in (targets >= 0).nonzero().tolist():
        row = logits[tuple(index)]
        lse = torch.log(torch.exp(row).sum())
        target = (1 - smoothing) * row[targets[tuple(index)]] + smoothing * row.mean()
        losses[tuple(index)] = lse - target + z_loss * lse**2
    ref = {"mean": losses.sum() / 4, "sum": losses.sum(), "none": losses}[reduction]
    out = ops.linear_cross_entropy(
        hidden, weight, targets, reduction=reduction, label_smoothing=smoothing, z_loss=z_loss
    )
    torch.testing.assert_close(out, ref)


def test_linear_cross_entropy_is_float32_for_bf16():
    hidden, weight = randn(4, 8).bfloat16(), randn(9, 8).bfloat16()
    assert ops.linear_cross_entropy(hidden, weight, torch.arange(4)).dtype == torch.float32


def test_embedding():
    weight, wpe = randn(7, 4), randn(5, 4)
    tokens, positions = torch.tensor([[1, 6, 1], [0, 2, 3]]), torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(ops.embedding(tokens, weight)[1, 2], weight[3], rtol=0, atol=0)
    out = ops.embedding(tokens, weight, positions, wpe)
    torch.testing.assert_close(out[0, 1], weight[6] + wpe[1], rtol=0, atol=0)
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([[7]]), weight)


def test_linear():
    x, w, b = randn(2, 3, 5), randn(4, 5), randn(4)
    ref = torch.stack([(x * row).sum(-1) for row in w], -1)
    torch.testing.assert_close(ops.linear(x, w), ref)
    torch.testing.assert_close(ops.linear(x, w, b), ref + b)


def test_gradients_of_the_other_ops():
    x, r, w, b = (randn(*s).requires_grad_() for s in ((2, 3, 4), (2, 3, 4), (4,), (4,)))
    angles = randn(1, 3, 2)
    w_in, w_out = randn(6, 4).requires_grad_(), randn(4, 3).requires_grad_()
    targets = torch.tensor([[0, 1, -100], [5, 2, 2]])
    check = torch.autograd.gradcheck
    assert check(ops.layer_norm, (x, w, b))
    assert check(ops.add_layer_norm, (x, r, w, b))
    assert check(ops.rms_norm, (x, w))
    assert check(ops.add_rms_norm, (x, r, w))
    assert check(lambda t: ops.rotary(t[..., None, :], angles.cos(), angles.sin()), (x,))
    assert check(lambda t: ops.activate(t, "gelu_tanh"), (x,))
    assert check(lambda t: ops.activate(t, "swiglu"), (x,))
    assert check(lambda *t: ops.mlp(t[0], t[1], None, t[2], None, "swiglu"), (x, w_in, w_out))
    assert check(lambda t, e: ops.linear_cross_entropy(t, e, targets), (x, w_in))
    assert check(lambda e: ops.embedding(targets.clamp(min=0), e), (w_in,))


T = torch.zeros
INVALID = {
    "norm weight": (lambda: ops.layer_norm(T(2, 8), T(7)), r"layer_norm: weight must be \(8,\), got \(7,\)"),
    "norm bias": (lambda: ops.layer_norm(T(2, 8), T(8), T(9)), r"bias must be \(8,\), got \(9,\)"),
    "residual": (lambda: ops.add_rms_norm(T(2, 8), T(2, 9), T(8)), r"residual must be \(2, 8\)"),
    "rotary": (lambda: ops.rotary(T(2, 3, 1, 8), T(1, 4, 4), T(1, 4, 4)), "rotary: cos must be"),
    "odd rotary": (lambda: ops.rotary(T(2, 3, 1, 7), T(1, 3, 3), T(1, 3, 3)), "rotary: cos must be"),
    "rotary_qkv angles": (
        lambda: ops.rotary_qkv(T(2, 3, 3, 8), T(2, 3, 4), T(1, 4, 4), 1),
        "rotary_qkv: sin must be",
    ),
    "rotary_qkv one weight": (
        lambda: ops.rotary_qkv(T(2, 3, 3, 8), T(1, 3, 4), T(1, 3, 4), 1, T(8)),
        "rotary_qkv: q_weight and k_weight must be given together",
    ),
    "rotary_qkv weight": (
        lambda: ops.rotary_qkv(T(2, 3, 3, 8), T(1, 3, 4), T(1, 3, 4), 1, T(8), T(4)),
        "rotary_qkv: k_weight must be",
    ),
    "rotary_qkv heads": (
        lambda: ops.rotary_qkv(T(2, 3, 4, 8), T(1, 3, 4), T(1, 3, 4), 2),
        "rotary_qkv: qkv must have",
    ),
    "no key for a query": (lambda: ops.attention(T(1, 3, 1, 4), T(1, 2, 1, 4), T(1, 2, 1, 4)), "a key for each"),
    "key heads": (lambda: ops.attention(T(1, 3, 3, 4), T(1, 3, 2, 4), T(1, 3, 2, 4)), "multiple of 2 key heads"),
    "values": (lambda: ops.attention(T(1, 3, 2, 4), T(1, 3, 2, 4), T(1, 4, 2, 4)), r"v must be \(1, 3, 2, 4\)"),
    "activation": (lambda: ops.mlp(T(1, 4), T(8, 4), None, T(4, 8), None, "tanh"), "activation must be one of"),
    "activate": (lambda: ops.activate(T(1, 4), "tanh"), "activation must be one of"),
    "halves": (lambda: ops.activate(T(1, 5), "swiglu"), r"h must be \(..., 2F\) for swiglu, got \(1, 5\)"),
    "gated": (lambda: ops.mlp(T(1, 4), T(8, 4), None, T(4, 8), None, "swiglu"), r"w_in must be \(16, 4\)"),
    "targets": (lambda: ops.linear_cross_entropy(T(2, 4), T(9, 4), T(3).long()), r"targets must be \(2,\)"),
    "reduction": (
        lambda: ops.linear_cross_entropy(T(2, 4), T(9, 4), T(2).long(), reduction="max"),
        "reduction must be one of",
    ),
    "positions": (lambda: ops.embedding(T(1, 2).long(), T(4, 4), T(1, 2).long()), "given together"),
    "linear": (lambda: ops.linear(T(2, 4), T(3, 5)), r"weight must be \(3, 4\)"),
    "stream": (
        lambda: ops.mlp(T(1, 4), T(8, 4), None, T(4, 8), None, "relu2", residual=T(1, 5)),
        r"residual must be \(1, 4\)",
    ),
    "cu_seqlens": (
        lambda: ops.attention_varlen(T(3, 2, 4), T(3, 2, 4), T(3, 2, 4), T(2).long(), 3),
        r"cu_seqlens must be \(B \+ 1,\) int32, got \(2,\) torch.int64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_rejects(name):
    call, message = INVALID[name]
    with pytest.raises(ValueError, match=message):
        call()
