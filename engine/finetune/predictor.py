"""Predictions for rows, in batches."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from ..data.documents import BYTE_ORDER_MARK, decode_line, open_decompressed
from ..data.inputs import file_format
from .dataset import parse_rows
from .rows import ROW_SUFFIXES, BadRows, Row, read_rows, rows_of_lines
from .tasks import Prediction, Report, Task

_ROWS_AT_ONCE = 256


class Predictor(Protocol):
    """A model with a task: a tuned one, or a zero-shot one."""

    @property
    def task(self) -> Task: ...

    def predict(self, samples: Sequence[Any]) -> list[Prediction]: ...

    def report(self, samples: Sequence[Any]) -> Report: ...


def predict(predictor: Predictor, rows: Sequence[dict[str, Any]]) -> list[Prediction]:
    """What the model says of each row: a dictionary that depends on the task, with probabilities.

    Raises:
        ValueError: a row lacks a field that the task needs; the message has its number.
    """
    named = (Row(values, f"row {i}") for i, values in enumerate(rows))
    return [prediction for _, prediction in predict_rows(predictor, named, BadRows())]


def predict_rows(
    predictor: Predictor, rows: Iterable[Row], bad_rows: BadRows
) -> Iterator[tuple[Row, Prediction]]:
    """Predictions of a stream of rows, some at a time.

    Raises:
        ValueError: a bad row, see `BadRows`.
    """

    remaining = parse_rows(rows, predictor.task.parse_input, bad_rows)
    while batch := list(islice(remaining, _ROWS_AT_ONCE)):
        predictions = predictor.predict([sample for _, sample in batch])
        yield from zip((row for row, _ in batch), predictions, strict=True)


def rows_of_input(path: Path | None, task: Task, bad_rows: BadRows) -> Iterator[Row]:
    """The rows of a file, or of standard input: JSON objects, or lines of text that are the task's one field each.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`; lines of text for a task that needs more than one field.
    """
    if path is not None and file_format(path)[0] in ROW_SUFFIXES:
        yield from read_rows(path, bad_rows)
        return
    source = "standard input" if path is None else str(path)
    with open_decompressed(path, file_format(path)[1]) if path else sys.stdin.buffer as file:
        lines = iter(file)
        first = next(lines, b"")
        lines = chain([first], lines)
        if first.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{"):
            yield from rows_of_lines(lines, ".jsonl", source, bad_rows)
            return
        field = task.line_field()
        for number, line in enumerate(lines, 1):
            place = f"{source}:{number}"
            try:
                text = decode_line(line, place).strip()
            except ValueError as error:
                bad_rows.report(error)
                continue
            if text:
                yield Row({field: text}, place)
