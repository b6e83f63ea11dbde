"""What fine-tuning adds to a base model, as decoders run it for single sequences: matrices of numpy, and no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..config import GPTConfig


@dataclass(frozen=True)
class LowRank:
    """`out + (x down^T) up^T` in place of the product out of a matrix `(N, K)` with x; all float32."""

    down: np.ndarray  # (r, K)
    up: np.ndarray  # (N, r)


@dataclass(frozen=True)
class Bottleneck:
    """`out + gelu_tanh(out down^T + down_bias) up^T + up_bias` in place of the product out of a matrix `(N, K)`; all float32."""

    down: np.ndarray  # (r, N)
    down_bias: np.ndarray  # (r,)
    up: np.ndarray  # (N, r)
    up_bias: np.ndarray  # (N,)


@dataclass(frozen=True)
class Adapter:
    """By the names of matrices ("blocks.0.qkv"), what is added to their products."""

    deltas: Mapping[str, LowRank | Bottleneck]

    def check(self, config: GPTConfig) -> None:
        """Raise ValueError where it does not fit a model of this config."""
        sizes = matrix_sizes(config)
        for name, delta in self.deltas.items():
            if name not in sizes:
                raise ValueError(f"the adapter is for {name}, which the model does not have")
            outputs, inputs = sizes[name]
            if isinstance(delta, Bottleneck):
                if not name.endswith(("attn_out", "mlp_out")):
                    raise ValueError(f"a bottleneck is for attn_out and mlp_out, got {name}")
                inputs = outputs
            rank = len(delta.down)
            shapes: dict[str, tuple[int, ...]] = {"down": (rank, inputs), "up": (outputs, rank)}
            if isinstance(delta, Bottleneck):
                shapes |= {"down_bias": (rank,), "up_bias": (outputs,)}
            for field, shape in shapes.items():
                actual = getattr(delta, field).shape
                if actual != shape:
                    raise ValueError(f"adapter: {name}.{field} must be {shape}, got {actual}")


@dataclass(frozen=True)
class Prefix:
    """Keys and values that stand in front of a sequence's own. They take room in the cache, but no positions."""

    keys: np.ndarray  # (n_layer, P, H_kv, D) float32
    values: np.ndarray  # as keys

    def __len__(self) -> int:
        return self.keys.shape[1]

    def check(self, config: GPTConfig) -> None:
        """Raise ValueError where it does not fit a model of this config."""
        for name, array in (("keys", self.keys), ("values", self.values)):
            expected = (config.n_layer, self.keys.shape[1], config.kv_heads, config.head_size)
            if array.shape != expected:
                raise ValueError(f"prefix: {name} must be {expected}, got {array.shape}")


def matrix_sizes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """`(N, K)` of each matrix that an adapter may be for, by name."""
    C, F, width = config.n_embd, config.inner_size, config.n_head * config.head_size
    of_block = {
        "qkv": (width + 2 * config.kv_heads * config.head_size, C),
        "attn_out": (C, width),
        "mlp_in": (F * (1 + config.is_gated), C),
        "mlp_out": (C, F),
    }
    return {
        f"blocks.{i}.{name}": size for i in range(config.n_layer) for name, size in of_block.items()
    }
