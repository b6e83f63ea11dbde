"""Precision, recall and F1 by label, and their averages: of labels of texts, or of spans.

    precision = TP / predicted,   recall = TP / support,   F1 = 2 TP / (predicted + support)

A ratio without anything in its denominator is 0, as in scikit-learn and seqeval. Averages: micro of all counts together, macro
the mean over labels, weighted the mean over labels by support.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self
from unicodedata import east_asian_width


class Scores(NamedTuple):
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class LabelTable:
    """One row a label, then micro, macro and weighted average."""

    rows: dict[str, Scores]
    averages: dict[str, Scores]

    @classmethod
    def of_counts(
        cls,
        labels: Sequence[str],
        found: Counter[str],
        predicted: Counter[str],
        support: Counter[str],
    ) -> Self:
        """`found`: how often each label was predicted where it is true."""
        rows = {name: _scores(found[name], predicted[name], support[name]) for name in labels}
        total = support.total()
        weights = {name: row.support / total if total else 0.0 for name, row in rows.items()}
        averages = {
            "micro avg": _scores(found.total(), predicted.total(), total),
            "macro avg": _weighted(rows, dict.fromkeys(rows, 1 / max(1, len(rows))), total),
            "weighted avg": _weighted(rows, weights, total),
        }
        return cls(rows, averages)

    @classmethod
    def of_sets(
        cls,
        labels: Sequence[str],
        true: Sequence[Iterable[tuple[str, Hashable]]],
        predicted: Sequence[Iterable[tuple[str, Hashable]]],
    ) -> Self:
        """From the (label, place) pairs that are true, and those that were predicted, of each text."""
        counts: list[Counter[str]] = [Counter(), Counter(), Counter()]
        for t, p in zip(map(set, true), map(set, predicted), strict=True):
            for counter, pairs in zip(counts, (t & p, p, t), strict=True):
                counter.update(label for label, _ in pairs)
        return cls.of_counts(labels, *counts)

    def __str__(self) -> str:
        width = max(12, *map(_width, self.rows)) if self.rows else 12
        lines = [f"{'':{width}}  precision  recall      F1  support"]
        for rows in (self.rows, self.averages):
            lines += [
                f"{name}{' ' * (width - _width(name))}  {s.precision:9.4f}  {s.recall:6.4f}  {s.f1:6.4f}  {s.support:7,}"
                for name, s in rows.items()
            ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {name: s._asdict() for name, s in (self.rows | self.averages).items()}


def _scores(found: int, predicted: int, support: int) -> Scores:
    return Scores(
        precision=found / predicted if predicted else 0.0,
        recall=found / support if support else 0.0,
        f1=2 * found / (predicted + support) if predicted + support else 0.0,
        support=support,
    )


def _weighted(rows: dict[str, Scores], weights: dict[str, float], support: int) -> Scores:
    return Scores(
        precision=sum(weights[name] * row.precision for name, row in rows.items()),
        recall=sum(weights[name] * row.recall for name, row in rows.items()),
        f1=sum(weights[name] * row.f1 for name, row in rows.items()),
        support=support,
    )


def _width(text: str) -> int:
    """Columns on a terminal: Chinese, Japanese and Korean characters take two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def accuracy(true: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Share of places where both are the same; 0 of none."""
    return sum(t == p for t, p in zip(true, predicted, strict=True)) / max(1, len(true))


def confusion_matrix(
    labels: Sequence[str], true: Sequence[str], predicted: Sequence[str]
) -> list[list[int]]:
    """`matrix[i][j]`: texts of label i that were predicted to be of label j."""
    counts = Counter(zip(true, predicted, strict=True))
    return [[counts[t, p] for p in labels] for t in labels]
