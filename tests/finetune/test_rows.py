"""Reading rows: formats, places of mistakes, and what is skipped and counted."""

import gzip

import pytest

from leangpt.finetune.rows import BadRows, read_rows


def rows_of(path, content, skip=False):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = BadRows(skip)
    return list(read_rows(path, bad)), bad


def test_jsonl(tmp_path):
    rows, _ = rows_of(tmp_path / "a.jsonl", '\ufeff{"text": "你好"}\n\n{"text": "x", "n": 1}\n')
    assert [row.values for row in rows] == [{"text": "你好"}, {"text": "x", "n": 1}]
    assert [row.source for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]


def test_compressed(tmp_path):
    rows, _ = rows_of(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n'))
    assert rows[0].values == {"text": "x"}
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged \.gz file"):
        rows_of(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-4])


def test_csv_with_quotes_and_line_ends(tmp_path):
    rows, _ = rows_of(tmp_path / "a.csv", 'text,label\n"a, ""b""\nc",正面\nd,负面\n')
    assert [row.values for row in rows] == [
        {"text": 'a, "b"\nc', "label": "正面"},
        {"text": "d", "label": "负面"},
    ]
    assert [row.source[-1] for row in rows] == ["2", "4"]  # lines of the file


def test_tsv_has_no_quotes(tmp_path):
    rows, _ = rows_of(tmp_path / "a.tsv", 'text\tlabel\nsay "hi\tpos\n')
    assert rows[0].values == {"text": 'say "hi', "label": "pos"}


def test_conll(tmp_path):
    text = (
        "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n北 x y B-LOC\n京 x y I-LOC"
    )
    rows, _ = rows_of(tmp_path / "a.conll", text)
    assert [row.values for row in rows] == [
        {"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"words": ["北", "京"], "tags": ["B-LOC", "I-LOC"]},
    ]
    assert [row.source[-1] for row in rows] == ["3", "6"]


def test_text(tmp_path):
    rows, _ = rows_of(tmp_path / "a.txt", "一个文件\n是一篇文章\n")
    assert [row.values for row in rows] == [{"text": "一个文件\n是一篇文章\n"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl:2: must be a JSON object, got list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: invalid UTF-8 at byte 10"),
        ("a.csv", b"text,label\na,b\na,b,c\n", r"a\.csv:3: must have 2 columns \(text, label\), got 3"),
        ("a.csv", b"text,label\na,b\n\xff,b\n", r"a\.csv:3: invalid UTF-8"),
        ("a.csv", b'text,label\na,b\n"a"x,b\n', r"a\.csv:3: not a row of a table"),
        ("a.conll", b"a O\n\nb O\nc\n\n", r"a\.conll:4: must have 2 columns"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[0] == "a" else "",
)  # fmt: skip
def test_a_bad_row_is_told_or_skipped(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path / name, content)
    rows, bad = rows_of(tmp_path / name, content, skip=True)
    assert len(rows) == 1 and bad.count == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(bad.messages[0])


def test_a_table_needs_names(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv: empty, the first line must name the columns"):
        rows_of(tmp_path / "a.csv", "")
    with pytest.raises(ValueError, match="names of columns must differ, got a, a"):
        rows_of(tmp_path / "a.csv", "a,a\n1,2\n")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / "none.jsonl", BadRows()))
