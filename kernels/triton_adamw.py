# pyright: reportArgumentType=false
"""AdamW in Triton: one step over all tensors of a model in a few launches; every value is read and written once.

g = grad * grad_scale
m += (1 - beta1) (g - m)        v += (1 - beta2) (g^2 - v)
p -= lr weight_decay p          p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

The table of pointers is the kernel's own argument list: a launch takes `GROUP` tensors, cut into chunks of `BLOCK` elements,
and a program finds the tensor of its chunk. So no table is copied to the device, nothing waits, and a CUDA graph can record
the step. All arithmetic is float32, as the moments are, and the masters where there are any.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 16  # tensors a launch: to search them takes a small part of the time of a chunk
BLOCK = 2048  # with 8 warps, two 16-byte accesses of float32 a thread and tensor


@triton.jit
def _update(pointers, offsets, mask, grad_scale, factors):
    grad_ptr, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr = pointers
    decay, step_size, one_minus_beta1, one_minus_beta2, second_correction, eps = factors
    grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32) * grad_scale
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask)
    if master_ptr is None:
        param = tl.load(param_ptr + offsets, mask=mask).to(tl.float32)
    else:
        param = tl.load(master_ptr + offsets, mask=mask)

    exp_avg += one_minus_beta1 * (grad - exp_avg)
    exp_avg_sq += one_minus_beta2 * (grad * grad - exp_avg_sq)
    param -= decay * param  # param * (1 - decay) would round a small decay away
    param -= step_size * exp_avg / (tl.sqrt(exp_avg_sq) * second_correction + eps)

    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
    tl.store(param_ptr + offsets, param, mask=mask)
    if master_ptr is not None:
        tl.store(master_ptr + offsets, param, mask=mask)


@triton.jit
def _adamw_kernel(
    tensors, sizes, grad_scale_ptr, factors, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0)
    pointers = tensors[0]
    numel = tl.zeros((), tl.int64)
    first_chunk, end_chunk = 0, 0
    for i in tl.static_range(GROUP):
        if chunk >= end_chunk:
            pointers = tensors[i]
            numel = (sizes[i].to(tl.int64) - 3) // 2
            first_chunk = end_chunk
            end_chunk += tl.cdiv(numel, BLOCK).to(tl.int32)

    grad_scale = 1.0
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(tl.float32)
    start = (chunk - first_chunk).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:  # without a mask, accesses are wide whatever numel is
        _update(pointers, offsets, None, grad_scale, factors)
    else:
        _update(pointers, offsets, offsets < numel, grad_scale, factors)


def _launch(
    tensors: list[tuple[Any, ...]], grad_scale: Tensor | None, factors: tuple[float, ...]
) -> None:
    """One launch over up to `GROUP` tuples of grad, param, exp_avg, exp_avg_sq and master or None."""
    numels = [grad.numel() for grad, *_ in tensors]
    num_chunks = sum(triton.cdiv(numel, BLOCK) for numel in numels)
    if num_chunks == 0:
        return
    missing = GROUP - len(tensors)
    # odd and above 1, so that Triton does not compile for divisibility or the value 1 of each size
    sizes = tuple(2 * numel + 3 for numel in numels + [0] * missing)
    _adamw_kernel[(num_chunks,)](
        (*tensors, *tensors[:1] * missing), sizes, grad_scale, factors, GROUP, BLOCK, num_warps=8
    )


@torch.library.custom_op(
    "leangpt_triton::adamw_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "masters")
)
def _adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
) -> None:
    factors = (
        lr * weight_decay,
        lr / (1 - beta1**step),
        1 - beta1,
        1 - beta2,
        1 / math.sqrt(1 - beta2**step),
        eps,
    )
    groups, copies = defaultdict(list), []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        changed = [param, exp_avgs[i], exp_avg_sqs[i], *masters[i : i + 1]]
        packed = [tensor.contiguous() for tensor in changed]
        copies += [pair for pair in zip(changed, packed, strict=True) if pair[0] is not pair[1]]
        groups[param.dtype, grad.dtype].append((grad.contiguous(), *packed, None)[:5])
    for group in groups.values():
        for first in range(0, len(group), GROUP):
            _launch(group[first : first + GROUP], grad_scale, factors)
    for tensor, stepped in copies:
        tensor.copy_(stepped)


@_adamw_step.register_fake
def _(*args: object) -> None:
    return None


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
) -> None:
    _adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, masters or [], step, lr, *betas, eps, weight_decay, grad_scale
    )  # fmt: skip
