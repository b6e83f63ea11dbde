"""What the loop computes: see test_resume.py, test_checkpoint.py, test_distributed.py, test_logs.py for the rest."""

import dataclasses
import itertools
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from train_helpers import TINY, content, make_data, tiny_config, without_measuring

import leangpt.training.loop
import leangpt.training.optimizer
from leangpt import GPT, TrainConfig
from leangpt.data.batches import Batches, TokenDataset, evaluation_batches
from leangpt.pretrained import load_model, save_pretrained
from leangpt.training import TrainingError, load_config, train
from leangpt.training.distributed import Group
from leangpt.training.loop import accumulate_gradients, compute_dtype
from leangpt.training.optimizer import Optimizer


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


def test_overfits_one_batch(data, tmp_path, monkeypatch):
    tokens = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = torch.arange(4)  # so that even the first prediction can be certain
    monkeypatch.setattr(Batches, "next", lambda self: (tokens[:, :-1], tokens[:, 1:]))
    arch = dataclasses.replace(TINY, n_embd=32)
    config = tiny_config(data, tmp_path / "run", arch=arch, max_steps=250, learning_rate=5e-3, weight_decay=0.0, eval_every=250)  # fmt: skip
    train(config)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["event"] == "step"]
    assert losses[0] == pytest.approx(math.log(257), rel=0.05)
    assert losses[-1] < 0.01


def test_learns_the_text_and_says_how_well(data, tmp_path):
    """The validation loss in the summary is that of the best checkpoint's weights, computed here by hand."""
    config = tiny_config(data, tmp_path / "run", max_steps=60, learning_rate=1e-2, eval_every=30)
    summary = train(config)
    assert (summary.reason, summary.steps, summary.tokens) == ("max_steps", 60, 60 * 4 * 32)
    assert summary.best_checkpoint is not None
    model = load_model(summary.best_checkpoint)
    val_data = TokenDataset(data, "val")
    logprobs = []
    for tokens, targets in evaluation_batches(val_data, 4, 32, 2):
        logprobs.append(model(tokens).log_softmax(-1).gather(-1, targets[..., None]).flatten())
    loss = -torch.cat(logprobs).mean().item()
    assert summary.val_loss == pytest.approx(loss, rel=1e-5)
    assert loss < 4.0 < math.log(257)
    bits = loss * len(torch.cat(logprobs)) / math.log(2) / len(torch.cat(logprobs))
    bits *= val_data.num_tokens / val_data.num_bytes
    assert summary.bits_per_byte == pytest.approx(bits, rel=1e-5)


def float64_model() -> GPT:
    torch.manual_seed(3)
    return GPT(dataclasses.replace(TINY, vocab_size=19)).double()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
def test_every_target_weighs_the_same_in_whatever_pass_it_is(micro_batch_size):
    tokens, targets = torch.randint(19, (2, 6, 16), generator=torch.Generator().manual_seed(1))
    for row, ignored in enumerate((0, 15, 3, 16, 8, 1)):  # the fourth sequence has no target at all
        targets[row, :ignored] = -100
    expected = float64_model()
    loss = F.cross_entropy(expected(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()

    model = float64_model()
    group = Group(torch.device("cpu"))
    off = torch.autocast("cpu", enabled=False)
    got, count = accumulate_gradients(model, tokens, targets, micro_batch_size, group, off)
    assert count == (targets != -100).sum()
    assert got == pytest.approx(loss.item(), rel=1e-12)
    for (name, p), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, reference.grad, rtol=1e-11, atol=1e-14, msg=name)


def break_gradients(monkeypatch, broken: dict[int, float]) -> list[torch.Tensor]:
    """Multiply the gradients of the n-th steps (from 0) by a factor; returns the list that gets each step's weights before."""
    original, calls = leangpt.training.loop.accumulate_gradients, itertools.count()
    weights: list[torch.Tensor] = []

    def accumulate(model, *args):
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        result = original(model, *args)
        factor = broken.get(next(calls), 1.0)
        for p in model.parameters():
            p.grad *= factor
        return result

    monkeypatch.setattr(leangpt.training.loop, "accumulate_gradients", accumulate)
    return weights


def test_the_first_steps_cut_sequences_in_half(data, tmp_path, monkeypatch):
    """The same tokens and targets as without, in passes of as many tokens."""
    seen = {}
    forward = GPT.forward

    def watch(self, tokens, targets, *rest):
        if self.training:
            seen.setdefault(out.name, []).append((tokens.clone(), targets.clone()))
        return forward(self, tokens, targets, *rest)

    monkeypatch.setattr(GPT, "forward", watch)
    for fraction in (0.0, 0.3):
        out = tmp_path / str(fraction)
        options = {"max_steps": 10, "micro_batch_size": 2, "short_fraction": fraction}
        assert train(tiny_config(data, out, **options)).tokens == 10 * 4 * 32
    assert [len(tokens) for tokens, _ in seen["0.3"]] == [4] * 6 + [2] * 14
    for whole, cut in zip(seen["0.0"], seen["0.3"], strict=True):
        for a, b in zip(whole, cut, strict=True):
            assert torch.equal(a.flatten(), b.flatten())


def test_sequences_of_an_odd_length_are_not_cut(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", seq_len=31, short_fraction=0.5)
    with pytest.raises(ValueError, match="cuts sequences in half, and seq_len is odd: 31"):
        train(config)


def test_spikes_and_nan_are_skipped_and_counted(data, tmp_path, monkeypatch):
    monkeypatch.setattr(leangpt.training.optimizer, "WARM_IN_STEPS", 5)
    broken = {2: math.nan, 8: 50.0, 9: math.inf, 15: 1e30}
    weights = break_gradients(monkeypatch, broken)
    summary = train(tiny_config(data, tmp_path / "run", warmup_steps=0))
    unchanged = {i for i, (a, b) in enumerate(itertools.pairwise(weights)) if torch.equal(a, b)}
    assert unchanged == set(broken)
    assert summary.skipped_steps == 4
    assert all(w.isfinite().all() for w in weights)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    skips = {e["step"]: e["grad_norm"] for e in log if e["event"] == "skip"}
    assert skips.keys() == {3, 9, 10, 16}
    assert (skips[3], skips[10]) == ("nan", "inf")


def test_a_spike_is_taken_with_factor_0(data, tmp_path, monkeypatch):
    monkeypatch.setattr(leangpt.training.optimizer, "WARM_IN_STEPS", 5)
    break_gradients(monkeypatch, {8: 50.0})
    assert train(tiny_config(data, tmp_path / "run", spike_factor=0.0)).skipped_steps == 0


def test_too_many_skipped_steps_in_a_row_end_the_run_with_its_state_saved(
    data, tmp_path, monkeypatch
):
    weights = break_gradients(monkeypatch, dict.fromkeys((1, 2, 4, 5, 6, 7, 8), math.nan))
    config = tiny_config(data, tmp_path / "run", max_skipped=3)
    with pytest.raises(
        TrainingError,
        match=r"stopped after 3 steps in a row were skipped.*step-00000007 has.*--resume",
    ):
        train(config)
    model = load_model(tmp_path / "run/checkpoints/step-00000007")
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), weights[4])
    config = dataclasses.replace(config, resume=True)
    with pytest.raises(TrainingError, match="stopped after 3"):
        train(config)
    summary = train(dataclasses.replace(config, max_skipped=6))
    assert (summary.steps, summary.skipped_steps) == (20, 2 + 5)


def test_gradients_are_clipped_to_the_given_norm(data, tmp_path, monkeypatch):
    norms = []
    step = Optimizer.step

    def record(self, grad_scale):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        scale = 1.0 if grad_scale is None else grad_scale.item()
        norms.append(scale * torch.nn.utils.get_total_norm(grads).item())
        return step(self, grad_scale=grad_scale)

    monkeypatch.setattr(Optimizer, "step", record)
    train(tiny_config(data, tmp_path / "a", max_steps=3, grad_clip=0.01))
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    norms.clear()
    train(tiny_config(data, tmp_path / "b", max_steps=3, grad_clip=0.0))
    assert min(norms) > 0.1
    norms.clear()
    train(tiny_config(data, tmp_path / "c", max_steps=3, grad_clip=1e6))
    assert 0.1 < min(norms) < 1e3, "short gradients stay as they are"


def test_stops_at_the_target_loss(data, tmp_path):
    config = tiny_config(
        data, tmp_path / "run", max_steps=200, learning_rate=1e-2, target_loss=4.0, eval_every=5
    )
    summary = train(config)
    assert summary.reason == "target_loss"
    assert summary.val_loss <= 4.0
    assert summary.steps < 200 and summary.steps % 5 == 0
    assert (
        summary.last_checkpoint
        == summary.best_checkpoint
        == tmp_path / f"run/checkpoints/step-{summary.steps:08d}"
    )


def test_stops_on_the_clock_and_goes_on_when_given_more_time(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", max_minutes=1e-6)
    summary = train(config)
    assert (summary.reason, summary.steps) == ("max_minutes", 1)
    assert summary.val_loss is not None, "it is evaluated at the end"
    again = train(dataclasses.replace(config, resume=True))
    assert again == summary, "its time is over"
    assert train(dataclasses.replace(config, resume=True, max_minutes=10.0)).steps == 20


def test_starts_from_the_weights_of_a_model(data, tmp_path):
    torch.manual_seed(11)
    arch = dataclasses.replace(TINY, vocab_size=257, n_embd=24)
    model = GPT(arch)
    save_pretrained(model, tmp_path / "model", format="native")
    config = tiny_config(
        data, tmp_path / "run", model=str(tmp_path / "model"), max_steps=1, learning_rate=1e-9
    )
    summary = train(config)
    trained = load_model(summary.last_checkpoint)
    assert trained.config == arch
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_a_model_with_another_vocabulary_is_refused(data, tmp_path):
    save_pretrained(
        GPT(dataclasses.replace(TINY, vocab_size=99)), tmp_path / "model", format="native"
    )
    config = tiny_config(data, tmp_path / "run", model=str(tmp_path / "model"))
    with pytest.raises(
        ValueError, match=r"has 257 tokens, .*model has 99: prepare the data with the model's own"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 3}, r"micro_batch_size \(3\) must divide the 4 sequences"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not there: torch sees"),
        ({"device": "abacus"}, "device must be"),
    ],
    ids=["micro", "cuda", "device"],
)
def test_options_that_do_not_fit_are_refused(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_config(data, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_missing_data_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared data here"):
        train(tiny_config(tmp_path, tmp_path / "run"))


def test_dtype_follows_the_hardware(monkeypatch):
    config, cpu = TrainConfig(), torch.device("cpu")
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            leangpt.training.loop, "multiplies_bf16", lambda device, answer=has_bf16: answer
        )
        assert compute_dtype(config, cpu) == dtype
        assert compute_dtype(dataclasses.replace(config, dtype="float32"), cpu) == torch.float32
        assert compute_dtype(dataclasses.replace(config, dtype="bfloat16"), cpu) == torch.bfloat16


@pytest.mark.parametrize("has_bf16", [True, False])
def test_steps_are_measured_in_the_dtype_that_trains(data, tmp_path, monkeypatch, has_bf16):
    monkeypatch.setattr(leangpt.training.loop, "multiplies_bf16", lambda device: has_bf16)
    seen = set()

    def forward(self, *args):
        seen.add(torch.is_autocast_enabled("cpu"))
        return original(self, *args)

    original = GPT.forward
    monkeypatch.setattr(GPT, "forward", forward)
    train(tiny_config(data, tmp_path / "run", dtype="auto", minutes=1e-6, warmup_steps=1))
    assert seen == {has_bf16}


def test_the_number_of_steps_follows_from_the_minutes(data, tmp_path, monkeypatch):
    """On a clock that gives each measured step a second; and to measure does not change the run."""
    now = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(leangpt.training.loop, "time", clock)
    timed = tiny_config(data, tmp_path / "timed", minutes=23 / 60, warmup_steps=1)
    assert train(timed).steps == 20  # of 1.15 seconds
    assert load_config(timed.out).max_steps == 20
    counted = tiny_config(data, tmp_path / "counted", max_steps=20, warmup_steps=1)
    train(counted)
    assert content(timed.out)["checkpoint"] == content(counted.out)["checkpoint"]
    # a resumed run keeps its number
    (timed.out / "summary.json").unlink()
    again = dataclasses.replace(timed, resume=True, max_steps=TrainConfig.max_steps)
    assert train(again).steps == 20


def test_minutes_give_the_warm_up_its_time(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", minutes=1e-6, warmup_steps=3)
    assert train(config).steps == 6


def test_bfloat16_trains_in_autocast_with_float32_weights(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", dtype="bfloat16", max_steps=60, learning_rate=1e-2)
    summary = train(config)
    assert summary.val_loss < 4.0
    exact = train(dataclasses.replace(config, dtype="float32", out=tmp_path / "exact"))
    assert summary.val_loss != exact.val_loss
    assert summary.val_loss == pytest.approx(exact.val_loss, rel=0.05)
    assert {p.dtype for p in load_model(summary.last_checkpoint).parameters()} == {torch.float32}


def test_dropout_is_off_in_evaluation(data, tmp_path):
    arch = dataclasses.replace(TINY, dropout=0.3)
    config = tiny_config(
        data, tmp_path / "run", arch=arch, max_steps=2, learning_rate=1e-12, eval_every=1
    )
    train(config)
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    first, second = (line["val_loss"] for line in log if line["event"] == "eval")
    assert first == pytest.approx(second, abs=1e-7)


def test_every_step_of_every_process_draws_differently():
    draws = set()
    for seed, step, rank in itertools.product((1, 2), range(3), range(2)):
        leangpt.training.loop.seed_step(seed, step, Group(torch.device("cpu"), rank, size=2))
        draws.add(torch.rand(()).item())
    assert len(draws) == 12


def test_the_loop_is_compiled_where_asked(data, tmp_path, monkeypatch):
    """That the compiled function is what runs; what the compiler makes of it is not this project's."""
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda model: lambda *args: compiled.append(1) or model(*args)
    )
    train(tiny_config(data, tmp_path / "run", compile=True, max_steps=3))
    assert len(compiled) == 3
