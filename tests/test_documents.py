import gzip
import json
import os
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from leangpt.data import documents as module
from leangpt.data.documents import iter_documents
from leangpt.data.inputs import find_files


def read(*inputs, **options) -> list[str]:
    return [document.text for document in iter_documents([str(i) for i in inputs], **options)]


def write_jsonl(path: Path, records: list, opener=open) -> Path:
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_order_and_choice_of_files(tmp_path):
    names = [
        "b.txt",
        "a.md",
        "a/z.py",
        "a/b/c.TXT",
        ".hidden.txt",
        ".git/x.txt",
        "image.png",
        "LICENSE",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/b/c.TXT", "a/z.py", "a.md", "b.txt"]
    assert read(tmp_path / "b.txt", tmp_path) == ["b.txt", "a/b/c.TXT", "a/z.py", "a.md"]
    assert read(tmp_path / "*.*") == ["a.md", "b.txt", "image.png"]
    assert read(tmp_path / "**/*.py") == ["a/z.py"]
    many = [f"{i * 7919 % 50:02d}.txt" for i in range(50)]
    (tmp_path / "many").mkdir()
    for name in many:
        (tmp_path / "many" / name).write_text(name)
    assert read(tmp_path / "many") == read(tmp_path / "many" / "*") == sorted(many)
    # a file that is named is read, whatever its name
    assert read(tmp_path / "LICENSE", tmp_path / ".hidden.txt") == ["LICENSE", ".hidden.txt"]


def test_a_file_may_look_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    assert read(tmp_path / "a[1].txt") == ["brackets"]


def test_nothing_to_read(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    for name, message in (
        ("nowhere.txt", "no such file or folder"),
        ("*.txt", "no file matches"),
        ("", "no file to read in this folder"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            find_files([str(tmp_path / name)])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: must be a regular file"):
        find_files([str(tmp_path / "pipe")])


def test_standard_library():
    """The default input is text that every Python has, without its tests and installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(folder).as_posix() for path in find_files([])]
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(files)
    assert not [f for f in files if {"test", "tests", "site-packages"} & set(f.split("/"))]
    assert all(f.endswith(".py") for f in files)
    size = sum(len(document.text) for document in iter_documents([]))
    assert 8e6 < size < 16e6


def test_text_is_kept_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\x00\xc2\x85\xe2\x80\xa8\xf0\x9f\x98\x80\n\n")
    assert read(path) == ["one\r\ntwo\rthree\n\x00\x85\u2028😀\n\n"]
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    assert read(tmp_path / "empty.txt", tmp_path / "mark.txt") == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_long_text_is_cut_at_line_ends(tmp_path, suffix):
    text = "".join(f"{i:06d} füße 中文 😀\n" for i in range(70_000))
    data = text.encode()
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + data))
    parts = read(path)
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)
    sizes = [len(part.encode()) for part in parts]
    assert len(parts) > 10 and min(sizes) > 2**16 - 100 and max(sizes) <= 2**17
    path.write_bytes(compress(b"a" * 2**20))
    assert len(read(path)) == 1
    path.write_bytes(compress(b"a" * (2**20 + 1)))
    assert len(read(path)) > 1


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["\n", "a", "é", "中", "😀", "\r\n", "\ufeff"]), max_size=200).map(
        "".join
    )
)
def test_pieces_make_the_whole_text(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WHOLE_BYTES", 40)
        patch.setattr(module, "_PIECE_BYTES", 8)
        parts = read(path)
    assert "".join(parts) == text.removeprefix("\ufeff")
    assert all(len(part.encode()) <= 40 for part in parts)


def test_long_text_without_lines(tmp_path):
    text = "中" * 1_000_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = read(tmp_path / "a.txt")
    assert "".join(parts) == text and len(parts) > 40


@pytest.mark.parametrize("offset", [0, 17, 2**16 + 5, 1_500_000])
def test_invalid_utf8_in_text(tmp_path, offset):
    data = bytearray(b"line\n" * 400_000)
    data[offset] = 0xFF
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.txt: invalid UTF-8 at byte {offset} "):
        read(tmp_path)


def test_jsonl(tmp_path):
    records = [{"text": "ein\nzwei \u2028 drei", "n": 1}, {"text": ""}, {"text": "中文 😀"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with path.open("a") as file:
        file.write('\n   \r\n{"text": "\\ud83d\\ude00 no newline at the end"}')
    expected = ["ein\nzwei \u2028 drei", "中文 😀", "😀 no newline at the end"]
    assert read(path) == expected
    data = b"\xef\xbb\xbf" + path.read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:30]) + gzip.compress(data[30:]))
    assert read(tmp_path / "b.jsonl.gz") == expected
    (tmp_path / "c.jsonl.zst").write_bytes(
        zstandard.compress(data[:30]) + zstandard.compress(b"") + zstandard.compress(data[30:])
    )
    assert read(tmp_path / "c.jsonl.zst") == expected
    other = write_jsonl(tmp_path / "d.jsonl", [{"body": "x"}])
    assert read(other, text_field="body") == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 3: not valid JSON"),
        (b"[" * 100_000, "line 3: not valid JSON"),
        (b'["text"]', "line 3: must be a JSON object, got list"),
        (b'{"body": "a", "id": 1}', "line 3: no field 'text', only 'body', 'id'; .*--text-field"),
        (b'{"text": null}', "line 3: 'text' must be a string, got NoneType"),
        (b'{"text": "a\xff"}', "line 3: invalid UTF-8 at byte 11"),
        (b'{"text": "a\\ud800b"}', r"line 3: .*lone surrogate U\+D800 at character 1"),
    ],
    ids=["malformed", "deep", "list", "field", "null", "utf8", "surrogate"],
)
def test_jsonl_errors(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compression(tmp_path, suffix):
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    path = tmp_path / f"a.jsonl{suffix}"
    lines = b"".join(b'{"text": "%d"}\n' % (i * i * 987) for i in range(50_000))
    good = compress(lines)
    assert len(good) > 2**15
    for bad in (good[:-3], good[: len(good) // 2], good + b"junk", b"no compression", good[:3]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"a\.jsonl{suffix}: damaged {suffix} file"):
            read(path)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{i} 中文 😀\n" for i in range(1000)]
    for kind in (
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ):
        table = pyarrow.table({"id": range(1000), "body": pyarrow.array(texts, kind)})
        pyarrow.parquet.write_table(table, path, row_group_size=300)
        assert read(path, text_field="body") == texts
    with pytest.raises(ValueError, match=r"no column 'text', only 'id', 'body'; .*--text-field"):
        read(path)
    with pytest.raises(ValueError, match="row 1: 'id' must be a string, got int"):
        read(path, text_field="id")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "", None]}), path)
    with pytest.raises(ValueError, match="row 3: 'text' must be a string, got NoneType"):
        read(path)
    good = path.read_bytes()
    for bad in (good[:-10], b"PAR1", b"no parquet at all", b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"a\.parquet: damaged or not a parquet file"):
            read(path)


def test_invalid_utf8_in_parquet(tmp_path):
    array = pyarrow.array([b"fine", b"ab\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: invalid UTF-8 at byte 2"):
        read(tmp_path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"pip install leangpt\[parquet\]"):
        read(tmp_path)


def test_a_file_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    assert read(tmp_path, tmp_path / "a.txt", tmp_path / "*.txt") == ["a"]
