"""How a file names and stacks the parameters of a GPT: one table a format, for reading and for writing.

The layout maps each parameter to the file's tensors that lie in it, one below the other, as the rows of `qkv.weight`
are those of q, k and v.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import GPTConfig
from ..model import GPT

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Names:
    """A format's names of our modules: several where it has the rows apart; `{}` is the number of the block."""

    modules: Mapping[str, tuple[str, ...]]
    is_transposed: bool = False  # matrices of the blocks are (in, out)


class Weights(NamedTuple):
    """What the reader of a format gives. No names: the file has our own."""

    where: str  # for errors
    config: GPTConfig
    tensors: dict[str, Tensor]
    names: Names | None


def parts(
    parameters: Mapping[str, Tensor], config: GPTConfig, names: Names | None
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors, by its names and in its orientation, as views of the parameters (or gradients) of a GPT."""
    rows = rows_of_parts(config)
    for key, parameter in parameters.items():
        if names is None:
            yield key, parameter
            continue
        *block, module, kind = key.split(".")  # blocks, 3, qkv, weight
        targets = names.modules[module]
        pieces = parameter.split(rows[module]) if len(targets) > 1 else (parameter,)
        for target, piece in zip(targets, pieces, strict=True):
            is_transposed = names.is_transposed and block and piece.ndim == 2
            name = f"{target.format(*block[1:])}.{kind}"
            yield name, piece.T if is_transposed else piece


def rows_of_parts(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """How the rows of a matrix of ours are shared out, where a format has several in its place."""
    D, F = config.head_size, config.inner_size
    return {
        "qkv": (config.n_head * D, config.kv_heads * D, config.kv_heads * D),
        "mlp_in": (F, F),
    }


def build(weights: Weights, dtype: torch.dtype, device: str | torch.device) -> GPT:
    """Build the model and copy each tensor straight to its place, dtype and device.

    Raises:
        ValueError: a tensor is missing, superfluous, of a wrong shape, or quantized; told before memory is taken.
    """
    where, config, tensors, names = weights
    if config.n_layer > len(tensors):
        raise ValueError(
            f"{where}: n_layer is {config.n_layer}, but there are {len(tensors)} tensors in all"
        )
    try:
        with torch.device("meta"):
            model = GPT(config).to(dtype)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        ArithmeticError,
    ) as error:  # sizes beyond int64, log(1)
        raise ValueError(f"{where}: no model can be built from its config ({error})") from error
    _check(where, tensors, dict(parts(dict(model.named_parameters()), config, names)))

    model.to_empty(device=device)
    with torch.no_grad():
        for name, part in parts(dict(model.named_parameters()), config, names):
            part.copy_(tensors[name])
    return model.eval()


def _check(where: str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for problem, wrong in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"{where}: {problem} tensor {', '.join(sorted(wrong)[:5])}{more}")
    for name, part in expected.items():
        tensor = tensors[name]
        if tensor.shape != part.shape:
            raise ValueError(
                f"{where}: {name} must be {tuple(part.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise ValueError(
                f"{where}: {name} must be a dense tensor of floating-point numbers of 16 to 64 bits, got "
                f"{tensor.dtype} ({tensor.layout}); quantized weights are not read"
            )
