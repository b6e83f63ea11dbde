"""The decoder on the native CPU engine (csrc/cpu): weights packed once, one call into C++ for each step. cuda_decoder.py is the same on GPUs.

The logits of a sequence have the same bits whatever else is in the batch, however its prompt was cut into steps, and with any
number of threads.
"""

import os
from collections.abc import Sequence
from ctypes import CDLL, byref, c_int32, c_int64, c_void_p
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

import numpy as np

from leangpt.kernels import decode

from ..config import GPTConfig
from .adapter import Adapter, Prefix
from .decoder import CacheFull, Ints, Output
from .packed import PackedModel, pack
from .packed_adapter import PackedAdapter
from .sampling import Draw, RowSampling
from .weight_format import WeightFormat

if TYPE_CHECKING:
    from ..model import GPT

_MAX_HEAD_DIM = 512
_MAX_INPUTS = 65536  # of a matrix: sums of more 8-bit products might not fit an int32
# as KvKind numbers them
_KV_KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "float16": 3, "float8_e4m3": 4}
_KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_DEFAULT_SEQUENCES = 64  # full ones that the cache has room for, memory permitting


def native_obstacle(config: GPTConfig, dtype: str) -> str | None:
    """Why the native engine cannot run a model of this config and dtype ("float32", …), or None where it can."""
    if decode.unavailable_reason:
        return f"the native decode engine is {decode.unavailable_reason}"
    if dtype not in ("float32", "bfloat16"):
        return f"the native decode engine reads float32 and bfloat16 weights, not {dtype}"
    if config.head_size > _MAX_HEAD_DIM:
        return f"the native decode engine has a head_dim of at most {_MAX_HEAD_DIM}, got {config.head_size}"
    inputs = max(config.n_embd, config.inner_size, config.n_head * config.head_size)
    if inputs > _MAX_INPUTS:
        return f"the native decode engine multiplies at most {_MAX_INPUTS} inputs, got {inputs}"
    return None


class NativeDecoder:
    """A packed model and its paged key/value cache; implements `leangpt.decoding.decoder.Decoder`.

    One thread at a time may use it; the work of a step is shared by the threads of `LEANGPT_THREADS`, or all processors.

    Args:
        packed: the model.
        num_blocks: pages of 16 tokens in the cache; None: for 64 full sequences, or what fits a quarter of the memory.
            Memory is taken as pages are used.
        kv_dtype: "float32", "bfloat16", or "int8" with a scale for each key and value of a head; None: as the weights,
            int8 for int4 ones.
    """

    _kv_dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "int8")
    # of the cache, by the kind of the weights
    _default_kv_dtypes: ClassVar = MappingProxyType(
        {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "int4": "int8"}
    )

    def __init__(
        self, packed: PackedModel, num_blocks: int | None = None, kv_dtype: str | None = None
    ) -> None:
        self.packed = packed
        self._lib = self._load()
        self._model = packed.model()
        self._handle: c_void_p | None = None
        self._adapters: list[PackedAdapter] = []  # by number
        self.kv_dtype = kv_dtype or self._default_kv_dtypes[packed.format.kind]
        if self.kv_dtype not in self._kv_dtypes:
            known = ", ".join(self._kv_dtypes)
            raise ValueError(f"kv_dtype must be one of {known}, got {kv_dtype!r}")
        kv_kind = _KV_KINDS[self.kv_dtype]
        if num_blocks is None:
            num_blocks = self._default_blocks(kv_kind)
        if not 1 <= num_blocks < 2**31:
            raise ValueError(f"num_blocks must be positive and below 2**31, got {num_blocks}")
        self._num_blocks = num_blocks
        handle = c_void_p()
        self._check(self._create(kv_kind, handle))
        self._handle = handle

    def _load(self) -> CDLL:
        return decode.library()

    def _create(self, kv_kind: int, handle: c_void_p) -> int:
        """Start the engine's decoder; its status."""
        return self._lib.leangpt_decoder_new(
            byref(self._model), kv_kind, self._num_blocks, byref(handle)
        )

    def _default_blocks(self, kv_kind: int) -> int:
        config = self.config
        width = -(-config.head_size // decode.LANES) * decode.LANES
        values = 2 * config.n_layer * config.kv_heads * width * self.kv_block_size
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        affordable = memory // 4 // (values * _KV_BYTES[self.kv_dtype])
        return max(1, min(self._wanted_blocks(), affordable))

    def _wanted_blocks(self) -> int:
        return _DEFAULT_SEQUENCES * -(-self.config.max_seq_len // self.kv_block_size)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.leangpt_decoder_delete(self._handle)
            self._handle = None

    @classmethod
    def from_model(cls, model: "GPT", format: str = "fp32", **options: Any) -> Self:
        """Pack a model's weights; it is not needed afterwards.

        Args:
            format: see `WeightFormat`.
            options: as the constructor's.

        Raises:
            ValueError: the format is unknown, or the engine cannot run the model (`native_obstacle`).
        """
        return cls(pack_model(model, format), **options)

    @classmethod
    def from_packed(cls, path: str | Path, **options: Any) -> Self:
        """Run a packed file where it lies; see `PackedModel.load`."""
        return cls(PackedModel.load(Path(path)), **options)

    def save(self, path: str | Path) -> None:
        """Write the packed file."""
        self.packed.save(Path(path))

    @property
    def config(self) -> GPTConfig:
        return self.packed.config

    @property
    def kv_block_size(self) -> int:
        return self._lib.leangpt_kv_block_size()

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._lib.leangpt_free_blocks(self._handle)

    def add_adapter(self, adapter: Adapter) -> int:
        packed, number = PackedAdapter(adapter, self.config), c_int32()
        self._check(self._lib.leangpt_add_adapter(self._handle, packed.layers, byref(number)))
        self._adapters.append(packed)
        return number.value

    def add_sequence(self, prefix: Prefix | None = None, adapter: int | None = None) -> int:
        if prefix is None and adapter is None:
            return self._lib.leangpt_add_sequence(self._handle)
        if adapter is not None and not 0 <= adapter < len(self._adapters):
            raise ValueError(f"there is no adapter {adapter}: add_adapter gives its number")
        keys = values = None
        if prefix is not None:
            prefix.check(self.config)
            keys, values = (
                np.ascontiguousarray(array, np.float32) for array in (prefix.keys, prefix.values)
            )
        sequence = c_int64()
        status = self._lib.leangpt_add_adapted_sequence(
            *(self._handle, decode.address(keys), decode.address(values)),
            *(0 if prefix is None else len(prefix), -1 if adapter is None else adapter),
            byref(sequence),
        )
        self._check(status)
        return sequence.value

    def fork(self, sequence: int) -> int:
        copy = c_int64()
        self._check(self._lib.leangpt_fork(self._handle, sequence, byref(copy)))
        return copy.value

    def truncate(self, sequence: int, length: int) -> None:
        self._check(self._lib.leangpt_truncate(self._handle, sequence, length))

    def drop(self, sequence: int) -> None:
        self._check(self._lib.leangpt_drop(self._handle, sequence))

    def forward(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        output: Output = "logits",
        targets: Ints | None = None,
    ) -> np.ndarray:
        if output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}, got {output!r}")
        if (output == "logprob_of") != (targets is not None):
            raise ValueError("targets go with output='logprob_of', and only with it")
        batch, arrays = batch_of(tokens, sequences, positions, output_rows)
        num_outputs = batch.num_outputs
        if output == "logprob_of":
            wanted = np.ascontiguousarray(targets, dtype=np.int64)
            if wanted.shape != (num_outputs,):
                raise ValueError(
                    f"targets must be ({num_outputs},) as output_rows, got {wanted.shape}"
                )
            out = np.empty(num_outputs, dtype=np.float32)
            args = (decode.address(wanted), decode.address(out))
            status = self._lib.leangpt_logprobs(self._handle, byref(batch), *args)
        else:
            width = self.config.vocab_size if output == "logits" else self.config.n_embd
            out = np.empty((num_outputs, width), dtype=np.float32)
            function = self._lib.leangpt_logits if output == "logits" else self._lib.leangpt_hidden
            status = function(self._handle, byref(batch), decode.address(out))
        del arrays  # what the batch points to was needed until here
        self._check(status)
        return out

    def sample(
        self,
        tokens: Ints,
        sequences: Ints,
        positions: Ints,
        output_rows: Ints,
        rows: Sequence[RowSampling],
    ) -> list[Draw]:
        batch, arrays = batch_of(tokens, sequences, positions, output_rows)
        draws = Draws(rows, batch.num_outputs, self.config.vocab_size)
        self._check(
            self._lib.leangpt_sample(self._handle, byref(batch), draws.settings, draws.drawn)
        )
        del arrays  # what the batch points to was needed until here
        return draws.read()

    def _check(self, status: int) -> None:
        try:
            decode.check(status, self._lib)
        except decode.CacheFullError as error:
            raise CacheFull(str(error)) from None


class Draws:
    """How the tokens after some rows are drawn, and room for what is drawn, as the engine takes them."""

    def __init__(self, rows: Sequence[RowSampling], num_outputs: int, vocab_size: int) -> None:
        if len(rows) != num_outputs:
            raise ValueError(f"rows must be {num_outputs} as output_rows, got {len(rows)}")
        self.settings = (decode.DrawSettings * len(rows))()
        self.drawn = (decode.Drawn * len(rows))()
        self._rows = rows
        self._room = [
            _fill(setting, row, vocab_size)
            for setting, row in zip(self.settings, rows, strict=True)
        ]

    def read(self) -> list[Draw]:
        if any(d.token < 0 for d in self.drawn):
            raise RuntimeError(
                "the model's logits are NaN: its weights are damaged, or too large for its dtype"
            )
        return [_draw(*one) for one in zip(self.drawn, self._room, self._rows, strict=True)]


def pack_model(model: "GPT", format: str) -> PackedModel:
    """Pack a torch model's weights in a format (see `WeightFormat`).

    Raises:
        ValueError: the format is unknown, the model is not plain, or the engine cannot run it (`native_obstacle`).
    """
    import torch

    from ..rotary import inverse_frequencies

    model.must_be_plain("the native decode engine")
    weight_format = WeightFormat.parse(format)
    dtype = model.wte.weight.dtype
    obstacle = native_obstacle(model.config, str(dtype).removeprefix("torch."))
    if obstacle:
        raise ValueError(obstacle)
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            weights[name] = tensor.view(torch.int16).numpy().view(np.uint16)
        else:
            weights[name] = tensor.float().numpy()
    frequencies, magnitude = None, 1.0
    if model.config.position == "rotary":
        table, magnitude = inverse_frequencies(model.config)
        frequencies = table.numpy()
    return pack(model.config, weights, frequencies, magnitude, weight_format)


def batch_of(
    tokens: Ints, sequences: Ints, positions: Ints, output_rows: Ints
) -> tuple[decode.Batch, list[Any]]:
    """The engine's view of a batch, and the arrays that it points to."""
    arrays = [
        np.ascontiguousarray(values, dtype=np.int64)
        for values in (tokens, sequences, positions, output_rows)
    ]
    shape = arrays[0].shape
    for name, array in zip(("sequences", "positions"), arrays[1:3], strict=True):
        if len(shape) != 1 or shape == (0,) or array.shape != shape:
            raise ValueError(
                f"tokens and {name} must be (N,) with N > 0, got {shape} and {array.shape}"
            )
    if arrays[3].ndim != 1:
        raise ValueError(f"output_rows must be (R,), got {arrays[3].shape}")
    batch = decode.Batch(
        decode.address(arrays[0]),
        decode.address(arrays[1]),
        decode.address(arrays[2]),
        len(arrays[0]),
        decode.address(arrays[3]),
        len(arrays[3]),
    )
    return batch, list(arrays)


def _fill(setting: decode.DrawSettings, row: RowSampling, vocab_size: int) -> list[np.ndarray]:
    """Write a row's settings; returns the arrays that they point to."""
    setting.temperature = row.temperature
    setting.top_k = row.top_k
    setting.top_p = row.top_p
    setting.min_p = row.min_p
    setting.seed = row.seed
    setting.sample_index = row.sample_index
    setting.position = row.position
    setting.repetition_penalty = row.repetition_penalty
    setting.presence_penalty = row.presence_penalty
    setting.vocab_limit = row.vocab_limit
    setting.num_logprobs = -1 if row.logprobs is None else row.logprobs
    arrays = []
    for name, tokens in (("context", row.context), ("text", row.text)):
        if len(tokens):
            array = np.asarray(tokens, dtype=np.int64)
            setattr(setting, name, decode.address(array))
            setattr(setting, f"{name}_length", len(array))
            arrays.append(array)
    if row.logprobs:
        for name, dtype in (("top_tokens", np.int64), ("top_logprobs", np.float64)):
            array = np.empty(min(row.logprobs, vocab_size), dtype=dtype)
            setattr(setting, name, decode.address(array))
            arrays.append(array)
    return arrays


def _draw(drawn: decode.Drawn, arrays: list[np.ndarray], row: RowSampling) -> Draw:
    if row.logprobs is None:
        return Draw(drawn.token, None, None)
    top: dict[int, float] = {}
    if row.logprobs:
        tokens, logprobs = arrays[-2:]
        top = dict(zip(tokens.tolist(), logprobs.tolist(), strict=True))
    return Draw(drawn.token, drawn.logprob, top)
