"""The project's own format: a folder with config.json (all options of `GPTConfig`) and model.safetensors (our names)."""

import dataclasses
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..config import GPTConfig, RopeScaling
from ..files import write_json
from ..model import GPT
from .layout import Weights
from .options import Options
from .tensors import read_tensors

MODEL_TYPE = "leangpt"
FORMAT_VERSION = 1


def read(folder: Path, options: Options) -> Weights:
    """Read the folder; `options` are those of its config.json."""
    options.must_be("format_version", FORMAT_VERSION, None)
    config = Options(f"{options.where}: config", options.need("config", dict))
    return Weights(str(folder), config_of(config), read_tensors(folder), None)


def config_of(options: Options) -> GPTConfig:
    options.check_fields(GPTConfig)
    scaling = options.values.get("rope_scaling")
    if scaling is not None:
        Options(f"{options.where}: rope_scaling", scaling).check_fields(RopeScaling)
    try:
        return GPTConfig.from_dict(options.values)
    except (ValueError, TypeError) as error:  # TypeError: an unknown or missing key of rope_scaling
        raise ValueError(f"{options.where}: {error}") from error


def write(model: GPT, folder: Path, ids: dict[str, Any]) -> None:
    """Write into a folder that is there; `ids` are the tokenizer's bos_token_id and eos_token_id."""
    config = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(model.config),
        **ids,
    }
    write_json(folder / "config.json", config)
    tensors = {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
