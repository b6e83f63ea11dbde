"""Writing files so that a kill, a power cut or a full disk leaves the old one or the new one, never half of one.

Everything is written beside its destination, synced to the disk, and renamed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at `path`, whole, when the `with` block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the `with` block ends without an error.

    A folder that stands at `path` already is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mend_after_kill(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(Path(folder))
        replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _sync_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mend_after_kill(path: Path) -> None:
    """Put back a folder that a killed process had moved aside but not replaced, and delete what it left half written."""
    for replaced, _ in _leftovers(path, "old"):
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process of the same group was quicker
                replaced.rename(path)
    for temporary, process in _leftovers(path, "tmp"):
        if not _is_running(process):
            shutil.rmtree(temporary, ignore_errors=True)


def _leftovers(path: Path, suffix: str) -> list[tuple[Path, int]]:
    """What processes left beside a path, and their numbers; not beside one whose name begins in the same way."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.{suffix}")
    matches = [(found, pattern.fullmatch(found.name)) for found in sorted(path.parent.iterdir())]
    return [(found, int(match[1])) for found, match in matches if match]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return process != os.getpid()


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file, or raise ValueError with its path and the place of the fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a valid JSON file ({error})") from error
