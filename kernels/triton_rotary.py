# pyright: reportArgumentType=false
"""Rotary position embedding in Triton: of queries or keys alone, and of both on their way out of packed qkv.

y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x1, x2 the halves of a head
dx1 = dy1 cos + dy2 sin     dx2 = dy2 cos - dy1 sin     the same turn backwards, with -sin

One program turns all heads of a token, so that it reads the token's cos and sin once, in float32.

`rotary_qkv` is not in place, since that would cost more than it saves. Counted in tensors of the size of q, k and v taken as
equal: in place, forward moves 4 (q and k, read and written) and backward 10 or more, because autograd first has to put dq, dk and
dv together. Here forward moves 6, v included, and backward 6: it turns dq and dk while it puts all three together. What
autograd keeps is q, k and v in both cases; qkv is free after forward, which `rotary` on views of it would not allow, as v
would hold all of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def _turn_heads(
    x_ptr, y_ptr, cos, sin, num_heads, stride_x, stride_y,
    HALF_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pairs = tl.arange(0, BLOCK_D)[None, :]
    for head in range(0, num_heads, BLOCK_H):
        heads = head + tl.arange(0, BLOCK_H)[:, None]
        mask = (heads < num_heads) & (pairs < HALF_D)
        x_ptrs = x_ptr + heads * stride_x + pairs
        x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptrs + HALF_D, mask=mask, other=0.0).to(tl.float32)
        y_ptrs = y_ptr + heads * stride_y + pairs
        tl.store(y_ptrs, x1 * cos - x2 * sin, mask=mask)
        tl.store(y_ptrs + HALF_D, x2 * cos + x1 * sin, mask=mask)


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
        x_ptr, y_ptr, cos, sin, num_heads, stride_x_head, 2 * HALF_D, HALF_D, BLOCK_H, BLOCK_D
    )


@triton.jit(do_not_specialize=["T"])
def _rotary_qkv_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
    stride_angle_batch, T, num_heads, num_kv_heads,
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
        _turn_heads(q_ptr, packed_q, cos, -sin, num_heads, D, D, HALF_D, BLOCK_H, BLOCK_D)
        _turn_heads(k_ptr, packed_k, cos, -sin, num_kv_heads, D, D, HALF_D, BLOCK_H, BLOCK_D)
        _copy(v_ptr, packed_v, num_kv_heads * D, BLOCK)
    else:
        _turn_heads(packed_q, q_ptr, cos, sin, num_heads, D, D, HALF_D, BLOCK_H, BLOCK_D)
        _turn_heads(packed_k, k_ptr, cos, sin, num_kv_heads, D, D, HALF_D, BLOCK_H, BLOCK_D)
        _copy(packed_v, v_ptr, num_kv_heads * D, BLOCK)


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
    qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H_all, D = qkv.shape
    H = H_all - 2 * num_kv_heads
    q = qkv.new_empty(B, T, H, D)
    k, v = qkv.new_empty(B, T, num_kv_heads, D), qkv.new_empty(B, T, num_kv_heads, D)
    if qkv.numel():
        cos, sin = cos.contiguous(), sin.contiguous()
        _rotary_qkv_kernel[(B * T,)](
            qkv.contiguous(), cos, sin, q, k, v,
            _stride_of_batch(cos), T, H, num_kv_heads, IS_BACKWARD=False, **_tile(H, D),
        )  # fmt: skip
    return q, k, v


@_rotary_qkv.register_fake
def _(qkv, cos, sin, num_kv_heads):
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
            dqkv, cos, sin, dq.contiguous(), dk.contiguous(), dv.contiguous(),
            _stride_of_batch(cos), T, H, H_kv, IS_BACKWARD=True, **_tile(H, D),
        )  # fmt: skip
    return dqkv


@_rotary_qkv_backward.register_fake
def _(dq, dk, dv, cos, sin):
    B, T, H, D = dq.shape
    return dq.new_empty(B, T, H + 2 * dk.shape[2], D)


def _save_angles_of_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward_of_qkv(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None


_rotary_qkv.register_autograd(_backward_of_qkv, setup_context=_save_angles_of_qkv)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotary(x, cos, sin, False)


def rotary_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _rotary_qkv(qkv, cos, sin, num_kv_heads)
