"""Which decoder runs a model: the native one of its device, and PyTorch's for what that one does not know."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from leangpt.kernels import decode

from ..config import GPTConfig
from .cuda_decoder import CudaDecoder, cuda_obstacle
from .decoder import Decoder
from .native_decoder import NativeDecoder, native_obstacle, pack_model
from .packed import PackedModel
from .weight_format import WeightFormat

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
    exact: bool = True,
) -> tuple[Decoder, Path]:
    """Load a model into the decoder that runs it; with the folder that its tokenizer is in.

    Args:
        name: a packed model (`*.leangpt`, or a folder with a model.leangpt), which is read without torch; else a hub id
            or a folder, see `resolve_model`.
        format: in which a native decoder holds the weights, such as "int8"; None: that of the packed file, or `dtype`.
        dtype: as of `load_model`, where the model is not packed; None: float32, on a GPU bfloat16.
        device: where it runs; "auto": on a GPU, where there is one, and a decoder there that has what was asked for.
        num_blocks: pages in a native decoder's cache, see there.
        exact: False: on a GPU, the same bits in any company are given up for the speed of prompts, see `CudaDecoder`; an
            error where that decoder does not run the model.

    Raises:
        ValueError: a packed file is to have another format or dtype than it has, or cannot run on the device.
        FileNotFoundError, ValueError: as `load_model` and `decoder_of`.
    """
    packed_file = _packed_file(name)
    if packed_file is not None:
        if format is None and dtype is None:
            return _packed_decoder(packed_file, str(device), num_blocks, exact), packed_file.parent
        if packed_file == Path(name):
            raise ValueError(
                f"{name} is packed in a format of its own: leave out format and dtype, or name the model that it was made from"
            )
    from ..machine import default_device
    from ..pretrained import load_model, resolve_model

    path = resolve_model(name)
    if device == "auto":
        needs_native = format is not None or num_blocks is not None or not exact
        device = "cpu" if needs_native and decode.cuda_obstacle() else default_device()
    is_on_gpu = _gpu(str(device)) is not None
    if is_on_gpu and format is None and dtype is None:
        dtype = "bfloat16"
    # what goes to a GPU is packed on the CPU
    model = load_model(path, dtype=dtype, device="cpu" if is_on_gpu else device)
    decoder = decoder_of(model, format=format, num_blocks=num_blocks, device=device, exact=exact)
    return decoder, path if path.is_dir() else path.parent


def decoder_of(
    model: "GPT",
    *,
    format: str | None = None,
    num_blocks: int | None = None,
    device: "torch.device | str | None" = None,
    exact: bool = True,
) -> Decoder:
    """A decoder of a model.

    A native one packs a copy of the weights, which training does not change any more. The one for GPUs knows no float32: such a
    model runs on PyTorch there, unless a format is given.

    Args:
        format: in which a native decoder holds the weights, such as "int8"; None: that of the model's dtype.
        num_blocks: pages in a native decoder's cache, see there.
        device: where it runs; None: where the model is.
        exact: False: as of `load_decoder`.

    Raises:
        ValueError: one of these was asked for, and the native decoder cannot run the model; exact=False, and it is not the
            one for GPUs.
    """
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    device = str(device or model.device)
    obstacle = _native_obstacle(model.config, dtype, format, device)
    if obstacle is None:
        packed = pack_model(model, format or _FORMATS[dtype])
        gpu = _gpu(device)
        return _native_decoder(packed, num_blocks, gpu, exact)
    options = ("format", format), ("num_blocks", num_blocks), ("exact", None if exact else False)
    for name, value in options:
        if value is not None:
            raise ValueError(f"{name}={value!r} needs the native decoder, but {obstacle}")
    is_slow = device == "cpu" and decode.unavailable_reason is not None
    level = logging.WARNING if is_slow else logging.INFO
    _log.log(level, "text is generated on PyTorch%s: %s", ", slowly" * is_slow, obstacle)
    from .torch_decoder import TorchDecoder

    return TorchDecoder(model.to(device))


def _native_obstacle(config: GPTConfig, dtype: str, format: str | None, device: str) -> str | None:
    """Why the native decoder of a device cannot run such a model in a format, or None where it can."""
    from leangpt.kernels.dispatch import forced_backend

    if forced_backend() == "reference":
        return "the reference was asked for (use_backend, LEANGPT_BACKEND)"
    gpu = _gpu(device)
    if device != "cpu" and gpu is None:
        return f"the model is on {device}, neither on a CPU nor on CUDA"
    obstacle = native_obstacle(config, dtype)
    if obstacle or gpu is None:
        return obstacle
    return cuda_obstacle(config, WeightFormat.parse(format or _FORMATS[dtype]), gpu)


def _native_decoder(
    packed: PackedModel, num_blocks: int | None, gpu: int | None, exact: bool
) -> NativeDecoder:
    if gpu is not None:
        return CudaDecoder(packed, num_blocks, device=gpu, exact=exact)
    if not exact:
        raise ValueError("exact=False is for decoding on CUDA: on a CPU nothing is gained by it")
    return NativeDecoder(packed, num_blocks)


def _packed_decoder(path: Path, device: str, num_blocks: int | None, exact: bool) -> Decoder:
    packed = PackedModel.load(path)
    gpu = 0 if device == "auto" else _gpu(device)
    if gpu is not None:
        obstacle = cuda_obstacle(packed.config, packed.format, gpu)
        if obstacle is None:
            return _native_decoder(packed, num_blocks, gpu, exact)
        if device != "auto":
            raise ValueError(f"{path} cannot run on {device}: {obstacle}")
    elif device != "cpu":
        raise ValueError(f"a packed model runs on a CPU or on CUDA, not on {device!r}")
    return _native_decoder(packed, num_blocks, None, exact)


def _gpu(device: str) -> int | None:
    """The number of a CUDA device, such as 1 of "cuda:1"."""
    kind, _, number = device.partition(":")
    return int(number or 0) if kind == "cuda" else None


def _packed_file(name: str) -> Path | None:
    """The packed model that is meant: the file itself, or the one in this folder."""
    path = Path(name)
    if path.suffix != ".leangpt":
        path = path / "model.leangpt"
    return path if path.is_file() else None
