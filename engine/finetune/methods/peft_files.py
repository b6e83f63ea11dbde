"""LoRA files of Hugging Face's `peft` for GPT-2: adapter_config.json and adapter_model.safetensors.

There, a module's `lora_A.weight` is `(r, K)` and its `lora_B.weight` `(N, r)`, whatever the orientation of the base's own
matrix (`fan_in_fan_out`). The files do not tell which weights the base had.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...files import atomic_write, read_json, write_json
from ...model import GPT
from ...pretrained.huggingface_config import closest_architecture
from .base import TARGETS, Target, check
from .lora import AdaptedProducts, LoRA

_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MODULES: dict[Target, str] = {
    "qkv": "attn.c_attn",
    "attn_out": "attn.c_proj",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
_PREFIXES = ("base_model.model.transformer.h.", "base_model.model.h.")  # GPT2Model has no head
# what is read, and what does not matter for a trained adapter; another option that is set is an error
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
_IGNORED = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out", "runtime_config"),
    *("megatron_config", "megatron_core", "eva_config", "qalora_group_size"),
)


def load_peft(folder: str | Path, model: GPT) -> AdaptedProducts:
    """Attach a LoRA that `peft` saved for the GPT-2 with this model's weights; the model changes in place.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it is not LoRA, uses what is not known here (named), or does not fit the model.
    """
    folder = Path(folder)
    if not (folder / _CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder}: there is no {_CONFIG_FILE}, so this is no peft adapter")
    path = folder / _WEIGHTS_FILE
    try:
        tensors = _our_names(load_file(path))
        targets = tuple(t for t in TARGETS if any(f".{t}.delta." in name for name in tensors))
        method = _method(read_json(folder / _CONFIG_FILE), targets)
        adapted = method.restore(model, tensors)
        assert isinstance(adapted, AdaptedProducts)
        return adapted
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error


@torch.no_grad()
def save_peft(adapted: AdaptedProducts, folder: str | Path) -> None:
    """Write a LoRA of a GPT-2 as `peft` reads it.

    Raises:
        ValueError: the method is not LoRA, or the model is no GPT-2.
    """
    method = adapted.method
    check(isinstance(method, LoRA), f"peft files are written of lora, got {method.name}")
    assert isinstance(method, LoRA)
    architecture, obstacles = closest_architecture(adapted.model.config)
    check(
        architecture == "GPT2LMHeadModel" and not obstacles,
        "peft files are written of GPT-2, and this model is another",
    )
    folder = Path(folder)
    tensors = {}
    for name, delta in adapted.deltas().items():
        _, block, target = name.split(".")
        module = f"{_PREFIXES[0]}{block}.{_MODULES[target]}"  # type: ignore[index]
        tensors[f"{module}.lora_A.weight"] = delta.down.cpu().contiguous()
        tensors[f"{module}.lora_B.weight"] = delta.up.cpu().contiguous()
    with atomic_write(folder / _WEIGHTS_FILE) as file:
        save_file(tensors, file.name, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": method.rank,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rank_stabilized,
        "target_modules": [_MODULES[target] for target in method.targets],
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / _CONFIG_FILE, config)


def _our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    targets = {module: target for target, module in _MODULES.items()}
    fields = {"lora_A.weight": "down", "lora_B.weight": "up"}
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        block, _, rest = name.removeprefix(prefix or "").partition(".")
        module, _, field = rest.partition(".lora_")
        field = f"lora_{field}"
        check(
            prefix is not None and module in targets and field in fields,
            f"only lora_A and lora_B of {', '.join(targets)} of GPT-2 are read, got {name}",
        )
        renamed[f"blocks.{block}.{targets[module]}.delta.{fields[field]}"] = tensor
    return renamed


def _method(config: dict[str, Any], targets: tuple[Target, ...]) -> LoRA:
    kind = config.get("peft_type")
    check(kind == "LORA", f"{_CONFIG_FILE}: peft_type must be LORA, got {kind!r}")
    for option, value in config.items():
        is_known = option in _READ or option in _IGNORED
        check(
            is_known or not value or value == "none",
            f"{_CONFIG_FILE}: {option} is not supported, got {value!r}",
        )
    start = config.get("init_lora_weights", True)
    check(
        start in (True, False, "gaussian", "eva"),
        f"{_CONFIG_FILE}: init_lora_weights {start!r} changes the base's weights, which is not supported",
    )
    try:
        return LoRA(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            targets=targets,
            rank_stabilized=config.get("use_rslora", False),
        )
    except KeyError as error:
        raise ValueError(f"{_CONFIG_FILE}: there is no {error}") from error
