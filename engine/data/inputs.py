"""Inputs, as a user names them, to the files that are read.

In folders only files with the suffixes below are taken; hidden files and folders, and folders behind links, are skipped. A file that
is named is read, whatever its name. Order: as given, folders and globs sorted.
"""

import glob
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".rst", ".org", ".tex", ".srt", ".csv", ".tsv", ".html", ".htm", ".xml", ".css",
    ".yaml", ".yml", ".toml", ".ini", ".cfg", ".sql", ".sh",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".cs", ".java", ".kt", ".scala",
    ".swift", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".js", ".jsx",
    ".ts", ".tsx",
))
# fmt: on
RECORD_SUFFIXES = frozenset((".jsonl", ".parquet"))


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files that the inputs name, in the order in which they are read, each once."""
    if not inputs:
        return _standard_library()
    files = {file.resolve(): file for name in inputs for file in _find(name)}
    return list(files.values())


def _find(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = _walk(path)
        if not found:
            raise FileNotFoundError(
                f"{name}: no file to read in this folder (.txt, .md, .py, .jsonl, .parquet, …)"
            )
        return found
    if path.exists():
        raise ValueError(f"{name}: must be a regular file or a folder, since it is read twice")
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        what = "no file matches" if glob.has_magic(name) else "no such file or folder"
        raise FileNotFoundError(f"{name}: {what}")
    files = [Path(match) for match in matches if Path(match).is_file()]
    # a glob that matches folders alone means what is in them
    return files or [file for match in matches for file in _find(match)]


def _walk(folder: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Readable files below `folder`, sorted, without hidden ones and folders named in `skip`."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".")
            and file_format(Path(name))[0] in TEXT_SUFFIXES | RECORD_SUFFIXES
        ]
    return sorted(found, key=lambda path: path.parts)


def _raise(error: OSError) -> None:
    raise error


def _standard_library() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    # encodings: a tenth of the text, tables of character names
    skip = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"))
    files = [path for path in _walk(folder, skip) if path.suffix == ".py"]
    if not files:
        raise FileNotFoundError(f"{folder}: the standard library has no sources here; name inputs")
    return files


def file_format(path: Path) -> tuple[str, str]:
    """Suffix that tells the format, and that of the compression or ""."""
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst"):
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""
