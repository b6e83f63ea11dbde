"""A fine-tuning that was killed or interrupted goes on as if nothing had happened: to the last bit."""

import json
import random
import signal
from dataclasses import replace

import pytest
import torch
from finetune_data import make_base
from finetune_sessions import run_session
from make_data import write_jsonl
from safetensors.torch import load_file
from train_helpers import KillAtEvent, SignalAt

from leangpt.cli import main
from leangpt.finetune import FinetuneConfig, finetune, load_tuned, methods
from leangpt.finetune.checkpoint import checkpoint_folder
from leangpt.finetune.tasks import Chat, Classify

ROWS = [
    {"text": f"{word} {i}", "label": label}
    for i in range(12)
    for word, label in (("涨 up", "正"), ("跌 down", "负"), ("会 meet", "中"))
]
METHODS = {"full": {}, "adalora": {"rank": 2, "interval": 2, "dropout": 0.2}}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def config(tmp_path):
    make_base(
        tmp_path / "base", ROWS, "char", 300, n_layer=1, n_embd=16, n_head=2, max_seq_len=32, dropout=0.1
    )  # fmt: skip
    earlier = [{"text": f"早 {i}", "label": "早"} for i in range(9)]
    return FinetuneConfig(
        task=Classify(),
        method=methods.create("full"),
        model=str(tmp_path / "base"),
        data=(write_jsonl(tmp_path / "rows.jsonl", ROWS),),
        replay=f"{write_jsonl(tmp_path / 'earlier.jsonl', earlier)}:0.2",
        out=tmp_path / "whole",
        max_steps=20,
        epochs=4,
        batch_size=6,
        learning_rate=1e-2,
        checkpoint_every=3,
        device="cpu",
        dtype="float32",
        progress=False,
    )


def content(out):
    """What the training made: tensors, and the report but for its clock."""
    tensors = {
        f"{path.name}:{name}": tensor.tolist()
        for path in sorted(out.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    report = json.loads((out / "report.json").read_text())
    del report["seconds"]
    return tensors, report


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_any_moment_it_resumes_bit_for_bit(config, tmp_path, name):
    whole = replace(config, method=methods.create(name, **METHODS[name]))
    finetune(whole)
    assert not checkpoint_folder(whole.out).exists()
    killed = replace(whole, out=tmp_path / "killed", resume=True)
    draw, trace = random.Random(5), tmp_path / "trace"
    for kills in range(40):  # later and later, so that it comes to an end
        code = run_session(killed, [KillAtEvent(draw.randint(10, 60 + 20 * kills), trace)])
        if code == 0:
            break
        assert code == -signal.SIGKILL, killed.out.with_suffix(".error").read_text()
    assert code == 0
    assert len(trace.read_text().splitlines()) >= 3
    assert content(killed.out) == content(whole.out)
    assert not checkpoint_folder(killed.out).exists()


@pytest.mark.parametrize("event", ["half a file", "before rename", "after rename"])
def test_killed_while_a_checkpoint_is_written(config, tmp_path, event):
    finetune(config)
    killed = replace(config, out=tmp_path / "killed", resume=True)
    kill = KillAtEvent(4, tmp_path / "trace", event)  # that of the second checkpoint
    assert run_session(killed, [kill]) == -signal.SIGKILL
    assert run_session(killed) == 0
    assert content(killed.out) == content(config.out)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_command_goes_on(config, tmp_path, capsys, signum):
    """What was learnt so far can be used at once; what is told as the way on is a way on."""
    finetune(config)
    out = tmp_path / "cut off"
    assert run_session(replace(config, out=out), [SignalAt(7, signum)]) == 130
    assert load_tuned(out).task.labels == ("中", "早", "正", "负")
    assert json.loads((out / "report.json").read_text())["steps"] == 8
    with pytest.raises(FileExistsError, match=r"go on with it by `leangpt finetune classify --res"):
        finetune(replace(config, out=out))
    assert main(["finetune", "classify", "--resume", "--out", str(out)]) == 0
    assert "20 steps" in capsys.readouterr().out
    assert content(out) == content(config.out)
    with pytest.raises(FileExistsError, match="holds a tuned model"):
        finetune(replace(config, out=out, resume=True))


def test_the_command_to_go_on_is_printed(config, monkeypatch, capsys):
    from leangpt.finetune import trainer

    monkeypatch.setattr(trainer, "seed_step", lambda *_: signal.raise_signal(signal.SIGINT))
    outcome = finetune(replace(config, progress=True))
    assert (outcome.is_interrupted, outcome.steps) == (True, 1)
    assert f"leangpt finetune classify --resume --out {config.out}" in capsys.readouterr().err


@pytest.fixture
def killed(config):
    """With a checkpoint of step 6."""
    assert run_session(config, [SignalAt(6, signal.SIGKILL)]) == -signal.SIGKILL
    return replace(config, resume=True)


def test_what_would_make_it_another_training_is_refused(killed, tmp_path):
    for changes, message in (
        ({"learning_rate": 0.1}, "started with learning_rate=0.01, .* cannot change it to 0.1"),
        ({"method": methods.create("lora")}, "cannot change it to LoRA"),
        ({"task": Classify(class_weights="balanced")}, "started with task="),
        ({"max_steps": 30}, "started with max_steps=20"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(replace(killed, **changes))
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS[1:], ROWS[0]])
    with pytest.raises(ValueError, match="the data is another than when the training began"):
        finetune(killed)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    make_base(
        tmp_path / "base", ROWS, "char", 300, n_layer=1, n_embd=16, n_head=2, max_seq_len=32, dropout=0.1, norm_eps=1e-4
    )  # fmt: skip
    torch.manual_seed(1)
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "classify", "--resume", "--out", str(killed.out), "--rank", "3"])
    assert main(["finetune", "tag", "--resume", "--out", str(killed.out)]) == 1


def test_another_base_model_is_refused(killed, tmp_path):
    base = load_file(tmp_path / "base" / "model.safetensors")
    name = next(iter(base))
    base[name] = base[name] + 1e-3
    from safetensors.torch import save_file

    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the base model is another than when the training began"):
        finetune(killed)


def test_a_damaged_checkpoint_is_not_used(killed):
    path = checkpoint_folder(killed.out) / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.safetensors: damaged.*--overwrite"):
        finetune(killed)
    path.unlink()
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        finetune(killed)
    outcome = finetune(replace(killed, resume=False, overwrite=True))
    assert outcome.steps == 20 and not checkpoint_folder(killed.out).exists()


def test_options_come_back_from_json(config):
    for changes in (
        {"task": Chat(template="{{ messages }}"), "method": methods.create("prefix")},
        {"method": methods.create("lora", targets=("qkv",)), "val_data": config.data},
    ):
        changed = replace(config, **changes)
        assert FinetuneConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    with pytest.raises(ValueError, match="unknown option of fine-tuning: rang"):
        FinetuneConfig.from_dict(config.to_dict() | {"rang": 3})
    with pytest.raises(ValueError, match="choose one"):
        replace(config, resume=True, overwrite=True)
