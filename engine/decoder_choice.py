"""Which decoder runs a model: the native one on a CPU, PyTorch's elsewhere and for what the native one does not know."""

from pathlib import Path
from typing import TYPE_CHECKING

from .decoder import Decoder

if TYPE_CHECKING:  # a packed model runs without torch
    from .model import GPT

_PACKED = "model.leangpt"
_FORMATS = {"float32": "fp32", "bfloat16": "bf16"}  # by the dtype of a model's weights


def decoder_of(model: "GPT", format: str | None = None) -> Decoder:
    """A decoder of a model.

    The native one packs a copy of the weights, so that training does not change it any more.

    Args:
        format: in which the native decoder holds the weights, such as "int8"; None: that of the model's dtype.

    Raises:
        ValueError: a format was asked for, and the native decoder cannot run the model.
    """
    obstacle = _native_obstacle(model)
    if obstacle is None:
        from .native_decoder import NativeDecoder  # type: ignore[import-not-found]

        return NativeDecoder.from_model(model, format or _FORMATS[_dtype_of(model)])
    if format is not None:
        raise ValueError(f"format={format!r} needs the native decoder, but {obstacle}")
    from .torch_decoder import TorchDecoder

    return TorchDecoder(model)


def packed_file(name: str) -> Path | None:
    """The packed model that is meant: the file itself, or the one in this folder."""
    path = Path(name)
    if path.suffix == ".leangpt" and path.is_file():
        return path
    path = path / _PACKED
    return path if path.is_file() else None


def _native_obstacle(model: "GPT") -> str | None:
    """Why the native decoder cannot run the model, or None where it can."""
    try:
        from .native_decoder import native_obstacle
    except ModuleNotFoundError:
        return "it is not there yet"
    if model.device.type != "cpu":
        return f"the model is on {model.device}, not on the CPU"
    if _dtype_of(model) not in _FORMATS:
        return f"the weights must be {' or '.join(_FORMATS)}, got {_dtype_of(model)}"
    return native_obstacle(model.config, _dtype_of(model))


def _dtype_of(model: "GPT") -> str:
    return str(model.wte.weight.dtype).removeprefix("torch.")
