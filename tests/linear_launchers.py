"""The launchers of csrc/cuda/linear_decode.cu, delta.cu, layer_norm.cu and embedding.cu, called on a GPU or in the emulator."""

import functools
from collections.abc import Mapping, Sequence
from ctypes import CDLL, Structure, byref, c_bool, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import cuda_device as cuda
import torch
from native_helpers import PackedMatrix
from torch import Tensor

from leangpt.kernels import decode

_HERE = Path(__file__).parent / "cuda"
_CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
_SOURCES = [
    _HERE / "linear_launchers.cpp",
    *(_CSRC / f"{name}.cu" for name in ("linear_decode", "delta", "layer_norm", "embedding")),
]
ACTIVATIONS = {"none": 0, **decode.ACTIVATIONS}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("is_rms", c_bool)]


class _LinearInput(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("stream", "rows")),
        ("stride", c_int64),
        ("row_of", c_void_p),
        ("norm", _Norm),
        ("normed", c_void_p),
    ]


class _LinearOutput(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("out", "stream", "bf16")),
        ("stride", c_int64),
        ("activation", c_int32),
        *((name, c_void_p) for name in ("addends", "addend_of")),
    ]


@functools.cache
def _library() -> CDLL:
    return cuda.library("linear_launchers", _SOURCES)


def _call(name: str, *args: Any) -> None:
    """Call a launcher; what it throws is a ValueError."""
    function = _library()[name]
    function.restype = c_char_p
    message = function(*args)
    if message is not None:
        raise ValueError(message.decode())


def padded(x: Tensor) -> Tensor:
    """Rows with zeros behind them up to a multiple of 16, as the launchers take them."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)).contiguous()


class Norm:
    """A norm's vectors on the device."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, is_rms: bool = False):
        self.weight = cuda.to_device(padded(weight), "norm.weight")
        self.bias = None if bias is None else cuda.to_device(padded(bias), "norm.bias")
        address = self.bias.address if self.bias else None
        self.struct = _Norm(self.weight.address, address, 1e-5, is_rms)


def device_matrix(packed: PackedMatrix) -> decode.Matrix:
    """A packed matrix on the device."""
    matrix = decode.Matrix.from_buffer_copy(packed.matrix)
    for name, part in packed.parts.items():
        setattr(matrix, name, cuda.to_device(torch.from_numpy(part), f"w.{name}").address)
    return matrix


def linear_decode(
    packed: PackedMatrix,
    x: Tensor,
    norm: Norm | None = None,
    row_of: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    addends: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`activation(norm(x) w^T + bias)`, plus `residual`: of `x` float32 with a norm, else bfloat16, `(rows, k)`.

    `addends` `(.., n up to a multiple of 64)` and their number for each row, or -1, come to the product and bias.
    """
    num_rows = len(x if row_of is None else row_of)
    rows = cuda.to_device(padded(x), "x")
    stride = -(-x.shape[1] // 16) * 16
    if norm is None:
        source = _LinearInput(rows=rows.address, stride=stride)
    else:
        normed = cuda.empty((num_rows, stride), torch.bfloat16, "normed")
        chosen = None if row_of is None else cuda.to_device(row_of, "row_of").address
        source = _LinearInput(rows.address, None, stride, chosen, norm.struct, normed.address)
    out = _Output(packed, num_rows, activation, residual, dtype, addends)
    _call(
        "call_linear_decode",
        *(byref(device_matrix(packed)), byref(source), byref(out.struct), num_rows),
    )
    return out.values()


def finish_products(
    packed: PackedMatrix,
    products: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    addends: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What `linear_decode` makes of the products `(rows, n)` float32 of x and the weights."""
    out = _Output(packed, len(products), activation, residual, dtype, addends)
    rows = cuda.to_device(padded(products), "products")
    _call(
        "call_finish_products", byref(device_matrix(packed)), rows, c_int64(rows.shape[1]),
        byref(out.struct), len(products),
    )  # fmt: skip
    return out.values()


class _Output:
    """Where products go."""

    def __init__(
        self,
        packed: PackedMatrix,
        num_rows: int,
        activation: str,
        residual: Tensor | None,
        dtype: torch.dtype,
        addends: tuple[Tensor, Tensor] | None,
    ):
        self._width = packed.matrix.n // 2 if activation == "swiglu" else packed.matrix.n
        stride = -(-self._width // 16) * 16
        if residual is not None:
            field, self._rows = "stream", cuda.to_device(padded(residual), "stream")
        else:
            field = "bf16" if dtype == torch.bfloat16 else "out"
            self._rows = cuda.to_device(torch.zeros(num_rows, stride, dtype=dtype), "out")
        self.struct = _LinearOutput(stride=stride, activation=ACTIVATIONS[activation])
        setattr(self.struct, field, self._rows.address)
        if addends is not None:
            self.struct.addends = cuda.to_device(addends[0], "addends").address
            self.struct.addend_of = cuda.to_device(addends[1], "addend_of").address

    def values(self) -> Tensor:
        result = self._rows.cpu()
        assert not result[:, self._width :].any(), "what lies behind the outputs was changed"
        return result[:, : self._width]


class DeviceDelta:
    """A low-rank delta or bottleneck, packed, on the device."""

    def __init__(
        self,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        is_bottleneck: bool,
    ):
        self.rank = len(down)
        biases = [None if b is None else b.numpy() for b in (down_bias, up_bias)]
        self.packed = [
            PackedMatrix("fp32", w.numpy(), b) for w, b in zip((down, up), biases, strict=True)
        ]
        self.struct = decode.Delta(*map(device_matrix, self.packed), is_bottleneck)


class _MatrixDeltas(Structure):
    _fields_ = [
        ("deltas", c_void_p),
        ("stride", c_int64),
        *((name, c_int32) for name in ("is_bottleneck", "outputs", "most_ranks")),
    ]


class _DeltaRows(Structure):
    _fields_ = [*((name, c_void_p) for name in ("rows", "tiles")), ("num_tiles", c_int32)]


def multiply_deltas(
    deltas: Sequence[DeviceDelta | None],
    rows: Mapping[int, Sequence[int]],
    x: Tensor,
    outputs: int,
    is_bottleneck: bool,
) -> Tensor:
    """What deltas, by adapter, add to the products of `rows` of x, by adapter: one after the other, `(.., outputs)`."""
    structs = (decode.Delta * len(deltas))(
        *(decode.Delta() if d is None else d.struct for d in deltas)
    )
    memory = cuda.to_device(torch.frombuffer(structs, dtype=torch.uint8).clone(), "deltas")
    most_ranks = max(d.rank for d in deltas if d is not None)
    of_matrix = _MatrixDeltas(memory.address, 1, is_bottleneck, outputs, most_ranks)
    order, tiles = [], []
    for adapter, of_adapter in rows.items():
        for first in range(0, len(of_adapter), 4):
            tiles.append((adapter, len(order) + first, min(4, len(of_adapter) - first)))
        order += of_adapter
    tiles.append((0, 0, 0))  # as steps of a graph have them
    device_rows = cuda.to_device(torch.tensor(order, dtype=torch.int32), "rows")
    device_tiles = cuda.to_device(torch.tensor(tiles, dtype=torch.int32), "tiles")
    of_rows = _DeltaRows(device_rows.address, device_tiles.address, len(tiles))
    source = cuda.to_device(padded(x), "x")
    narrow = cuda.empty((len(order), -(-most_ranks // 64) * 64), torch.float32, "narrow")
    addends = cuda.empty((len(order), -(-outputs // 64) * 64), torch.float32, "addends")
    _call(
        "call_multiply_deltas", byref(of_matrix), byref(of_rows), source,
        int(x.dtype == torch.bfloat16), c_int64(source.shape[1]), narrow, addends,
    )  # fmt: skip
    return addends.cpu()[:, :outputs]


def add_branch(
    branch: Tensor, addends: Tensor, addend_of: Tensor, outputs: int, stream: Tensor
) -> Tensor:
    """The stream, plus a branch and its addends."""
    out = cuda.to_device(padded(stream), "stream")
    _call(
        "call_add_branch", cuda.to_device(padded(branch), "branch"),
        cuda.to_device(addends, "addends"), cuda.to_device(addend_of, "addend_of"), outputs, out,
        c_int64(out.shape[1]), len(stream),
    )  # fmt: skip
    return out.cpu()[:, : stream.shape[1]]


def call_linear_decode(packed: PackedMatrix, source: dict, target: dict) -> None:
    """The launcher with any pointers, which it must refuse before it reads them."""
    arguments = _LinearInput(**source), _LinearOutput(**target)
    _call("call_linear_decode", byref(packed.matrix), *map(byref, arguments), 1)


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype, row_of: Tensor | None = None) -> Tensor:
    """The norm of rows of `x` `(rows, width)` float32."""
    num_rows = len(x if row_of is None else row_of)
    rows = cuda.to_device(padded(x), "x")
    stride = rows.shape[1]
    out = cuda.empty((num_rows, stride), dtype, "out")
    chosen = None if row_of is None else cuda.to_device(row_of, "row_of")
    _call(
        "call_normalize", rows, c_int64(stride), chosen, byref(norm.struct), x.shape[1],
        out, int(dtype == torch.bfloat16), c_int64(stride), num_rows,
    )  # fmt: skip
    result = out.cpu()
    assert not result[:, x.shape[1] :].any(), "behind the width there are not zeros"
    return result[:, : x.shape[1]]


def embed(
    packed: PackedMatrix,
    tokens: Tensor,
    learned: Tensor | None,
    positions: Tensor,
    drawn: Tensor | None = None,
) -> Tensor:
    """Rows of a packed embedding, and of learned positions; token -1 - i is `drawn[i]`."""
    k = packed.matrix.k
    stride = -(-k // 16) * 16
    out = cuda.to_device(torch.zeros(len(tokens), stride), "stream")
    rows = None if learned is None else cuda.to_device(padded(learned), "learned")
    matrix = device_matrix(packed)
    structs = None
    if drawn is not None:
        values = (decode.Drawn * len(drawn))(*((token, 0.0) for token in drawn.tolist()))
        structs = cuda.to_device(torch.frombuffer(values, dtype=torch.uint8).clone(), "drawn")
    _call(
        "call_embed", byref(matrix), rows, c_int64(stride), cuda.to_device(tokens.int(), "tokens"),
        structs, cuda.to_device(positions.int(), "positions"), out, c_int64(stride), len(tokens),
    )  # fmt: skip
    return out.cpu()[:, :k]
