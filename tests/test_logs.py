"""What a run writes down: log.jsonl, TensorBoard, W&B, the loss curve, the terminal."""

import dataclasses
import importlib.util
import json
import math
import signal
import sys
import types

import matplotlib.image
import numpy as np
import pytest
import torch
from train_helpers import SignalAt, make_data, run_sessions, tiny_config, without_measuring

import leangpt.training.loop
from leangpt.training import train
from leangpt.training.logs import RunLog, read_log, truncate_log
from leangpt.training.plot import _smoothed, plot_losses


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


def tensorboard_steps(folder) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_no_line_is_double_after_a_kill(data, tmp_path):
    """Killed after step 13, it goes on from the checkpoint of step 10: steps 11 to 13 are done again."""
    config = tiny_config(data, tmp_path / "run", sample_every=7, sample_tokens=8, tensorboard=True)
    assert run_sessions(config, hooks=[SignalAt(13, signal.SIGKILL)]) == [-signal.SIGKILL]
    [events] = (config.out / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1000000000.earlier"))  # read in this order
    before = read_log(config.out / "log.jsonl")
    assert before[-1]["step"] == 13
    with (config.out / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # a killed process may leave half a line
    summary = train(dataclasses.replace(config, resume=True))
    log = read_log(config.out / "log.jsonl")
    assert [(line["event"], line["step"]) for line in log] == [
        *(("step", step) for step in range(1, 8)),
        ("sample", 7),
        *(("step", step) for step in range(8, 11)),
        ("eval", 10),
        *(("step", step) for step in range(11, 15)),
        ("sample", 14),
        *(("step", step) for step in range(15, 21)),
        ("eval", 20),
    ]
    assert log[-1]["val_loss"] == summary.val_loss
    assert log[-1]["bits_per_byte"] == summary.bits_per_byte
    assert {*log[0]} == {"event", "step", "loss", "learning_rate", "grad_norm", "tokens_per_s"}

    steps = tensorboard_steps(config.out / "tensorboard")
    assert steps["step/loss"] == steps["step/grad_norm"] == list(range(1, 21))
    assert steps["eval/bits_per_byte"] == [10, 20]


def test_the_log_is_json_whatever_the_text_and_the_numbers(tmp_path):
    log = RunLog(tiny_config(tmp_path, tmp_path), "id", 0)
    log.write(
        "sample",
        1,
        text="line\nend\u2028 \x85 \U0001f600 \ud83d?".encode("utf-8", "replace").decode(),
    )
    log.write("skip", 2, loss=math.nan, grad_norm=math.inf)
    log.close()
    lines = (tmp_path / "log.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2]
    sample, skip = read_log(tmp_path / "log.jsonl")
    assert sample["text"].startswith("line\nend\u2028 \x85 \U0001f600")
    assert (skip["loss"], skip["grad_norm"]) == ("nan", "inf")
    truncate_log(tmp_path / "log.jsonl", 1)
    assert read_log(tmp_path / "log.jsonl") == [sample]


def test_without_tensorboard_it_says_so_once_and_trains(data, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    with pytest.warns(UserWarning, match="pip install tensorboard") as warnings:
        train(tiny_config(data, tmp_path / "run", tensorboard=True, max_steps=2))
    assert len(warnings) == 1
    assert not (tmp_path / "run/tensorboard").exists()


def test_weights_and_biases_gets_every_event_and_keeps_its_run(data, tmp_path, monkeypatch):
    inits, logged, finished = [], [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: finished.append(1)
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: inits.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny_config(
        data, tmp_path / "run", wandb_project="mine", max_minutes=1e-6, max_steps=3
    )
    train(config)
    train(dataclasses.replace(config, max_minutes=None, resume=True))
    assert [step for step, _ in logged] == [1, 1, 2, 3, 3]
    assert {*logged[1][1]} == {"eval/val_loss", "eval/bits_per_byte", "eval/seconds"}
    assert [options["project"] for options in inits] == ["mine", "mine"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    assert len(finished) == 2


def test_weights_and_biases_without_its_package_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project needs .*pip install leangpt\[wandb\]"):
        train(tiny_config(data, tmp_path / "run", wandb_project="mine"))


def test_the_terminal_shows_loss_speed_samples_and_summary(data, tmp_path, capsys):
    config = tiny_config(
        data,
        tmp_path / "run",
        progress=True,
        sample_every=20,
        sample_tokens=8,
        sample_prompt="the qu",
    )
    summary = train(config)
    captured = capsys.readouterr()
    assert captured.out == "", "standard output is for results"
    assert "parameters" in captured.err and "float32 on CPU" in captured.err
    assert (
        f"step 20: loss {read_log(config.out / 'log.jsonl')[-3]['loss']:.4f}, validation"
        in captured.err
    )
    assert "sample\nthe qu" in captured.err
    assert "tokens/s" in captured.err and "% of peak" in captured.err
    assert f"{summary.bits_per_byte:.4f} bits per byte" in captured.err
    assert str(config.out / "loss.png") in captured.err


def test_without_progress_it_is_silent(data, tmp_path, capsys):
    train(tiny_config(data, tmp_path / "run", sample_every=2, sample_tokens=4, max_steps=3))
    assert capsys.readouterr() == ("", "")


def test_share_of_the_peak(data, tmp_path, monkeypatch):
    """The model's operations a second over those of the machine."""
    monkeypatch.setattr(leangpt.training.loop, "matmul_peak", lambda dtype, device: 123.0)
    summary = train(tiny_config(data, tmp_path / "run", max_steps=3))
    config = json.loads((summary.last_checkpoint / "config.json").read_text())["config"]
    width, inner = config["n_embd"], 4 * config["n_embd"]
    weights = 257 * width + 4 * width * width + 2 * width * inner + 2 * width + width
    flops = (
        6 * weights + 12 * width * 32 / 2
    )  # a weight, a token: 2 forward, 4 backward; half of the square
    assert summary.peak_share == pytest.approx(summary.tokens_per_s * flops / 123.0, rel=1e-9)


def test_the_summary_is_written(data, tmp_path):
    summary = train(tiny_config(data, tmp_path / "run"))
    written = json.loads((tmp_path / "run/summary.json").read_text())
    assert written == {
        name: value if value is None or isinstance(value, (int, float)) else str(value)
        for name, value in dataclasses.asdict(summary).items()
    }
    assert written["steps"] == 20 and written["minutes"] > 0
    assert "(0 skipped)" in str(summary)


def test_the_loss_curve_is_drawn(tmp_path):
    """A picture with both colours in it, for one step as for many, with and without evaluations."""
    blue, orange = (31, 119, 180), (255, 127, 14)
    for num_steps, evals in ((1, []), (300, [100, 300])):
        log, picture = tmp_path / f"{num_steps}.jsonl", tmp_path / f"{num_steps}.png"
        lines = [{"event": "step", "step": i, "loss": 5 / i} for i in range(1, num_steps + 1)]
        lines += [
            {"event": "eval", "step": i, "val_loss": 5 / i, "bits_per_byte": 1.0} for i in evals
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_losses(log, picture)
        pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
        has = {c: bool((pixels == c).all(-1).any()) for c in (blue, orange)}
        assert has == {blue: True, orange: bool(evals)}
    (tmp_path / "empty.jsonl").touch()
    plot_losses(tmp_path / "empty.jsonl", tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_smoothing_is_a_mean_of_neighbours():
    values = np.random.default_rng(0).normal(size=700)  # 7 to each side
    smooth = _smoothed(values)
    assert smooth[350] == pytest.approx(values[343:358].mean())
    assert smooth[2] == pytest.approx(values[:5].mean())
    assert smooth[0] == values[0]
    # the last steps differ by more than the loss falls in them: all within reach count
    assert smooth[697] == pytest.approx(values[690:].mean())
    assert smooth[-1] == pytest.approx(values[692:].mean())
