"""A run that was killed, interrupted or extended goes on as if nothing had happened: to the last bit."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from train_helpers import (
    TINY,
    BreakGradients,
    KillAtEvent,
    SignalAt,
    content,
    make_data,
    run_sessions,
    tiny_config,
    without_measuring,
)

import leangpt.training.interrupt
import leangpt.training.loop
from leangpt import TrainConfig
from leangpt.training import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def _quick():
    without_measuring()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# skipped, and so part of what a resumed run has to do the same way
BREAK = BreakGradients(
    {4: math.nan, 11: 40.0, 12: 30.0, 13: 1e25, 23: 60.0, 31: math.inf},
)


def dropout_config(data: Path, out: Path) -> TrainConfig:
    return tiny_config(
        data,
        out,
        arch=dataclasses.replace(TINY, dropout=0.2),
        max_steps=40,
        micro_batch_size=2,
        learning_rate=1e-2,
        checkpoint_every=4,
        eval_every=6,
        sample_every=9,
        sample_tokens=8,
    )


def test_killed_at_any_moment_it_resumes_bit_for_bit(data, tmp_path):
    whole = dropout_config(data, tmp_path / "whole")
    assert run_sessions(whole, hooks=[BREAK]) == [0]
    expected = content(whole.out)
    assert expected["state"]["step"] == 40
    assert expected["state"]["detector"]["skipped"] == len(BREAK.factors)

    killed = dataclasses.replace(whole, out=tmp_path / "killed", resume=True)
    draw, trace = random.Random(8), tmp_path / "trace"
    for _kills in range(60):
        kill = KillAtEvent(draw.randint(3, 160), trace)
        [code] = run_sessions(killed, hooks=[BREAK, kill])
        if code == 0:
            break
        assert code == -signal.SIGKILL, killed.out.with_suffix(".error").read_text()
    events = trace.read_text().splitlines()
    assert len(events) >= 8, events
    # kills at a rename are the next test's
    assert {event.split()[-1] for event in events} >= {"seed_step", "fsync"}, events
    assert content(killed.out) == expected


@pytest.mark.parametrize(
    ("event", "number"), [("half a file", 2), ("before rename", 4), ("after rename", 4)]
)
def test_killed_while_a_checkpoint_is_written(data, tmp_path, event, number):
    """The second one; of the two renames, the model's and its own, at the latter."""
    whole, killed = (dropout_config(data, tmp_path / name) for name in ("whole", "killed"))
    assert run_sessions(whole) == [0]
    kill = KillAtEvent(number, tmp_path / "trace", event)
    assert run_sessions(killed, hooks=[kill]) == [-signal.SIGKILL]
    is_whole = (killed.out / "checkpoints/step-00000006").exists()
    assert is_whole == (event == "after rename")
    assert run_sessions(dataclasses.replace(killed, resume=True)) == [0]
    assert content(killed.out) == content(whole.out)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_resumes(data, tmp_path, signum):
    config = tiny_config(data, tmp_path / "run")
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    assert run_sessions(config, whole, hooks=[SignalAt(11, signum, only=0)]) == [130, 0]
    summary = json.loads((config.out / "summary.json").read_text())
    assert (summary["reason"], summary["steps"]) == ("interrupted", 12)
    assert summary["last_checkpoint"].endswith("step-00000012")
    assert (config.out / "loss.png").exists()
    assert run_sessions(dataclasses.replace(config, resume=True)) == [0]
    assert content(config.out) == content(whole.out)


def test_the_command_to_resume_is_printed(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        leangpt.training.loop, "seed_step", lambda *args: os.kill(os.getpid(), signal.SIGINT)
    )
    summary = train(tiny_config(data, tmp_path / "run", progress=True))
    assert (summary.reason, summary.steps) == ("interrupted", 1)
    assert f"leangpt train --resume --out {tmp_path / 'run'}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def signal_twice(*args):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_a_later_second_signal_ends_it_at_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(leangpt.training.interrupt, "SAME_WISH_SECONDS", 0.001)
    monkeypatch.setattr(leangpt.training.loop, "seed_step", signal_twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(data, tmp_path / "run"))


def test_the_same_ctrl_c_may_come_twice(data, tmp_path, monkeypatch):
    """From the terminal, and passed on by torchrun."""
    monkeypatch.setattr(leangpt.training.interrupt, "SAME_WISH_SECONDS", 1000.0)
    monkeypatch.setattr(leangpt.training.loop, "seed_step", signal_twice)
    summary = train(tiny_config(data, tmp_path / "run"))
    assert (summary.reason, summary.steps) == ("interrupted", 1)
    assert summary.last_checkpoint.exists()


def test_a_run_is_not_overwritten(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", max_steps=2)
    train(config)
    before = content(config.out)
    with pytest.raises(
        FileExistsError,
        match=r"a run already; go on with it by `leangpt train --resume --out .*run`",
    ):
        train(config)
    assert content(config.out) == before


def test_resume_without_a_run_starts_one(data, tmp_path):
    assert train(tiny_config(data, tmp_path / "run", max_steps=2, resume=True)).steps == 2


def test_killed_before_the_first_checkpoint_it_starts_anew(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", max_steps=6, resume=True)
    assert run_sessions(config, hooks=[SignalAt(3, signal.SIGKILL)]) == [-signal.SIGKILL]
    assert (config.out / "train.json").exists() and not (config.out / "checkpoints").exists()
    train(config)
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    train(whole)
    assert content(config.out) == content(whole.out)


def test_a_finished_run_is_left_as_it_is(data, tmp_path):
    config = tiny_config(data, tmp_path / "run")
    summary = train(config)
    times = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    assert train(dataclasses.replace(config, resume=True)) == summary
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == times


def test_an_earlier_session_does_not_speak_for_the_run(data, tmp_path, monkeypatch):
    """Interrupted, resumed, killed between the last checkpoint and the summary: there is only that of the first session."""
    config = tiny_config(data, tmp_path / "run", resume=True)
    assert run_sessions(config, hooks=[SignalAt(11, signal.SIGINT)]) == [130]

    def die(*args):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(leangpt.training.loop, "plot_losses", die)
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
    summary = train(config)
    assert (summary.reason, summary.steps) == ("max_steps", 20)


def test_killed_between_the_last_checkpoint_and_the_summary(data, tmp_path):
    config = tiny_config(data, tmp_path / "run")
    summary = train(config)
    before = content(config.out)
    (config.out / "summary.json").unlink()
    again = train(dataclasses.replace(config, resume=True))
    assert dataclasses.replace(again, peak_share=summary.peak_share) == summary
    assert content(config.out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.5}, r"started with learning_rate=0\.002, a resumed run cannot change it to 0\.5"),
        ({"batch_size": 8}, "started with batch_size=4"),
        ({"arch": dataclasses.replace(TINY, n_layer=2)}, "started with arch="),
        ({"seed": 2}, "started with seed=1337"),
        ({"max_steps": 30}, r"max_steps=20, and with 30 the learning rates of the 20 steps done.*schedule=wsd"),
    ],
    ids=["rate", "batch", "arch", "seed", "steps"],
)  # fmt: skip
def test_what_made_the_steps_cannot_change(data, tmp_path, options, message):
    config = tiny_config(data, tmp_path / "run")
    train(config)
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, resume=True, **options))


def test_a_moved_run_on_moved_data_goes_on_and_other_data_does_not(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", max_minutes=1e-6)
    train(config)
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = dataclasses.replace(config, resume=True, out=tmp_path / "moved", max_minutes=None)
    with pytest.raises(ValueError, match="started with other data than is in"):
        train(dataclasses.replace(moved, data=make_data(tmp_path / "other", seed=1)))
    assert train(dataclasses.replace(moved, data=tmp_path / "data")).steps == 20


def test_a_run_goes_on_with_short_sequences(data, tmp_path):
    whole = tiny_config(data, tmp_path / "whole", short_fraction=0.5)
    train(whole)
    out = tmp_path / "stopped"
    stopped = dataclasses.replace(whole, out=out)
    assert run_sessions(stopped, hooks=[SignalAt(7, signal.SIGINT)]) == [130]
    train(dataclasses.replace(stopped, resume=True))
    assert content(out) == content(whole.out)


def test_a_run_cannot_be_made_longer_after_its_short_sequences(data, tmp_path):
    options = {"schedule": "constant", "max_steps": 10, "short_fraction": 0.5}
    config = tiny_config(data, tmp_path / "run", **options)
    train(config)
    with pytest.raises(ValueError, match="others of the 10 steps done would have cut sequences"):
        train(dataclasses.replace(config, resume=True, max_steps=20))


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_run_can_be_made_longer_where_the_rates_stay(data, tmp_path, schedule):
    """With wsd: as long as the rate has not begun to fall."""
    long = tiny_config(
        data, tmp_path / "long", schedule=schedule, max_steps=30, decay_fraction=0.5, eval_every=10
    )
    train(long)
    out = tmp_path / "short"
    short = dataclasses.replace(long, out=out, max_steps=20)
    assert run_sessions(short, hooks=[SignalAt(5, signal.SIGINT)]) == [130]
    train(dataclasses.replace(short, resume=True, max_steps=30))
    assert content(out) == content(long.out)
