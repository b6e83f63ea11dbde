"""Checkpoints: whole or not there, read without executing anything, usable as models, few."""

import dataclasses
import errno
import json

import pytest
import torch
from train_helpers import LimitFileSizeAt, make_data, run_sessions, tiny_config, without_measuring

import leangpt.training.checkpoint
import leangpt.training.loop
from leangpt import GPT
from leangpt.data.tokenizer import load_tokenizer
from leangpt.pretrained import load_model, resolve_model
from leangpt.training import load_config, train
from leangpt.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from leangpt.training.optimizer import SpikeDetector, make_optimizer


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


def names(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_best_and_last_are_kept(data, tmp_path, monkeypatch):
    losses = iter((5.0, 3.0, 4.0, 4.5, 4.2))
    monkeypatch.setattr(leangpt.training.loop, "evaluate", lambda *args: next(losses))
    config = tiny_config(
        data, tmp_path / "run", max_steps=25, eval_every=5, checkpoint_every=5, keep_last=2
    )
    summary = train(config)
    assert names(config.out) == ["step-00000010", "step-00000020", "step-00000025"]
    assert summary.best_checkpoint == config.out / "checkpoints/step-00000010"
    best = json.loads((config.out / "best.json").read_text())
    assert best == {"step": 10, "val_loss": 3.0, "checkpoint": "checkpoints/step-00000010"}
    assert resolve_model(config.out) == summary.best_checkpoint


def test_an_evaluation_without_a_number_is_never_the_best(data, tmp_path, monkeypatch):
    losses = iter((float("nan"), 5.0, float("nan")))
    monkeypatch.setattr(leangpt.training.loop, "evaluate", lambda *args: next(losses))
    summary = train(tiny_config(data, tmp_path / "run", max_steps=15, eval_every=5))
    assert summary.best_checkpoint == tmp_path / "run/checkpoints/step-00000010"


def test_a_checkpoint_is_a_model_folder(data, tmp_path):
    summary = train(tiny_config(data, tmp_path / "run"))
    folder = summary.last_checkpoint
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "tokenizer_leangpt.json",
    }
    assert load_tokenizer(folder).encode("Füchse") == load_tokenizer(data).encode("Füchse")
    assert load_model(folder).config.vocab_size == 257
    assert load_config(tmp_path / "run") == tiny_config(data, tmp_path / "run")


def test_state_and_moments_come_back_as_they_were(data, tmp_path):
    config = tiny_config(data, tmp_path / "run")
    model = GPT(dataclasses.replace(config.arch, vocab_size=257))
    optimizer = make_optimizer(model, config)
    tokens = torch.randint(257, (2, 8))
    for _ in range(3):
        model(tokens, tokens).backward()
        optimizer.step()
    state = TrainState(7, 28, 99, 1.5, 1.25, 3.0, 2.5, 4, SpikeDetector(0.1, 6, 1, 0))
    folder = save_checkpoint(config, state, model, optimizer, load_tokenizer(data), {"torch": "x"})

    algorithms = {
        p: group["algorithm"] for group in optimizer.param_groups for p in group["params"]
    }
    keys = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}
    assert set(algorithms.values()) == keys.keys()

    fresh = GPT(model.config)
    fresh_optimizer = make_optimizer(fresh, config)
    load_checkpoint(folder, fresh, fresh_optimizer, {"torch": "x"})
    content = json.loads((folder / "state.json").read_text())
    assert TrainState.from_dict(content["state"]) == state
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
        moments, loaded = optimizer.state[p], fresh_optimizer.state[q]
        assert moments.keys() == loaded.keys() == keys[algorithms[p]]
        assert all(torch.equal(moments[key], loaded[key]) for key in moments)
        assert loaded.get("step", 3) == 3
    # and the next step is the same to the last bit
    for m, o in ((model, optimizer), (fresh, fresh_optimizer)):
        o.zero_grad()
        m(tokens, tokens).backward()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))  # fmt: skip


def test_another_environment_warns(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path / "run", max_minutes=1e-6, max_steps=2)
    train(config)
    monkeypatch.setattr(leangpt.training.loop, "__version__", "9.9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.warns(UserWarning, match=r"leangpt .* -> 9\.9, threads 1 -> 2\): results may"):
        train(dataclasses.replace(config, resume=True, max_minutes=None))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "flipped weights": ("model.safetensors", flip_a_bit, "does not match its sha256"),
    "truncated moments": ("optimizer.safetensors", truncate, "does not match its sha256"),
    "missing weights": ("model.safetensors", lambda path: path.unlink(), "not a whole checkpoint"),
    "no state": ("state.json", lambda path: path.unlink(), "not a whole checkpoint"),
    "half a state": ("state.json", truncate, "not a valid JSON file"),
    "empty state": ("state.json", lambda path: path.write_text("[]"), "not a whole checkpoint"),
    "foreign state": (
        "state.json",
        lambda path: path.write_text('{"format_version": 9}'),
        "must be a checkpoint of version 1, got 9",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_after_damage_the_one_before_is_taken(data, tmp_path, damage):
    """The run goes on from the previous checkpoint, and comes to the same end."""
    config = tiny_config(data, tmp_path / "run")
    expected = train(config)
    weights = (expected.last_checkpoint / "model.safetensors").read_bytes()
    name, spoil, message = DAMAGES[damage]
    spoil(expected.last_checkpoint / name)
    (config.out / "summary.json").unlink()
    with pytest.warns(UserWarning, match=f"{message}.*going on from step-00000015"):
        summary = train(dataclasses.replace(config, resume=True))
    assert summary.val_loss == expected.val_loss
    assert (summary.last_checkpoint / "model.safetensors").read_bytes() == weights


def test_a_damaged_best_checkpoint_is_no_longer_the_best(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path / "run", resume=True)
    flip_a_bit(train(config).best_checkpoint / "model.safetensors")
    (config.out / "summary.json").unlink()
    assert json.loads((config.out / "best.json").read_text())["step"] == 20

    def die(*args):
        raise RuntimeError("killed")

    monkeypatch.setattr(leangpt.training.loop, "seed_step", die)
    with pytest.warns(UserWarning, match="step-00000015"), pytest.raises(RuntimeError):
        train(config)
    assert json.loads((config.out / "best.json").read_text())["step"] == 10


def test_without_any_whole_checkpoint_the_error_names_them(data, tmp_path):
    config = tiny_config(data, tmp_path / "run")
    train(config)
    for folder in (config.out / "checkpoints").iterdir():
        flip_a_bit(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no whole checkpoint: .*step-00000020.*step-00000015"):
        train(dataclasses.replace(config, resume=True))


def test_nothing_is_unpickled(data, tmp_path, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read or written")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    config = tiny_config(data, tmp_path / "run", max_minutes=1e-6)
    train(config)
    train(dataclasses.replace(config, resume=True, max_minutes=None))


def test_a_full_disk_leaves_the_checkpoint_before(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path / "run", eval_every=100)
    save_file = leangpt.training.checkpoint.save_file

    def full(tensors, path):
        if "step-00000010" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(leangpt.training.checkpoint, "save_file", full)
    with pytest.raises(
        OSError, match=r"step-00000010: the checkpoint could not be written \(.*No space left.*--resume --out"
    ):  # fmt: skip
        train(config)
    assert names(config.out) == ["step-00000005"]
    monkeypatch.undo()
    without_measuring()
    summary = train(dataclasses.replace(config, resume=True))
    undisturbed = train(dataclasses.replace(config, out=tmp_path / "undisturbed"))
    assert summary.val_loss == undisturbed.val_loss


def test_the_operating_system_refuses_to_write(data, tmp_path):
    """As above, but the error comes out of the library that writes the weights: they need 30 kB, the log less."""
    config = tiny_config(data, tmp_path / "run", eval_every=100)
    assert run_sessions(config, hooks=[LimitFileSizeAt(7, 20_000)]) == [1]
    message = (tmp_path / "run.error").read_text()
    assert "OSError" in message and "step-00000010: the checkpoint could not be written" in message
    assert names(config.out) == ["step-00000005"]
    assert run_sessions(dataclasses.replace(config, resume=True)) == [0]
    assert names(config.out)[-1] == "step-00000020"
