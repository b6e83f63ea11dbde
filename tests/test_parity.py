"""Models of Hugging Face's transformers and the same files in this engine: equal logits, loss and gradients.

transformers is the oracle, on small random models of odd shapes. Two of its roundings to float32 would hide what is
compared in float64, so they are lifted there: RMSNorm (patched), and the loss (taken from its logits in float64).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from leangpt.pretrained import load_model, save_pretrained
from leangpt.pretrained.huggingface import names_of
from leangpt.pretrained.layout import parts

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

B, T = 2, 33


@dataclass
class Case:
    architecture: str
    n_head: int
    head_dim: int
    n_embd: int
    n_kv_head: int | None = None
    vocab_size: int = 97
    options: dict[str, Any] = field(default_factory=dict)
    n_layer: int = 2

    def __str__(self) -> str:
        shape = (
            f"h{self.n_head}x{self.head_dim}-kv{self.n_kv_head or self.n_head}-v{self.vocab_size}"
        )
        rope = self.options.get("rope_parameters", {}).get("rope_type", "")
        return "-".join([self.architecture, shape, *([rope] if rope else self.options)])

    def build(self) -> Any:
        """A model of transformers whose every parameter is random: norms and biases too."""
        if self.architecture == "GPT2":
            config = transformers.GPT2Config(
                vocab_size=self.vocab_size,
                n_positions=40,
                n_embd=self.n_embd,
                n_layer=self.n_layer,
                n_head=self.n_head,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **self.options,
            )
        else:
            config = getattr(transformers, f"{self.architecture}Config")(
                vocab_size=self.vocab_size,
                hidden_size=self.n_embd,
                intermediate_size=72,
                num_hidden_layers=self.n_layer,
                num_attention_heads=self.n_head,
                num_key_value_heads=self.n_kv_head or self.n_head,
                head_dim=self.head_dim,
                max_position_embeddings=40,
                **self.options,
            )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
                parameter.normal_(1.0 if is_norm_weight else 0.0, 0.1)
        return model


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **options}}


LLAMA3 = rope(
    "llama3",
    factor=2.5,
    original_max_position_embeddings=25,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
YARN = rope("yarn", factor=2.5, original_max_position_embeddings=16, beta_fast=4.0)
CASES = [
    Case("GPT2", 1, 64, 64),
    Case("GPT2", 5, 16, 80, options={"n_inner": 33, "activation_function": "gelu"}),
    Case("GPT2", 12, 40, 480, options={"tie_word_embeddings": False}),
    Case("GPT2", 5, 40, 200, vocab_size=50257, n_layer=1),
    Case("Llama", 12, 16, 192, 3),
    Case("Llama", 1, 64, 48, options=LLAMA3),
    Case("Llama", 5, 40, 40, 1, options=rope("linear", factor=2.5)),
    Case("Llama", 12, 64, 96, 4, options=YARN),
    Case("Llama", 5, 16, 80, options={"attention_bias": True, "mlp_bias": True}),
    Case("Llama", 1, 40, 40, vocab_size=50257, n_layer=1, options={"tie_word_embeddings": True}),
    Case("Mistral", 12, 16, 96, 2, options={"sliding_window": 7}),
    Case("Mistral", 5, 40, 72, 1, options={"sliding_window": None}),
    Case("Qwen2", 5, 16, 80, 1),
    Case(
        "Qwen2",
        12,
        40,
        480,
        4,
        options={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    Case("Qwen3", 5, 64, 72, 5),
    Case("Qwen3", 12, 40, 88, 6, options=YARN),
    Case("Qwen3", 1, 16, 24, options={"tie_word_embeddings": True}),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For such small models the threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def exact_rms_norm(self, x):
    """transformers' RMSNorm, which rounds to float32, in the dtype of its input."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def assert_close(name, ours, theirs, limit):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
    error = (ours - theirs).abs().max().item()
    assert error <= limit, f"{name}: largest difference {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_transformers(case, dtype, tmp_path, monkeypatch):
    theirs = case.build().to(dtype)
    if dtype == torch.float64:
        for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
            monkeypatch.setattr(norm, "forward", exact_rms_norm)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=dtype)

    def limit(reference):
        return 1e-9 if dtype == torch.float64 else 1e-5 * reference.abs().max().item()

    tokens, targets = torch.randint(case.vocab_size, (2, B, T))
    targets[0, ::3] = -100
    their_logits = theirs(tokens).logits
    assert_close("logits", ours(tokens), their_logits, limit(their_logits))

    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    loss = ours(tokens, targets)
    assert_close("loss", loss, their_loss, limit(their_loss))

    their_loss.backward()
    loss.backward()
    own = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradients = dict(parts(own, ours.config, names_of(theirs.config.architectures[0])))
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, gradients[name], gradient, limit(gradient))


def test_loss_is_that_of_transformers_itself(tmp_path):
    theirs = CASES[0].build()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(97, (B, T))
    expected = theirs(tokens, labels=tokens).loss
    loss = load_model(tmp_path)(tokens[:, :-1], tokens[:, 1:])
    assert_close("loss", loss, expected, 1e-5 * expected.item())


@pytest.mark.parametrize("case", [c for c in CASES if c.vocab_size == 97], ids=str)
def test_export_loads_in_transformers(case, tmp_path):
    theirs = case.build()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", format="hf")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(case.vocab_size, (B, T))
    assert torch.equal(back(tokens).logits, theirs(tokens).logits)  # the same weights and options
    assert load_model(tmp_path / "ours").config == ours.config
