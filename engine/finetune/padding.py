"""Examples of different lengths as one tensor: padding is marked in the tokens themselves, and never changes a result."""

from collections.abc import Sequence

import torch
from torch import Tensor

PADDING = -1  # no token: a place where there is none
IGNORED = -100  # no target: a place that does not count


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """`(B, T)` int64 with `value` behind the end of each row."""
    length = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def align_left(tokens: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Move the real tokens of each row to its left, in their order, with what belongs to them.

    Causal attention never looks to the right: a row's results are those without padding then, wherever it was.

    Args:
        tokens: `(B, T)` int64, PADDING anywhere.
        others: `(B, T)` each, such as targets.

    Returns:
        Tokens and others, each `(B, T)`.
    """
    order = (tokens == PADDING).long().argsort(dim=1, stable=True)
    return tuple(each.gather(1, order) for each in (tokens, *others))
