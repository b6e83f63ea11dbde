# pyright: reportArgumentType=false
"""The MLP in Triton: two products, and everything between and behind them in their epilogues.

Forward, both by the kernel of triton_linear.py:

h = x w_in^T + b_in        a = act(h)        out = residual + dropout(a w_out^T + b_out)

Backward, d the gradient of what dropout was applied to:

da = d w_out               dh = da act'(h)               db_out = sum over rows of d
dx = dh w_in               dw_in = dh^T x                dw_out = d^T a        db_in = sum over rows of dh

swiglu: h = (gate, up), a = silu(gate) up, dgate = da up silu'(gate), dup = da silu(gate).

Of what lies between the products, h alone is kept for backward, and only where a gradient is needed. The epilogue of
d w_out has to read h; with act'(h) it computes act(h), and writes a next to dh. To keep a as well would save that write, 1
of 9 passes over (M, F) in forward and backward, and would hold (M, F) more for every layer from forward to backward. The
same epilogue sums the columns of its tile of dh; the partial sums are added in a fixed order, which saves db_in a pass
over dh. With dropout, or where the residual stream is wider than the products, d is formed once for its three readers. The
other products stand alone: they are the library's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_activations import activation
from .triton_dropout import dropout_seed, kept_by_dropout
from .triton_linear import (
    dot_precision,
    fused_linear,
    product,
    size_class,
    slices,
    tile_of_program,
)

_BLOCK_M = 128  # of the backward kernel, whatever its configuration: it says how many partial sums there are


def configurations() -> list[triton.Config]:
    tiles = [(64, 32, 8, 4), (128, 64, 8, 3)]
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_warps=w, num_stages=s)
        for n, k, w, s in tiles
    ]


@triton.jit
def _bwd_epilogue(
    da, h_ptr, dh_ptr, a_ptr, db_ptr, tile_m, row, col, M, F, ACTIVATION: tl.constexpr
):
    """From da of the tile at (row, col) to what is stored; tile_m is the row of db for its sums."""
    IS_GATED: tl.constexpr = ACTIVATION == "swiglu"
    rows = row + tl.arange(0, da.shape[0]).to(tl.int64)
    cols = col + tl.arange(0, da.shape[1])
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    width = 2 * F if IS_GATED else F
    offsets = rows[:, None] * width + cols[None, :]
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    a, slope = activation(h, ACTIVATION)
    if IS_GATED:
        up = tl.load(h_ptr + F + offsets, mask=mask, other=0.0).to(tl.float32)
        dup = da * a
        tl.store(dh_ptr + F + offsets, dup, mask=mask)
        slope *= up
        a *= up
    dh = da * slope
    tl.store(dh_ptr + offsets, dh, mask=mask)
    tl.store(a_ptr + rows[:, None] * F + cols[None, :], a, mask=mask)

    if db_ptr is not None:
        partial_ptr = db_ptr + tile_m.to(tl.int64) * width + cols
        tl.store(partial_ptr, tl.sum(dh, axis=0), mask=cols < F)
        if IS_GATED:
            tl.store(partial_ptr + F, tl.sum(dup, axis=0), mask=cols < F)


@triton.autotune(configs=configurations(), key=["size_class", "ACTIVATION"], cache_results=True)
@triton.jit(do_not_specialize=["M", "size_class"])
def _mlp_bwd_kernel(
    d_ptr, w_out_ptr, h_ptr, dh_ptr, a_ptr, db_ptr,
    M, F, C, stride_dm, stride_dc, stride_wc, stride_wf, size_class,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, F, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    da = product(
        d_ptr, w_out_ptr, rows, cols, M, F, C,
        stride_dm, stride_dc, stride_wf, stride_wc, PRECISION, BLOCK_K,
    )  # fmt: skip

    da_slices = slices(da)
    for i in tl.static_range(len(da_slices)):
        _bwd_epilogue(
            da_slices[i], h_ptr, dh_ptr, a_ptr, db_ptr,
            tile_m, tile_m * BLOCK_M, tile_n * BLOCK_N + i * da_slices[i].shape[1], M, F, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _dropout_bwd_kernel(
    dout_ptr, seed_ptr, d_ptr, M, N, stride_dm, stride_dn, dropout_p,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, 1)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    dout_offsets = rows[:, None] * stride_dm + cols.to(tl.int64)[None, :] * stride_dn
    dout = tl.load(dout_ptr + dout_offsets, mask=mask, other=0.0).to(tl.float32)
    kept = kept_by_dropout(tl.load(seed_ptr), dropout_p, rows, tile_n * BLOCK_N, BLOCK_N)
    d = tl.where(kept, dout / (1.0 - dropout_p), 0.0)
    tl.store(d_ptr + rows[:, None] * N + cols[None, :], d, mask=mask)


@torch.library.custom_op("leangpt_triton::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    needs_h: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and h or nothing."""
    h = x.new_empty(x.shape[0] if needs_h else 0, w_in.shape[0])
    a = fused_linear(x, w_in, b_in, activation, h if needs_h else None)
    out = fused_linear(a, w_out, b_out, residual=residual, seed=seed, dropout_p=dropout_p)
    return out, h


@_mlp.register_fake
def _(x, w_in, b_in, w_out, b_out, residual, seed, activation, dropout_p, needs_h):
    dtype = torch.result_type(x, x if residual is None else residual)
    out = x.new_empty(x.shape[0], w_out.shape[0], dtype=dtype)
    return out, x.new_empty(x.shape[0] if needs_h else 0, w_in.shape[0])


@torch.library.custom_op("leangpt_triton::mlp_backward", mutates_args=())
def _mlp_backward(
    d: Tensor, w_out: Tensor, h: Tensor, activation: str, needs_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, a, and db_in or nothing."""
    M, C = d.shape
    F = w_out.shape[1]
    dh = torch.empty_like(h)
    a = h.new_empty(M, F)
    num_partials = triton.cdiv(M, _BLOCK_M) if needs_db else 0
    db = torch.empty(num_partials, h.shape[1], dtype=torch.float32, device=h.device)
    if a.numel() > 0:

        def grid(config: dict[str, Any]) -> tuple[int]:
            return (triton.cdiv(M, _BLOCK_M) * triton.cdiv(F, config["BLOCK_N"]),)

        _mlp_bwd_kernel[grid](
            d, w_out, h, dh, a, db if needs_db else None,
            M, F, C, *d.stride(), *w_out.stride(), size_class(M, F),
            ACTIVATION=activation, PRECISION=dot_precision(), BLOCK_M=_BLOCK_M,
        )  # fmt: skip
    return dh, a, db.sum(0).to(h.dtype)


@_mlp_backward.register_fake
def _(d, w_out, h, activation, needs_db):
    return torch.empty_like(h), h.new_empty(h.shape[0], w_out.shape[1]), h.new_empty(h.shape[1])


@torch.library.custom_op("leangpt_triton::mlp_dropout_backward", mutates_args=())
def _dropout_backward(dout: Tensor, seed: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    M, N = dout.shape
    d = dout.new_empty(M, N, dtype=dtype)
    if d.numel() > 0:
        # 4 warps of 32 x 128: each thread has 16 bytes of 16-bit numbers in a row, several of them in flight
        grid = (triton.cdiv(M, 32) * triton.cdiv(N, 128),)
        _dropout_bwd_kernel[grid](
            dout, seed, d, M, N, *dout.stride(), dropout_p, BLOCK_M=32, BLOCK_N=128
        )
    return d


@_dropout_backward.register_fake
def _(dout, seed, dropout_p, dtype):
    return dout.new_empty(dout.shape, dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_in, _, w_out, _, _, seed, ctx.activation, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(x, w_in, w_out, seed, output[1])
    ctx.set_materialize_grads(False)  # h has no gradient


def _backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, w_in, w_out, seed, h = ctx.saved_tensors
    needs_dx, needs_dw_in, needs_db_in, needs_dw_out, needs_db_out, needs_dresidual, *_ = (
        ctx.needs_input_grad
    )
    d = dout.to(x.dtype) if seed is None else _dropout_backward(dout, seed, ctx.dropout_p, x.dtype)
    dx = dw_in = db_in = dw_out = None
    if needs_dx or needs_dw_in or needs_db_in or needs_dw_out:
        dh, a, db = _mlp_backward(d, w_out, h, ctx.activation, needs_db_in)
        dx = dh @ w_in if needs_dx else None
        dw_in = dh.T @ x if needs_dw_in else None
        db_in = db if needs_db_in else None
        dw_out = d.T @ a if needs_dw_out else None
    db_out = d.sum(0) if needs_db_out else None
    dresidual = dout if needs_dresidual else None
    return dx, dw_in, db_in, dw_out, db_out, dresidual, None, None, None, None


_mlp.register_autograd(_backward, setup_context=_save_for_backward)


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dropout_p: float,
) -> Tensor:
    C = w_out.shape[0]
    given = [t for t in (x, w_in, b_in, w_out, b_out, residual) if t is not None]
    needs_h = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    seed = dropout_seed(x, dropout_p)
    flat_residual = None if residual is None else residual.reshape(-1, C)
    out, _ = _mlp(
        x.reshape(-1, x.shape[-1]), w_in, b_in, w_out, b_out, flat_residual, seed,
        activation, dropout_p, needs_h,
    )  # fmt: skip
    return out.view(*x.shape[:-1], C)
