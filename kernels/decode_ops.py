"""The kernels of a decode step on CUDA, one by one, for code that has its own step: `torch.ops.leangpt`, checked and compiled whole.

N rows, each of which continues a sequence; matrices are packed as csrc/matrix.h says, and pages of keys and values as
csrc/cuda/kernels.h. Rows of one sequence give the same bits as if they came alone. Nothing here has a gradient. A tensor of a wrong
dtype, shape or device raises ValueError; a library without CUDA kernels raises NotImplementedError.
"""

import torch
from torch import Tensor

from . import native


def linear_decode(
    x: Tensor,
    weight: Tensor,
    num_outputs: int,
    *,
    scales: Tensor | None = None,
    minimums: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 0,
    activation: str = "none",
) -> Tensor:
    """activation(x w^T + bias), float32 sums on tensor cores.

    Args:
        x: `(N, k)` bfloat16.
        weight: the panels of a packed bf16, int8 or int4 matrix, uint8; which of them, its size says.
        num_outputs: rows of the matrix.
        scales: of int8 and int4, float32, or float16 with groups; minimums: float16, of asymmetric ones.
        bias: `(num_outputs,)` float32.
        group: inputs that share a scale; 0: all of an output.
        activation: "none", "gelu_tanh", "gelu", "relu2", or "swiglu", for which 16 rows of gate and 16 of up alternate.

    Returns:
        `(N, num_outputs)` bfloat16, of "swiglu" half as many.
    """
    return torch.ops.leangpt.linear_decode(
        x, weight, scales, minimums, bias, num_outputs, group, activation
    )


def append_kv(
    qkv: Tensor,
    kv_cache: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    n_head: int,
    n_kv_head: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-5,
    frequencies: Tensor | None = None,
    rope_magnitude: float = 1.0,
    kv_dtype: str = "bfloat16",
) -> Tensor:
    """Norms of heads and rotary positions, and the keys and values to their pages.

    Args:
        qkv: `(N, (H + 2 H_kv) D)` float32.
        kv_cache: `(num_pages, bytes)` uint8, zero at first; pages of 16 tokens, written in place.
        positions: `(N,)` int32, of each row in its sequence.
        block_tables: `(N, pages)` int32, the pages of each row's sequence.
        q_norm, k_norm: `(D,)` float32, weights of RMS norms of the heads.
        frequencies: `(D/2,)` float32, radians a position.
        kv_dtype: of the cache: "bfloat16", "float16", or "int8" or "float8_e4m3" with a scale for each key and value of a head.

    Returns:
        The queries `(N, H, D)` bfloat16, for a cache of float16 float16, scaled by D^-0.5.
    """
    return torch.ops.leangpt.append_kv(
        *(qkv, kv_cache, positions, block_tables, q_norm, k_norm, frequencies),
        *(n_head, n_kv_head, norm_eps, rope_magnitude, kv_dtype),
    )


def attention_decode(
    q: Tensor,
    kv_cache: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    n_kv_head: int,
    max_keys: int,
    *,
    sliding_window: int | None = None,
    kv_dtype: str = "bfloat16",
) -> Tensor:
    """Attention of queries to the keys up to their positions, in splits of 256 keys that are merged in order.

    Args:
        q: `(N, H, D)`, as `append_kv` returns them; the other tensors are as there.
        max_keys: at least the largest position + 1; launches are sized for it.
        sliding_window: keys that a query sees.

    Returns:
        `(N, H, D)` bfloat16.

    Reference:
        Flash-Decoding, https://pytorch.org/blog/flash-decoding
    """
    return torch.ops.leangpt.attention_decode(
        *(q, kv_cache, positions, block_tables, n_kv_head, max_keys),
        *(sliding_window or 0, kv_dtype),
    )


def sample_decode(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    seed: int,
    position: int,
) -> Tensor:
    """Draw a token from each row of logits `(N, V)` float32 by the rule of `ops.sample`; row i is sample i of one request.

    Returns:
        `(N,)` int64; -1 where logits are NaN.
    """
    return torch.ops.leangpt.sample_decode(logits, temperature, top_k, top_p, min_p, seed, position)


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[i, targets[i]] of logits `(N, V)` float32 and targets `(N,)` int64: `(N,)` float32."""
    return torch.ops.leangpt.log_probs(logits, targets)


def _register_fakes() -> None:
    register_fake = torch.library.register_fake

    @register_fake("leangpt::linear_decode")
    def _(x, weight, scales, minimums, bias, num_outputs, group, activation):
        return x.new_empty((x.shape[0], num_outputs // (1 + (activation == "swiglu"))))

    @register_fake("leangpt::append_kv")
    def _(qkv, kv_cache, positions, block_tables, q_norm, k_norm, frequencies, n_head, n_kv_head, norm_eps, rope_magnitude, kv_dtype):  # fmt: skip
        D = qkv.shape[1] // (n_head + 2 * n_kv_head)
        dtype = torch.float16 if kv_dtype == "float16" else torch.bfloat16
        return qkv.new_empty((qkv.shape[0], n_head, D), dtype=dtype)

    @register_fake("leangpt::attention_decode")
    def _(q, kv_cache, positions, block_tables, n_kv_head, max_keys, sliding_window, kv_dtype):
        return torch.empty_like(q, dtype=torch.bfloat16)

    @register_fake("leangpt::sample_decode")
    def _(logits, temperature, top_k, top_p, min_p, seed, position):
        return logits.new_empty((logits.shape[0],), dtype=torch.int64)

    @register_fake("leangpt::log_probs")
    def _(logits, targets):
        return logits.new_empty((logits.shape[0],))


if native.unavailable_reason is None:
    _register_fakes()
