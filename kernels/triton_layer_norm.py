# pyright: reportArgumentType=false
"""LayerNorm in Triton, alone or with dropout and the residual add in front of it; RMSNorm is its special case.

total = residual + dropout(x), or x alone
y = xhat * w + b            xhat = (total - mean) * rstd        rstd = 1 / sqrt(mean((total - mean)^2) + eps)

dtotal = rstd * (w dy - mean(w dy) - xhat * mean(w dy xhat)) + the gradient of total as an output
dresidual = dtotal          dx = dropout(dtotal) with the mask of forward, drawn again
dw = sum over rows of dy xhat                       db = sum over rows of dy

A program holds some short rows or one long row in registers: each element is read once and written once. A row that is
longer than a tile is walked through tile by tile, for each of its sums and for the result, mostly from the cache.

Backward has as many programs as run at once; each takes every n-th group of rows and keeps its own part of dw and db in float32,
and the parts are summed in a fixed order: results are the same in every run.

Each tensor has its own dtype, so that a bfloat16 branch and its gradient meet a float32 stream without a pass for the cast:
total is as wide as the wider of x and residual, gradients as what they are the gradients of.

RMSNorm differs in two terms, `mean` and `b`, and shares all else, so its kernels are these without a `mean_ptr`; its ops are
in triton_rms_norm.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .autocast import compute_dtype
from .triton_dropout import dropout_seed, kept_by_dropout


@triton.jit
def _row_offsets(rows, num_inner, stride_outer, stride_inner):
    """Where the rows of an (outer, inner, C) tensor begin, as a column."""
    outer = (rows // num_inner).to(tl.int64) * stride_outer
    return (outer + (rows % num_inner).to(tl.int64) * stride_inner)[:, None]


@triton.jit
def _columns(tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The columns of a tile's elements: not of one row alone, so that w, too, is read 16 bytes a thread."""
    cols = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.broadcast_to(cols[None, :], (BLOCK_R, BLOCK_C))


@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    num_rows, num_inner, C, eps, dropout_p,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, NUM_TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R
    rows = row + tl.arange(0, BLOCK_R)
    is_row = (rows < num_rows)[:, None]
    x_rows = x_ptr + _row_offsets(rows, num_inner, stride_x_outer, stride_x_inner)
    out_offsets = rows.to(tl.int64)[:, None] * C
    total_rows = x_rows
    if residual_ptr is not None:
        total_rows = total_ptr + out_offsets

    zeros = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    total, sums = zeros, zeros  # sums of the elements; RMSNorm: of their squares
    for tile in range(NUM_TILES):
        cols = _columns(tile, BLOCK_R, BLOCK_C)
        mask = is_row & (cols < C)
        total = tl.load(x_rows + cols, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            seed = tl.load(seed_ptr)
            kept = kept_by_dropout(seed, dropout_p, rows, tile * BLOCK_C, BLOCK_C)
            total = tl.where(kept, total / (1.0 - dropout_p), 0.0)
        if residual_ptr is not None:
            offsets = _row_offsets(rows, num_inner, stride_residual_outer, stride_residual_inner)
            total += tl.load(residual_ptr + offsets + cols, mask=mask, other=0.0).to(tl.float32)
            total = total.to(total_ptr.dtype.element_ty).to(tl.float32)  # as it is stored
            tl.store(total_rows + cols, total, mask=mask)
        sums += total if mean_ptr is not None else total * total
    if NUM_TILES > 1:
        tl.debug_barrier()  # what a thread stored is read by others below

    if mean_ptr is not None:
        mean = tl.sum(sums, axis=1) / C
        tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        sums = zeros
        for tile in range(NUM_TILES):
            cols = _columns(tile, BLOCK_R, BLOCK_C)
            mask = is_row & (cols < C)
            if NUM_TILES > 1:
                total = tl.load(total_rows + cols, mask=mask, other=0.0).to(tl.float32)
            centered = tl.where(mask, total - mean[:, None], 0.0)
            sums += centered * centered
    rstd = 1.0 / tl.sqrt(tl.sum(sums, axis=1) / C + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)

    for tile in range(NUM_TILES):
        cols = _columns(tile, BLOCK_R, BLOCK_C)
        mask = is_row & (cols < C)
        if NUM_TILES > 1:
            total = tl.load(total_rows + cols, mask=mask, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            total -= mean[:, None]
        y = total * rstd[:, None]
        y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + out_offsets + cols, y, mask=mask)


@triton.jit
def _load_tile(x_rows, dy_rows, weight_ptr, mean, rstd, is_row, cols, C):
    """xhat, dy and w dy of a tile in float32; dy is 0 outside of the tensor."""
    mask = is_row & (cols < C)
    x = tl.load(x_rows + cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_rows + cols, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None], dy, w * dy


@triton.jit
def _add_to(ptrs, values, mask):
    tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + values, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def _norm_bwd_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dresidual_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_dy_outer, stride_dy_inner, stride_dtotal_outer, stride_dtotal_inner,
    stride_x_outer, stride_x_inner, num_rows, num_inner, C, dropout_p,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, NUM_TILES: tl.constexpr,
):  # fmt: skip
    dweight_ptr += tl.program_id(0) * C
    if dbias_ptr is not None:
        dbias_ptr += tl.program_id(0) * C
    zeros = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    dweight, dbias = zeros, zeros

    for row in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        is_row = (rows < num_rows)[:, None]
        x_rows = x_ptr + _row_offsets(rows, num_inner, stride_x_outer, stride_x_inner)
        dy_rows = dy_ptr + _row_offsets(rows, num_inner, stride_dy_outer, stride_dy_inner)
        out_offsets = rows.to(tl.int64)[:, None] * C
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        mean = tl.zeros((BLOCK_R,), dtype=tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)

        xhat, dy, wdy = zeros, zeros, zeros
        sum_wdy, sum_wdy_xhat = zeros, zeros
        for tile in range(NUM_TILES):
            cols = _columns(tile, BLOCK_R, BLOCK_C)
            xhat, dy, wdy = _load_tile(x_rows, dy_rows, weight_ptr, mean, rstd, is_row, cols, C)
            sum_wdy += wdy
            sum_wdy_xhat += wdy * xhat
        mean_wdy_xhat = tl.sum(sum_wdy_xhat, axis=1) / C
        mean_wdy = tl.zeros_like(mean)
        if mean_ptr is not None:
            mean_wdy = tl.sum(sum_wdy, axis=1) / C

        for tile in range(NUM_TILES):
            cols = _columns(tile, BLOCK_R, BLOCK_C)
            mask = is_row & (cols < C)
            if NUM_TILES > 1:
                xhat, dy, wdy = _load_tile(x_rows, dy_rows, weight_ptr, mean, rstd, is_row, cols, C)
            dtotal = rstd[:, None] * (wdy - mean_wdy[:, None] - xhat * mean_wdy_xhat[:, None])
            if dtotal_ptr is not None:
                offsets = _row_offsets(rows, num_inner, stride_dtotal_outer, stride_dtotal_inner)
                dtotal += tl.load(dtotal_ptr + offsets + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(dresidual_ptr + out_offsets + cols, dtotal, mask=mask)
            if dx_ptr is not None:
                dx = dtotal
                if seed_ptr is not None:
                    seed = tl.load(seed_ptr)
                    kept = kept_by_dropout(seed, dropout_p, rows, tile * BLOCK_C, BLOCK_C)
                    dx = tl.where(kept, dtotal / (1.0 - dropout_p), 0.0)
                tl.store(dx_ptr + out_offsets + cols, dx, mask=mask)

            if NUM_TILES > 1:
                cols = tile * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
                is_col = cols < C
                _add_to(dweight_ptr + cols, tl.sum(dy * xhat, axis=0, keep_dims=True), is_col)
                if dbias_ptr is not None:
                    _add_to(dbias_ptr + cols, tl.sum(dy, axis=0, keep_dims=True), is_col)
            else:
                dweight += dy * xhat
                dbias += dy
        if NUM_TILES > 1:
            tl.debug_barrier()  # the sums that a thread stored are read by others below

    if NUM_TILES == 1:
        cols = tl.arange(0, BLOCK_C)[None, :]
        tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < C)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + cols, tl.sum(dbias, axis=0, keep_dims=True), mask=cols < C)


def _as_rows(x: Tensor) -> Tensor:
    """`(outer, inner, C)`, a copy only where no two strides describe the rows or their elements are apart."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(x.shape[:-2].numel(), -1, x.shape[-1])


def _tile(C: int, longest_block: int, itemsize: int) -> dict[str, int]:
    """Some short rows, one row, or, of rows longer than `longest_block`, a part of four."""
    block = max(triton.next_power_of_2(C), 16)
    if block > longest_block:
        # four rows, so that the sums of dw and db in memory are added to less often
        num_tiles = triton.cdiv(C, 1024)
        return {"BLOCK_R": 4, "BLOCK_C": 1024, "NUM_TILES": num_tiles, "num_warps": 16}
    rows = max(2048 // block, 1)
    # two loads of 16 bytes a thread in flight from each tensor
    num_warps = rows * block * itemsize // (32 * 2 * 16)
    return {"BLOCK_R": rows, "BLOCK_C": block, "NUM_TILES": 1, "num_warps": min(num_warps, 16)}


def num_sms() -> int:
    device = driver.active.get_current_device()
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    has_mean: bool,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, total (None without residual), mean (None for RMSNorm) and rstd."""
    y = x.new_empty(x.shape, dtype=y_dtype)
    total = None
    if residual is not None:
        total = x.new_empty(x.shape, dtype=torch.result_type(x, residual))
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if has_mean else None
    if x.numel():
        x = _as_rows(x)
        outer, inner, C = x.shape
        residual = None if residual is None else _as_rows(residual)
        tile = _tile(C, 16384, (x if total is None else total).element_size())
        _norm_fwd_kernel[(triton.cdiv(outer * inner, tile["BLOCK_R"]),)](
            x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), seed,
            y, total, mean, rstd, *x.stride()[:2], *(x if residual is None else residual).stride()[:2],
            outer * inner, inner, C, eps, dropout_p, **tile,
        )  # fmt: skip
    return y, total, mean, rstd


def _input_gradients(x: Tensor, seed: Tensor | None, dx_dtype: torch.dtype) -> list[Tensor]:
    dresidual = x.new_empty(x.shape)
    if seed is None and dx_dtype == x.dtype:
        return [dresidual]
    return [dresidual, x.new_empty(x.shape, dtype=dx_dtype)]


@torch.library.custom_op("leangpt_triton::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    has_bias: bool,
    dx_dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    """dresidual and, where it is another tensor, dx; dw and db as rows. x is what was normalized."""
    gradients = _input_gradients(x, seed, dx_dtype)
    if not x.numel():
        return gradients, weight.new_zeros(1 + has_bias, len(weight))
    x, dy = _as_rows(x), _as_rows(dy)
    dtotal = None if dtotal is None else _as_rows(dtotal)
    outer, inner, C = x.shape
    tile = _tile(C, 8192, x.element_size())
    # 16 warps of 128 registers a thread fill a multiprocessor: all programs run at once
    num_programs = min(
        triton.cdiv(outer * inner, tile["BLOCK_R"]), num_sms() * 16 // tile["num_warps"]
    )
    make = torch.empty if tile["NUM_TILES"] == 1 else torch.zeros
    parts = make(1 + has_bias, num_programs, C, dtype=torch.float32, device=x.device)
    _norm_bwd_kernel[(num_programs,)](
        dy, dtotal, x, weight.contiguous(), mean, rstd, seed,
        gradients[0], gradients[1] if len(gradients) > 1 else None,
        parts[0], parts[1] if has_bias else None,
        *dy.stride()[:2], *(dy if dtotal is None else dtotal).stride()[:2], *x.stride()[:2],
        outer * inner, inner, C, dropout_p, **tile, maxnreg=128,
    )  # fmt: skip
    return gradients, parts.sum(1).to(weight.dtype)


@norm_backward.register_fake
def _(dy, dtotal, x, weight, mean, rstd, seed, dropout_p, has_bias, dx_dtype):
    return _input_gradients(x, seed, dx_dtype), weight.new_empty(1 + has_bias, len(weight))


@torch.library.custom_op("leangpt_triton::layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, y_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norm_forward(
        x, None, weight, bias, None, eps, 0.0, has_mean=True, y_dtype=y_dtype
    )
    assert mean is not None
    return y, mean, rstd


@_layer_norm.register_fake
def _(x, weight, bias, eps, y_dtype):
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=y_dtype), mean, torch.empty_like(mean)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, weight, mean, rstd = ctx.saved_tensors
    (dx,), (dweight, *dbias) = norm_backward(
        dy, None, x, weight, mean, rstd, None, 0.0, ctx.has_bias, x.dtype
    )
    return dx, dweight, dbias[0] if dbias else None, None, None


_layer_norm.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("leangpt_triton::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = norm_forward(
        x, residual, weight, bias, seed, eps, dropout_p, has_mean=True, y_dtype=y_dtype
    )
    assert total is not None and mean is not None
    return y, total, mean, rstd


@_add_layer_norm.register_fake
def _(x, residual, weight, bias, seed, eps, dropout_p, y_dtype):
    total = x.new_empty(x.shape, dtype=torch.result_type(x, residual))
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=y_dtype), total, mean, torch.empty_like(mean)


def _save_for_add_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, seed, _, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(weight, seed, *output[1:])
    ctx.has_bias = bias is not None
    ctx.dx_dtype = x.dtype
    ctx.set_materialize_grads(False)


def _add_backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    weight, seed, total, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(total)
    gradients, (dweight, *dbias) = norm_backward(
        dy, dtotal, total, weight, mean, rstd, seed, ctx.dropout_p, ctx.has_bias, ctx.dx_dtype
    )
    dx, dresidual = gradients[-1], gradients[0]
    return dx, dresidual, dweight, dbias[0] if dbias else None, None, None, None, None


_add_layer_norm.register_autograd(_add_backward, setup_context=_save_for_add_backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _layer_norm(x, weight, bias, eps, compute_dtype(x))[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    seed = dropout_seed(x, dropout_p)
    y_dtype = compute_dtype(x, residual)
    y, total, _, _ = _add_layer_norm(x, residual, weight, bias, seed, eps, dropout_p, y_dtype)
    return y, total
