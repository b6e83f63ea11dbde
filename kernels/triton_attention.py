# pyright: reportArgumentType=false
"""Causal attention in Triton after FlashAttention-2: the (T, S) matrix of weights exists only in tiles, in registers.

P = softmax(scale * q k^T + mask)        out = drop(P) v        lse = logsumexp(scale * q k^T + mask)

dv = drop(P)^T dout        dP = drop(dout v^T)        dS = P * (dP - delta)        delta = sum over D of dout * out
dq = scale * dS k          dk = scale * dS^T q

Forward: a program holds a tile of queries of one head and walks over the tiles of keys that they see, with the largest
score and the sum of exponentials so far of each row; when the largest score grows, what was summed is scaled down. It
keeps lse, from which backward has every P again without a second softmax.
Backward: the dq kernel walks in the same way, and writes delta, which it has from its own rows. The dk/dv kernel runs
after it, holds a tile of keys of one key head, and walks over the tiles of queries that see them, of all query heads of
the group in turn. Each result has one program that sums it up in a fixed order: no atomics, same bits every time.

Tiles that all queries of the tile see are walked over without a mask; the mask costs only on the diagonal and at the
far edge of a sliding window, and tiles beyond these are not visited. Exponentials are of base 2, with log2(e) in the
scale; `lse` is in base 2 too. Rows are read with their strides, so that q, k and v may be views of packed qkv.

Dropout's mask is a function of a seed and of (batch, head, query, key) alone, drawn again in backward.

Reference: Dao, 2023, https://arxiv.org/abs/2307.08691
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_dropout import dropout_seed, kept_by_dropout

MAX_HEAD_DIM = 256


@triton.jit
def _load_rows(
    ptr, first, num_rows, stride,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, IS_BOUNDED: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `first + BLOCK` of a matrix, `(BLOCK, BLOCK_D)`; zeros beyond HEAD_DIM and, if bounded, num_rows."""
    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    # only the first row can be far away
    ptrs = ptr + first.to(tl.int64) * stride + (rows * stride + dims)
    if IS_BOUNDED and HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=(first + rows < num_rows) & (dims < HEAD_DIM), other=0.0)
    elif IS_BOUNDED:
        return tl.load(ptrs, mask=first + rows < num_rows, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(ptrs, mask=dims < HEAD_DIM, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_rows(
    ptr, tile, first, num_rows, stride,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_rows`, rounded to the dtype of the matrix."""
    rows = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + first.to(tl.int64) * stride + (rows * stride + dims)
    mask = (first + rows < num_rows) & (dims < HEAD_DIM)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sequence(b, T, S, seqlens_k_ptr, cu_seqlens_ptr):
    """Where sequence b begins: in strides of the batch, in rows of queries, of keys; its numbers of queries and keys."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + b)
        length = tl.load(cu_seqlens_ptr + b + 1) - start
        return start.to(tl.int64), start.to(tl.int64), start.to(tl.int64), length, length
    elif seqlens_k_ptr is not None:
        b = b.to(tl.int64)
        return b, b * T, b * S, T, tl.load(seqlens_k_ptr + b).to(tl.int32)
    else:
        b = b.to(tl.int64)
        return b, b * T, b * S, T, S


@triton.jit
def _keys_seen(first, num_keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of keys for the queries at positions from `first` on: all of them see [full_begin, full_end), some the rest.

    The other keys that they see are in [begin, full_begin) and [full_end, end).
    """
    begin = 0
    full_begin = 0
    full_end = (first + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M, num_keys)
    if window is not None:
        begin = tl.maximum(first + 1 - window, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _queries_seeing(first, num_queries, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for keys: `first` is the query that stands at the position of the first key; it may be negative."""
    begin = tl.maximum(first, 0) // BLOCK_M * BLOCK_M
    full_begin = tl.cdiv(tl.maximum(first + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
    end = num_queries
    full_end = num_queries
    if window is not None:
        end = tl.minimum(num_queries, first + BLOCK_N - 1 + window)
        full_end = tl.minimum(tl.maximum(first + window, 0) // BLOCK_M * BLOCK_M, end)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _is_visible(position, key, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of the tile from (position, key) on the mask lets through: `(BLOCK_M, BLOCK_N)`."""
    positions = (position + tl.arange(0, BLOCK_M))[:, None]
    keys = (key + tl.arange(0, BLOCK_N))[None, :]
    if window is not None:
        return (keys <= positions) & (keys > positions - window)
    else:
        return keys <= positions


@triton.jit
def _is_kept(dropout, query, key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of the tile from (query, key) on dropout keeps: `(BLOCK_M, BLOCK_N)`."""
    seed, dropout_p, _, head, T = dropout
    rows = head * T + query + tl.arange(0, BLOCK_M)
    return kept_by_dropout(seed, dropout_p, rows, key, BLOCK_N)


@triton.jit
def _fwd_keys(
    acc, row_sum, row_max, q, keys, begin, end, query, shift, scale, window, dropout,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys in [begin, end) into the output of the tile of queries from `query` on."""
    k_ptr, stride_ks, v_ptr, stride_vs, num_keys = keys
    for key in tl.range(begin, end, BLOCK_N):
        k = _load_rows(k_ptr, key, num_keys, stride_ks, HEAD_DIM, BLOCK_N, BLOCK_D, IS_MASKED)
        scores = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if IS_MASKED:
            is_visible = _is_visible(shift + query, key, window, BLOCK_M, BLOCK_N)
            scores = tl.where(is_visible, scores * scale, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            p = tl.exp2(scores - new_max[:, None])
        else:  # the scale is positive: it and the subtraction are one instruction
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
        if dropout is not None:
            p = tl.where(_is_kept(dropout, query, key, BLOCK_M, BLOCK_N), p, 0.0)
        v = _load_rows(v_ptr, key, num_keys, stride_vs, HEAD_DIM, BLOCK_N, BLOCK_D, IS_MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit
def _dq_keys(
    dq, q, dout, lse, delta, keys, begin, end, query, shift, scale, window, dropout,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add dS k of the keys in [begin, end) to the dq of the tile of queries from `query` on."""
    k_ptr, stride_ks, v_ptr, stride_vs, num_keys = keys
    for key in tl.range(begin, end, BLOCK_N):
        k = _load_rows(k_ptr, key, num_keys, stride_ks, HEAD_DIM, BLOCK_N, BLOCK_D, IS_MASKED)
        v = _load_rows(v_ptr, key, num_keys, stride_vs, HEAD_DIM, BLOCK_N, BLOCK_D, IS_MASKED)
        scores = tl.dot(q, k.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        p = tl.exp2(scores * scale - lse[:, None])
        if IS_MASKED:
            p = tl.where(_is_visible(shift + query, key, window, BLOCK_M, BLOCK_N), p, 0.0)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        if dropout is not None:
            is_kept = _is_kept(dropout, query, key, BLOCK_M, BLOCK_N)
            dp = tl.where(is_kept, dp * dropout[2], 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dkv_queries(
    dk, dv, k, v, queries, group, begin, end, key, shift, scale, window, dropout,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add dS^T q and drop(P)^T dout of the queries in [begin, end) to the dk and dv of the tile of keys from `key` on."""
    q_ptr, stride_qt, stride_qh, dout_ptr, stride_dt, stride_dh, lse_ptr, delta_ptr, total, num_queries = queries  # fmt: skip
    num_tiles = tl.cdiv(end - begin, BLOCK_M)
    # one loop over heads and tiles: two, one in the other, take more registers
    for i in tl.range(0, group * num_tiles):
        head = (i // num_tiles).to(tl.int64)
        query = begin + i % num_tiles * BLOCK_M
        head_q_ptr, head_dout_ptr = q_ptr + head * stride_qh, dout_ptr + head * stride_dh
        q = _load_rows(head_q_ptr, query, num_queries, stride_qt, HEAD_DIM, BLOCK_M, BLOCK_D, True)
        rows = query + tl.arange(0, BLOCK_M)
        # beyond the last query: weights of 0
        lse = tl.load(lse_ptr + head * total + rows, mask=rows < num_queries, other=float("inf"))
        scores = tl.dot(k, q.T, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        p = tl.exp2(scores * scale - lse[None, :])
        if IS_MASKED:
            p = tl.where(_is_visible(shift + query, key, window, BLOCK_M, BLOCK_N).T, p, 0.0)
        kept = p
        if dropout is not None:
            is_kept = _is_kept(dropout, head * dropout[4] + query, key, BLOCK_M, BLOCK_N).T
            kept = tl.where(is_kept, p, 0.0)
        dout = _load_rows(
            head_dout_ptr, query, num_queries, stride_dt, HEAD_DIM, BLOCK_M, BLOCK_D, True
        )
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        if dropout is not None:
            dp = tl.where(is_kept, dp * dropout[2], 0.0)
        delta = tl.load(delta_ptr + head * total + rows, mask=rows < num_queries, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


# no argument decides over the code by its value, but for the alignment of pointers: a new length compiles nothing
_SIZES = [
    "stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_ks", "stride_kh",
    "stride_vb", "stride_vs", "stride_vh", "stride_db", "stride_dt", "stride_dh",
    "T", "S", "H", "group", "total", "window", "length_class",
]  # fmt: skip

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by (head_dim up to, bytes of an element), the leanest first: tiles as large as
# registers allow on sm_80, sm_90 and sm_100. float32 is multiplied without tensor cores, which unrolls to long code.
Tiles = dict[tuple[int, int], list[tuple[int, int, int, int]]]
_FWD_TILES: Tiles = {
    (64, 4): [(16, 32, 4, 2)],
    (128, 4): [(16, 16, 4, 2)],
    (256, 4): [(16, 16, 8, 2)],
    (64, 2): [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3)],
    (128, 2): [(64, 32, 4, 3), (128, 64, 8, 3)],
    (256, 2): [(64, 32, 8, 2), (64, 64, 8, 2)],
}
_DQ_TILES: Tiles = {
    (64, 4): [(16, 32, 4, 2)],
    (128, 4): [(16, 16, 4, 2)],
    (256, 4): [(16, 16, 8, 2)],
    (64, 2): [(64, 32, 4, 3), (128, 64, 8, 2)],
    (128, 2): [(64, 32, 4, 2), (128, 32, 8, 2)],
    (256, 2): [(64, 16, 8, 2), (64, 32, 8, 2)],
}
_DKV_TILES: Tiles = {
    (64, 4): [(16, 32, 4, 2)],
    (128, 4): [(16, 16, 4, 2)],
    (256, 4): [(16, 16, 8, 2)],
    (64, 2): [(32, 64, 4, 2), (64, 64, 4, 2)],
    (128, 2): [(16, 128, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2)],
    # HGMMA needs 64 keys, with which dk, dv and a step's products exceed the registers of sm_90: (16, 64, 8, 2) has 20 to 58
    # spills, with 16 warps of 128 registers it is 65 or more. So dk and dv of such wide heads are of HMMA there.
    (256, 2): [(32, 32, 8, 2)],
}
# the bounds of packed sequences within a window leave sm_80 too few registers for this one
_UNFIT_FOR_PACKED_WINDOWS = (64, 64, 4, 3)


def _autotune(tiles: Tiles) -> Any:
    """Decorator: the fastest of the tiles of a class of head_dim, dtype and length; kept on disk for the next run."""

    def config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> triton.Config:
        blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
        return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)

    configs = {tile: config(*tile) for choice in tiles.values() for tile in choice}

    def of_class(_: Any, arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
        arguments = arguments | more
        head_dim, itemsize = max(arguments["BLOCK_D"], 64), arguments["q_ptr"].element_size()
        choice = tiles[head_dim, itemsize]
        # what else takes registers: drawing dropout's mask, and the bounds of windows and packed sequences
        bounds = (arguments["window"] is not None) + (arguments["cu_seqlens_ptr"] is not None)
        if arguments["seed_ptr"] is not None:
            choice = choice[:1]
        elif bounds:
            choice = choice[:2]
            if bounds == 2:
                choice = [tile for tile in choice if tile != _UNFIT_FOR_PACKED_WINDOWS]
        return [configs[tile] for tile in choice]

    return triton.autotune(
        configs=list(configs.values()),
        key=["BLOCK_D", "length_class"],
        prune_configs_by={"early_config_prune": of_class},
        cache_results=True,
    )


@_autotune(_FWD_TILES)
@triton.jit(do_not_specialize=_SIZES)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlens_k_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    T, S, H, group, total, scale, window, dropout_p, keep_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries of a head, those with the most keys first."""
    num_tiles = tl.cdiv(T, BLOCK_M)
    query = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // H, head % H
    origin, row, _, num_queries, num_keys = _sequence(b, T, S, seqlens_k_ptr, cu_seqlens_ptr)
    if query >= num_queries:
        return
    shift = num_keys - num_queries
    q_ptr += (origin * stride_qb + h * stride_qh) * UNIT
    k_ptr += (origin * stride_kb + h // group * stride_kh) * UNIT
    v_ptr += (origin * stride_vb + h // group * stride_vh) * UNIT
    keys = (k_ptr, stride_ks * UNIT, v_ptr, stride_vs * UNIT, num_keys)
    dropout = None
    if seed_ptr is not None:
        dropout = (tl.load(seed_ptr), dropout_p, keep_scale, head, T)

    q = _load_rows(q_ptr, query, num_queries, stride_qt * UNIT, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # finite, so that rows without a visible key so far give no inf - inf
    row_max = tl.full((BLOCK_M,), -3.4e38, dtype=tl.float32)
    begin, full_begin, full_end, end = _keys_seen(shift + query, num_keys, window, BLOCK_M, BLOCK_N)
    if window is not None:
        acc, row_sum, row_max = _fwd_keys(
            acc, row_sum, row_max, q, keys, begin, full_begin, query, shift, scale, window, dropout,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=True,
        )  # fmt: skip
    acc, row_sum, row_max = _fwd_keys(
        acc, row_sum, row_max, q, keys, full_begin, full_end, query, shift, scale, window, dropout,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=False,
    )  # fmt: skip
    acc, row_sum, row_max = _fwd_keys(
        acc, row_sum, row_max, q, keys, full_end, end, query, shift, scale, window, dropout,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=True,
    )  # fmt: skip

    out_ptr += (row * H + h) * HEAD_DIM
    out = acc * (keep_scale / row_sum)[:, None]
    _store_rows(out_ptr, out, query, num_queries, H * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D)
    rows = query + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + h * total + row + rows, row_max + tl.log2(row_sum), mask=rows < num_queries)


@_autotune(_DQ_TILES)
@triton.jit(do_not_specialize=_SIZES)
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr, seqlens_k_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_db, stride_dt, stride_dh,
    T, S, H, group, total, scale, softmax_scale, window, dropout_p, keep_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries of a head, those with the most keys first; writes delta for the dk/dv kernel too."""
    num_tiles = tl.cdiv(T, BLOCK_M)
    query = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h = head // H, head % H
    origin, row, _, num_queries, num_keys = _sequence(b, T, S, seqlens_k_ptr, cu_seqlens_ptr)
    if query >= num_queries:
        return
    shift = num_keys - num_queries
    q_ptr += (origin * stride_qb + h * stride_qh) * UNIT
    k_ptr += (origin * stride_kb + h // group * stride_kh) * UNIT
    v_ptr += (origin * stride_vb + h // group * stride_vh) * UNIT
    dout_ptr += (origin * stride_db + h * stride_dh) * UNIT
    out_ptr += (row * H + h) * HEAD_DIM
    dq_ptr += (row * H + h) * HEAD_DIM
    keys = (k_ptr, stride_ks * UNIT, v_ptr, stride_vs * UNIT, num_keys)
    dropout = None
    if seed_ptr is not None:
        dropout = (tl.load(seed_ptr), dropout_p, keep_scale, head, T)

    dout = _load_rows(
        dout_ptr, query, num_queries, stride_dt * UNIT, HEAD_DIM, BLOCK_M, BLOCK_D, True
    )
    out = _load_rows(out_ptr, query, num_queries, H * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    rows = query + tl.arange(0, BLOCK_M)
    row_offsets = h * total + row + rows
    tl.store(delta_ptr + row_offsets, delta, mask=rows < num_queries)
    # beyond the last query: weights of 0
    lse = tl.load(lse_ptr + row_offsets, mask=rows < num_queries, other=float("inf"))
    q = _load_rows(q_ptr, query, num_queries, stride_qt * UNIT, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    begin, full_begin, full_end, end = _keys_seen(shift + query, num_keys, window, BLOCK_M, BLOCK_N)
    if window is not None:
        dq = _dq_keys(
            dq, q, dout, lse, delta, keys, begin, full_begin, query, shift, scale, window, dropout,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=True,
        )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, lse, delta, keys, full_begin, full_end, query, shift, scale, window, dropout,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=False,
    )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, lse, delta, keys, full_end, end, query, shift, scale, window, dropout,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=True,
    )  # fmt: skip
    dq *= softmax_scale
    _store_rows(dq_ptr, dq, query, num_queries, H * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_D)


@_autotune(_DKV_TILES)
@triton.jit(do_not_specialize=_SIZES)
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr, seqlens_k_ptr, cu_seqlens_ptr, seed_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_db, stride_dt, stride_dh,
    T, S, H, group, total, scale, softmax_scale, window, dropout_p, keep_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys of a key head, those that most queries see first; its query heads one after the other."""
    num_tiles = tl.cdiv(S, BLOCK_N)
    key = tl.program_id(0) % num_tiles * BLOCK_N
    H_kv = H // group
    head_kv = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, h_kv = head_kv // H_kv, head_kv % H_kv
    origin, row, k_row, num_queries, num_keys = _sequence(b, T, S, seqlens_k_ptr, cu_seqlens_ptr)
    num_rows = num_keys if cu_seqlens_ptr is not None else S  # padding keys have gradients, too: 0
    if key >= num_rows:
        return
    shift = num_keys - num_queries
    k_ptr += (origin * stride_kb + h_kv * stride_kh) * UNIT
    v_ptr += (origin * stride_vb + h_kv * stride_vh) * UNIT
    dk_ptr += (k_row * H_kv + h_kv) * HEAD_DIM
    dv_ptr += (k_row * H_kv + h_kv) * HEAD_DIM

    k = _load_rows(k_ptr, key, num_keys, stride_ks * UNIT, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v = _load_rows(v_ptr, key, num_keys, stride_vs * UNIT, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    begin, full_begin, full_end, end = _queries_seeing(
        key - shift, num_queries, window, BLOCK_M, BLOCK_N
    )
    h = h_kv * group
    queries = (
        q_ptr + (origin * stride_qb + h * stride_qh) * UNIT, stride_qt * UNIT, stride_qh * UNIT,
        dout_ptr + (origin * stride_db + h * stride_dh) * UNIT, stride_dt * UNIT, stride_dh * UNIT,
        lse_ptr + h * total + row, delta_ptr + h * total + row, total, num_queries,
    )  # fmt: skip
    dropout = None
    if seed_ptr is not None:
        dropout = (tl.load(seed_ptr), dropout_p, keep_scale, b * H + h, T)
    dk, dv = _dkv_queries(
        dk, dv, k, v, queries, group, begin, full_begin, key, shift, scale, window, dropout,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=True,
    )  # fmt: skip
    dk, dv = _dkv_queries(
        dk, dv, k, v, queries, group, full_begin, full_end, key, shift, scale, window, dropout,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=False,
    )  # fmt: skip
    if window is not None:
        dk, dv = _dkv_queries(
            dk, dv, k, v, queries, group, full_end, end, key, shift, scale, window, dropout,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, IS_MASKED=True,
        )  # fmt: skip
    dk *= softmax_scale
    dv *= keep_scale
    _store_rows(dk_ptr, dk, key, num_rows, H_kv * HEAD_DIM, HEAD_DIM, BLOCK_N, BLOCK_D)
    _store_rows(dv_ptr, dv, key, num_rows, H_kv * HEAD_DIM, HEAD_DIM, BLOCK_N, BLOCK_D)


def _unit_of_strides(*tensors: Tensor) -> int:
    """Elements in which strides are counted: 16 bytes, from which Triton knows that rows can be read so, or else one."""
    unit = 16 // tensors[0].element_size()
    sizes_strides = [(t.shape[i], t.stride(i)) for t in tensors for i in range(3)]
    return unit if all(stride % unit == 0 for size, stride in sizes_strides if size > 1) else 1


def _strides(name: str, tensor: Tensor, is_packed: bool, unit: int) -> dict[str, int]:
    """Strides of batch, row and head; packed sequences begin at rows instead of batches."""
    batch, row, head = (stride // unit for stride in tensor.stride()[:3])
    names = (f"stride_{name}b", f"stride_{name}{'s' if name in 'kv' else 't'}", f"stride_{name}h")
    return dict(zip(names, (row if is_packed else batch, row, head), strict=True))


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    seqlens_k: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    sliding_window: int | None,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[int, dict[str, Any]]:
    """Number of sequences, and the arguments that all kernels have."""
    B, T, H, D = q.shape
    rows = {"q": q, "k": k, "v": v} | ({} if dout is None else {"d": dout})
    unit = _unit_of_strides(*rows.values())
    arguments: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "total": B * T}
    for name, tensor in rows.items():
        arguments |= _strides(name, tensor, cu_seqlens is not None, unit)
    S = k.shape[1]
    if cu_seqlens is not None:
        B, T, S = len(cu_seqlens) - 1, max_seqlen, max_seqlen
    is_tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return B, arguments | {
        "seqlens_k_ptr": None if seqlens_k is None else seqlens_k.contiguous(),
        "cu_seqlens_ptr": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "seed_ptr": seed,
        "T": T,
        "S": S,
        "H": H,
        "group": H // k.shape[2],
        "scale": softmax_scale * math.log2(math.e),
        "window": sliding_window,
        "dropout_p": dropout_p,
        "keep_scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        # for the choice of tiles, in which windows and dropout have a part
        "length_class": (min(max(S.bit_length(), 7), 13) + (0 if seed is None else 16))
        * (1 if sliding_window is None else -1),
        "HEAD_DIM": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),  # a product needs 16
        "UNIT": unit,
        "PRECISION": "tf32" if is_tf32 else "ieee",
    }


@torch.library.custom_op("leangpt_triton::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    sliding_window: int | None,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output, and lse `(H, B * T)`. With cu_seqlens, q is `(1, N, H, D)`; max_seqlen counts only then."""
    B, T, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, B * T, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    num_sequences, arguments = _arguments(
        q, k, v, None, seqlens_k, cu_seqlens, max_seqlen, sliding_window, softmax_scale, dropout_p, seed
    )  # fmt: skip

    def grid(blocks: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(arguments["T"], blocks["BLOCK_M"]) * num_sequences * H,)

    _attention_fwd_kernel[grid](out_ptr=out, lse_ptr=lse, **arguments)
    return out, lse


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H = q.shape[:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, q.new_empty(H, B * T, dtype=torch.float32)


@torch.library.custom_op("leangpt_triton::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    sliding_window: int | None,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    if dout.stride(-1) != 1:  # a gradient that was expanded
        dout = dout.contiguous()
    delta = torch.empty_like(lse)
    num_sequences, arguments = _arguments(
        q, k, v, dout, seqlens_k, cu_seqlens, max_seqlen, sliding_window, softmax_scale, dropout_p, seed
    )  # fmt: skip
    arguments |= {
        "lse_ptr": lse,
        "dout_ptr": dout,
        "delta_ptr": delta,
        "softmax_scale": softmax_scale,
    }

    def grid_dq(blocks: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(arguments["T"], blocks["BLOCK_M"]) * num_sequences * q.shape[2],)

    def grid_dkv(blocks: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(arguments["S"], blocks["BLOCK_N"]) * num_sequences * k.shape[2],)

    _attention_dq_kernel[grid_dq](out_ptr=out, dq_ptr=dq, **arguments)  # first: writes delta
    _attention_dkv_kernel[grid_dkv](dk_ptr=dk, dv_ptr=dv, **arguments)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, seqlens_k, cu_seqlens, *ctx.options, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, q, k, v, seqlens_k, cu_seqlens, seed)


def _backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    dq, dk, dv = _attention_backward(dout, *saved, *ctx.options, seed)
    return dq, dk, dv, *(None,) * 7


_attention.register_autograd(_backward, setup_context=_setup_context)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    sliding_window: int | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    D = q.shape[-1]
    if D > MAX_HEAD_DIM:
        raise ValueError(f"attention: head_dim must be at most {MAX_HEAD_DIM} on Triton, got {D}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    softmax_scale = D**-0.5 if softmax_scale is None else softmax_scale
    if sliding_window is not None and sliding_window >= max_seqlen:
        sliding_window = None
    seed = dropout_seed(q, dropout_p)
    out, _ = _attention(
        q, k, v, seqlens_k, cu_seqlens, max_seqlen, sliding_window, softmax_scale, dropout_p, seed
    )
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sliding_window: int | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    S = k.shape[1]
    return _run(q, k, v, seqlens_k, None, S, sliding_window, softmax_scale, dropout_p)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sliding_window: int | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    return _run(
        q, k, v, None, cu_seqlens, max_seqlen, sliding_window, softmax_scale, dropout_p
    ).squeeze(0)
