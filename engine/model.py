"""The GPT: one lean pre-norm block whose options (`GPTConfig`) reach from GPT-2 to Llama, Mistral and Qwen.

It holds the parameters and says in which order the ops of `leangpt.kernels.ops` run. It knows neither tokenizers nor how
text is drawn; a decoder plugs its key/value cache in through `attend`, and fine-tuning hangs small modules on it: a `delta`
on a matrix, a `prefix` on attention.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leangpt.kernels import ops

from .config import GPTConfig
from .rotary import inverse_frequencies, rotary_tables

# (layer, q (B, T, H, D), k (B, T, H_kv, D), v (B, T, H_kv, D)) -> (B, T, H, D); q and k have their positions
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Norm(nn.Module):
    """LayerNorm or RMSNorm, alone or with the add to the residual stream in front of it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.is_layer_norm = config.norm == "layer_norm"
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        has_bias = self.is_layer_norm and config.bias
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if has_bias else None

    def forward(self, stream: Tensor) -> Tensor:
        """`norm(stream)`."""
        if self.is_layer_norm:
            return ops.layer_norm(stream, self.weight, self.bias, self.eps)
        return ops.rms_norm(stream, self.weight, self.eps)

    def add(self, branch: Tensor, stream: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
        """`norm(total)` and `total = stream + dropout(branch)`."""
        options = {"eps": self.eps, "dropout_p": dropout_p}
        if self.is_layer_norm:
            return ops.add_layer_norm(branch, stream, self.weight, self.bias, **options)
        return ops.add_rms_norm(branch, stream, self.weight, **options)


class HeadNorm(nn.Module):
    """RMSNorm over each head (QK-norm)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.head_size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Embedding):
    """A table, without values until `GPT.initialize` or a checkpoint gives them."""

    def reset_parameters(self) -> None:
        """Draw nothing: torch's own values would be drawn over."""


class Linear(nn.Linear):
    """`x w^T + bias`.

    A `delta` that hangs on it is called with x and this product, and returns what takes the product's place.
    Weights have no values until `GPT.initialize` or a checkpoint gives them.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.delta: nn.Module | None = None

    def reset_parameters(self) -> None:
        """Draw nothing: torch's own values would be drawn over."""

    @property
    def is_plain(self) -> bool:
        """Whether it is the product alone, which a fused op may compute from weight and bias."""
        return self.delta is None

    def forward(self, x: Tensor) -> Tensor:
        out = ops.linear(x, self.weight, self.bias)
        return out if self.delta is None else self.delta(x, out)


class Block(nn.Module):
    """Attention and MLP, each on the normalized stream and added to it.

    With a value residual (Zhou et al., 2024, https://arxiv.org/abs/2410.17897) it attends to the sum of its own values and the
    first block's.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        H, H_kv, D, C = config.n_head, config.kv_heads, config.head_size, config.n_embd
        self.norm_1 = Norm(config)
        self.qkv = Linear(C, (H + 2 * H_kv) * D, bias=config.has_qkv_bias)
        self.q_norm = HeadNorm(config) if config.qk_norm else None
        self.k_norm = HeadNorm(config) if config.qk_norm else None
        self.attn_out = Linear(H * D, C, bias=config.bias)
        self.norm_2 = Norm(config)
        self.mlp_in = Linear(C, config.inner_size * (1 + config.is_gated), bias=config.bias)
        self.mlp_out = Linear(config.inner_size, C, bias=config.bias)

    def forward(
        self,
        stream: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attend: Attend,
        first_values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The stream, and the values that were attended to; `first_values` are those of the first block, if they are added."""
        dropout_p = self.config.dropout if self.training else 0.0
        branch, values = self.attention(self.norm_1(stream), rope, attend, first_values)
        x, stream = self.norm_2.add(branch, stream, dropout_p)
        return self.add_mlp(x, stream, dropout_p), values

    def add_mlp(self, x: Tensor, stream: Tensor, dropout_p: float) -> Tensor:
        if not (self.mlp_in.is_plain and self.mlp_out.is_plain):
            h = ops.activate(self.mlp_in(x), self.config.activation)
            return stream + F.dropout(self.mlp_out(h), dropout_p)
        return ops.mlp(
            x,
            self.mlp_in.weight,
            self.mlp_in.bias,
            self.mlp_out.weight,
            self.mlp_out.bias,
            self.config.activation,
            residual=stream,
            dropout_p=dropout_p,
        )

    def attention(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attend: Attend,
        first_values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        B, T, _ = x.shape
        H, H_kv, D = self.config.n_head, self.config.kv_heads, self.config.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * H_kv, D)
        # (B, T, H or H_kv, D)
        if rope is not None:
            norms = self.q_norm, self.k_norm
            q_weight, k_weight = (None if norm is None else norm.weight for norm in norms)
            q, k, v = ops.rotary_qkv(qkv, *rope, H_kv, q_weight, k_weight, self.config.norm_eps)
        else:
            q, k, v = qkv.split((H, H_kv, H_kv), dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
        if first_values is not None:
            v = v + first_values
        out = attend(self.layer, q, k, v)
        return self.attn_out(out.flatten(2)), v


class GPT(nn.Module):
    """A GPT language model.

    `GPT(config)` initializes its weights from torch's random generator; `GPT.from_pretrained` reads them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.n_embd)
        is_learned = config.position == "learned"
        self.wpe = Embedding(config.max_seq_len, config.n_embd) if is_learned else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm_f = Norm(config)
        self.head = (
            None
            if config.tie_embeddings
            else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        )
        # (tokens, out) -> what takes the place of their rows of the token table, out (B, T, C)
        self.wte_delta: nn.Module | None = None
        # hidden (..., C) -> x (..., r), w (V, r), whose product is added to the logits
        self.head_delta: nn.Module | None = None
        # (layer, k, v) -> k, v (B, S, H_kv, D) with the keys and values of a learned prefix in front
        self.prefix: nn.Module | None = None
        # train with the activations of one block in memory: those of the others are computed again for their gradients
        self.recomputes_blocks = False
        if not is_learned:
            # no buffer: they stay float32, whatever the model's dtype
            self.frequencies, self.rope_magnitude = inverse_frequencies(config)
        self.initialize()

    def initialize(self) -> None:
        """GPT-2's: normal(0, 0.02), and 1 / sqrt(2 n_layer) of that for what is added to the residual stream."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_residual = name.endswith(("attn_out", "mlp_out"))
                scale = 1 / math.sqrt(2 * self.config.n_layer) if is_residual else 1.0
                nn.init.normal_(module.weight, std=0.02 * scale)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def from_pretrained(name: str | Path, **options: Any) -> "GPT":
        """Load a model: see `leangpt.pretrained.load_model`."""
        from .pretrained import load_model

        return load_model(name, **options)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def head_weight(self) -> Tensor:
        """`(V, C)`, the rows that hidden states are compared with."""
        return self.wte.weight if self.head is None else self.head.weight

    @property
    def has_additions(self) -> bool:
        """Whether fine-tuning has hung something on it, so that its own weights are not all of it."""
        linears = (m for m in self.modules() if isinstance(m, Linear))
        others = (self.prefix, self.wte_delta, self.head_delta)
        return any(m is not None for m in others) or not all(m.is_plain for m in linears)

    def must_be_plain(self, purpose: str) -> None:
        """Raise ValueError, with the purpose, where it has additions."""
        if self.has_additions:
            raise ValueError(
                f"{purpose} takes a model's own weights, but fine-tuning has additions on this one: merge them first, or keep "
                "them apart (leangpt.finetune.methods)"
            )

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward for one token of a sequence of `seq_len` tokens.

        6 for each weight that a token is multiplied with, and causal attention's share (half of the full square).
        """
        embeddings = sum(e.weight.numel() for e in (self.wte, self.wpe) if e is not None)
        matrix_weights = self.num_parameters - embeddings + self.head_weight.numel()
        if self.head is not None:
            matrix_weights -= self.head.weight.numel()
        keys = min(seq_len, self.config.sliding_window or seq_len) / 2
        width = self.config.n_head * self.config.head_size
        return 6 * matrix_weights + 12 * self.config.n_layer * width * keys

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within the given sequences, and to the prefix if there is one."""
        if self.prefix is not None:
            k, v = self.prefix(layer, k, v)
        dropout_p = self.config.dropout if self.training else 0.0
        return ops.attention(
            q, k, v, sliding_window=self.config.sliding_window, dropout_p=dropout_p
        )

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Hidden states after the final norm, `(B, T, C)`.

        Args:
            tokens: `(B, T)` int64.
            positions: int64 that broadcasts to `(B, T)`; None: 0 to T - 1.
            attend: replaces causal attention within the given tokens, as a key/value cache does.

        Raises:
            ValueError: T is larger than max_seq_len and no positions are given.
        """
        T, limit = tokens.shape[1], self.config.max_seq_len
        if positions is None:
            if limit < T:
                raise ValueError(f"the model reads at most {limit} tokens, got {T}")
            positions = torch.arange(T, device=tokens.device)[None]
        rope = None
        if self.wpe is not None:
            stream = ops.embedding(tokens, self.wte.weight, positions, self.wpe.weight)
        else:
            stream = ops.embedding(tokens, self.wte.weight)
            frequencies = self.frequencies.to(positions.device)
            rope = rotary_tables(positions, frequencies, self.rope_magnitude)
        if self.wte_delta is not None:
            stream = self.wte_delta(tokens, stream)
        stream = F.dropout(stream, self.config.dropout, self.training)
        first_values = None
        for block in self.blocks:
            inputs = stream, rope, attend or self.attend, first_values
            if self.recomputes_blocks and torch.is_grad_enabled():
                stream, values = checkpoint(block, *inputs, use_reentrant=False)
            else:
                stream, values = block(*inputs)
            if self.config.value_residual and first_values is None:
                first_values = values
        return self.norm_f(stream)

    def head_factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`(..., C)` to the two factors of its logits, `x` `(..., C)` and `w` `(V, C)`; a delta of the head makes both wider."""
        if self.head_delta is None:
            return hidden, self.head_weight
        low, up = self.head_delta(hidden)
        weight = self.head_weight
        return torch.cat((hidden, low), dim=-1), torch.cat((weight, up.to(weight.dtype)), dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., C)` to `(..., V)`."""
        return ops.linear(*self.head_factors(hidden))

    def losses(self, hidden: Tensor, targets: Tensor, reduction: ops.Reduction) -> Tensor:
        """Cross-entropy of the logits of hidden states, in nats (-100 does not count)."""
        return ops.linear_cross_entropy(*self.head_factors(hidden), targets, reduction=reduction)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, reduction: ops.Reduction = "mean"
    ) -> Tensor:
        """Logits `(B, T, V)`, or with targets `(B, T)` the cross-entropy in nats (-100 does not count)."""
        hidden = self.hidden(tokens)
        if targets is None:
            return self.logits(hidden)
        return self.losses(hidden, targets, reduction)
