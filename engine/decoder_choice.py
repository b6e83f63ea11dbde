"""Which decoder runs a model: the native one on a CPU, PyTorch's elsewhere, and for what the native one does not know."""

from pathlib import Path
from typing import TYPE_CHECKING

from .decoder import Decoder

if TYPE_CHECKING:  # a packed model runs without torch
    import torch

    from .model import GPT

_FORMATS = {"float32": "fp32", "bfloat16": "bf16"}  # by the dtype of a model's weights


def load_decoder(
    name: str,
    *,
    format: str | None = None,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str" = "cpu",
) -> tuple[Decoder, Path]:
    """Load a model into the decoder that runs it; with the folder that its tokenizer is in.

    Args:
        name: a packed model (`*.leangpt`, or a folder with a model.leangpt), which is read without torch; else a hub id
            or a folder, see `resolve_model`.
        format: in which the native decoder holds the weights, such as "int8"; None: that of the packed file, or `dtype`.
        dtype: as of `load_model`, where the model is not packed.
        device: where it runs; "auto": on a GPU, where there is one and the model need not be on the CPU.

    Raises:
        ValueError: a packed file is to have another format, dtype or device than it has.
        FileNotFoundError, ValueError: as `load_model` and `decoder_of`.
    """
    packed = _packed_file(name)
    if packed is not None:
        if format is None and dtype is None and str(device) in ("cpu", "auto"):
            from .native_decoder import NativeDecoder

            return NativeDecoder.from_packed(packed), packed.parent
        if packed == Path(name):
            raise ValueError(
                f"{name} is packed, for the CPU and in a format of its own: leave out format, dtype and device, or name "
                "the model that it was made from"
            )
    from .machine import default_device
    from .pretrained import load_model, resolve_model

    path = resolve_model(name)
    if device == "auto":
        device = default_device() if format is None else "cpu"
    model = load_model(path, dtype=dtype, device=device)
    return decoder_of(model, format), path if path.is_dir() else path.parent


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
        from .native_decoder import NativeDecoder

        return NativeDecoder.from_model(model, format or _FORMATS[_dtype_of(model)])
    if format is not None:
        raise ValueError(f"format={format!r} needs the native decoder, but {obstacle}")
    from .torch_decoder import TorchDecoder

    return TorchDecoder(model)


def _packed_file(name: str) -> Path | None:
    """The packed model that is meant: the file itself, or the one in this folder."""
    path = Path(name)
    if path.suffix != ".leangpt":
        path = path / "model.leangpt"
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
