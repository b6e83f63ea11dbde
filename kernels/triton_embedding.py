# pyright: reportArgumentType=false
"""Token and position embedding in Triton: one pass forward, sums without atomics backward.

y[n] = weight[tokens[n]] + position_weight[positions[n]]
dweight[v] = sum of dy[n] over the n with tokens[n] = v        dposition_weight: likewise, by positions

Backward: a stable sort of the tokens makes each token's rows of dy a segment of the sorted order. The program of a
segment's first entry adds the segment up in float32, always in the same order, and rounds once; rows of tokens that do
not occur stay as zeros. A long segment, such as padding, would keep one program busy while all others have finished:
blocks of entries that lie within one segment are added up beforehand, each by a program of its own, and the segment's
program adds these sums. Positions that all sequences share are summed over the sequences first.

A token or position out of range reads nothing: its row is NaN, and has no part in the gradients.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 512 bytes of each of 16 rows of bfloat16: two or four 16-byte accesses a thread, and few idle columns for any C
BLOCK_N, BLOCK_C = 16, 256


@triton.jit
def _load_rows(table_ptr, rows, c, n_rows, n_embd, stride_row, stride_col):
    """Rows of a table as float32, NaN where there is no such row."""
    is_valid = (rows >= 0) & (rows < n_rows)
    pointers = table_ptr + rows[:, None] * stride_row + c[None, :].to(tl.int64) * stride_col
    mask = is_valid[:, None] & (c[None, :] < n_embd)
    return tl.load(pointers, mask=mask, other=float("nan")).to(tl.float32)


# lengths and strides of indices say nothing of 16-byte accesses: one kernel for all
@triton.jit(
    do_not_specialize=[
        "num_tokens", "seq_len", "n_vocab", "n_positions",
        "stride_tokens_b", "stride_tokens_t", "stride_positions_b", "stride_positions_t",
    ]
)  # fmt: skip
def _embedding_kernel(
    tokens_ptr, weight_ptr, positions_ptr, position_weight_ptr, y_ptr,
    num_tokens, seq_len, n_vocab, n_positions, n_embd,
    stride_tokens_b, stride_tokens_t, stride_weight_row, stride_weight_col,
    stride_positions_b, stride_positions_t, stride_position_row, stride_position_col,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_token = n < num_tokens
    b, t = n // seq_len, n % seq_len

    tokens = tl.load(tokens_ptr + b * stride_tokens_b + t * stride_tokens_t, mask=is_token, other=0)
    y = _load_rows(weight_ptr, tokens, c, n_vocab, n_embd, stride_weight_row, stride_weight_col)
    if positions_ptr is not None:
        offsets = b * stride_positions_b + t * stride_positions_t
        positions = tl.load(positions_ptr + offsets, mask=is_token, other=0)
        y += _load_rows(
            position_weight_ptr, positions, c, n_positions, n_embd, stride_position_row, stride_position_col
        )  # fmt: skip
    mask = is_token[:, None] & (c[None, :] < n_embd)
    tl.store(y_ptr + n[:, None] * n_embd + c[None, :], y, mask=mask)


@triton.jit
def _load_entries(dy_ptr, order_ptr, entries, end, c, n_embd, stride_row, stride_col):
    """Rows of dy at the sorted entries before `end`, as float32; zeros beyond."""
    is_entry = entries < end
    rows = tl.load(order_ptr + entries, mask=is_entry, other=0)
    pointers = dy_ptr + rows[:, None] * stride_row + c[None, :].to(tl.int64) * stride_col
    mask = is_entry[:, None] & (c[None, :] < n_embd)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _block_sums_kernel(
    dy_ptr, order_ptr, ends_ptr, sums_ptr, n_embd, stride_row, stride_col,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of a block of BLOCK_N sorted entries, if all of them are of one segment."""
    block = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = block * BLOCK_N, (block + 1) * BLOCK_N
    if tl.load(ends_ptr + first) >= last:
        entries = first + tl.arange(0, BLOCK_N)
        dy = _load_entries(dy_ptr, order_ptr, entries, last, c, n_embd, stride_row, stride_col)
        tl.store(sums_ptr + block * n_embd + c, tl.sum(dy, axis=0), mask=c < n_embd)


@triton.jit(do_not_specialize=["n_table"])
def _segment_sums_kernel(
    dy_ptr, order_ptr, keys_ptr, ends_ptr, sums_ptr, dtable_ptr,
    n_table, n_embd, stride_row, stride_col,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The row of the gradient whose segment starts at this program's entry, if one does.

    `keys` are the sorted tokens, `order` where they stood, `ends` where the segment of an entry ends.
    """
    start = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    key = tl.load(keys_ptr + start)
    before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1)
    if (key != before) & (key >= 0) & (key < n_table):
        end = tl.load(ends_ptr + start)
        # the segment is entries of a block that it shares, whole blocks, and entries of another shared block
        first_block, last_block = tl.cdiv(start, BLOCK_N), end // BLOCK_N
        lanes = tl.arange(0, BLOCK_N)
        acc = _load_entries(
            dy_ptr, order_ptr, start + lanes, tl.minimum(end, first_block * BLOCK_N),
            c, n_embd, stride_row, stride_col,
        )  # fmt: skip
        for block in range(first_block, last_block, BLOCK_N):
            blocks = block + lanes
            mask = (blocks < last_block)[:, None] & (c[None, :] < n_embd)
            acc += tl.load(sums_ptr + blocks[:, None] * n_embd + c[None, :], mask=mask, other=0.0)
        tail = tl.maximum(first_block, last_block) * BLOCK_N + lanes
        acc += _load_entries(dy_ptr, order_ptr, tail, end, c, n_embd, stride_row, stride_col)
        tl.store(dtable_ptr + key * n_embd + c, tl.sum(acc, axis=0), mask=c < n_embd)


def _grid(num_rows: int, n_embd: int) -> tuple[int, int]:
    return num_rows, triton.cdiv(n_embd, BLOCK_C)


@torch.library.custom_op("leangpt_triton::embedding", mutates_args=())
def _embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> Tensor:
    (B, T), (V, C) = tokens.shape, weight.shape
    y = weight.new_empty(B, T, C)
    if y.numel() == 0:
        return y
    n_positions = 0
    position_strides: tuple[int, ...] = (0, 0, 0, 0)
    if positions is not None and position_weight is not None:
        positions, n_positions = positions.expand(B, T), position_weight.shape[0]
        position_strides = *positions.stride(), *position_weight.stride()
    _embedding_kernel[_grid(triton.cdiv(B * T, BLOCK_N), C)](
        tokens, weight, positions, position_weight, y,
        B * T, T, V, n_positions, C, *tokens.stride(), *weight.stride(), *position_strides,
        BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return y


@_embedding.register_fake
def _(tokens, weight, positions, position_weight):
    return weight.new_empty(*tokens.shape, weight.shape[1])


@torch.library.custom_op("leangpt_triton::embedding_backward", mutates_args=())
def _embedding_backward(dy: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """Gradient of a table of `num_rows` rows, which were taken at `indices`, broadcast to the `(B, T)` of dy `(B, T, C)`."""
    B, T, C = dy.shape
    dtable = dy.new_zeros(num_rows, C)
    if dy.numel() == 0:
        return dtable
    indices = indices.expand(B, T)
    if B > 1 and indices.stride(0) == 0:
        dy, indices = dy.sum(0, dtype=torch.float32), indices[0]
    dy = dy.reshape(-1, C)
    keys, order = torch.sort(indices.reshape(-1), stable=True)
    ends = torch.searchsorted(keys, keys, right=True)

    N, num_blocks = len(keys), len(keys) // BLOCK_N
    sums = dy.new_empty((num_blocks, C), dtype=torch.float32)
    tile = {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
    if num_blocks:
        _block_sums_kernel[_grid(num_blocks, C)](dy, order, ends, sums, C, *dy.stride(), **tile)
    _segment_sums_kernel[_grid(N, C)](
        dy, order, keys, ends, sums, dtable, num_rows, C, *dy.stride(), **tile
    )
    return dtable


@_embedding_backward.register_fake
def _(dy, indices, num_rows):
    return dy.new_empty(num_rows, dy.shape[-1])


def _save_indices(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    tokens, weight, positions, position_weight = inputs
    ctx.save_for_backward(tokens, positions)
    ctx.num_rows = [
        None if table is None else table.shape[0] for table in (weight, position_weight)
    ]


def _embedding_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dweight, dposition_weight = (
        _embedding_backward(dy, indices, num_rows) if needs_gradient else None
        for indices, num_rows, needs_gradient in zip(
            ctx.saved_tensors, ctx.num_rows, ctx.needs_input_grad[1::2], strict=True
        )
    )
    return None, dweight, None, dposition_weight


_embedding.register_autograd(_embedding_autograd, setup_context=_save_indices)


def embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> Tensor:
    return _embedding(tokens, weight, positions, position_weight)
