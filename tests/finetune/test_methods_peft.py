"""LoRA and AdaLoRA against Hugging Face's `peft` on the same weights, and its files."""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor

from leangpt import GPT, GPTConfig
from leangpt.finetune import methods
from leangpt.pretrained import load_model

transformers.logging.set_verbosity_error()

# our names of peft's modules
MODULES = {
    "attn.c_attn": "qkv",
    "attn.c_proj": "attn_out",
    "mlp.c_fc": "mlp_in",
    "mlp.c_proj": "mlp_out",
}
TARGETS = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture
def gpt2(tmp_path) -> tuple[transformers.GPT2LMHeadModel, GPT]:
    """The same GPT-2 in both."""
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    model.save_pretrained(tmp_path / "gpt2")
    return model, load_model(tmp_path / "gpt2", dtype=torch.float64).train()


def our_name(name: str) -> str:
    """Of a parameter of peft's model: `….transformer.h.0.attn.c_attn.lora_A.default.weight`."""
    module, kind = name.split(".h.")[1].split(".lora_")
    block, _, module = module.partition(".")
    field = {"A": "down", "B": "up", "E": "singular"}[kind[0]]
    return f"blocks.{block}.{MODULES[module]}.delta.{field}"


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {our_name(n): p for n, p in model.named_parameters() if ".lora_" in n}


def copy_weights(adapted: methods.Adapted, theirs: dict[str, torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for name, p in adapted.trainable_parameters().items():
            p.copy_(theirs[name].view_as(p))


def batch(seed: int = 3) -> Tensor:
    return torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(seed))


def their_loss(model: torch.nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """From its logits in float64: transformers' own loss is rounded to float32."""
    return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten())


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.normal_(std=0.2)


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("targets", [TARGETS, ["c_attn"], ["mlp.c_proj", "attn.c_proj"]], ids=str)
def test_lora_equals_peft(rank_stabilized, targets, gpt2):
    theirs, ours = gpt2
    config = LoraConfig(
        r=5, lora_alpha=7, target_modules=targets, use_rslora=rank_stabilized, fan_in_fan_out=True
    )
    theirs = get_peft_model(theirs, config)
    randomize(theirs)
    parameters = adapter_parameters(theirs)
    names = {name.split(".")[2] for name in parameters}
    adapted = methods.create(
        "lora",
        rank=5,
        alpha=7.0,
        rank_stabilized=rank_stabilized,
        targets=tuple(t for t in MODULES.values() if t in names),
    ).attach(ours)
    assert adapted.trainable_parameters().keys() == parameters.keys()
    copy_weights(adapted, parameters)

    tokens = batch()
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-12)
    targets = tokens.roll(-1, 1)
    their_loss(theirs, tokens, targets).backward()
    ours(tokens, targets).backward()
    for name, p in adapted.trainable_parameters().items():
        assert p.grad is not None and p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, parameters[name].grad, rtol=0, atol=1e-12)
    merged = adapted.merge()
    torch.testing.assert_close(
        merged(tokens), theirs.merge_and_unload()(tokens).logits, rtol=0, atol=1e-12
    )


def importance_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of each triplet in peft's allocator, by our names of the matrices."""
    allocator = model.base_model.rankallocator
    importance = {}
    for name in allocator.exp_avg_ipt:
        score = allocator._element_score(name)
        matrix, field = our_name(name).split(".delta.")
        mean = {"down": score.mean(1), "up": score.mean(0), "singular": score.flatten()}[field]
        importance[matrix] = importance.get(matrix, 0) + mean
    return importance


def test_adalora_equals_peft(gpt2):
    """Importance, allocation and weights over a whole training, step by step."""
    theirs, ours = gpt2
    steps, warmup, cooldown, interval = 20, 4, 6, 3
    config = AdaLoraConfig(
        init_r=6, target_r=3, tinit=warmup, tfinal=cooldown, deltaT=interval, beta1=0.8, beta2=0.9, lora_alpha=6,
        total_step=steps, orth_reg_weight=0.0, target_modules=TARGETS, fan_in_fan_out=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(theirs, config)
    adapted = methods.create(
        "adalora", rank=3, initial_rank=6, warmup=warmup / steps, cooldown=cooldown / steps, interval=interval,
        beta1=0.8, beta2=0.9, alpha=6 / (1 + 1e-5 / 6), orthogonality=0.0,
    ).attach(ours, max_steps=steps)  # fmt: skip
    parameters = adapter_parameters(theirs)
    assert adapted.trainable_parameters().keys() == parameters.keys()
    copy_weights(adapted, parameters)
    optimizers = [
        torch.optim.SGD(p.values(), lr=2.0) for p in (parameters, adapted.trainable_parameters())
    ]
    num_kept = []
    for step in range(1, steps + 1):
        tokens = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        targets = tokens.roll(-1, 1)
        their_loss(theirs, tokens, targets).backward()
        optimizers[0].step()
        theirs.base_model.update_and_allocate(step)

        ours(tokens, targets).backward()
        adapted.optimizer_step(optimizers[1])
        if step < steps - cooldown:  # then peft forgets them
            for name, expected in importance_of(theirs).items():
                torch.testing.assert_close(adapted.importance()[name], expected, rtol=1e-9, atol=0)
        for name, p in adapted.trainable_parameters().items():
            torch.testing.assert_close(p, parameters[name].view_as(p), rtol=1e-9, atol=1e-12)
        num_kept.append(sum(adapted.ranks().values()))
    assert num_kept[warmup - 1] == 6 * 8 and num_kept[-1] == 3 * 8
    assert num_kept == sorted(num_kept, reverse=True)
    assert len(set(adapted.ranks().values())) > 1, "all matrices got the same rank"


def test_penalty_of_adalora_is_that_of_the_paper():
    """Its gradient, against autograd of the formula."""
    model = GPT(GPTConfig(vocab_size=61, n_layer=1, n_head=2, n_embd=16, max_seq_len=16)).double()
    adapted = methods.create("adalora", rank=3, orthogonality=0.7).attach(model)
    parameters = adapted.trainable_parameters()
    for p in parameters.values():
        torch.nn.init.normal_(p)
    before = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
    penalty = torch.zeros((), dtype=torch.float64)
    for name, p in before.items():
        if not name.endswith("singular"):
            rows = p if name.endswith("down") else p.T
            penalty = penalty + 0.7 * (rows @ rows.T - torch.eye(len(rows))).square().sum()
    penalty.backward()
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    adapted.optimizer_step(torch.optim.SGD(parameters.values(), lr=1.0))
    for name, p in parameters.items():
        step = before[name] if before[name].grad is None else before[name] - before[name].grad
        torch.testing.assert_close(p, step.detach())


def test_adalora_resumes():
    """A training that was cut in two ends as the whole one."""
    config = GPTConfig(vocab_size=61, n_layer=2, n_head=2, n_embd=16, max_seq_len=16)
    base = GPT(config)

    def start(state=None, optimizer_state=None):
        adapted = methods.create("adalora", rank=2, interval=2).attach(
            copy.deepcopy(base), max_steps=20
        )
        optimizer = torch.optim.AdamW(adapted.trainable_parameters().values(), lr=0.01)
        if state:
            adapted.load_state_dict(state)
            optimizer.load_state_dict(optimizer_state)
        return adapted, optimizer

    def train(adapted, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            tokens = batch(step)
            adapted.model(tokens, tokens.roll(-1, 1)).backward()
            adapted.optimizer_step(optimizer)

    whole, optimizer = start()
    weights = {n: p.detach().clone() for n, p in whole.trainable_parameters().items()}
    train(whole, optimizer, range(20))
    first, optimizer = start()
    copy_weights(first, weights)
    train(first, optimizer, range(9))
    state = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = start(*state)
    train(second, optimizer, range(9, 20))
    assert second.ranks() == whole.ranks()
    for name, p in second.trainable_parameters().items():
        assert torch.equal(p, whole.trainable_parameters()[name])


@pytest.mark.parametrize("with_head", [True, False], ids=["GPT2LMHeadModel", "GPT2Model"])
def test_reads_what_peft_saved(with_head, gpt2, tmp_path):
    theirs, ours = gpt2
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapted = get_peft_model(theirs if with_head else theirs.transformer, config)
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "lora")
    loaded = methods.load_peft(tmp_path / "lora", ours)
    assert loaded.method == methods.create("lora", rank=3, alpha=5, targets=("qkv", "mlp_in"))
    tokens = batch()
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-6)  # the file is float32


@pytest.mark.parametrize(
    "targets", [("qkv", "attn_out", "mlp_in", "mlp_out"), ("mlp_out",)], ids=str
)
def test_peft_reads_what_is_saved(targets, gpt2, tmp_path):
    theirs, ours = gpt2
    adapted = methods.create(
        "lora", rank=3, alpha=5.0, dropout=0.1, targets=targets, rank_stabilized=True
    ).attach(ours)
    with torch.no_grad():
        for p in adapted.trainable_parameters().values():
            p.normal_(std=0.2)
    methods.save_peft(adapted, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "lora").eval()
    ours.eval()
    tokens = batch()
    torch.testing.assert_close(ours(tokens), loaded(tokens).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias is not supported, got 'all'"),
        ({"rank_pattern": {"c_attn": 4}}, "rank_pattern is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base's weights"),
        ({"something_new": 1}, "something_new is not supported"),
        ({"r": 4}, r"lora_A.weight must be \(4, 24\), got \(3, 24\)"),
    ],
)
def test_peft_files_that_are_not_read(change, message, gpt2, tmp_path):
    theirs, ours = gpt2
    config = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(theirs, config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        methods.load_peft(tmp_path, ours)


def test_peft_files_are_for_lora_and_known_models(gpt2, tmp_path):
    _, ours = gpt2
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        methods.load_peft(tmp_path, ours)
    with pytest.raises(ValueError, match="are written of lora, got adalora"):
        methods.save_peft(methods.create("adalora").attach(ours), tmp_path)
    llama = GPT(
        GPTConfig(
            vocab_size=61,
            n_layer=1,
            n_head=2,
            n_embd=16,
            max_seq_len=16,
            position="rotary",
            norm="rms_norm",
        )
    )
    with pytest.raises(ValueError, match="models that transformers has, .*activation='gelu_tanh'"):
        methods.save_peft(methods.create("lora").attach(llama), tmp_path)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def llama(request, tmp_path) -> tuple[transformers.LlamaForCausalLM, GPT]:
    """The same Llama in both, with fewer heads of keys than of queries."""
    config = transformers.LlamaConfig(
        vocab_size=61, max_position_embeddings=32, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    model.save_pretrained(tmp_path / "llama")
    return model, load_model(tmp_path / "llama", dtype=torch.float64).train()


def randomize_lora(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.2)


LLAMA_TARGETS = {
    "usual": (["q_proj", "v_proj"], ("qkv",), 2),
    "one": (["o_proj"], ("attn_out",), 1),
    "mlp": (["up_proj", "down_proj"], ("mlp_in", "mlp_out"), 1),
    "all": (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ("qkv", "attn_out", "mlp_in", "mlp_out"),
        3,
    ),
    "tables": (["k_proj", "lm_head", "embed_tokens"], ("qkv", "head", "wte"), 1),
}


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("case", LLAMA_TARGETS)
def test_files_of_llama_go_both_ways(case, rank_stabilized, llama, tmp_path):
    """Their q, k and v lie in one matrix of ours; what is read is written again."""
    theirs, ours = llama
    modules, targets, growth = LLAMA_TARGETS[case]
    plain = theirs(batch()).logits
    theirs = get_peft_model(
        theirs, LoraConfig(r=3, lora_alpha=5, target_modules=modules, use_rslora=rank_stabilized)
    )
    randomize_lora(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    base = copy.deepcopy(ours)
    adapted = methods.load_peft(tmp_path / "theirs", ours)
    assert isinstance(adapted.method, methods.METHODS["lora"])
    assert (adapted.method.targets, adapted.method.rank) == (targets, 3 * growth)
    expected = theirs(batch()).logits
    assert (expected - plain).abs().max() > 0.01
    # the files are float32
    torch.testing.assert_close(ours(batch()), expected, rtol=0, atol=1e-6)

    methods.save_peft(adapted, tmp_path / "ours")
    again = methods.load_peft(tmp_path / "ours", base)
    torch.testing.assert_close(base(batch()), ours(batch()), rtol=0, atol=1e-12)
    assert again.method.rank <= 3 * growth
    loaded = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(batch()).logits, expected, rtol=0, atol=1e-6)
    assert loaded.peft_config["default"].r == 3
    merged = adapted.merge()
    torch.testing.assert_close(merged(batch()), expected, rtol=0, atol=1e-6)


def test_peft_reads_what_was_trained_on_a_llama(llama, tmp_path):
    """Where q, k and v have the rows of `down` in common."""
    theirs, ours = llama
    adapted = methods.create("lora", rank=3, alpha=5.0).attach(ours)
    with torch.no_grad():
        for p in adapted.trainable_parameters().values():
            p.normal_(std=0.2)
    methods.save_peft(adapted, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "lora").eval()
    torch.testing.assert_close(ours(batch()), loaded(batch()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["c_fc", "wte", "lm_head"]], ids=str)
def test_lora_of_head_and_token_table_equals_peft(targets, gpt2, tmp_path):
    """Both are one tensor in GPT-2, and stay one below their products; merged they are two."""
    theirs, ours = gpt2
    theirs = get_peft_model(
        theirs, LoraConfig(r=5, lora_alpha=7, target_modules=targets, fan_in_fan_out=True)
    )
    randomize_lora(theirs)
    names = {"lm_head": "head", "wte": "wte", "c_fc": "mlp_in"}
    adapted = methods.create(
        "lora", rank=5, alpha=7.0, targets=tuple(names[t] for t in targets)
    ).attach(ours)
    parameters = {}
    for name, p in theirs.named_parameters():
        if ".lora_" in name:
            module, kind = name.removeprefix("base_model.model.").split(".lora_")
            field = "down" if "A" in kind else "up"
            ours_name = {"lm_head": "head_delta", "transformer.wte": "wte_delta"}.get(module)
            block = module.split(".")[2:3]
            ours_name = ours_name or f"blocks.{block[0]}.mlp_in.delta"
            parameters[f"{ours_name}.{field}"] = p
    assert adapted.trainable_parameters().keys() == parameters.keys()
    copy_weights(adapted, parameters)

    tokens = batch()
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-12)
    wanted = tokens.roll(-1, 1)
    their_loss(theirs, tokens, wanted).backward()
    ours(tokens, wanted).backward()
    for name, p in adapted.trainable_parameters().items():
        assert p.grad is not None and p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, parameters[name].grad, rtol=0, atol=1e-12)
    methods.save_peft(adapted, tmp_path / "lora")
    table = ours.wte.weight.detach().clone()
    merged = adapted.merge()
    torch.testing.assert_close(merged(tokens), expected, rtol=0, atol=1e-12)
    if targets != ["c_fc"]:
        assert not merged.config.tie_embeddings
        assert torch.equal(merged.wte.weight, table) == ("wte" not in targets)
        assert torch.equal(merged.head_weight, table) == ("lm_head" not in targets)
    loaded = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path / "lora").eval()
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=1e-6)
