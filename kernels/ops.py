"""The ops of the engine: what they compute, on what; `select` says which backend runs them.

Shapes: B batch, T query length, S key length, H heads, D head_dim, C n_embd, F n_inner, V vocab. Floating-point tensors
are float32, bfloat16, float16 or float64, all arguments of a call of one dtype and device, of any strides. Within
`torch.autocast` products run in its dtype, norms write it, and what is added to a residual may be narrower than it: sums have
the wider dtype. Every op is differentiable in its floating-point tensors, but for `adamw_step`, `muon_step`, `grad_norm`,
`sample` and `penalize`.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .dispatch import select

Activation = Literal["gelu_tanh", "gelu", "relu2", "swiglu"]
Reduction = Literal["mean", "sum", "none"]


def _check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must be {shape}, got {tuple(tensor.shape)}")


def embedding(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
) -> Tensor:
    """Rows of a table, and of a second one for learned positions: `weight[tokens] + position_weight[positions]`.

    Args:
        tokens: `(B, T)` int64 in [0, V).
        weight: `(V, C)`.
        positions: None, or int64 in [0, max_seq_len) that broadcasts to `(B, T)`.
        position_weight: `(max_seq_len, C)`, given with `positions`.

    Returns:
        `(B, T, C)`.

    Raises:
        ValueError: only one of `positions` and `position_weight` is given.
        IndexError: a token or position is out of range (on a GPU, which the caller does not wait for: a device
            assertion, or with Triton a row of NaN that has no part in the gradients).
    """
    if (positions is None) != (position_weight is None):
        raise ValueError("embedding: positions and position_weight must be given together")
    backend = select("embedding", weight, position_weight)
    return backend.embedding(tokens, weight, positions, position_weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalization: `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, variance without Bessel's correction.

    Args:
        x: `(..., C)`.
        weight: `(C,)`.
        bias: `(C,)` or None.
        eps: added to the variance.

    Returns:
        `(..., C)`, dtype of `x` or of autocast.

    Raises:
        ValueError: `weight` or `bias` is not `(C,)`.

    Reference: Ba et al., 2016, https://arxiv.org/abs/1607.06450
    """
    _check_shape("layer_norm", "weight", weight, (x.shape[-1],))
    _check_shape("layer_norm", "bias", bias, (x.shape[-1],))
    return select("layer_norm", x, weight, bias).layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Residual add and layer normalization in one pass: `(layer_norm(total), total)`, `total = residual + dropout(x)`.

    Args, Raises and Reference: as `layer_norm`; `residual` has the shape of `x`; `dropout_p` is the probability of
    dropping an element of `x`.

    Returns:
        The normalized tensor and the sum, both `(..., C)`.
    """
    _check_shape("add_layer_norm", "residual", residual, tuple(x.shape))
    _check_shape("add_layer_norm", "weight", weight, (x.shape[-1],))
    _check_shape("add_layer_norm", "bias", bias, (x.shape[-1],))
    backend = select("add_layer_norm", x, residual, weight, bias)
    return backend.add_layer_norm(x, residual, weight, bias, eps, dropout_p)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalization: `x / sqrt(mean(x^2) + eps) * weight`.

    Args:
        x: `(..., C)`.
        weight: `(C,)`.
        eps: added to the mean square.

    Returns:
        `(..., C)`, dtype of `x` or of autocast.

    Raises:
        ValueError: `weight` is not `(C,)`.

    Reference: Zhang & Sennrich, 2019, https://arxiv.org/abs/1910.07467
    """
    _check_shape("rms_norm", "weight", weight, (x.shape[-1],))
    return select("rms_norm", x, weight).rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Residual add and RMS normalization in one pass: `(rms_norm(total), total)`, `total = residual + dropout(x)`.

    Args, Raises and Reference: as `rms_norm`; `residual` has the shape of `x`; `dropout_p` is the probability of
    dropping an element of `x`.

    Returns:
        The normalized tensor and the sum, both `(..., C)`.
    """
    _check_shape("add_rms_norm", "residual", residual, tuple(x.shape))
    _check_shape("add_rms_norm", "weight", weight, (x.shape[-1],))
    backend = select("add_rms_norm", x, residual, weight)
    return backend.add_rms_norm(x, residual, weight, eps, dropout_p)


def _check_angles(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    B, T, _, D = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if D % 2 or tuple(table.shape) not in ((B, T, D // 2), (1, T, D // 2)):
            raise ValueError(
                f"{op}: {name} must be ({B} or 1, {T}, {D} / 2), got {tuple(table.shape)}"
            )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: each pair `(x[i], x[i + D/2])` is turned by the angle of its position.

    `y[i] = x[i] cos[i] - x[i + D/2] sin[i]` and `y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]` for i < D/2.

    Args:
        x: `(B, T, H, D)`, queries or keys, D even; a view into packed qkv is fine.
        cos: `(B, T, D/2)` or `(1, T, D/2)`, float32; not differentiated.
        sin: like `cos`.

    Returns:
        `(B, T, H, D)`, dtype of `x`.

    Raises:
        ValueError: D is odd, or `cos` or `sin` does not fit `x`.

    Reference: Su et al., 2021, https://arxiv.org/abs/2104.09864
    """
    _check_angles("rotary", x, cos, sin)
    return select("rotary", x).rotary(x, cos, sin)


def rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of a packed projection, queries and keys turned by the angles of their positions.

    `(rotary(q), rotary(k), v)` with `q, k, v = qkv.split((H, H_kv, H_kv), dim=2)`, so that qkv need not be kept. With the
    weights of QK-norm, `rms_norm(q, q_weight, eps)` and `rms_norm(k, k_weight, eps)` are turned.

    Args:
        qkv: `(B, T, H + 2 H_kv, D)`, D even.
        cos, sin: as `rotary`.
        num_kv_heads: H_kv.
        q_weight, k_weight: `(D,)`, or both None.
        eps: of the norms.

    Returns:
        `(B, T, H, D)`, `(B, T, H_kv, D)` and `(B, T, H_kv, D)`; the last may be a view of `qkv`.

    Raises:
        ValueError: D is odd, `cos`, `sin` or a weight does not fit `qkv`, `qkv` has not that many heads, or only one
            weight is given.

    Reference: QK-norm: Henry et al., 2020, https://arxiv.org/abs/2010.04245
    """
    _check_angles("rotary_qkv", qkv, cos, sin)
    if qkv.shape[2] <= 2 * num_kv_heads:
        raise ValueError(
            f"rotary_qkv: qkv must have more than 2 * {num_kv_heads} heads, got {qkv.shape[2]}"
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rotary_qkv: q_weight and k_weight must be given together")
    _check_shape("rotary_qkv", "q_weight", q_weight, (qkv.shape[3],))
    _check_shape("rotary_qkv", "k_weight", k_weight, (qkv.shape[3],))
    backend = select("rotary_qkv", qkv, q_weight, k_weight)
    return backend.rotary_qkv(qkv, cos, sin, num_kv_heads, q_weight, k_weight, eps)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seqlens_k: Tensor | None = None,
    sliding_window: int | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal attention: `softmax(softmax_scale * q k^T + mask) v`, softmax and sums in float32 or wider.

    The T queries are the last T positions of their sequence: query t stands at `seqlens_k - T + t` and sees the keys up
    to and with its own position; with `sliding_window` w only the last w of these. Query head h reads key head
    `h // (H / H_kv)` (grouped-query attention).

    Args:
        q: `(B, T, H, D)`.
        k: `(B, S, H_kv, D)`, S >= T.
        v: `(B, S, H_kv, D)`.
        seqlens_k: `(B,)` int64, valid keys of each sequence, in [T, S]; keys beyond are padding. None: S for all.
        sliding_window: number of keys that a query sees, itself included; None: all.
        softmax_scale: positive; None is `1 / sqrt(D)`.
        dropout_p: probability of dropping an attention weight.

    Returns:
        `(B, T, H, D)`, dtype of `q`.

    Raises:
        ValueError: a shape does not fit, or H is not a multiple of H_kv.

    References: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; grouped queries: Ainslie et al., 2023,
    https://arxiv.org/abs/2305.13245; sliding window: Beltagy et al., 2020, https://arxiv.org/abs/2004.05150
    """
    B, T, H, D = q.shape
    _, S, H_kv, _ = k.shape
    _check_shape("attention", "k", k, (B, S, H_kv, D))
    _check_shape("attention", "v", v, (B, S, H_kv, D))
    _check_shape("attention", "seqlens_k", seqlens_k, (B,))
    if S < T:
        raise ValueError(f"attention: there must be a key for each of the {T} queries, got {S}")
    if H % H_kv:
        raise ValueError(f"attention: {H} query heads must be a multiple of {H_kv} key heads")
    backend = select("attention", q, k, v)
    return backend.attention(q, k, v, seqlens_k, sliding_window, softmax_scale, dropout_p)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    sliding_window: int | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal attention within each of several sequences that lie behind each other: `attention` without padding.

    Args:
        q: `(N, H, D)`, N tokens in all.
        k: `(N, H_kv, D)`.
        v: `(N, H_kv, D)`.
        cu_seqlens: `(B + 1,)` int32, sequence b is tokens `cu_seqlens[b]` up to `cu_seqlens[b + 1]`, which may be none;
            starts with 0 and ends with N.
        max_seqlen: at least the length of the longest sequence.
        sliding_window, softmax_scale, dropout_p: as `attention`.

    Returns:
        `(N, H, D)`, dtype of `q`.

    Raises:
        ValueError: a shape or the dtype of `cu_seqlens` does not fit, or H is not a multiple of H_kv.
    """
    N, H, D = q.shape
    H_kv = k.shape[1]
    _check_shape("attention_varlen", "k", k, (N, H_kv, D))
    _check_shape("attention_varlen", "v", v, (N, H_kv, D))
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(
            "attention_varlen: cu_seqlens must be (B + 1,) int32,"
            f" got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if H % H_kv:
        raise ValueError(
            f"attention_varlen: {H} query heads must be a multiple of {H_kv} key heads"
        )
    backend = select("attention_varlen", q, k, v)
    return backend.attention_varlen(
        q, k, v, cu_seqlens, max_seqlen, sliding_window, softmax_scale, dropout_p
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix product `x weight^T + bias`, accumulated in float32 or wider.

    A GPU library's GEMM is the better choice for a product that stands alone: the Triton kernel runs only where
    `use_backend` asks for it.

    Args:
        x: `(..., C)`.
        weight: `(N, C)`.
        bias: `(N,)` or None.

    Returns:
        `(..., N)`.

    Raises:
        ValueError: `weight` or `bias` does not fit.
    """
    _check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    _check_shape("linear", "bias", bias, (weight.shape[0],))
    return select("linear", x, weight, bias).linear(x, weight, bias)


def _check_activation(op: str, activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(
            f"{op}: activation must be one of {get_args(Activation)}, got {activation!r}"
        )


def activate(h: Tensor, activation: Activation) -> Tensor:
    """The activation of an MLP alone, where something stands between it and a product; `mlp` has it inside.

    Args:
        h: `(..., F)`; `(..., 2F)` for swiglu, gate first.
        activation: see `mlp`.

    Returns:
        `(..., F)`, dtype of `h`.

    Raises:
        ValueError: `activation` is unknown, or the width of `h` is odd for swiglu.

    References: as `mlp`.
    """
    _check_activation("activate", activation)
    if activation == "swiglu" and h.shape[-1] % 2:
        raise ValueError(f"activate: h must be (..., 2F) for swiglu, got {tuple(h.shape)}")
    return select("activate", h).activate(h, activation)


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: Activation,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Two-layer perceptron of a block: `act(x w_in^T + b_in) w_out^T + b_out`; with residual `residual + dropout(that)`.

    `gelu_tanh` is GPT-2's GELU, `gelu` the exact one, `relu2` is `max(0, h)^2`, and `swiglu` is `silu(gate) * up` with
    `(gate, up)` the two halves of the first product. In float32 a GPU library's GEMM is the better choice: the Triton
    kernel, which has no tensor cores then, runs only where `use_backend` asks for it.

    Args:
        x: `(..., C)`.
        w_in: `(F, C)`; `(2F, C)` for swiglu, the rows of gate first.
        b_in: as many as `w_in` has rows, or None.
        w_out: `(C, F)`.
        b_out: `(C,)` or None.
        activation: see above.
        residual: `(..., C)` or None.
        dropout_p: probability of dropping an element of the output, before the residual is added.

    Returns:
        `(..., C)`.

    Raises:
        ValueError: a shape does not fit, or `activation` is unknown.

    References: GELU: Hendrycks & Gimpel, 2016, https://arxiv.org/abs/1606.08415; SwiGLU: Shazeer, 2020,
    https://arxiv.org/abs/2002.05202; ReLU^2: So et al., 2021, https://arxiv.org/abs/2109.08668
    """
    _check_activation("mlp", activation)
    n_inner = w_out.shape[1]
    rows = 2 * n_inner if activation == "swiglu" else n_inner
    _check_shape("mlp", "w_in", w_in, (rows, x.shape[-1]))
    _check_shape("mlp", "b_in", b_in, (rows,))
    _check_shape("mlp", "b_out", b_out, (w_out.shape[0],))
    _check_shape("mlp", "residual", residual, (*x.shape[:-1], w_out.shape[0]))
    backend = select("mlp", x, w_in, b_in, w_out, b_out, residual)
    return backend.mlp(x, w_in, b_in, w_out, b_out, activation, residual, dropout_p)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Language-model head and loss: `lse - (1 - s) l[target] - s mean(l) + z lse^2`, in float32 or wider.

    `l = hidden weight^T` are the logits of a row, `lse = logsumexp(l)`, s is `label_smoothing` and z is `z_loss`.

    Args:
        hidden: `(..., C)`.
        weight: `(V, C)`.
        targets: `(...)` int64 in [0, V), or `ignore_index`: such rows have loss and gradient 0 and do not count.
        reduction: "mean" over the rows that count, "sum", or "none".
        label_smoothing: share of the target that is spread over all tokens, in [0, 1].
        z_loss: weight of the squared log-normalizer, which keeps logits from drifting.

    Returns:
        Scalar, or the shape of `targets` for "none"; in nats, float32 (float64 for doubles).

    Raises:
        ValueError: a shape does not fit, or `reduction` is unknown.
        IndexError: a target is out of range (on a GPU: a device assertion, or with Triton a loss of NaN).

    References: label smoothing: Szegedy et al., 2016, https://arxiv.org/abs/1512.00567; z-loss: Chowdhery et al., 2022,
    https://arxiv.org/abs/2204.02311
    """
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"linear_cross_entropy: reduction must be one of {get_args(Reduction)}, got {reduction!r}"
        )
    _check_shape("linear_cross_entropy", "weight", weight, (weight.shape[0], hidden.shape[-1]))
    _check_shape("linear_cross_entropy", "targets", targets, tuple(hidden.shape[:-1]))
    backend = select("linear_cross_entropy", hidden, weight)
    return backend.linear_cross_entropy(
        hidden, weight, targets, ignore_index, reduction, label_smoothing, z_loss
    )


def _check_lists(op: str, params: Sequence[Tensor], lists: dict[str, Sequence[Tensor]]) -> None:
    """Each list has a tensor for each parameter, of its shape; all but gradients are float32 or wider."""
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {name} must be {len(params)} tensors, got {len(tensors)}")
        for param, tensor in zip(params, tensors, strict=True):
            _check_shape(op, f"each of {name}", tensor, tuple(param.shape))
            wide = torch.promote_types(param.dtype, torch.float32)
            if name != "grads" and tensor.dtype != wide:
                raise ValueError(
                    f"{op}: each of {name} must be {wide} for {param.dtype}, got {tensor.dtype}"
                )


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all elements of many tensors, summed in float64: what clipping compares with its limit.

    Args:
        grads: at least one, of any shapes and floating-point dtypes, on one device.

    Returns:
        Scalar, float32 (float64 if the first is).

    Raises:
        ValueError: there is no tensor.
    """
    if not grads:
        raise ValueError("grad_norm: grads must be at least 1 tensor, got none")
    return select("grad_norm", *grads).grad_norm(grads)


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    masters: Sequence[Tensor] | None = None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
) -> None:
    """One step of AdamW on many tensors, in place: Adam with a weight decay that does not pass through the gradient.

    With `g = grad * grad_scale`, `exp_avg = beta1 exp_avg + (1 - beta1) g` and `exp_avg_sq = beta2 exp_avg_sq +
    (1 - beta2) g^2`, param becomes `(1 - lr weight_decay) param - lr m / (sqrt(v) + eps)`, where m and v are the moments
    over `1 - beta1^step` and `1 - beta2^step`: as `torch.optim.AdamW`, but the moments of low-precision parameters are
    float32, there may be masters, and gradients are clipped while they are read.

    Args:
        params: changed in place; dtypes may be mixed.
        grads: of the shapes of `params`, any floating-point dtype.
        exp_avgs: of the shapes of `params`, float32 (float64 for doubles); changed in place, at first zeros.
        exp_avg_sqs: like `exp_avgs`.
        masters: like `exp_avgs`, the parameters before rounding: they are stepped, and `params` get their rounded values.
            None: `params` are stepped themselves.
        step: 1 at the first step.
        lr: learning rate.
        betas: how much the moments keep of a step, each in [0, 1).
        eps: added to the denominator.
        weight_decay: times `lr`, the share of a parameter that is taken off at a step.
        grad_scale: scalar on the device of `params`, such as what clips the norm of the gradients; it is not waited for.

    Raises:
        ValueError: lists differ in length, a shape or a dtype does not fit, or `step` is below 1.

    Reference: Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101
    """
    if step < 1:
        raise ValueError(f"adamw_step: step must be at least 1, got {step}")
    _check_shape("adamw_step", "grad_scale", grad_scale, ())
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if masters is not None:
        lists["masters"] = masters
    _check_lists("adamw_step", params, lists)
    if not params:
        return
    backend = select("adamw_step", *params)
    backend.adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, masters, step, lr, betas, eps, weight_decay, grad_scale
    )  # fmt: skip


@torch.no_grad()
def muon_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
) -> None:
    """One step of Muon on many matrices, in place: the update is the momentum with its singular values made about equal.

    With `g = grad * grad_scale`, `buffer = momentum buffer + (1 - momentum) g` and (Nesterov) `u = momentum buffer +
    (1 - momentum) g`, param becomes `(1 - lr weight_decay) param - 0.2 sqrt(max(rows, columns)) lr orthogonalize(u)`, see
    `reference.orthogonalize`: as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, whose steps are as long as those
    of AdamW at the same `lr`, but in float32, where that one rounds to bfloat16.

    Args:
        params: `(rows, columns)` each; changed in place.
        grads: of the shapes of `params`.
        momentum_buffers: of the shapes of `params`, float32 (float64 for doubles); changed in place, at first zeros.
        lr: learning rate.
        momentum: how much the buffers keep of a step, in [0, 1); 0.95 is usual.
        weight_decay: times `lr`, the share of a parameter that is taken off at a step.
        grad_scale: scalar on the device of `params`, such as what clips the norm of the gradients.

    Raises:
        ValueError: lists differ in length, a shape or a dtype does not fit, or a parameter is no matrix.

    References: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/; the factor of lr: Liu et al., 2025,
    https://arxiv.org/abs/2502.16982
    """
    _check_shape("muon_step", "grad_scale", grad_scale, ())
    _check_lists("muon_step", params, {"grads": grads, "momentum_buffers": momentum_buffers})
    for param in params:
        if param.ndim != 2:
            raise ValueError(
                f"muon_step: each of params must be (rows, columns), got {tuple(param.shape)}"
            )
    if not params:
        return
    backend = select("muon_step", *params)
    backend.muon_step(params, grads, momentum_buffers, lr, momentum, weight_decay, grad_scale)


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    position: Tensor,
) -> Tensor:
    """Draw one token a row, by a rule that depends on the row alone: neither on its neighbours nor on the machine.

    `argmax_v (logits[v] / temperature - log(noise[v]))` over the tokens v that the filters keep, where `noise[v]` is
    exponentially distributed and a function of (seed, sample_index, position, v) alone, see
    `reference.exponential_noise`; this draws v with probability `softmax(logits / temperature)[v]` (Gumbel-max).
    At temperature 0 it is the token of the largest logit, the first of equals.

    The filters, in this order, each on what the one before kept, and each keeping all tokens tied with its last one:
    top_k, the k most probable; top_p, the fewest most probable ones whose probabilities sum to at least p;
    min_p, those at least `min_p` times as probable as the best.

    Args:
        logits: `(N, V)`.
        temperature: `(N,)` float, >= 0.
        top_k: `(N,)` int64; 0 keeps all.
        top_p: `(N,)` float in (0, 1]; 1 keeps all.
        min_p: `(N,)` float in [0, 1]; 0 keeps all.
        seed: `(N,)` int64, the 64 bits of the request's seed.
        sample_index: `(N,)` int64, which of the request's samples this is.
        position: `(N,)` int64, the position in its sequence of the token that is drawn.

    Returns:
        `(N,)` int64.

    References: top-p: Holtzman et al., 2019, https://arxiv.org/abs/1904.09751; min-p: Nguyen et al., 2024,
    https://arxiv.org/abs/2407.01082; Gumbel-max: Maddison et al., 2014, https://arxiv.org/abs/1411.0030
    """
    settings = (temperature, top_k, top_p, min_p, seed, sample_index, position)
    for setting in settings:
        _check_shape("sample", "each setting", setting, (logits.shape[0],))
    return select("sample", logits).sample(logits, *settings)


@torch.no_grad()
def penalize(
    logits: Tensor,
    in_context: Tensor,
    in_text: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
) -> Tensor:
    """Make tokens that occurred less likely.

    Repetition: positive logits are divided by the penalty, negative ones multiplied. Presence: it is subtracted.

    Args:
        logits: `(N, V)`.
        in_context: `(N, V)` bool, tokens of the prompt or of the text so far: repetition applies.
        in_text: `(N, V)` bool, tokens of the text so far: presence applies.
        repetition_penalty: `(N,)` float; 1 changes nothing.
        presence_penalty: `(N,)` float; 0 changes nothing.

    Returns:
        `(N, V)`, a new tensor.

    Reference: Keskar et al., 2019, https://arxiv.org/abs/1909.05858
    """
    _check_shape("penalize", "in_context", in_context, tuple(logits.shape))
    _check_shape("penalize", "in_text", in_text, tuple(logits.shape))
    backend = select("penalize", logits)
    return backend.penalize(logits, in_context, in_text, repetition_penalty, presence_penalty)
