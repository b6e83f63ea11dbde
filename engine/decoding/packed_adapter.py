"""An adapter as the native decode engine runs it: its thin matrices packed in float32, for each matrix of each layer."""

from ctypes import Array
from typing import Any

import numpy as np

from leangpt.kernels import decode
from leangpt.kernels.decode import PANEL, LayerDeltas, Matrix

from ..config import GPTConfig
from .adapter import Adapter, Bottleneck
from .packed import _allocate, _empty_matrix, _matrix_shapes, _round_up, _row_of
from .weight_format import WeightFormat

_FORMAT = WeightFormat("fp32")


class PackedAdapter:
    """The engine's view of an adapter, `layers`; it points into memory of this object, which must live as long.

    Raises:
        ValueError: the adapter does not fit the config.
    """

    layers: "Array[LayerDeltas]"

    def __init__(self, adapter: Adapter, config: GPTConfig) -> None:
        adapter.check(config)
        self.layers = (LayerDeltas * config.n_layer)()
        self._memory: list[np.ndarray] = []
        for name, delta in adapter.deltas.items():
            _, layer, matrix = name.split(".")
            outputs, inputs = _matrix_shapes(config)[matrix]
            rank = len(delta.down)
            down_bias = up_bias = None
            if isinstance(delta, Bottleneck):
                inputs, down_bias, up_bias = outputs, delta.down_bias, delta.up_bias
            of_rank = np.full(_round_up(rank, PANEL), -1)
            of_rank[:rank] = np.arange(rank)
            # as the rows of the matrix that it adds to
            of_outputs = _row_of(matrix, outputs, config)
            target: Any = getattr(self.layers[int(layer)], matrix)
            target.is_bottleneck = isinstance(delta, Bottleneck)
            target.down = self._pack(delta.down, down_bias, rank, inputs, of_rank)
            target.up = self._pack(delta.up, up_bias, outputs, rank, of_outputs)

    def _pack(
        self, weight: np.ndarray, bias: np.ndarray | None, n: int, k: int, row_of: np.ndarray
    ) -> Matrix:
        matrix = _empty_matrix(_FORMAT, n, k)
        matrix.data = self._keep(_allocate(decode.packed_bytes(matrix)[0]))
        decode.pack(matrix, weight.astype(np.float32), row_of)
        if bias is not None:
            values = _allocate(4 * len(row_of)).view(np.float32)
            values[row_of >= 0] = bias[row_of[row_of >= 0]]
            matrix.bias = self._keep(values)
        return matrix

    def _keep(self, array: np.ndarray) -> int | None:
        self._memory.append(array)
        return decode.address(array)
