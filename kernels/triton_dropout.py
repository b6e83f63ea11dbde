# pyright: reportArgumentType=false
"""Dropout as part of other kernels: which elements are kept is a function of a seed and their place, and is never stored.

Element (row, column) of an (M, N) tensor is dropped if word `column % 4` of Philox at counter
`row * ceil(N / 4) + column // 4`, as a number in [0, 1), is below dropout_p: one Philox serves four elements. Backward
draws the same words again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def kept_by_dropout(seed, dropout_p, rows, col, N, BLOCK_N: tl.constexpr):
    """Which elements are kept of these rows (int64) of (M, N) and BLOCK_N columns from col on, a multiple of 4."""
    quads = col // 4 + tl.arange(0, BLOCK_N // 4)
    counters = rows[:, None] * tl.cdiv(N, 4) + quads[None, :]
    u0, u1, u2, u3 = tl.rand4x(seed, counters)
    even = tl.join(u0 >= dropout_p, u2 >= dropout_p)
    odd = tl.join(u1 >= dropout_p, u3 >= dropout_p)
    return tl.join(even, odd).reshape(rows.shape[0], BLOCK_N)


def dropout_seed(x: Tensor, dropout_p: float) -> Tensor | None:
    """A seed from torch's generator, on the device of `x`: no kernel waits for it. None without dropout."""
    return torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None
