"""Every method of fine-tuning: what it trains, what it leaves alone, and that what it saves comes back."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from leangpt import GPT, GPTConfig
from leangpt.decoding.torch_decoder import TorchDecoder
from leangpt.finetune import methods
from leangpt.finetune.decoder import decoder_of_tuned
from leangpt.finetune.methods.int8 import Int8Linear
from leangpt.finetune.tasks import Classify
from leangpt.pretrained import load_model, save_pretrained

GPT2_STYLE = GPTConfig(vocab_size=97, n_layer=2, n_head=4, n_embd=32, max_seq_len=64)
LLAMA_STYLE = GPTConfig(
    vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, max_seq_len=64, norm="rms_norm", position="rotary",
    activation="swiglu", bias=False, qk_norm=True, value_residual=True, tie_embeddings=False,
)  # fmt: skip
STYLES = [GPT2_STYLE, LLAMA_STYLE]
OPTIONS = {
    "full": {},
    "head": {"lm_head": True},
    "lora": {"rank": 4},
    "adalora": {"rank": 4, "interval": 2},
    "prefix": {"length": 5},
    "adapter": {"width": 6},
}
ADDING = ["lora", "adalora", "prefix", "adapter"]
# parameters of GPT2_STYLE: the sizes of the matrices' inputs and outputs add up to 576 in two blocks
NUM_TRAINABLE = {
    "full": 30624,
    "head": 97 * 32,
    "lora": 4 * 2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32),
    "adalora": 6 * (2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32) + 8),
    "prefix": 2 * 2 * 5 * 32,
    "adapter": 4 * (2 * 6 * 32 + 6 + 32),
}


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(97, (2, 3, 20), generator=generator))


def train(adapted: methods.Adapted, steps: int, learning_rate: float = 0.01) -> list[float]:
    """Fit one batch; the losses."""
    tokens, targets = batch()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters().values(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = adapted.model(tokens, targets)
        loss.backward()
        adapted.optimizer_step(optimizer)
        losses.append(loss.item())
    return losses


@pytest.fixture(params=STYLES, ids=["gpt2", "llama"])
def base(request) -> GPT:
    return GPT(request.param)


@pytest.mark.parametrize("name", OPTIONS)
def test_trains_only_what_it_says(name, base):
    model = copy.deepcopy(base)
    adapted = methods.create(name, **OPTIONS[name]).attach(model, max_steps=12)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(adapted, 12)
    assert losses[-1] < losses[0]
    trained = adapted.trainable_parameters().keys()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (n not in trained), n
    if name in ADDING:
        assert all(torch.equal(p, model.get_parameter(n)) for n, p in base.named_parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_number_of_trainable_parameters(name):
    adapted = methods.create(name, **OPTIONS[name]).attach(GPT(GPT2_STYLE))
    assert adapted.num_trainable == NUM_TRAINABLE[name]


@pytest.mark.parametrize("name", ["full", "head", "lora", "adalora", "adapter"])
def test_starts_as_the_base_model(name, base):
    tokens, _ = batch()
    expected = base(tokens)
    methods.create(name, **OPTIONS[name]).attach(base)
    # not bit for bit: the MLP is no fused op any more
    torch.testing.assert_close(base(tokens), expected, rtol=0, atol=1e-6)


def test_adalora_starts_where_its_penalty_is_zero(base):
    """With columns and rows of length 1: where they are short, the gradients of singular values are too."""
    methods.create("adalora", rank=4).attach(base)
    for block in base.blocks:
        delta = block.mlp_in.delta
        for rows in (delta.down, delta.up.T):
            torch.testing.assert_close(rows @ rows.T, torch.eye(6), rtol=0, atol=1e-5)


def test_a_head_of_the_task_trains_alone(base):
    adapted = methods.create("head").attach(base)
    assert adapted.trainable_parameters() == {}


def test_tied_embeddings_stay_when_the_head_trains():
    model = GPT(GPT2_STYLE)
    table = model.wte.weight.detach().clone()
    train(methods.create("head", lm_head=True).attach(model), 3)
    assert torch.equal(model.wte.weight, table)
    assert not torch.equal(model.head_weight, table) and not model.config.tie_embeddings


@pytest.mark.parametrize("name", OPTIONS)
def test_saves_and_loads(name, base, tmp_path):
    trained = copy.deepcopy(base)
    adapted = methods.create(name, **OPTIONS[name]).attach(trained, max_steps=12)
    train(adapted, 12)
    adapted.save(tmp_path)
    loaded = methods.load(tmp_path, base)
    assert loaded.method == adapted.method and loaded.base_hash == adapted.base_hash
    tokens, _ = batch(2)
    torch.testing.assert_close(base(tokens), trained(tokens), rtol=0, atol=1e-6)
    again = tmp_path / "again"
    loaded.save(again)
    first, second = (load_file(folder / "adapter.safetensors") for folder in (tmp_path, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("name", [*OPTIONS, "reparametrized"])
def test_goes_back_to_an_earlier_state(name, base):
    """As a training does that keeps its best weights; AdaLoRA has fewer ranks by then."""
    options = {"reparametrization": 24} if name == "reparametrized" else OPTIONS[name]
    method = methods.create("prefix" if name == "reparametrized" else name, **options)
    adapted = method.attach(base, max_steps=12)
    train(adapted, 5)
    tokens, _ = batch(2)
    expected = base(tokens).detach()
    state = copy.deepcopy(adapted.state_dict())
    train(adapted, 7)
    assert not torch.equal(base(tokens), expected)
    adapted.load_state_dict(state)
    assert torch.equal(base(tokens), expected)


def test_a_prefix_is_saved_without_the_mlp_that_made_it(base, tmp_path):
    trained = copy.deepcopy(base)
    adapted = methods.create("prefix", length=5, reparametrization=24).attach(trained)
    losses = train(adapted, 10)
    assert losses[-1] < losses[0]
    adapted.save(tmp_path)
    assert load_file(tmp_path / "adapter.safetensors").keys() == {"prefix.keys", "prefix.values"}
    methods.load(tmp_path, base)
    tokens, _ = batch()
    assert torch.equal(base(tokens), trained(tokens))


def test_another_base_is_an_error(base, tmp_path):
    methods.create("lora").attach(copy.deepcopy(base)).save(tmp_path)
    with torch.no_grad():
        base.blocks[1].norm_2.weight[3] += 1e-6
    with pytest.raises(ValueError, match="another base model.*load the model"):
        methods.load(tmp_path, base)
    assert not base.has_additions


def test_the_dtype_of_equal_weights_does_not_count(base):
    rounded = base.bfloat16()
    assert methods.base_hash(copy.deepcopy(rounded).float()) == methods.base_hash(rounded)


def damage(name, value):
    def edit(options):
        options[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (damage("format_version", 2), "format_version must be 1, got 2"),
        (damage("method", "magic"), "method must be one of full, lora.*got 'magic'"),
        (damage("options", {"rang": 8}), "lora has no option rang, only rank"),
        (damage("options", {"rank": 0}), "rank must be positive, got 0"),
        (
            damage("options", {"rank": 9}),
            r"blocks.0.qkv.delta.down must be \(9, 32\), got \(8, 32\)",
        ),
        (lambda options: options.pop("base_sha256"), "adapter.json: no valid options"),
    ],
)
def test_damaged_options(edit, message, tmp_path):
    model = GPT(GPT2_STYLE)
    methods.create("lora").attach(copy.deepcopy(model)).save(tmp_path)
    path = tmp_path / "adapter.json"
    options = json.loads(path.read_text())
    edit(options)
    path.write_text(json.dumps(options))
    with pytest.raises(ValueError, match=message):
        methods.load(tmp_path, model)


def test_damaged_weights(tmp_path):
    model = GPT(GPT2_STYLE)
    methods.create("lora").attach(copy.deepcopy(model)).save(tmp_path)
    path = tmp_path / "adapter.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "qkv" not in n}, path)
    with pytest.raises(ValueError, match="missing tensor blocks.0.qkv.delta.down"):
        methods.load(tmp_path, copy.deepcopy(model))
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="adapter.safetensors"):
        methods.load(tmp_path, copy.deepcopy(model))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="adapter.safetensors"):
        methods.load(tmp_path, copy.deepcopy(model))
    with pytest.raises(FileNotFoundError, match="no adapter.json"):
        methods.load(tmp_path / "nowhere", model)


@pytest.mark.parametrize("name", ["lora", "adalora", "full", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_logits_are_the_unmerged_ones(name, dtype, base, tmp_path):
    base = base.to(dtype)
    adapted = methods.create(name, **OPTIONS[name]).attach(base, max_steps=12)
    train(adapted, 12)
    tokens, _ = batch(2)
    expected = base(tokens).detach()
    merged = adapted.merge()
    assert not merged.has_additions and all(p.requires_grad for p in merged.parameters())
    bound = 32 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=bound)
    save_pretrained(
        merged, tmp_path / "merged"
    )  # a plain model: it is saved and loaded as any other
    again = load_model(tmp_path / "merged", dtype=dtype)
    assert again.config.tie_embeddings == (base.config.tie_embeddings and name != "head")
    torch.testing.assert_close(again(tokens), merged(tokens).detach(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "reason"), [("prefix", "keys and values"), ("adapter", "linear")])
def test_what_cannot_be_merged_says_why(name, reason):
    adapted = methods.create(name).attach(GPT(GPT2_STYLE))
    with pytest.raises(ValueError, match=reason):
        adapted.merge()


def test_a_model_with_additions_is_not_taken_for_a_plain_one(tmp_path):
    model = GPT(GPT2_STYLE)
    methods.create("lora").attach(model)
    with pytest.raises(ValueError, match="save_pretrained takes a model's own weights.*merge"):
        save_pretrained(model, tmp_path / "model")
    with pytest.raises(ValueError, match="attached to the model already"):
        methods.create("prefix").attach(model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "magic",
            {},
            "method must be one of full, lora, adalora, prefix, adapter, head, got 'magic'",
        ),
        ("lora", {"width": 8}, "lora has no option width, only rank, alpha, dropout"),
        ("full", {"rank": 8}, "full has no option rank, only none"),
        ("lora", {"rank": 0}, "rank must be positive, got 0"),
        ("lora", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (
            "lora",
            {"targets": ("q_proj",)},
            "targets must be of qkv, attn_out, mlp_in, mlp_out, head, wte, got 'q_proj'",
        ),
        (
            "adalora",
            {"targets": ("head",)},
            "targets must be of qkv, attn_out, mlp_in, mlp_out, got 'head'",
        ),
        ("lora", {"targets": ()}, "targets must name at least one"),
        ("adalora", {"initial_rank": 4}, r"initial_rank must be at least rank \(8\), got 4"),
        ("adalora", {"warmup": 0.5, "cooldown": 0.5}, "must leave steps between them"),
        ("prefix", {"length": 0}, "length must be positive, got 0"),
        ("prefix", {"reparametrization": 0}, "reparametrization must be positive, got 0"),
        ("adapter", {"width": -1}, "width must be positive, got -1"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.create(name, **options)


def test_lora_on_some_matrices_only():
    model = GPT(GPT2_STYLE)
    adapted = methods.create("lora", rank=2, targets=("qkv", "mlp_out")).attach(model)
    matrices = {name.split(".delta.")[0] for name in adapted.trainable_parameters()}
    assert matrices == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "mlp_out")}


@pytest.mark.parametrize("targets", [("head",), ("wte",), ("mlp_in", "head", "wte")], ids=str)
def test_lora_of_head_and_token_table(targets, base, tmp_path):
    """It starts as the base, trains alone, is saved and loaded, and merges; tied tables part then."""
    tokens, _ = batch(2)
    plain = base(tokens).detach()
    trained = copy.deepcopy(base)
    adapted = methods.create("lora", rank=4, targets=targets).attach(trained)
    torch.testing.assert_close(trained(tokens), plain, rtol=0, atol=1e-6)
    names = {f"{t}_delta" for t in targets if t != "mlp_in"}
    assert {n.split(".")[0] for n in adapted.trainable_parameters()} - {"blocks"} == names
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    losses = train(adapted, 12)
    assert losses[-1] < losses[0]
    assert all(torch.equal(trained.get_parameter(n), p) for n, p in before.items())
    expected = trained(tokens).detach()
    adapted.save(tmp_path / "lora")
    loaded = copy.deepcopy(base)
    methods.load(tmp_path / "lora", loaded)
    torch.testing.assert_close(loaded(tokens), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="fine-tuning has additions"):
        save_pretrained(trained, tmp_path / "model")
    with pytest.raises(ValueError, match="beside head or token table: merge it"):
        adapted.additions()
    decoded = decoder_of_tuned(adapted)
    sequence = decoded.add_sequence()
    row = tokens[0].tolist()
    logits = decoded.forward(row, [sequence] * 20, range(20), range(20))
    torch.testing.assert_close(torch.from_numpy(logits), expected[0], rtol=0, atol=1e-4)
    merged = adapted.merge()
    torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=1e-5)
    assert not merged.has_additions and not merged.config.tie_embeddings
    assert torch.equal(merged.wte.weight, base.wte.weight) == ("wte" not in targets)
    assert torch.equal(merged.head_weight, base.head_weight) == ("head" not in targets)


def test_the_torch_decoder_runs_lora_of_head_and_token_table(base):
    """As samples are drawn while it trains."""
    adapted = methods.create("lora", rank=4, targets=("head", "wte")).attach(base)
    train(adapted, 8)
    tokens = batch(2)[0][0].tolist()
    decoder = TorchDecoder(base)
    sequence = decoder.add_sequence()
    logits = decoder.forward(tokens, [sequence] * 20, range(20), range(20))
    expected = base(torch.tensor([tokens])).detach()[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)
    targets = tokens[1:]
    again = decoder.add_sequence()
    logprobs = decoder.forward(
        tokens, [again] * 20, range(20), range(19), output="logprob_of", targets=targets
    )
    wanted = expected.log_softmax(-1)[range(19), targets]
    torch.testing.assert_close(torch.from_numpy(logprobs), wanted, rtol=0, atol=1e-5)


def test_a_task_with_a_head_of_its_own_does_not_use_that_of_the_model(base):
    methods.create("lora", targets=("qkv", "head")).attach(base)
    with pytest.raises(ValueError, match="leave it out of targets"):
        Classify(labels=("a", "b")).make_module(base, ())


def test_dropout_of_lora_is_on_in_training_only():
    model = GPT(GPT2_STYLE)
    adapted = methods.create("lora", dropout=0.5).attach(model)
    with torch.no_grad():
        for p in adapted.trainable_parameters().values():
            p.fill_(0.01)
    tokens, _ = batch()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("name", OPTIONS)
def test_recomputed_blocks_give_the_same_gradients(name, base):
    adapted = methods.create(name, **OPTIONS[name]).attach(base, max_steps=4)
    train(adapted, 2)  # past the zeros of the start
    gradients = []
    for recomputes in (False, True):
        base.recomputes_blocks = recomputes
        base.zero_grad()
        base(*batch(2)).backward()
        gradients.append({n: p.grad.clone() for n, p in adapted.trainable_parameters().items()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


INT8_IN_FULL = [
    pytest.param(name, True, marks=pytest.mark.full) for name in ADDING if name != "lora"
]


@pytest.mark.parametrize(
    ("name", "int8"), [*((name, False) for name in ADDING), ("lora", True), *INT8_IN_FULL]
)
def test_autocast_and_compile(name, int8, base):
    adapted = methods.create(name, **OPTIONS[name], int8_base=int8).attach(base, max_steps=8)
    train(adapted, 4)
    tokens, targets = batch(2)

    def gradients(model, **autocast):
        base.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
            loss = model(tokens, targets)
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in adapted.trainable_parameters().items()}

    loss, expected = gradients(base, enabled=False)
    rounded, actual = gradients(base)
    assert abs(rounded - loss) < 0.02 * loss
    for n, gradient in expected.items():
        assert actual[n].dtype == torch.float32
        assert (actual[n] - gradient).norm() <= 0.1 * gradient.norm() + 1e-6, n
    torch.compiler.reset()  # models of other tests count towards the limit of recompilations
    compiled = torch.compile(base, backend="aot_eager", fullgraph=True)
    same, actual = gradients(compiled, enabled=False)
    assert same == pytest.approx(loss, rel=1e-5)
    for n, gradient in expected.items():
        torch.testing.assert_close(actual[n], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ADDING)
def test_int8_base(name, base, tmp_path):
    """The frozen matrices are the rounded ones, in a quarter of the bytes, and saving and merging keep to them."""
    tokens, _ = batch()
    plain = base(tokens).detach()
    original = copy.deepcopy(base)
    matrices = sum(p.numel() for n, p in base.named_parameters() if "blocks" in n and p.ndim == 2)
    frozen_bytes = sum(p.nbytes for p in base.parameters())
    adapted = methods.create(name, **OPTIONS[name], int8_base=True).attach(base, max_steps=12)
    rounded = [m for m in base.modules() if isinstance(m, Int8Linear)]
    assert sum(m.values.nbytes for m in rounded) == matrices
    own = sum(t.nbytes for t in base.state_dict().values()) - sum(
        p.nbytes for p in adapted.trainable_parameters().values()
    )
    scales = sum(m.scale.nbytes for m in rounded)
    assert own == frozen_bytes - 3 * matrices + scales
    if name != "prefix":
        assert 0 < (base(tokens) - plain).abs().max() < 0.02 * plain.abs().max()
    losses = train(adapted, 12)
    assert losses[-1] < losses[0]
    adapted.save(tmp_path)
    expected = base(tokens).detach()
    methods.load(tmp_path, original)
    torch.testing.assert_close(original(tokens), expected, rtol=0, atol=1e-6)
    if name in ("lora", "adalora"):
        merged = adapted.merge()
        torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=1e-5)
        assert {n for n, _ in merged.named_parameters()} == {
            n for n, _ in GPT(base.config).named_parameters()
        }
