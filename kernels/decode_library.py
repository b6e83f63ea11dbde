"""Products of the CUDA decode engine by PyTorch's library (cuBLAS), for users who give up the invariance of bits for its speed.

The engine gives addresses on the GPU and its stream, and PyTorch sees them as tensors.
"""

from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from . import decode

_TYPES = {torch.bfloat16: "<i2", torch.float32: "<f4"}  # numpy knows no bfloat16


class LibraryProducts:
    """What `leangpt_use_library` takes: `callback`, for as long as the decoder lives.

    Args:
        weights: float32 `(n, k)`, of each matrix by its number; kept on the GPU in bfloat16, beside those of the engine.
        device: number of the GPU.

    Raises:
        RuntimeError: this PyTorch knows no CUDA.
    """

    def __init__(self, weights: Iterable[np.ndarray], device: int) -> None:
        self.error: BaseException | None = None  # that the last failure was about
        self._device = device
        self._weights = [self.upload(torch.from_numpy(weight).bfloat16()) for weight in weights]
        self.callback = decode.LIBRARY_PRODUCT(self._call)

    def upload(self, weight: Tensor) -> Tensor:
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"exact=False needs a PyTorch with CUDA, and {torch.__version__} has none"
            )
        weight = weight.to(f"cuda:{self._device}")
        torch.cuda.synchronize(self._device)  # the engine's stream waits for no other
        return weight

    def multiply(
        self, weight: Tensor, rows: int, row_stride: int, products: int, stride: int, num_rows: int, stream: int
    ) -> None:  # fmt: skip
        """Queue products `(num_rows, n)` float32 = rows `(num_rows, k)` bfloat16 times weight^T; both are addresses."""
        n, k = weight.shape
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, weight.device)):
            x = _at(rows, (num_rows, k), row_stride, torch.bfloat16, weight.device)
            out = _at(products, (num_rows, n), stride, torch.float32, weight.device)
            torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)

    def _call(
        self, matrix: int, rows: int, row_stride: int, num_rows: int, products: int, stride: int, stream: int
    ) -> int:  # fmt: skip
        try:
            self.multiply(
                self._weights[matrix], rows, row_stride, products, stride, num_rows, stream
            )
        except BaseException as error:  # C++ cannot pass it on
            self.error = error
            return 1
        return 0


def _at(
    address: int, shape: tuple[int, int], stride: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory of the GPU as a tensor."""
    interface = {
        "data": (address, False),
        "shape": shape,
        "strides": (stride * dtype.itemsize, dtype.itemsize),
        "typestr": _TYPES[dtype],
        "version": 3,
    }
    memory = SimpleNamespace(__cuda_array_interface__=interface)
    tensor = torch.as_tensor(memory, device=device).view(dtype)
    assert tensor.data_ptr() == address, "a copy was made"
    return tensor
