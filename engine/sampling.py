"""One step's draw: from the logits and parameters of several drafts to a token for each.

How a token is drawn is said by `leangpt.kernels.reference.sample`; here its arguments are put together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from leangpt.kernels import ops

from .completion import Draft, Draw


@torch.inference_mode()
def draw(logits: Tensor, drafts: Sequence[Draft]) -> list[Draw]:
    """Draw the next token of each draft from its row of `logits`, `(N, V)`.

    Raises:
        RuntimeError: logits are NaN.
    """
    if logits.isnan().any():
        raise RuntimeError(
            "the model's logits are NaN: its weights are damaged, or too large for its dtype"
        )
    params = [draft.request.params for draft in drafts]

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    tokens = ops.sample(
        _only_known_tokens(_penalized(logits, drafts), drafts),
        temperature=column([p.temperature for p in params], torch.float64),
        top_k=column([p.top_k or 0 for p in params], torch.int64),
        top_p=column([p.top_p for p in params], torch.float64),
        min_p=column([p.min_p for p in params], torch.float64),
        seed=column([_as_int64(draft.request.seed) for draft in drafts], torch.int64),
        sample_index=column([draft.index for draft in drafts], torch.int64),
        position=column([len(draft.tokens) for draft in drafts], torch.int64),
    ).tolist()
    return [
        Draw(token, *_logprobs(row, token, p.logprobs))
        for row, token, p in zip(logits, tokens, params, strict=True)
    ]


def _as_int64(seed: int) -> int:
    """The same 64 bits as a signed number."""
    return seed - 2**64 if seed >= 2**63 else seed


def _penalized(logits: Tensor, drafts: Sequence[Draft]) -> Tensor:
    rows = [
        i
        for i, draft in enumerate(drafts)
        if draft.request.params.repetition_penalty != 1
        or draft.request.params.presence_penalty != 0
    ]
    if not rows:
        return logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    result = logits.to(wide, copy=True)
    in_context, in_text = (torch.zeros_like(result[rows], dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(rows):
        in_context[i, torch.tensor(drafts[row].tokens, dtype=torch.int64)] = True
        in_text[i, torch.tensor(drafts[row].drawn, dtype=torch.int64)] = True
    params = [drafts[row].request.params for row in rows]
    repetition = result.new_tensor([p.repetition_penalty for p in params])
    presence = result.new_tensor([p.presence_penalty for p in params])
    result[rows] = ops.penalize(result[rows], in_context, in_text, repetition, presence)
    return result


def _only_known_tokens(logits: Tensor, drafts: Sequence[Draft]) -> Tensor:
    """Without the rows that pad a vocabulary beyond its tokenizer (50257 to 50304, say): they have no text."""
    tokenizer = drafts[0].request.tokenizer
    if tokenizer is None or tokenizer.vocab_size >= logits.shape[1]:
        return logits
    result = logits.clone()
    result[:, tokenizer.vocab_size :] = -torch.inf
    return result


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
