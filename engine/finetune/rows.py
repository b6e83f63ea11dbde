"""Data files to rows: what a task learns from, one dictionary a row with the place that it came from.

By the name of the file: `.jsonl` has a JSON object a line, `.csv` and `.tsv` a first line with the names of the columns,
`.conll` and `.bio` a word and its tags a line with an empty line after each sentence, all others documents of text. All may be
compressed as `.gz` or `.zst`. A row that cannot be read is an error with file and line, or is skipped and counted.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ..data.documents import (
    BYTE_ORDER_MARK,
    DAMAGES,
    decode_line,
    open_decompressed,
    parse_record,
    read_documents,
)
from ..data.inputs import file_format
from ..data.text import encode_utf8

ROW_SUFFIXES = (".jsonl", ".csv", ".tsv", ".conll", ".bio")
SEPARATOR = "|"  # of several labels or candidates in one cell of a table
_SHOWN = 5  # messages kept of bad rows


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    source: str  # file and line


@dataclass
class BadRows:
    """What becomes of a row that cannot be used: an error, or with `skip` a count and the first messages."""

    skip: bool = False
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def report(self, error: ValueError) -> None:
        if not self.skip:
            raise error
        self.count += 1
        if len(self.messages) < _SHOWN:
            self.messages.append(str(error))


def read_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of one file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged compressed file, a table without names of columns; or a bad row, see `BadRows`.
    """
    path = Path(path)
    suffix, compression = file_format(path)
    if suffix not in ROW_SUFFIXES:
        for document in read_documents(path):
            yield Row({"text": document.text}, document.source)
        return
    try:
        with open_decompressed(path, compression) as file:
            yield from rows_of_lines(file, suffix, str(path), bad_rows)
    except DAMAGES as error:
        raise ValueError(f"{path}: damaged {compression} file ({error})") from error


def rows_of_lines(
    lines: Iterable[bytes], suffix: str, source: str, bad_rows: BadRows
) -> Iterator[Row]:
    """Yield the rows of lines of bytes, in the format that a file of this suffix has; `source` is for messages."""
    match suffix:
        case ".jsonl":
            yield from _read_jsonl(lines, source, bad_rows)
        case ".csv" | ".tsv":
            yield from _read_table(lines, source, "," if suffix == ".csv" else "\t", bad_rows)
        case _:
            yield from _read_conll(lines, source, bad_rows)


def _read_jsonl(lines: Iterable[bytes], source: str, bad_rows: BadRows) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        place = f"{source}:{number}"
        if not line.strip():
            continue
        try:
            row = Row(parse_record(line, place), place)
        except ValueError as error:
            bad_rows.report(error)
            continue
        yield row


def _texts(lines: Iterable[bytes], source: str, bad_rows: BadRows) -> Iterator[str]:
    """The lines as text; one that is not UTF-8 is reported, and empty then so that lines stay counted."""
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            text = decode_line(line, f"{source}:{number}")
        except ValueError as error:
            bad_rows.report(error)
            text = "\n"
        yield text


def _read_table(
    lines: Iterable[bytes], source: str, delimiter: str, bad_rows: BadRows
) -> Iterator[Row]:
    # tab-separated files have no quotes: a quotation mark is one
    has_quotes = delimiter == ","
    quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    texts = _texts(lines, source, bad_rows)
    # typeshed wants literals of quoting
    reader = csv.reader(texts, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    names: list[str] | None = None
    while True:
        place = f"{source}:{reader.line_num + 1}"  # a row may have several lines
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            bad_rows.report(ValueError(f"{place}: not a row of a table ({error})"))
            continue
        if not cells:
            continue
        if names is None:
            names = cells
            if len(set(names)) != len(names):
                raise ValueError(f"{place}: names of columns must differ, got {', '.join(names)}")
        elif len(cells) != len(names):
            bad_rows.report(
                ValueError(
                    f"{place}: must have {len(names)} columns ({', '.join(names)}), got {len(cells)}"
                )
            )
        else:
            yield Row(dict(zip(names, cells, strict=True)), place)
    if names is None:
        raise ValueError(f"{source}: empty, the first line must name the columns")


def _read_conll(lines: Iterable[bytes], source: str, bad_rows: BadRows) -> Iterator[Row]:
    """Sentences: the first column is the word, the last one its tag."""
    words: list[str] = []
    tags: list[str] = []
    start, num_columns = 0, None
    problem: ValueError | None = None
    for number, text in enumerate(_texts(chain(lines, [b"\n"]), source, bad_rows), 1):
        columns = text.rstrip("\r\n").split("\t") if "\t" in text else text.split()
        if not columns or columns[0] == "-DOCSTART-":
            if problem is not None:
                bad_rows.report(problem)
            elif words:
                yield Row({"words": words, "tags": tags}, f"{source}:{start}")
            words, tags, problem = [], [], None
            continue
        if not words:
            start = number
        if num_columns is None and len(columns) > 1:
            num_columns = len(columns)
        if len(columns) != num_columns:
            problem = ValueError(
                f"{source}:{number}: must have {num_columns or 'two or more'} columns (a word, …, its tag), got {len(columns)}"
            )
        words.append(columns[0])
        tags.append(columns[-1])


def list_of(values: dict[str, Any], name: str) -> Any:
    """What is in a field that should be a list, None where it is missing; in a cell of a table, a list is JSON.

    Raises:
        ValueError: the cell begins as a list in JSON, and is none.
    """
    value = values.get(name)
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise ValueError(f"{name!r} must be a list in JSON, got {value!r:.80}") from None


def text_of(values: dict[str, Any], name: str) -> str:
    """The text in a field of a row.

    Raises:
        ValueError: the field is missing, empty, no text, or not valid Unicode.
    """
    if name not in values:
        raise ValueError(f"no field {name!r}, only {', '.join(map(repr, values))}")
    text = values[name]
    if not isinstance(text, str):
        raise ValueError(f"{name!r} must be text, got {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{name!r} must not be empty")
    try:
        encode_utf8(text)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    return text
