"""Predictions of a tuned model for rows, in batches."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from .rows import BadRows, Row
from .tasks import Tuned

_ROWS_AT_ONCE = 256


def predict(tuned: Tuned, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the model says of each row: a dictionary that depends on the task, with probabilities.

    Raises:
        ValueError: a row lacks a field that the task needs; the message has its number.
    """
    samples = []
    for i, row in enumerate(rows):
        try:
            samples.append(tuned.task.parse_input(row))
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from error
    return tuned.task.predict(tuned, samples)


def predict_rows(
    tuned: Tuned, rows: Iterable[Row], bad_rows: BadRows
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """`predict` of a stream of rows, some at a time."""

    def usable() -> Iterator[tuple[Row, Any]]:
        for row in rows:
            try:
                yield row, tuned.task.parse_input(row.values)
            except ValueError as error:
                bad_rows.report(ValueError(f"{row.source}: {error}"))

    remaining = usable()
    while batch := list(islice(remaining, _ROWS_AT_ONCE)):
        predictions = tuned.task.predict(tuned, [sample for _, sample in batch])
        yield from zip((row for row, _ in batch), predictions, strict=True)
