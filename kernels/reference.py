"""Every op in plain PyTorch: the definition that tests and benchmarks compare with.

Sums are accumulated in fp32 or wider, here or inside PyTorch's own op. Called with doubles, the same function is the
float64 reference. Arguments and shapes are described in ops.py.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import compute_dtype


def embedding(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None
) -> Tensor:
    x = F.embedding(tokens, weight)
    if positions is None or position_weight is None:
        return x
    return x + F.embedding(positions, position_weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(compute_dtype(x))


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x, dropout_p)
    return layer_norm(total, weight, bias, eps), total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight).to(compute_dtype(x))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x, dropout_p)
    return rms_norm(total, weight, eps), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)  # (B, T, 1, D / 2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def rotary_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_heads = qkv.shape[2] - 2 * num_kv_heads
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return rotary(q, cos, sin), rotary(k, cos, sin), v


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


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    sliding_window: int | None,
    softmax_scale: float | None,
    dropout_p: float,
) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    parts = [
        attention(q_[None], k_[None], v_[None], None, sliding_window, softmax_scale, dropout_p)[0]
        for q_, k_, v_ in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(parts or [q])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def activate(h: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu_tanh":
            return F.gelu(h, approximate="tanh")
        case "gelu":
            return F.gelu(h)
        case "relu2":
            return F.relu(h).square()
        case _:
            gate, up = h.chunk(2, dim=-1)
            return F.silu(gate) * up


def mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dropout_p: float,
) -> Tensor:
    h = activate(F.linear(x, w_in, b_in), activation)
    out = F.dropout(F.linear(h, w_out, b_out), dropout_p)
    return out if residual is None else residual + out


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, -2)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(
        wide,
        targets.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    if z_loss:
        counts = targets.flatten() != ignore_index
        squares = torch.where(counts, wide.logsumexp(-1).square(), 0.0)
        if reduction != "none":
            squares = squares.sum() / (counts.sum() if reduction == "mean" else 1)
        loss = loss + z_loss * squares
    return loss.view(targets.shape) if reduction == "none" else loss


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor] | None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None,
) -> None:
    beta1, beta2 = betas
    lists = (params, grads, exp_avgs, exp_avg_sqs, masters or params)
    for param, grad, exp_avg, exp_avg_sq, master in zip(*lists, strict=True):
        grad = grad.to(exp_avg.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.lerp_(grad.square(), 1 - beta2)
        scale = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
        wide = master.to(exp_avg.dtype)
        wide = wide - lr * weight_decay * wide
        wide -= lr / (1 - beta1**step) * exp_avg / scale
        master.copy_(wide)
        param.copy_(wide)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    return torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().to(wide)


def orthogonalize(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, roughly: five Newton-Schulz steps bring the singular values to about 0.7 to 1.2."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.mT if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def muon_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    grad_scale: Tensor | None,
) -> None:
    for param, grad, buffer in zip(params, grads, momentum_buffers, strict=True):
        grad = grad.to(buffer.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale
        buffer.lerp_(grad, 1 - momentum)
        update = orthogonalize(grad.lerp(buffer, momentum))
        wide = param.to(buffer.dtype)
        wide = wide - lr * weight_decay * wide
        param.copy_(wide - 0.2 * math.sqrt(max(param.shape)) * lr * update)


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


class QuantizedWeight(NamedTuple):
    """A matrix `(N, K)` in integers, of which each group of inputs has its scale: what `quantize` gives."""

    values: Tensor  # (N, groups, K / groups) int8, zeros behind the last input
    scale: Tensor  # (N, groups): float32 with one group of all inputs, else float16
    minimum: Tensor | None  # (N, groups) float16; None: symmetric
    num_inputs: int


def quantize(
    weight: Tensor, bits: int, group: int = 0, is_asymmetric: bool = False
) -> QuantizedWeight:
    """Weights as integers q, which stand for `scale * q`, or asymmetric for `scale * q + minimum`.

    With 8 bits, q is in [-127, 127] and the largest weight of a group has 127. With 4 bits, q is in [-8, 7]: of nine scales
    that one counts whose integers q have the highest correlation with the weights w (asymmetric: with their means taken off
    both), and the scale becomes `w.w / q.w`, which leaves an error orthogonal to w: least squares, `q.w / q.q`, would shrink
    all weights. In the end weights are rounded with the scales as they are stored.

    Args:
        weight: `(N, K)`; it is rounded as float32.
        bits: 8 or 4.
        group: inputs that share a scale; 0: all of an output.
        is_asymmetric: groups have a minimum too; 4 bits only.
    """
    N, K = weight.shape
    size = group or K
    x = F.pad(weight.float(), (0, -K % size)).view(N, -1, size)  # (N, groups, size)
    minimum = None
    if bits == 8:
        lowest, highest = -127, 127
        scale = x.abs().amax(-1) / 127
    else:
        lowest, highest = -8, 7
        scale, best_minimum = _fit_int4(x, is_asymmetric)
        minimum = best_minimum.half() if is_asymmetric else None
    # integers cannot tell of NaN and infinity: the scale becomes NaN
    scale = torch.where(x.isfinite().all(-1), scale, torch.nan)
    if group:
        scale = scale.half()  # from here on as products see it
    wide = scale.float()
    inverse = torch.where(wide == 0, 0.0, 1 / wide)
    shifted = x if minimum is None else x - minimum.float()[..., None]
    values = (
        (shifted * inverse[..., None]).round().clamp(lowest, highest).nan_to_num().to(torch.int8)
    )
    return QuantizedWeight(values, scale, minimum, K)


def _fit_int4(x: Tensor, is_asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each group of `x` `(N, groups, size)`, by a search."""
    low, high = x.aminmax(dim=-1)
    middle = 0.5 * (low + high) if is_asymmetric else torch.zeros_like(low)
    x = x - middle[..., None]
    mean_x = x.double().mean(-1) if is_asymmetric else torch.zeros_like(low, dtype=torch.float64)
    wide = x.double() - mean_x[..., None]
    best_scale = torch.zeros_like(low)
    best_minimum = low.clone() if is_asymmetric else torch.zeros_like(low)
    best_likeness = torch.zeros_like(mean_x)
    for candidate in range(9):
        if is_asymmetric:
            scale = (high - low) / (15 + 0.4 * (candidate - 1))
            shift = 0.5 * scale
        else:
            # the weight of largest magnitude takes the side of -8, which is the longer one
            scale = torch.where(-low > high, low, high) / (-8 - 0.25 * (candidate - 4))
            shift = torch.zeros_like(scale)
        q = ((x - shift[..., None]) * (1 / scale)[..., None]).round().clamp(-8, 7).double()
        mean_q = q.mean(-1) if is_asymmetric else torch.zeros_like(mean_x)
        q = q - mean_q[..., None]
        qx = (q * wide).sum(-1)
        likeness = qx.square() / q.square().sum(-1)
        is_better = (scale != 0) & (likeness > best_likeness)
        best_likeness = torch.where(is_better, likeness, best_likeness)
        stretched = wide.square().sum(-1) / qx
        best_scale = torch.where(is_better, stretched.float(), best_scale)
        if is_asymmetric:
            minimum = middle + mean_x - stretched * mean_q
            best_minimum = torch.where(is_better, minimum.float(), best_minimum)
    return best_scale, best_minimum


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The weights that products see: `(N, K)` float32."""
    x = weight.scale.float()[..., None] * weight.values
    if weight.minimum is not None:
        x = x + weight.minimum.float()[..., None]
    return x.flatten(1)[:, : weight.num_inputs]


def round_activations(x: Tensor, group: int = 0) -> Tensor:
    """What a product with dynamic activations sees of `x` `(..., K)`: integers in [-127, 127] times the scale of a group."""
    K = x.shape[-1]
    size = group or K
    groups = F.pad(x, (0, -K % size)).unflatten(-1, (-1, size))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, 0.0, 127 / largest)
    return ((groups * inverse).round() * (largest / 127)).flatten(-2)[..., :K]


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(weight).to(x.dtype), bias)
