import math

import pytest
import torch

from leangpt import GPT, GPTConfig, TrainConfig
from leangpt.training.optimizer import (
    MEAN_STEPS,
    WARM_IN_STEPS,
    SpikeDetector,
    learning_rate,
    make_optimizer,
    parameter_groups,
)

GPT2_STYLE = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, max_seq_len=4)
LLAMA_STYLE = GPTConfig(
    n_layer=1, n_head=2, n_embd=8, vocab_size=11, max_seq_len=4, norm="rms_norm", position="rotary",
    bias=False, qk_norm=True, tie_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "decaying"),
    [
        (GPT2_STYLE, {"wte", "blocks.0.qkv", "blocks.0.attn_out", "blocks.0.mlp_in", "blocks.0.mlp_out"}),
        (LLAMA_STYLE, {"wte", "head", "blocks.0.qkv", "blocks.0.attn_out", "blocks.0.mlp_in", "blocks.0.mlp_out"}),
    ],
    ids=["gpt2", "llama"],
)  # fmt: skip
def test_matrices_decay_and_nothing_else(config, decaying):
    model = GPT(config)
    groups = parameter_groups(model, TrainConfig(optimizer="adamw", weight_decay=0.3))
    decayed, others = sorted(groups, key=lambda group: -group["weight_decay"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in decayed["params"]} == {f"{name}.weight" for name in decaying}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize("config", [GPT2_STYLE, LLAMA_STYLE], ids=["gpt2", "llama"])
def test_muon_has_the_matrices_of_the_blocks(config):
    model = GPT(config)
    options = TrainConfig(optimizer="muon", muon_lr_scale=2.5, learning_rate=0.1)
    optimizer = make_optimizer(model, options)
    rates = {
        p: (group["algorithm"], group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        is_hidden = name.startswith("blocks.") and p.ndim == 2
        assert rates[p] == (("muon", 0.25) if is_hidden else ("adamw", 0.1)), name


def test_steps_are_those_of_torch():
    """torch.optim.Muon for the blocks' matrices, torch.optim.AdamW for the rest; gradients scaled before, by clipping."""
    torch.manual_seed(0)
    model = GPT(LLAMA_STYLE)
    expected = GPT(LLAMA_STYLE)
    expected.load_state_dict(model.state_dict())
    options = TrainConfig(optimizer="muon", learning_rate=1e-3, muon_lr_scale=3.0, weight_decay=0.2)
    optimizer = make_optimizer(model, options)
    hidden = [p for n, p in expected.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    tables = [
        p for n, p in expected.named_parameters() if not n.startswith("blocks.") and p.ndim == 2
    ]
    vectors = [p for p in expected.parameters() if p.ndim < 2]
    theirs = [
        torch.optim.Muon(
            hidden, lr=3e-3, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(options.beta1, options.beta2),
        ),
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        for p, e in zip(model.parameters(), expected.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            e.grad = 0.25 * p.grad
        optimizer.step(grad_scale=torch.tensor(0.25))
        for other in theirs:
            other.step()
    for (name, p), e in zip(model.named_parameters(), expected.parameters(), strict=True):
        moved, theirs_moved = p - before[name], e - before[name]
        # torch orthogonalizes in bfloat16
        limit = 0.05 if name.startswith("blocks.") and p.ndim == 2 else 1e-4
        error = (moved - theirs_moved).norm() / theirs_moved.norm()
        assert error < limit, (name, error)


def test_the_update_is_that_of_adamw():
    """One step by the formula of Loshchilov & Hutter, in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        model = GPT(GPT2_STYLE)
    finally:
        torch.set_default_dtype(torch.float32)
    config = TrainConfig(
        optimizer="adamw", learning_rate=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9
    )
    optimizer = make_optimizer(model, config)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 1 - 0.1 * 0.2 if p.ndim == 2 and name != "wpe.weight" else 1.0
        assert p.grad is not None
        expected = before[name] * decay - 0.1 * p.grad / (
            p.grad.abs() + 1e-8
        )  # bias-corrected moments: g, g^2
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12)


def test_warm_up_is_linear_and_begins_above_zero():
    config = TrainConfig(learning_rate=2.0, warmup_steps=4, max_steps=100)
    assert [learning_rate(config, step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(TrainConfig(learning_rate=2.0, warmup_steps=0), 0) == 2.0


def test_cosine_falls_on_half_a_wave():
    config = TrainConfig(
        schedule="cosine", learning_rate=1.0, min_learning_rate=0.2, warmup_steps=10, max_steps=111
    )
    rates = [learning_rate(config, step) for step in (10, 35, 60, 85, 110)]
    half = math.sqrt(0.5)  # cos(pi / 4)
    assert rates == pytest.approx([1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half, 0.2], abs=1e-12)


def test_wsd_is_stable_then_falls_linearly():
    config = TrainConfig(
        learning_rate=1.0, min_learning_rate=0.0, warmup_steps=10, max_steps=101, schedule="wsd", decay_fraction=0.4,
    )  # fmt: skip
    rates = [learning_rate(config, step) for step in (10, 59, 60, 80, 90, 100)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.25, 0.0], abs=1e-12)


def test_constant_stays():
    config = TrainConfig(learning_rate=1.0, warmup_steps=2, max_steps=10, schedule="constant")
    assert {learning_rate(config, step) for step in range(2, 10)} == {1.0}


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", 0.1), ("wsd", 0.0)])
def test_the_last_rate_unless_given(schedule, expected):
    config = TrainConfig(schedule=schedule, learning_rate=1.0, max_steps=500)
    assert learning_rate(config, 499) == pytest.approx(expected)


def detector_after(norms: list[float]) -> SpikeDetector:
    detector = SpikeDetector()
    for norm in norms:
        assert detector.accepts(norm, 3.0)
    return detector


def test_a_spike_is_measured_against_the_mean_and_only_after_a_warm_in():
    assert SpikeDetector(mean=1.0, count=WARM_IN_STEPS - 1).accepts(100.0, 3.0)
    detector = detector_after([1.0, 3.0] * (WARM_IN_STEPS // 2))
    assert detector.mean == pytest.approx(2.0)
    assert detector.accepts(5.9, 3.0)
    detector = detector_after([1.0, 3.0] * (WARM_IN_STEPS // 2))
    assert not detector.accepts(6.1, 3.0)
    assert (detector.skipped, detector.skipped_in_row) == (1, 1)
    assert detector.accepts(100.0, 0.0), "a factor of 0 lets every finite norm through"
    assert (detector.skipped, detector.skipped_in_row) == (1, 0)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(norm):
    detector = SpikeDetector()
    assert not detector.accepts(norm, 0.0)
    assert (detector.skipped, detector.count, detector.mean) == (1, 0, 0.0)


def test_a_lasting_change_is_let_through():
    detector = detector_after([1.0] * WARM_IN_STEPS)
    rejected = 0
    while not detector.accepts(5.0, 3.0):
        rejected += 1
    # each counts as 3 times the mean, which grows by 1 + 2 / MEAN_STEPS
    assert rejected == math.ceil(math.log(5 / 3) / math.log(1 + 2 / MEAN_STEPS))
