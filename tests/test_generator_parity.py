"""Greedy text equals that of transformers' `generate`, token for token, in float64."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from leangpt import SamplingParams
from leangpt.generation.generator import Generator
from leangpt.pretrained import load_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB_SIZE = 97
PROMPT_LENGTHS = (1, 2, 7, 30, 13)
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=40, n_layer=3, n_head=5
    ),
    "llama": transformers.LlamaConfig(**LLAMA),
    "mistral": transformers.MistralConfig(**LLAMA, head_dim=10, sliding_window=6),
    "qwen3": transformers.Qwen3Config(**LLAMA, head_dim=16),
}


def exact_rms_norm(self, x):
    """transformers' RMSNorm, which rounds to float32, in the dtype of its input."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For such small models the threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_rms_norm)


@pytest.fixture(params=CONFIGS)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Generator]:
    """A random model of transformers, and this engine's generator on its files."""
    oracle = AutoModelForCausalLM.from_config(CONFIGS[request.param]).double().eval()
    with torch.no_grad():
        for (
            parameter
        ) in oracle.parameters():  # large, so that the text does not settle on one token
            parameter += 0.3 * torch.randn_like(parameter)
    oracle.save_pretrained(tmp_path)
    return oracle, Generator(load_model(tmp_path, dtype="float64"), max_batch_tokens=11)


def make_prompts() -> list[list[int]]:
    return [torch.randint(VOCAB_SIZE, (length,)).tolist() for length in PROMPT_LENGTHS]


def continuation(oracle: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    tokens = torch.tensor([prompt])
    out = oracle.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        **{"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0} | options,
    )
    return out[0, len(prompt) :].tolist()


def test_greedy(models):
    oracle, generator = models
    prompts = make_prompts()
    expected = [continuation(oracle, prompt) for prompt in prompts]
    assert len(set(itertools.chain(*expected))) > 10  # says something
    completions = generator.generate(prompts, SamplingParams(temperature=0, max_new_tokens=30))
    assert [c.token_ids for c in completions] == expected


def test_greedy_with_repetition_penalty(models):
    oracle, generator = models
    prompts = make_prompts()
    expected = [continuation(oracle, prompt, repetition_penalty=1.7) for prompt in prompts]
    assert expected != [continuation(oracle, prompt) for prompt in prompts]
    params = SamplingParams(temperature=0, max_new_tokens=30, repetition_penalty=1.7)
    assert [c.token_ids for c in generator.generate(prompts, params)] == expected


def test_end_tokens(models):
    oracle, generator = models
    prompts = make_prompts()
    ends = sorted({continuation(oracle, prompt)[4] for prompt in prompts})
    expected = [continuation(oracle, prompt, eos_token_id=ends) for prompt in prompts]
    params = SamplingParams(temperature=0, max_new_tokens=30, stop_token_ids=tuple(ends))
    completions = generator.generate(prompts, params)
    assert [c.token_ids for c in completions] == expected
    assert all(c.finish_reason == "stop" for c in completions)


def test_logprobs(models):
    oracle, generator = models
    prompts = make_prompts()
    params = SamplingParams(temperature=1.0, max_new_tokens=20, seed=3, logprobs=0)
    for prompt, completion in zip(prompts, generator.generate(prompts, params), strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + completion.token_ids])).logits[0]
        rows = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-9)
