# pyright: reportArgumentType=false
"""The activation of an MLP in Triton where it stands alone: forward, and backward from its input.

a = act(h)                  dh = da act'(h)

swiglu: h = (gate, up), a = silu(gate) up, dgate = da up silu'(gate), dup = da silu(gate).

Sums and functions are in float32. Memory is the bound: h is read once in each direction, and backward computes what it needs
of forward again instead of reading it. `mlp` has the same in the epilogues of its products, where h costs no pass at all.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_activations import activation
from .triton_linear import load_tile, tile_of_program


@triton.jit(do_not_specialize=["M"])
def _activate_fwd_kernel(
    h_ptr, a_ptr, M, F, stride_h,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, F, BLOCK_M, BLOCK_N, 1)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    a, _ = activation(load_tile(h_ptr, rows, cols, M, F, stride_h, 1).to(tl.float32), ACTIVATION)
    if ACTIVATION == "swiglu":
        a *= load_tile(h_ptr + F, rows, cols, M, F, stride_h, 1).to(tl.float32)
    tl.store(a_ptr + rows[:, None] * F + cols[None, :], a, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _activate_bwd_kernel(
    da_ptr, h_ptr, dh_ptr, M, F, stride_da, stride_h,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, F, BLOCK_M, BLOCK_N, 1)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    da = load_tile(da_ptr, rows, cols, M, F, stride_da, 1).to(tl.float32)
    a, slope = activation(
        load_tile(h_ptr, rows, cols, M, F, stride_h, 1).to(tl.float32), ACTIVATION
    )
    if ACTIVATION == "swiglu":
        offsets = rows[:, None] * (2 * F) + cols[None, :]
        up = load_tile(h_ptr + F, rows, cols, M, F, stride_h, 1).to(tl.float32)
        tl.store(dh_ptr + F + offsets, da * a, mask=mask)
        slope *= up
    else:
        offsets = rows[:, None] * F + cols[None, :]
    tl.store(dh_ptr + offsets, da * slope, mask=mask)


def _launch(kernel: Any, read: list[Tensor], written: Tensor, F: int, activation: str) -> None:
    read = [t if t.stride(1) == 1 else t.contiguous() for t in read]
    M = written.shape[0]
    if written.numel() > 0:
        # 4 warps of 32 x 128: each thread has 16 bytes of 16-bit numbers in a row, several of them in flight
        grid = (triton.cdiv(M, 32) * triton.cdiv(F, 128),)
        strides = [t.stride(0) for t in read]
        kernel[grid](*read, written, M, F, *strides, ACTIVATION=activation, BLOCK_M=32, BLOCK_N=128)


@torch.library.custom_op("leangpt_triton::activate", mutates_args=())
def _activate(h: Tensor, activation: str) -> Tensor:
    F = h.shape[1] // (2 if activation == "swiglu" else 1)
    a = h.new_empty(h.shape[0], F)
    _launch(_activate_fwd_kernel, [h], a, F, activation)
    return a


@_activate.register_fake
def _(h, activation):
    return h.new_empty(h.shape[0], h.shape[1] // (2 if activation == "swiglu" else 1))


@torch.library.custom_op("leangpt_triton::activate_backward", mutates_args=())
def _activate_backward(da: Tensor, h: Tensor, activation: str) -> Tensor:
    dh = h.new_empty(h.shape)
    _launch(_activate_bwd_kernel, [da, h], dh, da.shape[1], activation)
    return dh


@_activate_backward.register_fake
def _(da, h, activation):
    return h.new_empty(h.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    h, ctx.activation = inputs
    ctx.save_for_backward(h)


def _backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
    (h,) = ctx.saved_tensors
    return _activate_backward(da, h, ctx.activation), None


_activate.register_autograd(_backward, setup_context=_save_for_backward)


def activate(h: Tensor, activation: str) -> Tensor:
    a = _activate(h.reshape(-1, h.shape[-1]), activation)
    return a.view(*h.shape[:-1], a.shape[1])
