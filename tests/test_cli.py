"""The command line as a user meets it: what it prints, what it refuses, and its exit status."""

import dataclasses
import io
import json
import sys

import pytest
import torch

import leangpt
from leangpt import GPT, GPTConfig, TrainConfig, cli, demo
from leangpt.data.prepare import PrepareConfig, prepare
from leangpt.data.tokenizer import ByteTokenizer
from leangpt.pretrained import save_pretrained

TINY = GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=16, max_seq_len=32)
SHORT = ["--max-new-tokens", "6", "--seed", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    save_pretrained(GPT(TINY), folder, ByteTokenizer())
    return str(folder)


def run(capsys, *argv):
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_usage(capsys):
    assert run(capsys)[0] == 2
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(command in out for command in cli.COMMANDS)
    assert run(capsys, "--version")[1].strip() == leangpt.__version__
    status, _, err = run(capsys, "foo")
    assert status == 2 and "there is no command 'foo'" in err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"leangpt {command}" in capsys.readouterr().out


def test_generate_prints_prompt_and_text(model, capsys):
    status, out, _ = run(capsys, "generate", "你好", "--model", model, *SHORT)
    assert status == 0 and out.startswith("你好") and out.endswith("\n")
    assert run(capsys, "generate", "你好", "--model", model, *SHORT, "--stream")[1] == out


def test_generate_reads_files_and_standard_input(model, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompts").write_text("ab\ncd\n", encoding="utf-8")
    lines = ["--each-line", "--json", "--n", "2"]
    _, out, _ = run(
        capsys, "generate", "--file", str(tmp_path / "prompts"), *lines, "--model", model, *SHORT
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r["prompt"], r["index"]) for r in rows] == [("ab", 0), ("ab", 1), ("cd", 0), ("cd", 1)]
    assert all(len(r["token_ids"]) == 6 and r["seed"] == 1 for r in rows)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\ncd\n")))
    assert run(capsys, "generate", "-", *lines, "--model", model, *SHORT)[1] == out


def test_generate_asks_again_and_again(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\ncd\n"))
    status, out, _ = run(capsys, "generate", "--interactive", "--model", model, *SHORT)
    assert status == 0 and out.count("> ") == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-new-tokens", "40"], "context of 32 tokens"),
        (["--chat"], "no chat template"),
        (["--json", "--stream"], "--json prints whole completions"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
    ],
    ids=str,
)
def test_generate_refuses(argv, message, model, capsys):
    status, _, err = run(
        capsys, "generate", *([] if "--file" in argv else ["x"]), "--model", model, *argv
    )
    assert status == 1 and message in err and "Traceback" not in err


def test_input_that_is_not_utf8_names_its_source(model, capsys, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    status, _, err = run(capsys, "generate", "--file", str(tmp_path / "latin"), "--model", model)
    assert status == 1 and "latin: not UTF-8 at byte 3" in err


def test_without_a_demo_generate_says_how_to_get_one(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "generate", "x")
    assert status == 1 and "leangpt demo" in err


def test_preset_chooses_the_defaults_of_arch(monkeypatch):
    seen = []
    monkeypatch.setattr("leangpt.training.train", lambda c: seen.append(c) or Interrupted())
    status = cli.main(["train", "--preset", "tiny", "--arch.n-layer", "3", "--data", "d"])
    assert status == 130  # an interrupted run
    assert seen[0].arch == dataclasses.replace(GPTConfig.preset("tiny"), n_layer=3)
    cli.main(["train", "--preset=gpt2"])
    assert seen[1].arch == GPTConfig.preset("gpt2")


class Interrupted:
    reason = "interrupted"


def test_recipe_chooses_the_defaults_of_training(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "leangpt.training.train", lambda config: seen.append(config) or Interrupted()
    )
    cli.main(["train", "--recipe", "gpt2", "--preset", "tiny", "--beta2", "0.9"])
    assert (seen[0].optimizer, seen[0].schedule, seen[0].beta2) == ("adamw", "cosine", 0.9)
    assert seen[0].arch == GPTConfig(n_layer=4, n_head=2, n_embd=128, max_seq_len=256)
    cli.main(["train", "--preset", "tiny"])
    assert seen[1] == TrainConfig(arch=GPTConfig.preset("tiny"))


def test_a_resumed_run_needs_no_other_options(tmp_path):
    """The command that an interrupted run prints."""
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 200, encoding="utf-8")
    (tmp_path / "b.txt").write_text("class A:\n    pass\n" * 100, encoding="utf-8")
    data, out = str(tmp_path / "data"), str(tmp_path / "run")
    texts = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    assert cli.main(["prepare", *texts, "--tokenizer", "byte", "--out", data]) == 0
    options = ["--preset", "tiny", "--arch.n-layer", "1", "--seq-len", "32", "--batch-size", "2"]
    silent = ["--no-tensorboard", "--no-progress", "--eval-batches", "1", "--sample-every", "0"]
    first = ["train", "--data", data, "--out", out, "--max-steps", "3", *options, *silent]
    assert cli.main([*first, "--max-minutes", "0.00001", "--warmup-steps", "1"]) == 0
    steps = json.loads((tmp_path / "run/summary.json").read_text())["steps"]
    assert cli.main(["train", "--resume", "--out", out, "--max-minutes", "10"]) == 0
    assert (steps, json.loads((tmp_path / "run/summary.json").read_text())["steps"]) == (1, 3)


def test_unknown_recipe(capsys):
    status, _, err = run(capsys, "train", "--recipe", "best")
    assert status == 1 and "recipe must be one of lean, gpt2, got 'best'" in err


def test_unknown_preset(capsys):
    status, _, err = run(capsys, "train", "--preset", "huge")
    assert status == 1 and "preset must be one of tiny" in err


def test_info(capsys):
    rows = json.loads(run(capsys, "info", "--json")[1])
    assert rows["torch"] == torch.__version__
    assert {"threads", "backend native", "backend triton", "backend reference"} <= rows.keys()


def test_export(model, capsys, tmp_path):
    assert run(capsys, "export", str(tmp_path / "hf"), "--model", model, "--format", "hf")[0] == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]


def test_bad_number_of_threads(capsys, monkeypatch):
    monkeypatch.setenv("LEANGPT_THREADS", "many")
    status, _, err = run(capsys, "info")
    assert status == 1 and "LEANGPT_THREADS must be a positive number, got 'many'" in err


def test_a_demo_beside_other_data_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("ab\n" * 400, encoding="utf-8")
    (tmp_path / "b.txt").write_text("ba\n" * 400, encoding="utf-8")
    prepare(PrepareConfig(inputs=("a.txt", "b.txt"), tokenizer="byte"))
    before = (tmp_path / "data/stdlib/manifest.json").read_bytes()
    monkeypatch.setattr(
        demo, "PrepareConfig", lambda **options: PrepareConfig(inputs=("a.txt", "b.txt"), **options)
    )
    status, _, err = run(capsys, "demo")
    assert status == 1
    assert "remove this folder, or run `leangpt prepare --vocab-size 2048 --overwrite`" in err
    assert (tmp_path / "data/stdlib/manifest.json").read_bytes() == before


def test_demo_trains_once_and_shows_samples(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 200, encoding="utf-8")
    (tmp_path / "b.txt").write_text("class A:\n    pass\n" * 100, encoding="utf-8")

    def prepared(**options):
        return PrepareConfig(inputs=("a.txt", "b.txt"), tokenizer="byte")

    def config(out, data, minutes):
        return TrainConfig(
            data=data,
            out=out,
            arch=dataclasses.replace(TINY, max_seq_len=128),
            batch_size=2,
            max_steps=200,  # thousands on so few lines end in spikes of the gradient, and they in an error
            eval_batches=1,
            tensorboard=False,
            sample_every=0,
        )

    monkeypatch.setattr(demo, "PrepareConfig", prepared)
    monkeypatch.setattr(demo, "demo_config", config)
    assert cli.main(["demo", "--minutes", "0.001"]) == 0
    first = capsys.readouterr().out
    assert "bits per byte" in first and "loss.png" in first and "--- sample 3\nimport os" in first
    written = (tmp_path / "runs/demo/log.jsonl").read_bytes()
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "runs/demo/log.jsonl").read_bytes() == written, "done is not done again"
