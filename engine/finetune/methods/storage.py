"""Methods by name, and reading what `Adapted.save` wrote."""

import dataclasses
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...files import read_json
from ...model import GPT
from .adalora import AdaLoRA
from .adapter import BottleneckAdapter
from .base import FORMAT_VERSION, OPTIONS_FILE, WEIGHTS_FILE, Adapted, Method, base_hash, check
from .full import Full, Head
from .lora import LoRA
from .prefix import PrefixTuning

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Full, LoRA, AdaLoRA, PrefixTuning, BottleneckAdapter, Head)
}


def create(name: str, **options: Any) -> Method:
    """The method of that name with some of its options, the others at their defaults.

    Raises:
        ValueError: the method or an option is unknown (the known ones are named), or an option is out of range.
    """
    check(name in METHODS, f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    known = [field.name for field in dataclasses.fields(method)]
    for option in options:
        check(option in known, f"{name} has no option {option}, only {', '.join(known) or 'none'}")
    return method(**options)


def from_dict(values: dict[str, Any]) -> Method:
    """A method of its name and its options as JSON holds them: a list is a tuple of ours.

    Raises:
        ValueError: as `create`.
    """
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "name"}
    return create(str(values.get("name")), **options)


def load(folder: str | Path, model: GPT) -> Adapted:
    """Attach what `Adapted.save` wrote to the same base model, which changes in place.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the adapter is for another base model, or its files are damaged.
    """
    folder = Path(folder)
    if not (folder / OPTIONS_FILE).is_file():
        raise FileNotFoundError(f"{folder}: there is no {OPTIONS_FILE}, so this is no adapter")
    method, base = _read_options(folder / OPTIONS_FILE)
    actual = base_hash(model)
    check(
        actual == base,
        f"{folder}: the adapter was trained on another base model (SHA-256 of its weights {base[:12]}…, of this model's "
        f"{actual[:12]}…): load the model that it was trained on, in the same dtype",
    )
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
        return method.restore(model, tensors)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_options(path: Path) -> tuple[Method, str]:
    """The method, and the hash of its base model."""
    values = read_json(path)
    try:
        check(
            values["format_version"] == FORMAT_VERSION,
            f"format_version must be {FORMAT_VERSION}, got {values['format_version']}",
        )
        method = from_dict({"name": values["method"], **values["options"]})
        return method, str(values["base_sha256"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: no valid options of an adapter ({error!r})") from error
