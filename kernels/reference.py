"""Every op in plain PyTorch: the definition that tests and benchmarks compare with.

Sums are accumulated in fp32 or wider, here or inside PyTorch's own op. Called with doubles, the same function is the
float64 reference. Arguments and shapes are described in ops.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> Tensor:
    x = F.embedding(tokens, weight)
    if positions is None or position_weight is None:
        return x
    return x + F.embedding(positions, position_weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rms_norm(total, weight, eps), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)  # (B, T, 1, D / 2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens_k: Tensor | None,
    sliding_window: int | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    mask = None
    if seqlens_k is not None or sliding_window is not None or T != S:
        ends = torch.tensor([S], device=q.device) if seqlens_k is None else seqlens_k
        query = (ends[:, None] - T + torch.arange(T, device=q.device))[:, None, :, None]
        key = torch.arange(S, device=q.device)
        mask = key <= query  # (B or 1, 1, T, S)
        if sliding_window is not None:
            mask = mask & (key > query - sliding_window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=softmax_scale,
        dropout_p=dropout_p,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    h = F.linear(x, w_in, b_in)
    match activation:
        case "gelu_tanh":
            h = F.gelu(h, approximate="tanh")
        case "gelu":
            h = F.gelu(h)
        case "relu2":
            h = F.relu(h).square()
        case "swiglu":
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
    return F.linear(h, w_out, b_out)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(
        wide.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction=reduction
    )
    return loss.view(targets.shape) if reduction == "none" else loss


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (int64 tensors in [0, 2**32)) from a 128-bit counter and a 64-bit seed.

    Reference: Salmon et al., 2011, https://doi.org/10.1145/2063384.2063405
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # products modulo 2**64
        c0, c1, c2, c3 = (
            ((p1 >> 32) & low) ^ c1 ^ k0,
            p1 & low,
            ((p0 >> 32) & low) ^ c3 ^ k1,
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def exponential_noise(
    vocab_size: int, seed: Tensor, sample_index: Tensor, position: Tensor
) -> Tensor:
    """(N, V) float64, exponentially distributed: what the draw of token v at a position of a sample depends on.

    Word v % 4 of Philox at counter (v // 4, position, sample_index, 0), as u = (word + 1/2) / 2**32, gives -log(1 - u).
    """
    block = torch.arange((vocab_size + 3) // 4, device=seed.device).expand(len(seed), -1)
    counter = (
        block,
        position[:, None].expand_as(block),
        sample_index[:, None].expand_as(block),
        torch.zeros_like(block),
    )
    words = torch.stack(philox(counter, seed[:, None].expand_as(block)), dim=-1)
    uniform = (words.flatten(1)[:, :vocab_size].double() + 0.5) / 2**32
    return -torch.log1p(-uniform)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    position: Tensor,
) -> Tensor:
    is_greedy = temperature == 0
    if bool(is_greedy.all()):
        return logits.argmax(-1)
    scaled = logits.double() / torch.where(is_greedy, 1.0, temperature.double())[:, None]

    # each filter keeps what reaches a threshold, ties included, so that nothing depends on an order among equals
    if bool((top_k > 0).any() or (top_p < 1).any()):
        k = torch.where(top_k > 0, top_k, scaled.shape[1]).clamp(max=scaled.shape[1])
        ordered = scaled.sort(dim=-1, descending=True).values
        kth = ordered.gather(1, k[:, None] - 1)
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
        mass = ordered.masked_fill(ordered < kth, -torch.inf).softmax(-1).cumsum(-1)
        needed = (mass < top_p[:, None]).sum(-1, keepdim=True).clamp(max=scaled.shape[1] - 1)
        last = torch.where((top_p < 1)[:, None], ordered.gather(1, needed), -torch.inf)
        scaled = scaled.masked_fill(scaled < last, -torch.inf)
    best = scaled.amax(-1, keepdim=True)
    scaled = scaled.masked_fill(scaled < best + min_p.double().log()[:, None], -torch.inf)

    noise = exponential_noise(logits.shape[1], seed, sample_index, position)
    drawn = (scaled - noise.log()).argmax(-1)  # Gumbel-max
    return torch.where(is_greedy, logits.argmax(-1), drawn)


def penalize(
    logits: Tensor,
    in_context: Tensor,
    in_text: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
) -> Tensor:
    factor = torch.where(in_context, repetition_penalty[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - torch.where(in_text, presence_penalty[:, None], 0.0)
