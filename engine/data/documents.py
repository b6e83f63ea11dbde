"""Files to documents: what `leangpt prepare` reads, as a stream in bounded memory.

By the name of the file: `.jsonl` holds one JSON record a line with the text in one field, `.parquet` a
column of texts, everything else is text in UTF-8; all but parquet may be compressed as `.gz` or `.zst`.

A text file of up to 1 MiB is one document; a longer one is cut at line ends into documents of about 64 KiB. Empty documents
are left out. A byte order mark is dropped, line ends stay as they are.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from .inputs import file_format, find_files
from .text import encode_utf8

_WHOLE_BYTES = 2**20
_PIECE_BYTES = 2**16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGES = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)  # of compressed files


class Document(NamedTuple):
    text: str
    source: str  # file and place in it, for messages


def iter_documents(inputs: Sequence[str], text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of all inputs; of none: the sources of Python's own standard library.

    Args:
        inputs: files, folders, globs.
        text_field: the field of JSON records, or column of parquet files, that holds the text.

    Raises:
        FileNotFoundError: an input that does not exist, a glob or folder without anything to read.
        ValueError: invalid UTF-8, a lone surrogate, a malformed record: with file and place.
    """
    for path in find_files(inputs):
        yield from read_documents(path, text_field)


def read_documents(path: Path, text_field: str = "text") -> Iterator[Document]:
    """Yield the documents of one file."""
    suffix, compression = file_format(path)
    if suffix == ".parquet":
        yield from _read_parquet(path, text_field)
        return
    try:
        with open_decompressed(path, compression) as file:
            if suffix == ".jsonl":
                yield from _read_jsonl(path, file, text_field)
            else:
                yield from _read_text(path, file)
    except DAMAGES as error:
        raise ValueError(f"{path}: damaged {compression} file ({error})") from error


def open_decompressed(path: Path, compression: str) -> io.BufferedIOBase:
    """Open a file for reading; `compression` is ".gz", ".zst" or ""."""
    match compression:
        case ".gz":
            return gzip.open(path)
        case ".zst":
            return io.BufferedReader(_ZstdFile(path))
        case _:
            return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """A decompressed .zst file of any number of frames; unlike zstandard's own reader it notices a missing end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decoder = zstandard.ZstdDecompressor().decompressobj()
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            block = self._decoder.unused_data or self._file.read(2**14)
            if self._decoder.eof and block:
                self._decoder = zstandard.ZstdDecompressor().decompressobj()
            elif not block and not self._decoder.eof:
                raise EOFError("it ends before its last frame does")
            elif not block:
                return 0
            self._output = self._decoder.decompress(block)
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def decode_line(data: bytes, file_and_line: str, offset: int = 0) -> str:
    """The text of UTF-8 bytes that begin at `offset`, or ValueError with their place."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file_and_line}: invalid UTF-8 at byte {offset + error.start} ({error.reason})"
        ) from None


def _read_text(path: Path, file: io.BufferedIOBase) -> Iterator[Document]:
    data = file.read(_WHOLE_BYTES + 1)
    offset = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
    data = data[offset:]
    piece_bytes = _PIECE_BYTES if len(data) > _WHOLE_BYTES - offset else _WHOLE_BYTES
    while data:
        end = len(data)
        if end > 2 * piece_bytes:  # so that the last piece is not much shorter than the others
            end = _end_of_line(data, piece_bytes)
        text = decode_line(data[:end], str(path), offset)
        yield Document(text, f"{path}, byte {offset}")
        offset += end
        data = data[end:]
        if len(data) <= 2 * piece_bytes:
            data += file.read(_WHOLE_BYTES)


def _end_of_line(data: bytes, limit: int) -> int:
    """The last line end within `limit` bytes; in a longer line, the last end of a character."""
    end = data.rfind(b"\n", 0, limit) + 1
    if end:
        return end
    continuation = 0
    while continuation < 3 and data[limit - continuation] & 0xC0 == 0x80:
        continuation += 1
    return limit - continuation


def _read_jsonl(path: Path, file: io.BufferedIOBase, field: str) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        record = parse_record(line, f"{path}, line {number}")
        if field not in record:
            raise ValueError(
                f"{path}, line {number}: no field {field!r}, only {', '.join(map(repr, record))}; "
                "name the field of the text with --text-field"
            )
        yield from _checked(record[field], f"{path}, line {number}", field)


def parse_record(line: bytes, file_and_line: str) -> dict[str, Any]:
    """The JSON object of a line, or ValueError with its place."""
    text = decode_line(line, file_and_line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file_and_line}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file_and_line}: must be a JSON object, got {type(record).__name__}")
    return record


def _read_parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RuntimeError(
            f"{path}: reading parquet needs pyarrow: pip install leangpt[parquet]"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ValueError(
                    f"{path}: no column {field!r}, only {', '.join(map(repr, names))}; "
                    "name the column of the text with --text-field"
                )
            row = 0
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield from _checked(_as_python(value, path, row), f"{path}, row {row}", field)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged or not a parquet file ({error})") from error


def _as_python(value: Any, path: Path, row: int) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, row {row}: invalid UTF-8 at byte {error.start} ({error.reason})"
        ) from None


def _checked(text: Any, source: str, field: str) -> Iterator[Document]:
    """The document, if it has any text."""
    if not isinstance(text, str):
        raise ValueError(f"{source}: {field!r} must be a string, got {type(text).__name__}")
    try:
        encode_utf8(text)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if text:
        yield Document(text, source)
