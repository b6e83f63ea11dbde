"""Hugging Face's format, for the architectures of huggingface_config.py: the names of the weights, reading, writing."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_json
from ..model import GPT
from .huggingface_config import architecture_of, closest_architecture, read_config, write_config
from .layout import Names, Weights, parts
from .options import Options
from .tensors import read_tensors

GPT2_MODULES = {
    "wte": ("transformer.wte",),
    "wpe": ("transformer.wpe",),
    "norm_1": ("transformer.h.{}.ln_1",),
    "qkv": ("transformer.h.{}.attn.c_attn",),
    "attn_out": ("transformer.h.{}.attn.c_proj",),
    "norm_2": ("transformer.h.{}.ln_2",),
    "mlp_in": ("transformer.h.{}.mlp.c_fc",),
    "mlp_out": ("transformer.h.{}.mlp.c_proj",),
    "norm_f": ("transformer.ln_f",),
    "head": ("lm_head",),
}
_ATTENTION, _MLP = "model.layers.{}.self_attn", "model.layers.{}.mlp"
_LLAMA_MODULES = {
    "wte": ("model.embed_tokens",),
    "norm_1": ("model.layers.{}.input_layernorm",),
    "qkv": (f"{_ATTENTION}.q_proj", f"{_ATTENTION}.k_proj", f"{_ATTENTION}.v_proj"),
    "q_norm": (f"{_ATTENTION}.q_norm",),
    "k_norm": (f"{_ATTENTION}.k_norm",),
    "attn_out": (f"{_ATTENTION}.o_proj",),
    "norm_2": ("model.layers.{}.post_attention_layernorm",),
    "mlp_in": (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
    "mlp_out": (f"{_MLP}.down_proj",),
    "norm_f": ("model.norm",),
    "head": ("lm_head",),
}


def names_of(architecture: str) -> Names:
    if architecture == "GPT2LMHeadModel":
        return Names(GPT2_MODULES, is_transposed=True)
    return Names(_LLAMA_MODULES)


def read(folder: Path, options: Options) -> Weights:
    """Read the folder; `options` are those of its config.json."""
    architecture = architecture_of(options)
    is_gpt2 = architecture == "GPT2LMHeadModel"
    config = read_config(options, architecture)
    tensors = {n: t for n, t in read_tensors(folder).items() if not is_buffer(n)}
    prefix = "transformer." if is_gpt2 else "model."
    if not any(name.startswith(prefix) for name in tensors):  # saved without the head around it
        tensors = {n if n.startswith("lm_head.") else prefix + n: t for n, t in tensors.items()}
    if config.tie_embeddings:
        embedding = "transformer.wte.weight" if is_gpt2 else "model.embed_tokens.weight"
        without_tied_head(str(folder), tensors, embedding)
    return Weights(str(folder), config, tensors, names_of(architecture))


def is_buffer(name: str) -> bool:
    """Whether it is a causal mask or rotary frequencies, which old files carry along."""
    return re.search(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$", name) is not None


def without_tied_head(where: str, tensors: dict[str, Tensor], embedding: str) -> None:
    """Drop the head of a model that reads it from its embedding."""
    head = tensors.pop("lm_head.weight", None)
    if head is not None and embedding in tensors and not torch.equal(head, tensors[embedding]):
        raise ValueError(
            f"{where}: lm_head.weight must equal {embedding}, because the config ties them; set "
            "tie_word_embeddings to false in config.json if both are meant"
        )


def write(model: GPT, folder: Path, ids: dict[str, Any]) -> None:
    """Write into a folder that is there; `ids` are the tokenizer's bos_token_id and eos_token_id."""
    config = model.config
    architecture, _ = closest_architecture(config)
    is_gpt2 = architecture == "GPT2LMHeadModel"
    parameters: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    if is_gpt2 or config.bias:
        # these architectures have every bias; where the model has none, zeros do the same
        config = replace(config, bias=True, qkv_bias=None)
        with torch.device("meta"):
            complete = GPT(config)
        for name, parameter in complete.named_parameters():
            if name not in parameters:
                parameters[name] = torch.zeros(parameter.shape, dtype=model.wte.weight.dtype)

    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    values = write_config(config, architecture) | {"torch_dtype": dtype} | ids
    write_json(folder / "config.json", values)
    if ids["eos_token_id"] is not None:
        write_json(folder / "generation_config.json", ids)
    tensors = {n: t.contiguous() for n, t in parts(parameters, config, names_of(architecture))}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
