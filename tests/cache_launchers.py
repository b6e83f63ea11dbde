"""The launchers of csrc/cuda/kv_cache.cu and attention_decode.cu, called on a GPU or in the emulator on a paged cache."""

import functools
from collections.abc import Sequence
from ctypes import (
    CDLL,
    Structure,
    byref,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_void_p,
)  # fmt: skip
from pathlib import Path
from typing import Any

import cuda_device as cuda
import torch
from torch import Tensor

_HERE = Path(__file__).parent / "cuda"
_CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
_SOURCES = [
    _HERE / "cache_launchers.cpp",
    *(_CSRC / f"{name}.cu" for name in ("kv_cache", "attention_decode")),
]
PAGE = 16
KINDS = {"bf16": 1, "int8": 2, "fp16": 3, "fp8": 4}  # of keys and values, as in kernels.h


class HeadShape(Structure):
    _fields_ = [("n_head", c_int), ("n_kv_head", c_int), ("head_dim", c_int)]


class _KvLayer(Structure):
    _fields_ = [("base", c_void_p), ("block_bytes", c_int64), ("kind", c_int32)]


class _StepRows(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("places", "table_of", "block_tables")),
        ("table_stride", c_int64),
        ("num_rows", c_int),
    ]


class _AppendArgs(Structure):
    _fields_ = [
        ("qkv", c_void_p),
        ("qkv_stride", c_int64),
        *((name, c_void_p) for name in ("q_norm", "k_norm")),
        ("norm_eps", c_float),
        *((name, c_void_p) for name in ("rotations", "queries")),
        ("query_stride", c_int64),
        ("first_values", c_void_p),
        ("is_first_layer", c_bool),
    ]


class _Prefix(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int) for name in ("length", "n_layer")),
    ]


class _AttentionArgs(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("queries", "out")),
        ("stride", c_int64),
        ("tiles", c_void_p),
        *((name, c_int) for name in ("num_tiles", "max_keys", "sliding_window")),
        ("scratch", c_void_p),
    ]


@functools.cache
def library() -> CDLL:
    loaded = cuda.library("cache_launchers", _SOURCES)
    loaded.call_kv_block_bytes.restype = loaded.call_attention_scratch_floats.restype = c_int64
    return loaded


def call(name: str, *args: Any) -> None:
    """Call a launcher; what it throws is a ValueError."""
    function = getattr(library(), f"call_{name}")
    function.restype = c_char_p
    message = function(*args)
    if message is not None:
        raise ValueError(message.decode())


def rotary_angles(positions: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> Any:
    """Cosines, then sines, `(rows, head_dim)`, of rows at `positions`."""
    D = 2 * len(frequencies)
    rotations = cuda.empty((len(positions), D), torch.float32, "rotations")
    call(
        "rotary_angles", cuda.to_device(positions.int(), "positions"),
        cuda.to_device(frequencies, "frequencies"), c_float(magnitude), D, rotations, len(positions),
    )  # fmt: skip
    return rotations


class Rows:
    """The rows of a step: `(sequence, position)` of each."""

    def __init__(self, rows: Sequence[tuple[int, int]]):
        self.rows = list(rows)
        self.sequences = torch.tensor([s for s, _ in rows], dtype=torch.int32)
        self.positions = torch.tensor([p for _, p in rows], dtype=torch.int32)

    def tiles(self, most_rows: int) -> list[tuple[int, int]]:
        """First row and number of rows that may attend together."""
        tiles: list[tuple[int, int]] = []
        for i, (sequence, position) in enumerate(self.rows):
            follows = i > 0 and self.rows[i - 1] == (sequence, position - 1)
            if follows and tiles[-1][1] < most_rows:
                tiles[-1] = (tiles[-1][0], tiles[-1][1] + 1)
            else:
                tiles.append((i, 1))
        return tiles


class PagedCache:
    """One layer's pages of some sequences, which lie in any order; what was not written is NaN."""

    def __init__(self, shape: HeadShape, kind: str, lengths: Sequence[int]):
        self.shape, self.kind = shape, kind
        counts = [-(-length // PAGE) for length in lengths]
        self.block_bytes = library().call_kv_block_bytes(byref(shape), KINDS[kind])
        num_pages = sum(counts) + 1
        self.pages = cuda.to_device(
            torch.full((num_pages, self.block_bytes), 0xFF, dtype=torch.uint8), "pages"
        )
        self.layer = _KvLayer(self.pages.address, self.block_bytes, KINDS[kind])
        order = torch.randperm(num_pages, dtype=torch.int32)
        self.block_tables = torch.full((len(lengths), max(counts)), 1 << 30, dtype=torch.int32)
        for sequence, count in enumerate(counts):
            self.block_tables[sequence, :count] = order[:count]
            order = order[count:]

    @property
    def query_dtype(self) -> torch.dtype:
        return torch.float16 if self.kind == "fp16" else torch.bfloat16

    @property
    def stride(self) -> int:
        return -(-self.shape.n_head * self.shape.head_dim // 16) * 16

    def step_rows(self, rows: Rows) -> _StepRows:
        return _StepRows(
            cuda.to_device(rows.positions, "places").address,
            cuda.to_device(rows.sequences, "table_of").address,
            cuda.to_device(self.block_tables, "block_tables").address,
            self.block_tables.shape[1],
            len(rows.rows),
        )

    def append(
        self,
        qkv: Tensor,
        rows: Rows,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        rotations: Any | None = None,
        first_values: Any | None = None,
        is_first_layer: bool = False,
    ) -> Tensor:
        """Write keys and values of `qkv` `(rows, H + 2 H_kv, D)`; its queries, `(rows, H, D)` in `query_dtype`."""
        flat = torch.nn.functional.pad(qkv.flatten(1), (0, 3))  # rows may be further apart
        queries = cuda.to_device(
            torch.zeros(len(qkv), self.stride, dtype=self.query_dtype), "queries"
        )

        def address(tensor: Tensor | None, name: str) -> int | None:
            return None if tensor is None else cuda.to_device(tensor, name).address

        args = _AppendArgs(
            cuda.to_device(flat, "qkv").address,
            flat.shape[1],
            address(q_norm, "q_norm"),
            address(k_norm, "k_norm"),
            1e-5,
            rotations.address if rotations else None,
            queries.address,
            self.stride,
            first_values.address if first_values else None,
            is_first_layer,
        )
        call("append_kv", byref(args), byref(self.shape), byref(self.step_rows(rows)), byref(self.layer))  # fmt: skip
        H, D = self.shape.n_head, self.shape.head_dim
        return queries.cpu()[:, : H * D].unflatten(1, (H, D))

    def write_prefix(self, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Write the first keys and values of a sequence, `(length, H_kv, D)` float32."""
        memory = [cuda.to_device(x[None], "prefix") for x in (keys, values)]
        prefix = _Prefix(memory[0].address, memory[1].address, len(keys), 1)
        table = cuda.to_device(self.block_tables[sequence].clone(), "block_table")
        layer_bytes = c_int64(self.pages.nbytes)
        call(
            "write_prefix", byref(prefix), byref(self.shape), table, byref(self.layer), layer_bytes
        )

    def attend(
        self, queries: Tensor, rows: Rows, window: int = 0, max_keys: int | None = None
    ) -> Tensor:
        """What `queries` `(rows, H, D)` attend to in their sequences, likewise."""
        H, D = self.shape.n_head, self.shape.head_dim
        padding = (0, self.stride - H * D)
        padded = torch.nn.functional.pad(queries.flatten(1), padding)
        out = cuda.to_device(torch.zeros(len(queries), self.stride).bfloat16(), "out")
        tiles = rows.tiles(library().call_attention_tile_rows(byref(self.shape)))
        max_keys = max_keys or int(rows.positions.max()) + 1
        num_floats = library().call_attention_scratch_floats(
            byref(self.shape), len(queries), max_keys
        )
        args = _AttentionArgs(
            cuda.to_device(padded, "q").address,
            out.address,
            self.stride,
            cuda.to_device(torch.tensor(tiles, dtype=torch.int32), "tiles").address,
            len(tiles),
            max_keys,
            window,
            cuda.empty(num_floats, torch.float32, "scratch").address,
        )
        call("attention_decode", byref(args), byref(self.shape), byref(self.step_rows(rows)), byref(self.layer))  # fmt: skip
        result = out.cpu()
        assert not result[:, H * D :].any(), "what lies behind the heads was changed"
        return result[:, : H * D].unflatten(1, (H, D))

    def keys_and_values(self, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """What the cache stands for, `(length, H_kv, D)` float32 both, by the layout that kv_layout.cuh states."""
        H_kv, D = self.shape.n_kv_head, self.shape.head_dim
        num_elements = -(-D // 16) * 16 * PAGE
        num_bytes = num_elements * (1 if self.kind in ("int8", "fp8") else 2)
        pages = self.pages.cpu()[self.block_tables[sequence, : -(-length // PAGE)].long()]
        heads = pages.unflatten(1, (H_kv, -1))
        slot, dim = torch.arange(PAGE)[:, None], torch.arange(D)
        key = (slot % 8 * 4 + dim % 16 // 4) * 8 + slot // 8 * 4 + dim % 4
        value = (dim % 8 * 4 + slot % 8 // 2) * 8 + dim % 16 // 8 * 4 + slot // 8 * 2 + slot % 2
        found = []
        for i, place in enumerate((key, value)):
            stored = heads[..., i * num_bytes : (i + 1) * num_bytes].contiguous()
            if self.kind in ("bf16", "fp16"):
                elements = stored.view(self.query_dtype).float()[..., dim // 16 * 256 + place]
            else:
                first = 2 * num_bytes + i * PAGE * 4
                scales = heads[..., first : first + PAGE * 4].contiguous().view(torch.float32)
                is_fp8 = self.kind == "fp8"
                numbers = (
                    stored.view(torch.float8_e4m3fn).float() if is_fp8 else stored.float() - 128
                )
                elements = numbers[..., dim // 16 * 256 + place] * scales[..., None]
            # (pages, H_kv, slots, D)
            found.append(elements.transpose(1, 2).flatten(0, 1)[:length])
        return found[0], found[1]
