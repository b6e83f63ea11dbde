"""The decoder on the native CUDA engine (csrc/cuda): `NativeDecoder`, whose steps run on a GPU.

The weights are copied to the GPU as they are packed, and multiplied with activations of bfloat16, whatever the format says of
activations. The logits of a sequence have the same bits whatever else is in the batch, and however its prompt was cut into steps.
"""

import os
from ctypes import CDLL, byref, c_int64, c_void_p
from types import MappingProxyType
from typing import ClassVar

from leangpt.kernels import decode

from ..config import GPTConfig
from .native_decoder import NativeDecoder
from .packed import PackedModel
from .weight_format import WeightFormat

_MAX_HEAD_DIM = 256
_CACHE_SHARE = 0.8  # of the memory that the weights leave free


def cuda_obstacle(config: GPTConfig, format: WeightFormat, device: int = 0) -> str | None:
    """Why the CUDA engine cannot run a model of this config in a format on a GPU, or None where it can."""
    if format.kind == "fp32":
        return "the CUDA decode engine multiplies bf16, int8 and int4 weights, not fp32"
    if config.head_size > _MAX_HEAD_DIM:
        return f"the CUDA decode engine has a head_dim of at most {_MAX_HEAD_DIM}, got {config.head_size}"
    return decode.cuda_obstacle(device)


class CudaDecoder(NativeDecoder):
    """A packed model on a GPU; see `NativeDecoder` for what it does.

    Steps that append one token to each sequence run as CUDA graphs, unless LEANGPT_CUDA_GRAPHS is 0. Graphs have run in the emulator of
    the tests alone, and not on a GPU yet.

    Args:
        packed: the model, in bf16, int8 or int4.
        num_blocks: pages of 16 tokens in the cache, whose memory is taken at once; None: for 64 full sequences, or what fits
            most of the GPU's free memory.
        kv_dtype: "bfloat16", "float16" (with queries of float16), or "int8" or "float8_e4m3" with a scale for each key and value of
            a head; None: int8 for integer weights, else bfloat16.
        device: number of the GPU.

    Raises:
        ValueError: the engine cannot run the model, or there is no such GPU.
        RuntimeError: the engine was not built, there is no GPU that it runs on, or too little memory.
    """

    _kv_dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "int8", "float8_e4m3")
    _default_kv_dtypes: ClassVar = MappingProxyType(
        {"fp32": "bfloat16", "bf16": "bfloat16", "int8": "int8", "int4": "int8"}
    )

    def __init__(
        self,
        packed: PackedModel,
        num_blocks: int | None = None,
        kv_dtype: str | None = None,
        *,
        device: int = 0,
    ) -> None:
        self.device = device
        super().__init__(packed, num_blocks, kv_dtype)

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that were captured so far."""
        return self._lib.leangpt_num_graphs(self._handle)

    def _load(self) -> CDLL:
        lib = decode.cuda_library()
        decode.check(lib.leangpt_check_device(self.device), lib)
        return lib

    def _create(self, kv_kind: int, handle: c_void_p) -> int:
        wish = os.environ.get("LEANGPT_CUDA_GRAPHS", "1")
        if wish not in ("0", "1"):
            raise ValueError(f"LEANGPT_CUDA_GRAPHS must be 0 or 1, got {wish!r}")
        return self._lib.leangpt_decoder_new(
            *(byref(self._model), kv_kind, self._num_blocks, self.device, int(wish)),
            byref(handle),
        )

    def _default_blocks(self, kv_kind: int) -> int:
        block_bytes, free_bytes = c_int64(), c_int64()
        self._check(
            self._lib.leangpt_cache_memory(
                *(byref(self._model.config), kv_kind, self.device),
                *(byref(block_bytes), byref(free_bytes)),
            )
        )
        room = _CACHE_SHARE * (free_bytes.value - self.packed.num_bytes)
        return max(1, min(self._wanted_blocks(), int(room) // block_bytes.value))
