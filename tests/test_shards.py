import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leangpt.data.shards import (
    ShardWriter,
    open_shard,
    open_split,
    read_manifest,
    token_dtype,
)


def write(folder, parts, vocab_size=300, shard_tokens=2**27):
    with ShardWriter(folder, "train", token_dtype(vocab_size), shard_tokens) as writer:
        for part in parts:
            writer.write(np.array(part, dtype=np.uint32))
    return writer.shards


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=20), max_size=8),
    vocab_size=st.sampled_from([2**16, 2**16 + 1]),
    shard_tokens=st.integers(1, 30),
)
def test_round_trip(tmp_path_factory, parts, vocab_size, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    shards = write(folder, parts, vocab_size, shard_tokens)
    whole = [token for part in parts for token in part]
    assert [shard["tokens"] for shard in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
    assert sorted(path.name for path in folder.iterdir()) == [shard["file"] for shard in shards]
    read = [open_shard(folder / shard["file"], shard["sha256"]) for shard in shards]
    assert [token for tokens in read for token in tokens.tolist()] == whole
    assert all(tokens.dtype.itemsize == (2 if vocab_size == 2**16 else 4) for tokens in read)


def test_file_format(tmp_path):
    """The layout that the module's docstring promises, byte for byte."""
    shards = write(tmp_path, [[1, 258], [65535]])
    data = (tmp_path / "train-00000.bin").read_bytes()
    assert data[:24] == b"leantok\n\x01\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0"
    assert data[24:56].hex() == shards[0]["sha256"]
    assert data[56:] == bytes(8) + b"\x01\x00\x02\x01\xff\xff"


def test_memory_mapped(tmp_path):
    write(tmp_path, [[1, 2, 3]])
    tokens = open_shard(tmp_path / "train-00000.bin")
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable


def test_foreign_and_damaged_files(tmp_path):
    shards = write(tmp_path, [[7, 8, 9, 10]])
    path = tmp_path / "train-00000.bin"
    good = path.read_bytes()
    cases = {
        b"": "not a token shard",
        b"leantok\n": "not a token shard",
        b"\x93NUMPY" + good: "not a token shard",
        good[:8] + b"\x02" + good[9:]: "version 1 .* got version 2",
        good[:12] + b"\x08" + good[13:]: "got version 1 with 8",
        good[:-1]: "must have 72 bytes for 4 tokens, got 71",
        good[:64]: "must have 72 bytes for 4 tokens, got 64",
        good + b"\0": "must have 72 bytes for 4 tokens, got 73",
        good[:16] + b"\xff" * 8 + good[24:]: "damaged, must have",
    }
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            open_shard(path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        open_shard(tmp_path / "nowhere.bin")
    path.unlink()
    write(tmp_path, [[7, 8, 9, 11]])
    with pytest.raises(ValueError, match=r"not the shard that manifest\.json beside it names"):
        open_shard(path, shards[0]["sha256"])


@given(position=st.integers(0, 64 + 2 * 40 - 1), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_every_flipped_bit_is_found(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    shards = write(folder, [range(40)])
    path = folder / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    if 56 <= position < 64:  # padding
        assert open_shard(path, shards[0]["sha256"]).tolist() == list(range(40))
    else:
        with pytest.raises(ValueError, match=str(path)):
            open_shard(path, shards[0]["sha256"])


def test_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="leangpt prepare"):
        read_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    shards = write(tmp_path, [[1, 2], [3]], shard_tokens=2)
    path.write_text(json.dumps({"format_version": 1, "splits": {"train": {"shards": shards}}}))
    assert [tokens.tolist() for tokens in open_split(tmp_path, "train")] == [[1, 2], [3]]
    path.write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"manifest\.json: must have format_version 1, got 2"):
        read_manifest(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not a valid JSON file"):
        read_manifest(tmp_path)
