import os
from pathlib import Path

import pytest

from leangpt.files import atomic_directory, atomic_write, read_json, write_json


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "x.json"
    write_json(path, {"a": "汉字"})
    assert read_json(path) == {"a": "汉字"}
    with pytest.raises(RuntimeError, match="half"), atomic_write(path) as file:
        file.write(b"{")
        raise RuntimeError("half way")
    assert read_json(path) == {"a": "汉字"}
    assert names(path.parent) == ["x.json"]


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"x\.json: not a valid JSON file"):
        read_json(tmp_path / "x.json")


def test_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    with atomic_directory(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="half"), atomic_directory(path) as temporary:
        (temporary / "b").write_text("2")
        raise RuntimeError("half way")
    assert names(path) == ["a"]
    with atomic_directory(path) as temporary:
        (temporary / "c").write_text("3")
    assert names(path) == ["c"] and names(tmp_path) == ["folder"]


DEAD = 2**22 + 1  # no process has this number: it is above the kernel's largest


def test_what_a_kill_left_is_mended(tmp_path):
    path = tmp_path / "folder"
    old = tmp_path / f".folder.{DEAD}.old"
    half = tmp_path / f".folder.{DEAD}.tmp"
    old.mkdir()
    half.mkdir()
    (old / "a").write_text("1")
    with pytest.raises(RuntimeError, match="no"), atomic_directory(path):
        raise RuntimeError("no")
    assert names(path) == ["a"] and names(tmp_path) == ["folder"]


def test_another_running_process_keeps_its_folder(tmp_path):
    other = tmp_path / f".folder.{os.getppid()}.tmp"
    other.mkdir()
    with atomic_directory(tmp_path / "folder"):
        pass
    assert other.exists()


def test_what_a_kill_left_of_another_folder_is_left_alone(tmp_path):
    """`run` is mended, and `run.checkpoint`, whose name begins in the same way, is not taken for what is left of it."""
    other = tmp_path / f".run.checkpoint.{DEAD}.old"
    other.mkdir()
    with atomic_directory(tmp_path / "run"):
        pass
    assert names(tmp_path) == [other.name, "run"]
