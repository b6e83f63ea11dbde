"""The benchmark of decoding on GPUs, with the CUDA engine in the emulator: it checks, measures and writes; no time of it counts."""

import json
import sys
from pathlib import Path

import pytest
import torch

from leangpt import GPTConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_gpu_decode

CONFIG = GPTConfig(vocab_size=300, max_seq_len=64, n_layer=1, n_head=2, n_embd=32)
OPTIONS = bench_gpu_decode.parse(
    ["--batches", "1", "2", "--context", "20", "--rounds", "2", "--no-compile"]
)

pytestmark = pytest.mark.usefixtures("native_engine", "emulated")


def test_what_it_writes(tmp_path):
    where = {"date": "2026-01-01T00:00", "device": "No GPU"}
    document = bench_gpu_decode.run(CONFIG, OPTIONS, "cpu", where)
    assert [(row["batch"], row["contender"]) for row in document["rows"]] == [
        (batch, name)
        for batch in (1, 2)
        for name in ("torch eager", "leangpt bf16", "leangpt int8", "leangpt int4")
    ]
    assert all(0 < error <= 1 for error in document["errors"].values())
    page = bench_gpu_decode.write_page(document, "a command", tmp_path)
    assert page.name == "2026-01-01-no-gpu.md"
    assert "| 2 | leangpt int4 |" in page.read_text() and "`a command`" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text()) == document


def test_steps_agree_and_leave_everything_as_it_was():
    bench = bench_gpu_decode.Bench(bench_gpu_decode.random_model(CONFIG), "cpu", ["bf16"])
    for call in bench.steps(3, 20, compiles=False).values():
        assert call() == call()
    static, own = bench.steps(3, 20, compiles=False).values()
    assert static() == own()


def test_wrong_logits_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench_gpu_decode.Bench, "errors", lambda _: {"bf16": 1.2})
    with pytest.raises(ValueError, match="not timed: the logits of bf16 are wrong"):
        bench_gpu_decode.run(CONFIG, OPTIONS, "cpu", {})


def test_without_a_gpu_it_says_so(capsys, cuda):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with cuda.settings(capability=(0, 0)):
        assert bench_gpu_decode.main([]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing was measured: there is no GPU")
