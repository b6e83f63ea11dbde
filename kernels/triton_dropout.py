# pyright: reportArgumentType=false
"""Dropout as part of other kernels: which elements are kept is a function of a seed and their place, and is never stored.

Element (row, column) is dropped if word `column % 4` of Philox at counter `(column // 4, row, 0, 0)`, as a number in [0, 1),
is below dropout_p: one Philox serves four elements, and its counters have 32 bits. Backward draws the same words again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def kept_by_dropout(seed, dropout_p, rows, col, BLOCK_N: tl.constexpr):
    """Which elements are kept of these rows and BLOCK_N columns from col on, a multiple of 4."""
    quads = (col // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    rows_, quads = tl.broadcast(rows.to(tl.uint32)[:, None], quads)
    zero = tl.zeros_like(quads)
    w0, w1, w2, w3 = tl.philox(seed, quads, rows_, zero, zero)
    u0, u1 = tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1)
    u2, u3 = tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3)
    even = tl.join(u0 >= dropout_p, u2 >= dropout_p)
    odd = tl.join(u1 >= dropout_p, u3 >= dropout_p)
    return tl.join(even, odd).reshape(rows.shape[0], BLOCK_N)


def dropout_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """A seed from torch's generator, on the device of `x`: no kernel waits for it. None without dropout."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None
