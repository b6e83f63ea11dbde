"""The launchers of csrc/cuda/linear_decode.cu, layer_norm.cu and embedding.cu, called in the emulator."""

import functools
from ctypes import Structure, byref, c_bool, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from emulator import cuda
from native_helpers import PackedMatrix
from torch import Tensor

from leangpt.kernels import decode

_HERE = Path(__file__).parent / "cuda"
_CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
_SOURCES = [
    _HERE / "linear_launchers.cpp",
    *(_CSRC / f"{name}.cu" for name in ("linear_decode", "layer_norm", "embedding")),
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
    ]


@functools.cache
def _library() -> cuda.Library:
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
) -> Tensor:
    """`activation(norm(x) w^T + bias)`, plus `residual`: of `x` float32 with a norm, else bfloat16, `(rows, k)`."""
    n = packed.matrix.n // 2 if activation == "swiglu" else packed.matrix.n
    num_rows = len(x if row_of is None else row_of)
    rows = cuda.to_device(padded(x), "x")
    stride = -(-x.shape[1] // 16) * 16
    if norm is None:
        source = _LinearInput(rows=rows.address, stride=stride)
    else:
        normed = cuda.empty((num_rows, stride), torch.bfloat16, "normed")
        chosen = None if row_of is None else cuda.to_device(row_of, "row_of").address
        source = _LinearInput(rows.address, None, stride, chosen, norm.struct, normed.address)
    out_stride = -(-n // 16) * 16
    if residual is not None:
        field, out = "stream", cuda.to_device(padded(residual), "stream")
    else:
        field = "bf16" if dtype == torch.bfloat16 else "out"
        out = cuda.to_device(torch.zeros(num_rows, out_stride, dtype=dtype), "out")
    target = _LinearOutput(stride=out_stride, activation=ACTIVATIONS[activation])
    setattr(target, field, out.address)
    _call(
        "call_linear_decode", byref(device_matrix(packed)), byref(source), byref(target), num_rows
    )
    result = out.cpu()
    assert not result[:, n:].any(), "what lies behind the outputs was changed"
    return result[:, :n]


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
    packed: PackedMatrix, tokens: Tensor, learned: Tensor | None, positions: Tensor
) -> Tensor:
    """Rows of a packed embedding, and of learned positions."""
    k = packed.matrix.k
    stride = -(-k // 16) * 16
    out = cuda.to_device(torch.zeros(len(tokens), stride), "stream")
    rows = None if learned is None else cuda.to_device(padded(learned), "learned")
    matrix = device_matrix(packed)
    _call(
        "call_embed", byref(matrix), rows, c_int64(stride), cuda.to_device(tokens.int(), "tokens"),
        cuda.to_device(positions.int(), "positions"), out, c_int64(stride), len(tokens),
    )  # fmt: skip
    return out.cpu()[:, :k]
