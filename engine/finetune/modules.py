"""What is trained for a task: a GPT and, for most tasks, a linear head on its hidden states; its loss and its scores.

Every module is called as `module(tokens, targets, "sum")`, as `training.loop.accumulate_gradients` does: padding in the tokens
is PADDING, a target that does not count is IGNORED, and the sum goes over the targets that count.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leangpt.kernels import ops

from ..model import GPT
from .padding import IGNORED, PADDING, align_left


class TaskModule(nn.Module):
    """A model and perhaps a head."""

    def __init__(self, model: GPT, num_outputs: int = 0) -> None:
        super().__init__()
        self.model = model
        self.head: nn.Linear | None = None
        if num_outputs:
            if model.head_delta is not None:
                raise ValueError(
                    "the head over the vocabulary is not used by a task that has a head of its own: leave it out of targets"
                )
            C = model.config.n_embd
            self.head = nn.Linear(C, num_outputs).to(model.device, model.wte.weight.dtype)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            if model.head is not None:
                model.head.requires_grad_(False)  # the head over the vocabulary is not used

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        raise NotImplementedError

    def hidden(self, tokens: Tensor) -> Tensor:
        """`(B, T)`, aligned left, to `(B, T, C)`; at padding anything."""
        return self.model.hidden(tokens.clamp(min=0))

    def scores(self, hidden: Tensor) -> Tensor:
        """`(..., C)` to `(..., L)`, float32 at least."""
        assert self.head is not None, "the module has no head"
        hidden = hidden.to(self.head.weight.device)
        scores = ops.linear(hidden, self.head.weight, self.head.bias)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def last_hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states `(B, C)` of the last real token of each row `(B, T)`."""
        [tokens] = align_left(tokens)
        last = (tokens != PADDING).sum(1).sub(1).clamp(min=0)
        return self.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), last]


class LanguageModule(TaskModule):
    """The language model itself: the loss of the targets `(B, T)`."""

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        tokens, targets = align_left(tokens, targets)
        return self.model(tokens.clamp(min=0), targets, reduction)


class Classifier(TaskModule):
    """The head reads the last real token; one label of a text, or with targets of 0 and 1 `(B, L)` any number.

    Args:
        class_weights: `(L,)`, how much an example of each label counts; None: 1.
    """

    class_weights: Tensor | None

    def __init__(
        self, model: GPT, num_labels: int, is_multi_label: bool, class_weights: Tensor | None
    ) -> None:
        super().__init__(model, num_labels)
        self.is_multi_label = is_multi_label
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        scores = self.scores(self.last_hidden(tokens))
        if self.is_multi_label:
            return F.binary_cross_entropy_with_logits(
                scores, targets.to(scores), pos_weight=self.class_weights, reduction=reduction
            )
        return F.cross_entropy(scores, targets, self.class_weights, reduction=reduction)

    def probabilities(self, hidden: Tensor) -> Tensor:
        """`(B, C)` of the last tokens to `(B, L)`, which sum to 1 for one label a text."""
        scores = self.scores(hidden)
        return scores.sigmoid() if self.is_multi_label else scores.softmax(-1)


class Tagger(TaskModule):
    """The head reads every token; targets `(B, T)` are labels."""

    class_weights: Tensor | None

    def __init__(self, model: GPT, num_labels: int, class_weights: Tensor | None) -> None:
        super().__init__(model, num_labels)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        tokens, targets = align_left(tokens, targets)
        scores = self.scores(self.hidden(tokens))
        return F.cross_entropy(
            scores.mT,
            targets,
            self.class_weights,
            ignore_index=IGNORED,
            reduction=reduction,
        )

    def probabilities(self, hidden: Tensor) -> Tensor:
        """`(T, C)` to `(T, L)`."""
        return self.scores(hidden).softmax(-1)


class Ranker(TaskModule):
    """A number for each candidate after a context, and the cross-entropy of the chosen one.

    Tokens are `(B, 1 + K, T)`: the context and K candidates; targets `(B,)`, the chosen ones. A candidate of padding alone is none.
    """

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(self.candidate_scores(tokens), targets, reduction=reduction)

    def candidate_scores(self, tokens: Tensor) -> Tensor:
        """`(B, K)`; -inf where there is no candidate."""
        candidates = tokens[:, 1:]  # (B, K, T)
        B, K, T = candidates.shape
        context = tokens[:, :1].expand(B, K, T)
        is_candidate = torch.arange(2 * T, device=tokens.device).ge(T).expand(B * K, 2 * T)
        joined = torch.cat((context, candidates), -1).flatten(0, 1)
        rows, is_candidate = align_left(joined, is_candidate)
        length = int((rows != PADDING).sum(1).max())
        scores = self.score(rows[:, :length], is_candidate[:, :length]).view(B, K)
        return scores.masked_fill((candidates == PADDING).all(-1), -torch.inf)

    def score(self, tokens: Tensor, is_candidate: Tensor) -> Tensor:
        """`(N,)` for contexts with a candidate behind each, `(N, T)` with padding on the right."""
        raise NotImplementedError


class HeadRanker(Ranker):
    """What the head says at the last token."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model, num_outputs=1)

    def score(self, tokens: Tensor, is_candidate: Tensor) -> Tensor:
        return self.scores(self.last_hidden(tokens)).squeeze(-1)


class LikelihoodRanker(Ranker):
    """The mean log-probability of the candidate's tokens."""

    def score(self, tokens: Tensor, is_candidate: Tensor) -> Tensor:
        counts = is_candidate & (tokens != PADDING)
        targets = tokens.masked_fill(~counts, IGNORED)[:, 1:]
        losses = self.model(tokens[:, :-1].clamp(min=0), targets, "none")
        return -losses.sum(1) / counts.sum(1).clamp(min=1)
