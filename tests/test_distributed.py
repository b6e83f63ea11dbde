"""Several processes train as one: the same weights, one that writes, and none that hangs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from train_helpers import (
    TINY,
    FailAt,
    Float64,
    IgnoreSpaces,
    JoinGroup,
    SignalAt,
    content,
    free_port,
    make_data,
    run_sessions,
    tiny_config,
)

from leangpt import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("text"))


def run_group(size: int, config: TrainConfig, *hooks, timeout: float = 60) -> list[int]:
    join = JoinGroup(size, free_port())
    return run_sessions(*[config] * size, hooks=[join, *hooks], timeout=timeout)


def final_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    newest = max((config.out / "checkpoints").glob("step-*"))
    return load_file(newest / "model.safetensors")


def test_two_processes_equal_one(data, tmp_path):
    """In float64, where rounding cannot hide a wrong weight: after 20 steps within 1e-10 of the largest of each tensor.

    The targets that count are unevenly spread over the sequences, so that an average of averages would be wrong.
    """
    one = tiny_config(data, tmp_path / "one", micro_batch_size=4)
    two = tiny_config(data, tmp_path / "two", micro_batch_size=1)
    hooks = [Float64(), IgnoreSpaces()]
    assert run_sessions(one, hooks=hooks) == [0]
    assert run_group(2, two, *hooks) == [0, 0]
    for name, expected in final_weights(one).items():
        got = final_weights(two)[name]
        assert got.dtype == torch.float64
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < 1e-10, name
    logs = [content(config.out)["log"] for config in (one, two)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for a, b in zip(*logs, strict=True):
        name = "val_loss" if a["event"] == "eval" else "loss"
        assert a[name] == pytest.approx(b[name], rel=1e-10)


def test_two_processes_resume_bit_for_bit(data, tmp_path):
    """Dropout on: each process has its own, and the same again."""
    arch = dataclasses.replace(TINY, dropout=0.2)
    whole = tiny_config(data, tmp_path / "whole", arch=arch)
    assert run_group(2, whole) == [0, 0]
    parted = dataclasses.replace(whole, out=tmp_path / "parted", resume=True)
    codes = run_group(2, parted, SignalAt(13, signal.SIGKILL, only=0))
    assert codes[0] == -signal.SIGKILL and codes[1] == 1, "the other one notices"
    assert run_group(2, parted) == [0, 0]
    assert content(parted.out) == content(whole.out)


def test_a_signal_to_one_process_stops_all_and_saves(data, tmp_path):
    config = tiny_config(data, tmp_path / "run")
    assert run_group(2, config, SignalAt(7, signal.SIGINT, only=1)) == [130, 130]
    summary = json.loads((config.out / "summary.json").read_text())
    assert (summary["reason"], summary["steps"]) == ("interrupted", 8)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_process_ends_the_other(data, tmp_path, failing):
    config = tiny_config(data, tmp_path / "run")
    assert run_group(2, config, FailAt(7, only=failing), timeout=30) == [1, 1]


def test_a_batch_that_does_not_divide_is_refused(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", batch_size=3)
    assert run_group(2, config) == [1, 1]
    message = (tmp_path / "run.error").read_text()
    assert "batch_size (3) must be a multiple of the 2 processes" in message


def test_torchrun_trains_on_the_command_line(data, tmp_path):
    """One process writes and prints; Ctrl-C, which a terminal sends to all of them, saves; resumed, it comes to the end."""
    log = tmp_path / "run/log.jsonl"
    options = {
        "--data": data, "--out": tmp_path / "run", "--arch.n-layer": 1, "--arch.n-embd": 16, "--arch.n-head": 2,
        "--arch.max-seq-len": 32, "--batch-size": 4, "--schedule": "constant", "--warmup-steps": 2, "--device": "cpu",
        "--dtype": "float32", "--eval-every": 10**6, "--sample-tokens": 8, "--sample-every": 10**6,
    }  # fmt: skip

    def start(*more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", str(free_port()), "-m", "leangpt.train", *more]
        command += [str(word) for option in options.items() for word in option]
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    run = start("--max-steps", "1000000")
    try:
        while run.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 5):
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=60)
        assert errors.count("stopped by       interrupted") == 1, errors
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        steps = summary["steps"]
        assert steps > 5 and summary["last_checkpoint"].endswith(f"step-{steps:08d}")

        options["--sample-every"] = steps + 6
        run = start("--resume", "--max-steps", str(steps + 6))
        _, errors = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    assert errors.count("stopped by       max_steps") == 1
    events = [line["event"] for line in content(tmp_path / "run")["log"]]
    assert events == ["step"] * (steps + 6) + ["eval", "sample"]
