"""LoRA files of Hugging Face's `peft` for GPT-2 and models of Llama's kind: adapter_config.json and adapter_model.safetensors.

There, a module's `lora_A.weight` is `(r, K)` and its `lora_B.weight` `(N, r)`, whatever the orientation of the base's own
matrix (`fan_in_fan_out`); of the token table they are `lora_embedding_A` `(r, V)` and `lora_embedding_B` `(C, r)`. Where modules of
theirs lie in one matrix of ours, as q, k and v do, each of them gets rows of `down` of its own, and the other modules' `up` is
zero there:

    down = [A_q; A_k; A_v]    up = [[B_q, 0, 0], [0, B_k, 0], [0, 0, B_v]]

All our matrices have one rank, so those with fewer modules get zeros. The files do not tell which weights the base had.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...config import GPTConfig
from ...decoding.adapter import matrix_sizes
from ...files import atomic_write, read_json, write_json
from ...model import GPT
from ...pretrained.huggingface import names_of
from ...pretrained.huggingface_config import closest_architecture
from ...pretrained.layout import Names, rows_of_parts
from .base import check
from .lora import LORA_TARGETS, AdaptedProducts, LoRA, LoRATarget

_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FIELDS = {"down": "lora_A.weight", "up": "lora_B.weight"}
_TABLE_FIELDS = {"down": "lora_embedding_A", "up": "lora_embedding_B"}
# what is read, and what does not matter for a trained adapter; another option that is set is an error
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
_IGNORED = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out", "runtime_config"),
    *("megatron_config", "megatron_core", "eva_config", "qalora_group_size"),
)


def load_peft(folder: str | Path, model: GPT) -> AdaptedProducts:
    """Attach a LoRA that `peft` saved for the transformers model with this model's weights; the model changes in place.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it is not LoRA, uses what is not known here (named), or does not fit the model.
    """
    folder = Path(folder)
    if not (folder / _CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder}: there is no {_CONFIG_FILE}, so this is no peft adapter")
    path = folder / _WEIGHTS_FILE
    try:
        method = _method(read_json(folder / _CONFIG_FILE))
        factors = _our_factors(_without_tables(load_file(path), model), model.config, method.rank)
        found = {_target(matrix) for matrix in factors}
        method = replace(
            method.with_rank(max((len(down) for down, _ in factors.values()), default=method.rank)),
            targets=tuple(target for target in LORA_TARGETS if target in found),
        )
        adapted = method.restore(
            model,
            {
                f"{_delta(matrix)}.{field}": tensor
                for matrix, pair in factors.items()
                for field, tensor in zip(("down", "up"), pair, strict=True)
            },
        )
        assert isinstance(adapted, AdaptedProducts)
        return adapted
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error


@torch.no_grad()
def save_peft(adapted: AdaptedProducts, folder: str | Path) -> None:
    """Write a LoRA as `peft` reads it.

    Raises:
        ValueError: the method is not LoRA, or transformers has no model like this one.
    """
    method = adapted.method
    check(isinstance(method, LoRA), f"peft files are written of lora, got {method.name}")
    assert isinstance(method, LoRA)
    names = _names(adapted.model.config)
    theirs = list(_their_factors(adapted, names))
    written = _written_modules(method.targets, names, theirs)
    theirs = [factors for factors in theirs if _pattern(factors[0]) in written]
    rank = max(1, *(len(down) for _, down, _ in theirs))
    tensors = {}
    for module, down, up in theirs:
        fields = _TABLE_FIELDS if module in names.modules["wte"] else _FIELDS
        missing = rank - len(down)
        tensors[f"{_PREFIX}{module}.{fields['down']}"] = F.pad(down, (0, 0, 0, missing))
        tensors[f"{_PREFIX}{module}.{fields['up']}"] = F.pad(up, (0, missing))
    folder = Path(folder)
    with atomic_write(folder / _WEIGHTS_FILE) as file:
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, file.name, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": method.with_rank(rank).alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rank_stabilized,
        "target_modules": sorted(module.rpartition("{}.")[2] for module in written),
        "fan_in_fan_out": names.is_transposed,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / _CONFIG_FILE, config)


def _names(config: GPTConfig) -> Names:
    architecture, obstacles = closest_architecture(config)
    check(
        not obstacles,
        f"peft files are for models that transformers has, and this one is not {architecture} ({', '.join(obstacles)})",
    )
    return names_of(architecture)


def _modules_of(targets: tuple[LoRATarget, ...], names: Names) -> list[str]:
    return [module for target in targets for module in names.modules[target]]


def _their_factors(adapted: AdaptedProducts, names: Names) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Modules of theirs with `down` and `up`; where several lie in one matrix, without what is the others'."""
    tensors = adapted.tensors()
    for module, part in _parts(adapted.model.config, names).items():
        delta = _delta(part.matrix)
        if f"{delta}.down" in tensors:
            down, up = tensors[f"{delta}.down"], tensors[f"{delta}.up"]
            rows = up[part.start : part.end]
            is_part = len(rows) < len(up)
            kept = rows.any(0) if is_part else rows.any(0) | down.any(1)  # zeros fill up the rank
            yield module, down[kept], rows[:, kept]


def _pattern(module: str) -> str:
    """With `{}` in place of the number of its block."""
    return re.sub(r"\.\d+\.", ".{}.", module)


def _written_modules(
    targets: tuple[LoRATarget, ...], names: Names, theirs: list[tuple[str, Tensor, Tensor]]
) -> set[str]:
    """All that lie in the targets; of several in one matrix, those that have something."""
    used = {_pattern(module) for module, down, _ in theirs if len(down)}
    written: set[str] = set()
    for target in targets:
        modules = names.modules[target]
        written.update(used.intersection(modules) or modules)
    return written


def _without_tables(theirs: dict[str, Tensor], model: GPT) -> dict[str, Tensor]:
    """What is trained, without head and token table themselves, which peft saves where they are targets."""
    modules = _names(model.config).modules
    for target, weight in (("head", model.head_weight), ("wte", model.wte.weight)):
        name = f"{_PREFIX}{modules[target][0]}.base_layer.weight"
        table = theirs.pop(name, None)
        check(
            table is None or torch.equal(table.to(weight), weight),
            f"{name} is another than the model's: the adapter is for another base model",
        )
    return theirs


class _Part(NamedTuple):
    """Where a module of theirs lies: the rows from `start` to `end` of the matrix of that name."""

    matrix: str
    start: int
    end: int


def _parts(config: GPTConfig, names: Names) -> dict[str, _Part]:
    """By their modules."""
    parts = {}
    for matrix, (outputs, _) in _sizes(config).items():
        *block, target = matrix.removeprefix("blocks.").split(".")
        modules = names.modules[target]
        rows = rows_of_parts(config)[target] if len(modules) > 1 else (outputs,)
        ends = itertools.accumulate(rows)
        for module, n, end in zip(modules, rows, ends, strict=True):
            parts[module.format(*block)] = _Part(matrix, end - n, end)
    return parts


def _sizes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """`(N, K)` of each matrix that LoRA may be beside; the token table reads one of V tokens."""
    V, C = config.vocab_size, config.n_embd
    return matrix_sizes(config) | {"head": (V, C), "wte": (C, V)}


def _target(matrix: str) -> str:
    return matrix.rpartition(".")[2]


def _delta(matrix: str) -> str:
    return f"{matrix}.delta" if matrix.startswith("blocks.") else f"{matrix}_delta"


def _our_factors(
    theirs: Mapping[str, Tensor], config: GPTConfig, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """By our matrices, `down` and `up`, all of one rank; `rank` is that of the file."""
    names = _names(config)
    parts, sizes = _parts(config, names), _sizes(config)
    root = names.modules["wte"][0].partition(".")[0]
    our_field = {
        their: field for fields in (_FIELDS, _TABLE_FIELDS) for field, their in fields.items()
    }
    found: dict[str, dict[_Part, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in theirs.items():
        module, _, field = name.removeprefix(_PREFIX).partition(".lora_")
        field = our_field.get(f"lora_{field}", "")
        if module not in parts:
            module = f"{root}.{module}"  # of a model without head
        check(
            name.startswith(_PREFIX) and module in parts and field != "",
            f"only LoRA of {', '.join(_modules_of(LORA_TARGETS, names))} is read, got {name}",
        )
        part = parts[module]
        N, K = part.end - part.start, sizes[part.matrix][1]
        expected = (rank, K) if field == "down" else (N, rank)
        check(
            tuple(tensor.shape) == expected,
            f"{name} must be {expected}, got {tuple(tensor.shape)}",
        )
        found[part.matrix][part][field] = tensor
    our_rank = rank * max(map(len, found.values()), default=1)
    result = {}
    for matrix, factors in found.items():
        N, K = sizes[matrix]
        down, up = torch.zeros(our_rank, K), torch.zeros(N, our_rank)
        for i, (part, factor) in enumerate(sorted(factors.items())):
            check(len(factor) == 2, f"{matrix} must have both of its factors")
            own = slice(i * rank, (i + 1) * rank)
            down[own], up[part.start : part.end, own] = factor["down"], factor["up"]
        result[matrix] = down, up
    return result


def _method(config: dict[str, Any]) -> LoRA:
    """With the rank of the file, and any targets."""
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
            rank_stabilized=config.get("use_rslora", False),
        )
    except KeyError as error:
        raise ValueError(f"{_CONFIG_FILE}: there is no {error}") from error
