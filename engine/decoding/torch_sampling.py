"""One step's draws on PyTorch: from logits and `RowSampling`s to the arguments of `ops.penalize` and `ops.sample`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leangpt.kernels import ops

from .sampling import Draw, RowSampling


@torch.inference_mode()
def draw(logits: Tensor, rows: Sequence[RowSampling]) -> list[Draw]:
    """Draw a token from each row of `logits`, `(R, V)`.

    Raises:
        RuntimeError: logits are NaN.
    """
    if logits.isnan().any():
        raise RuntimeError(
            "the model's logits are NaN: its weights are damaged, or too large for its dtype"
        )

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    tokens = ops.sample(
        _only_known_tokens(_penalized(logits, rows), rows),
        temperature=column([row.temperature for row in rows], torch.float64),
        top_k=column([row.top_k for row in rows], torch.int64),
        top_p=column([row.top_p for row in rows], torch.float64),
        min_p=column([row.min_p for row in rows], torch.float64),
        seed=column([_as_int64(row.seed) for row in rows], torch.int64),
        sample_index=column([row.sample_index for row in rows], torch.int64),
        position=column([row.position for row in rows], torch.int64),
    ).tolist()
    return [
        Draw(token, *_logprobs(row_logits, token, row.logprobs))
        for row_logits, token, row in zip(logits, tokens, rows, strict=True)
    ]


def _as_int64(seed: int) -> int:
    """The same 64 bits as a signed number."""
    return seed - 2**64 if seed >= 2**63 else seed


def _penalized(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    index = [
        i for i, row in enumerate(rows) if row.repetition_penalty != 1 or row.presence_penalty != 0
    ]
    if not index:
        return logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    result = logits.to(wide, copy=True)
    in_context, in_text = (torch.zeros_like(result[index], dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(rows[j] for j in index):
        if row.repetition_penalty != 1:
            in_context[i, torch.tensor(row.context, dtype=torch.int64)] = True
        if row.presence_penalty != 0:
            in_text[i, torch.tensor(row.text, dtype=torch.int64)] = True
    repetition = result.new_tensor([rows[i].repetition_penalty for i in index])
    presence = result.new_tensor([rows[i].presence_penalty for i in index])
    result[index] = ops.penalize(result[index], in_context, in_text, repetition, presence)
    return result


def _only_known_tokens(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    vocab_size = logits.shape[1]
    if all(row.vocab_limit >= vocab_size for row in rows):
        return logits
    limits = torch.tensor([row.vocab_limit for row in rows], device=logits.device)
    tokens = torch.arange(vocab_size, device=logits.device)
    return logits.masked_fill(tokens >= limits[:, None], -torch.inf)


def _logprobs(
    logits: Tensor, token: int, count: int | None
) -> tuple[float | None, dict[int, float] | None]:
    """Log-probability of the token, and of the `count` most probable ones, from a row of logits."""
    if count is None:
        return None, None
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.topk(min(count, len(logprobs)))
    most_probable = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return logprobs[token].item(), most_probable
