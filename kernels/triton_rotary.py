# pyright: reportArgumentType=false
"""Rotary position embedding in Triton: of queries or keys alone, and of both on their way out of packed qkv.

y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x1, x2 the halves of a head
dx1 = dy1 cos + dy2 sin     dx2 = dy2 cos - dy1 sin     the same turn backwards, with -sin

With QK-norm, what is turned is xhat w, and what is turned backwards, dz, goes on through the norm:

xhat = x rstd               rstd = 1 / sqrt(mean(x^2) + eps)
dx = rstd (w dz - xhat mean(w dz xhat))                 dw = sum over tokens and heads of dz xhat

One program turns all heads of a token, so that it reads the token's cos and sin once, in float32.

`rotary_qkv` is not in place, since that would cost more than it saves. Counted in tensors of the size of q, k and v taken as
equal: in place, forward moves 4 (q and k, read and written) and backward 10 or more, because autograd first has to put dq, dk and
dv together. Here forward moves 6, v included, and backward 6: it turns dq and dk while it puts all three together. What
autograd keeps is q, k and v in both cases; qkv is free after forward, which `rotary` on views of it would not allow, as v
would hold all of it.

With QK-norm, qkv is kept, since rstd and xhat are computed anew from it, in registers: forward moves 6 and backward 8, where norms
and turns apart would move 8 and 16. A program of backward takes every n-th token and sums up its part of both dw; the parts are
added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_layer_norm import num_sms


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, token, T, stride_batch,
    HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cos and sin of a token, for each element of a tile of heads: where a thread needs them it reads them, 16 bytes each."""
    pairs = tl.broadcast_to(tl.arange(0, BLOCK_D)[None, :], (BLOCK_H, BLOCK_D))
    offsets = (token // T) * stride_batch + (token % T) * HALF_D + pairs
    cos = tl.load(cos_ptr + offsets, mask=pairs < HALF_D, other=0.0)
    return cos, tl.load(sin_ptr + offsets, mask=pairs < HALF_D, other=0.0)


@triton.jit
def _load_halves(ptrs, mask, HALF_D: tl.constexpr):
    x1 = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    return x1, tl.load(ptrs + HALF_D, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(ptrs, x1, x2, mask, HALF_D: tl.constexpr):
    tl.store(ptrs, x1, mask=mask)
    tl.store(ptrs + HALF_D, x2, mask=mask)


@triton.jit
def _load_weight(ptr, HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """The halves of a norm's weight, for each element of a tile of heads."""
    pairs = tl.broadcast_to(tl.arange(0, BLOCK_D)[None, :], (BLOCK_H, BLOCK_D))
    return _load_halves(ptr + pairs, pairs < HALF_D, HALF_D)


@triton.jit
def _rstd(x1, x2, eps, HALF_D: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF_D) + eps)[:, None]


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, weight_ptr, cos, sin, num_heads, stride_x, stride_y, eps,
    HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn heads, after their norm if there is a weight for it."""
    pairs = tl.arange(0, BLOCK_D)[None, :]
    for head in range(0, num_heads, BLOCK_H):
        heads = head + tl.arange(0, BLOCK_H)[:, None]
        mask = (heads < num_heads) & (pairs < HALF_D)
        x1, x2 = _load_halves(x_ptr + heads * stride_x + pairs, mask, HALF_D)
        if weight_ptr is not None:
            rstd = _rstd(x1, x2, eps, HALF_D)
            w1, w2 = _load_weight(weight_ptr, HALF_D, BLOCK_H, BLOCK_D)
            x1, x2 = x1 * rstd * w1, x2 * rstd * w2
        y_ptrs = y_ptr + heads * stride_y + pairs
        _store_halves(y_ptrs, x1 * cos - x2 * sin, x2 * cos + x1 * sin, mask, HALF_D)


@triton.jit
def _turn_back_through_norm(
    dy_ptr, x_ptr, dx_ptr, weight_ptr, dw1, dw2, cos, sin, num_heads, eps,
    HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the heads' dx; give back dw1 and dw2, to which they are added, one row a head of the tile."""
    pairs = tl.arange(0, BLOCK_D)[None, :]
    w1, w2 = _load_weight(weight_ptr, HALF_D, BLOCK_H, BLOCK_D)
    for head in range(0, num_heads, BLOCK_H):
        heads = head + tl.arange(0, BLOCK_H)[:, None]
        mask = (heads < num_heads) & (pairs < HALF_D)
        offsets = heads * (2 * HALF_D) + pairs
        dy1, dy2 = _load_halves(dy_ptr + offsets, mask, HALF_D)
        dz1, dz2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
        x1, x2 = _load_halves(x_ptr + offsets, mask, HALF_D)
        # beyond the last head: no 0 / 0 without eps
        rstd = tl.where(heads < num_heads, _rstd(x1, x2, eps, HALF_D), 0.0)
        xhat1, xhat2 = x1 * rstd, x2 * rstd
        dw1 += dz1 * xhat1
        dw2 += dz2 * xhat2
        wdz1, wdz2 = w1 * dz1, w2 * dz2
        mean = tl.sum(wdz1 * xhat1 + wdz2 * xhat2, axis=1)[:, None] / (2 * HALF_D)
        dx1, dx2 = rstd * (wdz1 - xhat1 * mean), rstd * (wdz2 - xhat2 * mean)
        _store_halves(dx_ptr + offsets, dx1, dx2, mask, HALF_D)
    return dw1, dw2


@triton.jit
def _store_dweight(
    ptr, dw1, dw2, HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    pairs = tl.arange(0, BLOCK_D)
    _store_halves(ptr + pairs, tl.sum(dw1, axis=0), tl.sum(dw2, axis=0), pairs < HALF_D, HALF_D)


@triton.jit
def _copy(x_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    for start in range(0, num_elements, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < num_elements)
        tl.store(y_ptr + offsets, x, mask=offsets < num_elements)


@triton.jit(do_not_specialize=["T"])
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    stride_x_batch, stride_x_token, stride_x_head, stride_angle_batch, T, num_heads,
    IS_INVERSE: tl.constexpr,
    HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = _load_angles(
        cos_ptr, sin_ptr, token, T, stride_angle_batch, HALF_D, BLOCK_H, BLOCK_D
    )
    if IS_INVERSE:
        sin = -sin
    x_ptr += (token // T) * stride_x_batch + (token % T) * stride_x_token
    y_ptr += token * num_heads * (2 * HALF_D)
    _turn_heads(
        x_ptr, y_ptr, None, cos, sin, num_heads, stride_x_head, 2 * HALF_D, 0.0,
        HALF_D, BLOCK_H, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _rotary_qkv_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr,
    stride_angle_batch, T, num_heads, num_kv_heads, eps,
    IS_BACKWARD: tl.constexpr,
    HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cos, sin = _load_angles(
        cos_ptr, sin_ptr, token, T, stride_angle_batch, HALF_D, BLOCK_H, BLOCK_D
    )
    D: tl.constexpr = 2 * HALF_D
    packed_q = qkv_ptr + token * (num_heads + 2 * num_kv_heads) * D
    packed_k = packed_q + num_heads * D
    packed_v = packed_k + num_kv_heads * D
    q_ptr += token * num_heads * D
    k_ptr += token * num_kv_heads * D
    v_ptr += token * num_kv_heads * D
    BLOCK: tl.constexpr = 2 * BLOCK_H * BLOCK_D
    if IS_BACKWARD:
        tl.static_assert(q_weight_ptr is None)
        _turn_heads(
            q_ptr, packed_q, None, cos, -sin, num_heads, D, D, eps, HALF_D, BLOCK_H, BLOCK_D
        )
        _turn_heads(
            k_ptr, packed_k, None, cos, -sin, num_kv_heads, D, D, eps, HALF_D, BLOCK_H, BLOCK_D
        )
        _copy(v_ptr, packed_v, num_kv_heads * D, BLOCK)
    else:
        _turn_heads(
            packed_q, q_ptr, q_weight_ptr, cos, sin, num_heads, D, D, eps, HALF_D, BLOCK_H, BLOCK_D
        )
        _turn_heads(
            packed_k, k_ptr, k_weight_ptr, cos, sin, num_kv_heads, D, D, eps,
            HALF_D, BLOCK_H, BLOCK_D,
        )  # fmt: skip
        _copy(packed_v, v_ptr, num_kv_heads * D, BLOCK)


@triton.jit(do_not_specialize=["T", "num_tokens"])
def _rotary_qkv_norm_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr,
    dqkv_ptr, dq_weight_ptr, dk_weight_ptr,
    stride_angle_batch, T, num_tokens, num_heads, num_kv_heads, eps,
    HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF_D
    q_size, kv_size = num_heads * D, num_kv_heads * D
    zeros = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    dw_q1, dw_q2, dw_k1, dw_k2 = zeros, zeros, zeros, zeros
    for i in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        token = tl.cast(i, tl.int64)
        cos, sin = _load_angles(
            cos_ptr, sin_ptr, token, T, stride_angle_batch, HALF_D, BLOCK_H, BLOCK_D
        )
        packed = token * (q_size + 2 * kv_size)
        dw_q1, dw_q2 = _turn_back_through_norm(
            dq_ptr + token * q_size, qkv_ptr + packed, dqkv_ptr + packed, q_weight_ptr,
            dw_q1, dw_q2, cos, sin, num_heads, eps, HALF_D, BLOCK_H, BLOCK_D,
        )  # fmt: skip
        packed += q_size
        dw_k1, dw_k2 = _turn_back_through_norm(
            dk_ptr + token * kv_size, qkv_ptr + packed, dqkv_ptr + packed, k_weight_ptr,
            dw_k1, dw_k2, cos, sin, num_kv_heads, eps, HALF_D, BLOCK_H, BLOCK_D,
        )  # fmt: skip
        packed += kv_size
        _copy(dv_ptr + token * kv_size, dqkv_ptr + packed, kv_size, 2 * BLOCK_H * BLOCK_D)
    row = tl.program_id(0) * D
    _store_dweight(dq_weight_ptr + row, dw_q1, dw_q2, HALF_D, BLOCK_H, BLOCK_D)
    _store_dweight(dk_weight_ptr + row, dw_k1, dw_k2, HALF_D, BLOCK_H, BLOCK_D)


def _tile(num_heads: int, head_dim: int) -> dict[str, int]:
    """Heads that a program turns at a time: 8 pairs a thread, which are two loads of 16 bytes in bfloat16."""
    block_d = triton.next_power_of_2(head_dim // 2)
    block_h = max(min(triton.next_power_of_2(num_heads), 1024 // block_d), 1)
    return {
        "HALF_D": head_dim // 2,
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "num_warps": max(block_h * block_d // 256, 1),
    }


def _stride_of_batch(table: Tensor) -> int:
    """0 where all sequences of a batch share their angles."""
    return table.stride(0) if table.shape[0] > 1 else 0


@torch.library.custom_op("leangpt_triton::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, is_inverse: bool) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel():
        B, T, H, D = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        _rotary_kernel[(B * T,)](
            x, cos, sin, y, *x.stride()[:3], _stride_of_batch(cos), T, H, is_inverse, **_tile(H, D)
        )
    return y


@_rotary.register_fake
def _(x, cos, sin, is_inverse):
    return x.new_empty(x.shape)


def _save_angles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.is_inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary(dy, *ctx.saved_tensors, not ctx.is_inverse), None, None, None


_rotary.register_autograd(_rotary_backward, setup_context=_save_angles)


@torch.library.custom_op("leangpt_triton::rotary_qkv", mutates_args=())
def _rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H_all, D = qkv.shape
    H = H_all - 2 * num_kv_heads
    q = qkv.new_empty(B, T, H, D)
    k, v = qkv.new_empty(B, T, num_kv_heads, D), qkv.new_empty(B, T, num_kv_heads, D)
    if qkv.numel():
        cos, sin = cos.contiguous(), sin.contiguous()
        _rotary_qkv_kernel[(B * T,)](
            qkv.contiguous(), cos, sin, q, k, v,
            None if q_weight is None else q_weight.contiguous(),
            None if k_weight is None else k_weight.contiguous(),
            _stride_of_batch(cos), T, H, num_kv_heads, eps, IS_BACKWARD=False, **_tile(H, D),
        )  # fmt: skip
    return q, k, v


@_rotary_qkv.register_fake
def _(qkv, cos, sin, q_weight, k_weight, num_kv_heads, eps):
    B, T, H_all, D = qkv.shape
    q = qkv.new_empty(B, T, H_all - 2 * num_kv_heads, D)
    return q, qkv.new_empty(B, T, num_kv_heads, D), qkv.new_empty(B, T, num_kv_heads, D)


@torch.library.custom_op("leangpt_triton::rotary_qkv_backward", mutates_args=())
def _rotary_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, T, H, D = dq.shape
    H_kv = dk.shape[2]
    dqkv = dq.new_empty(B, T, H + 2 * H_kv, D)
    if dqkv.numel():
        cos, sin = cos.contiguous(), sin.contiguous()
        _rotary_qkv_kernel[(B * T,)](
            dqkv, cos, sin, dq.contiguous(), dk.contiguous(), dv.contiguous(), None, None,
            _stride_of_batch(cos), T, H, H_kv, 0.0, IS_BACKWARD=True, **_tile(H, D),
        )  # fmt: skip
    return dqkv


@_rotary_qkv_backward.register_fake
def _(dq, dk, dv, cos, sin):
    B, T, H, D = dq.shape
    return dq.new_empty(B, T, H + 2 * dk.shape[2], D)


@torch.library.custom_op("leangpt_triton::rotary_qkv_norm_backward", mutates_args=())
def _rotary_qkv_norm_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dqkv, and the gradients of both weights as rows."""
    B, T, H, D = dq.shape
    dqkv = dq.new_empty(qkv.shape)
    if not dqkv.numel():
        return dqkv, q_weight.new_zeros(2, D)
    cos, sin = cos.contiguous(), sin.contiguous()
    tile = _tile(H, D)
    # 16 warps of 128 registers a thread fill a multiprocessor: all programs run at once
    num_programs = min(B * T, num_sms() * 16 // tile["num_warps"])
    parts = torch.empty(2, num_programs, D, dtype=torch.float32, device=dq.device)
    _rotary_qkv_norm_bwd_kernel[(num_programs,)](
        dq.contiguous(), dk.contiguous(), dv.contiguous(), cos, sin, qkv.contiguous(),
        q_weight.contiguous(), k_weight.contiguous(), dqkv, parts[0], parts[1],
        _stride_of_batch(cos), T, B * T, H, dk.shape[2], eps, **tile, maxnreg=128,
    )  # fmt: skip
    return dqkv, parts.sum(1).to(q_weight.dtype)


@_rotary_qkv_norm_backward.register_fake
def _(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, eps):
    return dq.new_empty(qkv.shape), q_weight.new_empty(2, dq.shape[-1])


def _save_for_backward_of_qkv(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    qkv, cos, sin, q_weight, k_weight, _, ctx.eps = inputs
    norm = () if q_weight is None else (qkv, q_weight, k_weight)
    ctx.save_for_backward(cos, sin, *norm)


def _backward_of_qkv(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, *norm = ctx.saved_tensors
    if not norm:
        return _rotary_qkv_backward(dq, dk, dv, cos, sin), *(None,) * 6
    qkv, *weights = norm
    dqkv, dweights = _rotary_qkv_norm_backward(dq, dk, dv, qkv, cos, sin, *weights, ctx.eps)
    return dqkv, None, None, *dweights, None, None


_rotary_qkv.register_autograd(_backward_of_qkv, setup_context=_save_for_backward_of_qkv)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotary(x, cos, sin, False)


def rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rotary_qkv(qkv, cos, sin, q_weight, k_weight, num_kv_heads, eps)
