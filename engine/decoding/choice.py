"""Which decoder runs a model: the native one on a CPU, PyTorch's elsewhere, and for what the native one does not know."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from leangpt.kernels import decode

from .decoder import Decoder
from .native_decoder import NativeDecoder, native_obstacle

if TYPE_CHECKING:  # a packed model runs without torch
    import torch

    from ..model import GPT

_log = logging.getLogger("leangpt")
_FORMATS = {"float32": "fp32", "bfloat16": "bf16"}  # by the dtype of a model's weights


def load_decoder(
    name: str,
    *,
    format: str | None = None,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str" = "cpu",
    num_blocks: int | None = None,
) -> tuple[Decoder, Path]:
    """Load a model into the decoder that runs it; with the folder that its tokenizer is in.

    Args:
        name: a packed model (`*.leangpt`, or a folder with a model.leangpt), which is read without torch; else a hub id
            or a folder, see `resolve_model`.
        format: in which the native decoder holds the weights, such as "int8"; None: that of the packed file, or `dtype`.
        dtype: as of `load_model`, where the model is not packed.
        device: where it runs; "auto": on a GPU, where there is one and the model need not be on the CPU.
        num_blocks: pages in the native decoder's cache, see there.

    Raises:
        ValueError: a packed file is to have another format, dtype or device than it has.
        FileNotFoundError, ValueError: as `load_model` and `decoder_of`.
    """
    packed = _packed_file(name)
    if packed is not None:
        if format is None and dtype is None and str(device) in ("cpu", "auto"):
            return NativeDecoder.from_packed(packed, num_blocks=num_blocks), packed.parent
        if packed == Path(name):
            raise ValueError(
                f"{name} is packed, for the CPU and in a format of its own: leave out format, dtype and device, or name "
                "the model that it was made from"
            )
    from ..machine import default_device
    from ..pretrained import load_model, resolve_model

    path = resolve_model(name)
    if device == "auto":
        needs_cpu = format is not None or num_blocks is not None
        device = "cpu" if needs_cpu else default_device()
    model = load_model(path, dtype=dtype, device=device)
    decoder = decoder_of(model, format=format, num_blocks=num_blocks)
    return decoder, path if path.is_dir() else path.parent


def decoder_of(
    model: "GPT", *, format: str | None = None, num_blocks: int | None = None
) -> Decoder:
    """A decoder of a model.

    The native one packs a copy of the weights, which training does not change any more.

    Args:
        format: in which the native decoder holds the weights, such as "int8"; None: that of the model's dtype.
        num_blocks: pages in the native decoder's cache, see there.

    Raises:
        ValueError: one of these was asked for, and the native decoder cannot run the model.
    """
    from leangpt.kernels.dispatch import forced_backend

    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    obstacle = native_obstacle(model.config, dtype)
    if model.device.type != "cpu":
        obstacle = f"the model is on {model.device}, not on a CPU"
    elif model.has_additions:
        obstacle = "fine-tuning has additions on the model, which were not merged"
    elif forced_backend() == "reference":
        obstacle = "the reference was asked for (use_backend, LEANGPT_BACKEND)"
    if obstacle is None:
        return NativeDecoder.from_model(model, format or _FORMATS[dtype], num_blocks=num_blocks)
    for name, value in (("format", format), ("num_blocks", num_blocks)):
        if value is not None:
            raise ValueError(f"{name}={value!r} needs the native decoder, but {obstacle}")
    if decode.unavailable_reason:
        _log.warning("text is generated on PyTorch, slowly: %s", obstacle)
    from .torch_decoder import TorchDecoder

    return TorchDecoder(model)


def _packed_file(name: str) -> Path | None:
    """The packed model that is meant: the file itself, or the one in this folder."""
    path = Path(name)
    if path.suffix != ".leangpt":
        path = path / "model.leangpt"
    return path if path.is_file() else None
