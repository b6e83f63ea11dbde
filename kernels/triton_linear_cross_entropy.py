# pyright: reportArgumentType=false
"""Language-model head and cross-entropy in Triton: the logits of all rows never exist at the same time.

Per row with logits l = hidden weight^T, p = softmax(l), lse = logsumexp(l), smoothing s and z-loss z:

loss = lse - (1 - s) l[target] - s mean(l) + z lse^2
dl = p (1 + 2 z lse) - (1 - s) onehot(target) - s / V          dhidden = dl weight          dweight = dl^T hidden

Rows are taken in chunks whose logits fill at most LOGITS_BYTES, or are 128 rows. The library multiplies a chunk with
the vocabulary matrix, one kernel turns logits into losses and, in the same place, into dl; the library gives dhidden,
and a second kernel adds to dweight in float32, so that it is rounded once, however many chunks there are. With a loss
of one number all that happens in the forward pass: its gradients are those of the sum times a factor, which the
backward pass applies. That is three products; recomputing the logits would be a fourth. Losses of single rows have a
gradient of their own each, so their backward pass does recompute the logits, by the same code. Nothing is atomic:
results are deterministic.

Memory beyond inputs and gradients: LOGITS_BYTES and `(V, C)` float32.

A target out of range reads nothing: its loss is NaN.

Chunks and gradients in the forward pass: Hsu et al., 2024 (Liger Kernel), https://arxiv.org/abs/2410.10989. What these
save over full logits, and a kernel that never writes them but needs more products: Wijmans et al., 2024 (Cut
Cross-Entropy), https://arxiv.org/abs/2411.09009
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGITS_BYTES = 256 * 2**20  # enough rows to fill a GPU with tiles of each product


@triton.jit(do_not_specialize=["n_vocab", "ignore_index"])
def _cross_entropy_kernel(
    logits_ptr, target_ptr, dloss_ptr, loss_ptr,
    n_vocab, stride_logits, ignore_index, label_smoothing, z_loss,
    NEEDS_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss of one row; its logits become its dl, times `dloss` if given. Rows are padded to `stride_logits`."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits_ptr += row * stride_logits
    cols = tl.arange(0, BLOCK_V)

    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if NEEDS_GRADIENT:
            zeros = tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)
            for start in range(0, stride_logits, BLOCK_V):
                tl.store(logits_ptr + start + cols, zeros, mask=start + cols < stride_logits)
        return

    # read here: the reductions below keep all warps from storing dl before each of them has it
    is_valid = (target >= 0) & (target < n_vocab)
    target_logit = tl.load(logits_ptr + target, mask=is_valid, other=float("nan")).to(tl.float32)

    largest = float("-inf")
    exp_sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
    logit_sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, stride_logits, BLOCK_V):
        # masked by the padded width, a multiple of 16, so that loads stay 16 bytes wide for every vocabulary
        v = start + cols
        logits = tl.load(logits_ptr + v, mask=v < stride_logits, other=0.0).to(tl.float32)
        logit_sums += tl.where(v < n_vocab, logits, 0.0)
        logits = tl.where(v < n_vocab, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        exp_sums = exp_sums * tl.exp(largest - new_largest) + tl.exp(logits - new_largest)
        largest = new_largest
    lse = largest + tl.log(tl.sum(exp_sums, axis=0))
    mean = tl.sum(logit_sums, axis=0) / n_vocab
    loss = lse - (1.0 - label_smoothing) * target_logit - label_smoothing * mean
    tl.store(loss_ptr + row, loss + z_loss * lse * lse)

    if NEEDS_GRADIENT:
        dloss = 1.0 if dloss_ptr is None else tl.load(dloss_ptr + row)
        dlse = dloss * (1.0 + 2.0 * z_loss * lse)
        dtarget = dloss * (1.0 - label_smoothing)
        dmean = dloss * label_smoothing / n_vocab
        for start in range(0, stride_logits, BLOCK_V):
            v = start + cols
            mask = v < stride_logits
            logits = tl.load(logits_ptr + v, mask=mask, other=0.0).to(tl.float32)
            dlogits = dlse * tl.exp(logits - lse) - tl.where(v == target, dtarget, 0.0) - dmean
            dlogits = tl.where(v < n_vocab, dlogits, 0.0)
            tl.store(logits_ptr + v, dlogits, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_vocab"])
def _add_weight_gradient_kernel(
    dlogits_ptr, hidden_ptr, dweight_ptr,
    n_rows, n_vocab, n_embd, stride_dlogits, stride_hidden_row, stride_hidden_col,
    IS_FIRST: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of `dweight = dlogits^T hidden`, added to what is there unless IS_FIRST."""
    # programs that follow each other share a strip of dlogits, the large operand: it is read from memory once
    num_tiles_c = tl.cdiv(n_embd, BLOCK_C)
    v = tl.program_id(0) // num_tiles_c * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.program_id(0) % num_tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    dlogits_ptrs = dlogits_ptr + v[:, None] + n[None, :].to(tl.int64) * stride_dlogits
    hidden_ptrs = (
        hidden_ptr
        + n[:, None].to(tl.int64) * stride_hidden_row
        + c[None, :].to(tl.int64) * stride_hidden_col
    )

    acc = tl.zeros((BLOCK_V, BLOCK_C), dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_N):
        is_row = start + n < n_rows
        # masked by the padded width, see above; the columns beyond the vocabulary are zeros
        mask = (v[:, None] < stride_dlogits) & is_row[None, :]
        dlogits = tl.load(dlogits_ptrs, mask=mask, other=0.0)
        hidden = tl.load(hidden_ptrs, mask=is_row[:, None] & (c[None, :] < n_embd), other=0.0)
        acc = tl.dot(dlogits, hidden, acc, input_precision=INPUT_PRECISION)
        dlogits_ptrs += BLOCK_N * stride_dlogits
        hidden_ptrs += BLOCK_N * stride_hidden_row

    dweight_ptrs = dweight_ptr + v[:, None].to(tl.int64) * n_embd + c[None, :]
    mask = (v[:, None] < n_vocab) & (c[None, :] < n_embd)
    if not IS_FIRST:
        acc += tl.load(dweight_ptrs, mask=mask)
    tl.store(dweight_ptrs, acc, mask=mask)


@triton.jit
def _scale_kernel(x_ptr, scale_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < numel).to(tl.float32)
    tl.store(y_ptr + index, x * tl.load(scale_ptr), mask=index < numel)


def _add_weight_gradient(dlogits: Tensor, hidden: Tensor, dweight: Tensor, is_first: bool) -> None:
    n_vocab, n_embd = dweight.shape
    precision, block_v, block_c, block_n, num_warps = "ieee", 128, 128, 64, 8
    if hidden.dtype == torch.float32:
        # without tensor cores operands, too, take registers: larger tiles spill
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        block_v, block_c, block_n, num_warps = 64, 64, 32, 4
    # not autotuned: trial runs would add to dweight too
    _add_weight_gradient_kernel[(triton.cdiv(n_vocab, block_v) * triton.cdiv(n_embd, block_c),)](
        dlogits, hidden, dweight,
        hidden.shape[0], n_vocab, n_embd, dlogits.stride(0), hidden.stride(0), hidden.stride(1),
        IS_FIRST=is_first, INPUT_PRECISION=precision,
        BLOCK_V=block_v, BLOCK_C=block_c, BLOCK_N=block_n, num_warps=num_warps, num_stages=3,
    )  # fmt: skip


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dloss: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `(N,)`, and gradients of their sum, weighted by `dloss` `(N,)` if given; empty where not needed.

    dhidden has the dtype of `hidden`, dweight is float32.
    """
    (N, C), V = hidden.shape, weight.shape[0]
    targets = targets.contiguous()
    losses = hidden.new_empty(N, dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if needs_dhidden else 0)
    dweight = hidden.new_empty((V, C) if needs_dweight else 0, dtype=torch.float32)
    if N == 0:
        return losses, dhidden, dweight.zero_()

    # rows in memory are padded: 16-byte accesses, also in the library's products
    width = triton.cdiv(V, 16) * 16
    rows_per_chunk = max(128, LOGITS_BYTES // (width * hidden.element_size()) // 128 * 128)
    buffer = hidden.new_empty(min(N, rows_per_chunk), width)
    block_v, num_warps = (1024, 4) if V <= 1024 else (4096, 8)  # 8 or 16 elements a thread
    for start in range(0, N, rows_per_chunk):
        chunk = slice(start, min(start + rows_per_chunk, N))
        padded = buffer[: chunk.stop - start]
        logits = padded[:, :V]
        torch.mm(hidden[chunk], weight.t(), out=logits)
        _cross_entropy_kernel[(len(padded),)](
            padded, targets[chunk], None if dloss is None else dloss[chunk], losses[chunk],
            V, width, ignore_index, label_smoothing, z_loss,
            NEEDS_GRADIENT=needs_dhidden or needs_dweight, BLOCK_V=block_v, num_warps=num_warps,
        )  # fmt: skip
        if needs_dhidden:
            torch.mm(logits, weight, out=dhidden[chunk])
        if needs_dweight:
            _add_weight_gradient(padded, hidden[chunk], dweight, is_first=start == 0)
    return losses, dhidden, dweight


@torch.library.custom_op("leangpt_triton::linear_cross_entropy", mutates_args=())
def _token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Losses `(N,)` of the rows of `hidden` `(N, C)`."""
    settings = ignore_index, label_smoothing, z_loss
    return _losses_and_gradients(hidden, weight, targets, None, *settings, False, False)[0]


@_token_losses.register_fake
def _(hidden, weight, targets, ignore_index, label_smoothing, z_loss):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op("leangpt_triton::linear_cross_entropy_backward", mutates_args=())
def _token_losses_backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    _, dhidden, dweight = _losses_and_gradients(
        hidden, weight, targets, dloss.contiguous(), ignore_index, label_smoothing, z_loss,
        needs_dhidden, needs_dweight,
    )  # fmt: skip
    return dhidden, dweight.to(weight.dtype)


@_token_losses_backward.register_fake
def _(
    dloss, hidden, weight, targets, ignore_index, smoothing, z_loss, needs_dhidden, needs_dweight
):
    dhidden = hidden.new_empty(hidden.shape if needs_dhidden else 0)
    return dhidden, weight.new_empty(weight.shape if needs_dweight else 0)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, targets, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _token_losses_autograd(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
    dhidden, dweight = _token_losses_backward(
        dloss, *ctx.saved_tensors, *ctx.settings, needs_dhidden, needs_dweight
    )
    gradients = dhidden if needs_dhidden else None, dweight if needs_dweight else None
    return *gradients, None, None, None, None


_token_losses.register_autograd(_token_losses_autograd, setup_context=_save_inputs)


@torch.library.custom_op("leangpt_triton::linear_cross_entropy_sum", mutates_args=())
def _loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of all rows, and its gradients as `_losses_and_gradients` gives them."""
    settings = ignore_index, label_smoothing, z_loss
    losses, dhidden, dweight = _losses_and_gradients(
        hidden, weight, targets, None, *settings, needs_dhidden, needs_dweight
    )
    return losses.sum(), dhidden, dweight


@_loss_sum.register_fake
def _(hidden, weight, targets, ignore_index, smoothing, z_loss, needs_dhidden, needs_dweight):
    loss = hidden.new_empty((), dtype=torch.float32)
    dhidden = hidden.new_empty(hidden.shape if needs_dhidden else 0)
    return loss, dhidden, loss.new_empty(weight.shape if needs_dweight else 0)


@torch.library.custom_op("leangpt_triton::linear_cross_entropy_sum_backward", mutates_args=())
def _scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * scale` in `dtype`, for a contiguous x and a float32 scalar that stays on the device."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), 4096),)](x, scale, y, x.numel(), BLOCK=4096)
    return y


@_scale.register_fake
def _(x, scale, dtype):
    return torch.empty_like(x, dtype=dtype)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dhidden, dweight = output
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)  # of dhidden and dweight
    ctx.save_for_backward(dhidden, dweight)


def _loss_sum_autograd(ctx: Any, dloss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
    gradients = (
        _scale(dhidden, dloss, dhidden.dtype) if needs_dhidden else None,
        _scale(dweight, dloss, dhidden.dtype) if needs_dweight else None,
    )
    return *gradients, None, None, None, None, None, None


_loss_sum.register_autograd(_loss_sum_autograd, setup_context=_save_gradients)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)
    settings = ignore_index, label_smoothing, z_loss
    needs_dhidden, needs_dweight = (t.requires_grad and torch.is_grad_enabled() for t in rows[:2])
    if reduction == "none":
        return _token_losses(*rows, *settings).view(targets.shape)
    if needs_dhidden or needs_dweight:
        loss, _, _ = _loss_sum(*rows, *settings, needs_dhidden, needs_dweight)
    else:
        loss = _token_losses(*rows, *settings).sum()
    if reduction == "sum":
        return loss
    count = (targets != ignore_index).sum()  # stays on the device
    # where no row counts: nan, as PyTorch, with gradients of 0
    return torch.where(count > 0, loss / count.clamp(min=1), torch.nan)
