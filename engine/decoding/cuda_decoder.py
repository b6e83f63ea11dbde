"""The decoder on the native CUDA engine (csrc/cuda): `NativeDecoder`, whose steps run on a GPU.

The weights are copied to the GPU as they are packed, and multiplied with activations of bfloat16, whatever the format says of
activations. The logits of a sequence have the same bits whatever else is in the batch, and however its prompt was cut into steps,
unless the user gives that up (`exact=False`).
"""

import os
from collections.abc import Callable, Sequence
from ctypes import CDLL, byref, c_int64, c_void_p
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from leangpt.kernels import decode

from ..config import GPTConfig
from .decoder import Ints
from .native_decoder import Draws, NativeDecoder, batch_of
from .packed import PackedModel
from .sampling import Draw, RowSampling
from .weight_format import WeightFormat

if TYPE_CHECKING:  # a packed model runs without torch
    from leangpt.kernels.decode_library import LibraryProducts

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
        exact: False: PyTorch's library (cuBLAS) makes the products of the layers in steps of more than 256 tokens, which are
            those of prompts. Bits then depend on how a prompt was cut into steps, and with them, rarely, a text that is
            drawn; the weights, which must be bf16, are in the GPU's memory twice. From which length of a prompt on it pays
            has been measured nowhere, and cuBLAS itself has not been called from here on a GPU yet.

    Raises:
        ValueError: the engine cannot run the model, there is no such GPU, or exact=False with weights other than bf16.
        RuntimeError: the engine was not built, there is no GPU that it runs on, too little memory, or exact=False with a
            PyTorch that knows no CUDA.
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
        exact: bool = True,
    ) -> None:
        if not exact and packed.format.kind != "bf16":
            raise ValueError(f"exact=False needs bf16 weights, got {packed.format}")
        self.device = device
        self._library: LibraryProducts | None = None
        super().__init__(packed, num_blocks, kv_dtype)
        if not exact:
            self._use_library()

    def _use_library(self) -> None:
        from leangpt.kernels.decode_library import LibraryProducts

        layers = self._model.layers[: self.config.n_layer]
        matrices = (m for x in layers for m in (x.qkv, x.attn_out, x.mlp_in, x.mlp_out))
        self._library = LibraryProducts(map(decode.unpack, matrices), self.device)
        self._lib.leangpt_use_library(self._handle, self._library.callback)

    def _check(self, status: int) -> None:
        if status and self._library is not None and self._library.error is not None:
            error, self._library.error = self._library.error, None
            raise RuntimeError(f"the library could not multiply: {error}") from error
        super()._check(status)

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that were captured so far."""
        return self._lib.leangpt_num_graphs(self._handle)

    def start_sample(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        rows: Sequence[RowSampling],
    ) -> Callable[[], list[Draw]]:
        """See `AsyncDecoder`: the next step's tokens are taken from the draws on the GPU."""
        batch, arrays = batch_of(tokens, sequences, positions, output_rows)
        draws = Draws(rows, batch.num_outputs, self.config.vocab_size)
        self._check(self._lib.leangpt_start_sample(self._handle, byref(batch), draws.settings))
        del arrays  # what the batch points to was needed until here

        def read() -> list[Draw]:
            self._check(self._lib.leangpt_take_draws(self._handle, draws.settings, draws.drawn))
            return draws.read()

        return read

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
