import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangpt.data import prepare as module
from leangpt.data import workers
from leangpt.data.batches import TokenDataset
from leangpt.data.documents import Document
from leangpt.data.prepare import PrepareConfig, is_validation, prepare
from leangpt.data.shards import ShardWriter, open_split
from leangpt.data.tokenizer import load_tokenizer, train_tokenizer

DOCUMENTS = [f"document {i}: 中文 😀\n" + "some text that recurs, " * (i % 7) for i in range(200)]


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "input.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture
def config(tmp_path, source) -> PrepareConfig:
    return PrepareConfig(inputs=(str(source),), out=tmp_path / "out", vocab_size=300, workers=1)


def run(config: PrepareConfig) -> dict:
    return prepare(config, progress=False)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file, hidden ones too."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def texts(folder: Path, split: str) -> list[str]:
    """The documents, read back from the shards."""
    tokenizer = load_tokenizer(folder)
    tokens = [token for shard in open_split(folder, split) for token in shard.tolist()]
    found, text = [], []
    for token in tokens:
        if token == tokenizer.eos_id:
            found.append(tokenizer.decode(text))
            text = []
        else:
            text.append(token)
    assert not text  # the last document ends too
    return found


@pytest.mark.parametrize("tokenizer", ["bpe", "byte", "char"])
def test_documents_come_back(config, tokenizer):
    config = replace(config, tokenizer=tokenizer, val_fraction=0.1, shard_tokens=1000)
    manifest = run(config)
    train, val = texts(config.out, "train"), texts(config.out, "val")
    assert len(val) == 20
    # each split is in the order of the input
    assert train == [text for text in DOCUMENTS if text not in set(val)]
    assert val == [text for text in DOCUMENTS if text in set(val)]
    assert load_tokenizer(config.out).kind == tokenizer == manifest["tokenizer"]["kind"]
    assert len(list(config.out.glob("train-*.bin"))) > 1


def test_manifest_counts(config):
    manifest = run(config)
    assert json.loads((config.out / "manifest.json").read_text()) == manifest
    assert manifest["input"]["documents"] == len(DOCUMENTS)
    assert manifest["input"]["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert manifest["tokenizer"]["fingerprint"] == load_tokenizer(config.out).fingerprint
    for split in ("train", "val"):
        counts = manifest["splits"][split]
        found = texts(config.out, split)
        assert counts["documents"] == len(found)
        assert counts["bytes"] == sum(len(text.encode()) for text in found)
        assert counts["tokens"] == sum(shard["tokens"] for shard in counts["shards"])
        dataset = TokenDataset(config.out, split)
        assert (dataset.num_tokens, dataset.num_bytes) == (counts["tokens"], counts["bytes"])


def test_several_processes_write_the_same_bytes(config, monkeypatch):
    monkeypatch.setattr(module, "_TASK_BYTES", 500)
    one = run(config)
    other = replace(config, out=config.out.with_name("other"), workers=2)
    assert run(other) == one
    for path in config.out.iterdir():
        assert path.read_bytes() == (other.out / path.name).read_bytes(), path.name


def test_a_failing_process_is_an_error(config, monkeypatch):
    monkeypatch.setattr(workers, "_start_worker", os.abort)
    with pytest.raises(RuntimeError, match=r"a worker process died.*workers=1"):
        run(replace(config, workers=2))
    assert sorted(p.name for p in config.out.parent.iterdir()) == ["input.jsonl"]


def test_second_run_writes_nothing(config, source, tmp_path, capsys):
    manifest = prepare(config)
    before = snapshot(config.out)
    capsys.readouterr()
    assert prepare(config) == manifest
    assert "already prepared" in capsys.readouterr().err
    # neither the name of the input matters, nor its time, nor the number of processes
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(source.read_bytes())
    assert run(replace(config, inputs=(str(copy),), workers=2, overwrite=True)) == manifest
    assert snapshot(config.out) == before


def test_changed_input_is_noticed(config, source):
    run(config)
    before, times = snapshot(config.out), source.stat()
    source.write_bytes(source.read_bytes().replace(b"document 7:", b"document 8:"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
    with pytest.raises(FileExistsError, match=r"was prepared from other text; .* --overwrite"):
        run(config)
    assert snapshot(config.out) == before
    run(replace(config, overwrite=True))
    assert texts(config.out, "train").count(DOCUMENTS[7].replace("7:", "8:")) == 1
    assert (
        os.listdir(config.out.parent).count("out") == 1 and len(os.listdir(config.out.parent)) == 2
    )


@pytest.mark.parametrize(
    "option",
    [
        {"vocab_size": 290},
        {"val_fraction": 0.3},
        {"seed": 1},
        {"shard_tokens": 99},
        {"tokenizer": "byte"},
    ],
    ids=str,
)
def test_changed_options_are_noticed(config, option):
    run(config)
    before = snapshot(config.out)
    with pytest.raises(FileExistsError, match=rf"other options \({next(iter(option))}"):
        run(replace(config, **option))
    assert snapshot(config.out) == before
    run(replace(config, overwrite=True, **option))
    assert snapshot(config.out) != before


def test_damage_is_noticed(config):
    run(config)
    path = config.out / "train-00000.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    with pytest.raises(FileExistsError, match=r"train-00000\.bin: damaged.*--overwrite"):
        run(config)
    run(replace(config, overwrite=True))
    assert path.read_bytes() == good
    path.unlink()
    with pytest.raises(FileExistsError, match=r"train-00000\.bin.*--overwrite"):
        run(config)


def test_other_folders_are_not_replaced(config, tmp_path):
    config.out.mkdir()
    run(config)  # an empty one is fine
    other = replace(config, out=tmp_path / "documents", overwrite=True)
    other.out.mkdir()
    (other.out / "letter.txt").write_text("to keep")
    with pytest.raises(FileExistsError, match="was not made by leangpt prepare"):
        run(other)
    inside = config.out / "more.txt"
    inside.write_text("to keep")
    with pytest.raises(ValueError, match=r"more\.txt: lies inside --out"):
        run(replace(config, inputs=(str(inside),), overwrite=True))
    with pytest.raises(FileExistsError, match="was not made by leangpt prepare"):
        run(replace(config, out=inside, overwrite=True))
    assert (other.out / "letter.txt").exists() and inside.read_text() == "to keep"


def test_input_that_changes_while_it_is_read(config, monkeypatch):
    streams = iter([["one", "two"], ["one", "three"]])
    monkeypatch.setattr(
        module, "iter_documents", lambda *_: (Document(text, "") for text in next(streams))
    )
    with pytest.raises(RuntimeError, match="the input changed while it was read"):
        run(replace(config, tokenizer="byte"))
    assert not config.out.exists()


def disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ShardWriter, "write"),
        (ShardWriter, "_finish"),
        (module, "write_json"),
        (os, "fsync"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_full_disk(config, monkeypatch, owner, name):
    run(config)
    before = snapshot(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, disk_full)
        with pytest.raises(OSError, match="No space left"):
            run(replace(config, seed=1, overwrite=True))
    assert snapshot(config.out) == before
    assert sorted(p.name for p in config.out.parent.iterdir()) == ["input.jsonl", "out"]


STUCK = """
import sys, time
from pathlib import Path
from leangpt.data import prepare as module
from leangpt.data import workers

def write(self, tokens):
    print("writing", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    module.ShardWriter.write = write
    module._TASK_BYTES = 500
    module.prepare(
        module.PrepareConfig((sys.argv[1],), Path(sys.argv[2]), "byte", workers=2, seed=1, overwrite=True)
    )
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_while_writing(config, source, tmp_path, number):
    config = replace(config, tokenizer="byte")
    run(config)
    before = snapshot(config.out)
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    process = subprocess.Popen(
        [sys.executable, str(script), str(source), str(config.out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    # Ctrl-C goes to all processes of a terminal, a kill to one
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.wait(30)
    process.stdout.close()
    assert snapshot(config.out) == before
    if number == signal.SIGINT:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["input.jsonl", "out", "stuck.py"]
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    run(replace(config, seed=1, overwrite=True))
    assert snapshot(config.out) != before


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("num_workers", [1, 2])
def test_streams(config, monkeypatch, num_workers):
    """However long the input is, few documents are on their way."""
    read, written, most = 0, 0, 0

    def many(*_):
        nonlocal read, most
        for i in range(3000):
            read += 1
            most = max(most, read - written)
            yield Document(f"{i} " * 50, "")

    def write(writer, tokens):
        nonlocal written
        written += int((tokens == 256).sum())

    monkeypatch.setattr(module, "iter_documents", many)
    monkeypatch.setattr(module, "_TASK_BYTES", 2000)
    module_survey = module._survey

    def survey(*arguments, **options):
        nonlocal read, most
        result = module_survey(*arguments, **options)
        read, most = 0, 0
        return result

    monkeypatch.setattr(module, "_survey", survey)
    monkeypatch.setattr(ShardWriter, "write", write)
    run(replace(config, tokenizer="byte", workers=num_workers))
    assert read == written == 3000
    assert 0 < most < 200


def test_tokenizer_is_trained_on_a_sample_of_everything(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE_CHARACTERS", 1000)
    survey = module._Survey()
    for i in range(5000):
        survey.add(f"{i:010d}", keep_sample=True)
        assert sum(map(len, survey.sample)) <= 1000
    places = [int(text) for text in survey.sample]
    assert 50 <= len(places) <= 100
    assert {b - a for a, b in pairwise(places)} == {64}
    assert places[0] == 0 and places[-1] > 4900


@pytest.mark.parametrize("text", ["title\n" + "one long line " * 1000, "ab", "a\nb"])
def test_validation_gets_its_share_of_one_document(config, tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    run(replace(config, inputs=(str(tmp_path / "a.txt"),), val_fraction=0.1))
    (train,), (val,) = texts(config.out, "train"), texts(config.out, "val")
    assert train + val == text and len(val) <= max(1, 0.2 * len(text) + 1)


def test_one_document_is_cut_in_two(config, tmp_path):
    lines = [f"line {i}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    run(replace(config, inputs=(str(tmp_path / "a.txt"),), val_fraction=0.1))
    (train,), (val,) = texts(config.out, "train"), texts(config.out, "val")
    assert train + val == "".join(lines)
    assert val.startswith("line 9") and 95 <= val.count("\n") <= 105


@given(
    count=st.integers(2, 300),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**63),
)
def test_split(count, fraction, seed):
    chosen = [i for i in range(count) if is_validation(i, count, fraction, seed)]
    assert len(chosen) == min(max(1, round(count * fraction)), count - 1)
    # spread over the corpus: one in every stretch of equal length
    assert [i * len(chosen) // count for i in chosen] == list(range(len(chosen)))


def test_split_depends_on_the_seed():
    chosen = {
        tuple(i for i in range(1000) if is_validation(i, 1000, 0.02, seed)) for seed in range(20)
    }
    assert len(chosen) == 20


def test_tokenizer_of_a_folder(config, tmp_path):
    train_tokenizer("bpe", ["other words, other words"], 280).save(tmp_path / "tokenizer")
    config = replace(config, tokenizer=str(tmp_path / "tokenizer"))
    run(config)
    expected = load_tokenizer(tmp_path / "tokenizer").fingerprint
    assert load_tokenizer(config.out).fingerprint == expected
    before = snapshot(config.out)
    run(replace(config, vocab_size=1))  # of no concern here
    assert snapshot(config.out) == before
    train_tokenizer("bpe", ["third words, third words"], 280).save(tmp_path / "tokenizer")
    with pytest.raises(FileExistsError, match=r"other options \(tokenizer\)"):
        run(config)


def test_mistakes(config, tmp_path):
    for option, message in (
        ({"tokenizer": "wordpiece"}, "tokenizer must be bpe, byte, char, gpt2 or a folder"),
        ({"tokenizer": str(tmp_path)}, "no tokenizer here"),
        ({"vocab_size": 256}, "vocab_size must be at least 257"),
        ({"text_field": "body"}, "no field 'body'"),
        ({"inputs": (str(tmp_path / "none.txt"),)}, "no such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(replace(config, **option))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt: no text in there"):
        run(replace(config, inputs=(str(tmp_path / "empty.txt"),)))
    for option, message in (
        ({"val_fraction": 0.0}, r"val_fraction must be in \(0, 1\)"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \(0, 1\)"),
        ({"workers": 0}, "workers must be positive"),
        ({"shard_tokens": 0}, "shard_tokens must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **option)
    with pytest.raises(TypeError, match="inputs must be a tuple of strings"):
        PrepareConfig(inputs="data.txt")  # type: ignore[arg-type]
    assert not config.out.exists()
