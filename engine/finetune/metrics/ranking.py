"""How high the chosen candidate stands: accuracy, mean reciprocal rank and NDCG.

With one right candidate at rank r (1 is the top): accuracy is [r = 1], reciprocal rank 1 / r, and NDCG@k, whose ideal is 1,
1 / log2(r + 1) where r <= k, else 0 (https://doi.org/10.1145/582415.582418).
"""

import math
from collections.abc import Sequence


def rank_of(scores: Sequence[float], chosen: int) -> int:
    """Rank of the chosen candidate; candidates of the same score are counted before it."""
    return sum(score >= scores[chosen] for score in scores)


def accuracy(ranks: Sequence[int]) -> float:
    return sum(rank == 1 for rank in ranks) / max(1, len(ranks))


def mean_reciprocal_rank(ranks: Sequence[int]) -> float:
    return sum(1 / rank for rank in ranks) / max(1, len(ranks))


def ndcg(ranks: Sequence[int], k: int) -> float:
    return sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k) / max(1, len(ranks))
