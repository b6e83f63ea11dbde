"""`rank`: choose among candidates for a context, as in recommendation and multiple choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.tokenizer import Tokenizer
from ..decoder import hidden_of_candidates
from ..metrics.ranking import accuracy, mean_reciprocal_rank, ndcg, rank_of
from ..modules import HeadRanker, LikelihoodRanker, Ranker
from ..padding import PADDING, pad
from ..rows import SEPARATOR, list_of, text_of
from ..templates import field_texts, fields_of, fill, with_bos
from .base import Example, Prediction, Report, Task

if TYPE_CHECKING:
    from ..tuned import Tuned


class Choice(NamedTuple):
    context: str  # as the template has it
    candidates: tuple[str, ...]
    chosen: int


@dataclass(frozen=True)
class Rank(Task[Choice]):
    """By likelihood: the mean log-probability of a candidate's tokens after the context. By a head: a number at the last token of
    context and candidate. The loss is the cross-entropy over the candidates, so that no candidate wins by being common.
    """

    name = "rank"

    prompt: str = "{context}\n"  # template, with {fields} of a row
    candidates_field: str = "candidates"  # a list of texts, or one text with | between
    chosen_field: str = "chosen"  # one of them, or its number from 0
    score: Literal["likelihood", "head"] = "likelihood"
    ndcg_at: int = 5

    def __post_init__(self) -> None:
        if not fields_of(self.prompt):
            raise ValueError(f"prompt must name a field, as in {{context}}, got {self.prompt!r}")
        if self.ndcg_at < 1:
            raise ValueError(f"ndcg_at must be positive, got {self.ndcg_at}")

    def parse(self, values: dict[str, Any]) -> Choice:
        sample = self.parse_input(values)
        chosen = values.get(self.chosen_field)
        if isinstance(chosen, str) and chosen not in sample.candidates and chosen.isdecimal():
            chosen = int(chosen)  # in a cell of a table
        if isinstance(chosen, str):
            if sample.candidates.count(chosen) != 1:
                raise ValueError(
                    f"{self.chosen_field!r} must be one of the candidates, got {chosen!r}"
                )
            chosen = sample.candidates.index(chosen)
        if not isinstance(chosen, int) or not 0 <= chosen < len(sample.candidates):
            raise ValueError(
                f"{self.chosen_field!r} must be a candidate or its number below {len(sample.candidates)}, got {chosen!r}"
            )
        return sample._replace(chosen=chosen)

    def parse_input(self, values: dict[str, Any]) -> Choice:
        candidates = list_of(values, self.candidates_field)
        if isinstance(candidates, str):
            candidates = [text.strip() for text in candidates.split(SEPARATOR)]
        if not isinstance(candidates, list) or len(candidates) < 2:
            raise ValueError(
                f"{self.candidates_field!r} must be a list of two texts or more, got {candidates!r:.80}"
            )
        for text in candidates:
            text_of({self.candidates_field: text}, self.candidates_field)
        context = fill(self.prompt, field_texts(values, self.prompt))
        return Choice(context, tuple(candidates), -1)

    def key(self, sample: Choice) -> tuple[str, frozenset[str]]:
        return sample.context, frozenset(sample.candidates)

    def parts(
        self, sample: Choice, tokenizer: Tokenizer, max_len: int
    ) -> tuple[list[int], list[list[int]], bool]:
        """Tokens of the context and of each candidate; whether the context lost its left so that all fit.

        Raises:
            ValueError: a candidate alone does not fit.
        """
        ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        candidates = [[*tokenizer.encode(text), *ends] for text in sample.candidates]
        room = max_len - max(map(len, candidates))
        if room < 1:
            raise ValueError(
                f"a candidate of {max_len - room} tokens does not fit behind a context into {max_len}"
            )
        context = with_bos(tokenizer, tokenizer.encode(sample.context))
        return context[-room:], candidates, len(context) > room

    def encode(self, sample: Choice, tokenizer: Tokenizer, max_len: int) -> Example:
        context, candidates, is_cut = self.parts(sample, tokenizer, max_len)
        return Example([context, *candidates], max(0, sample.chosen), is_cut)

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        num_rows = max(example.length for example in examples)
        rows = [
            row
            for example in examples
            for row in (*example.tokens, *[()] * (num_rows - example.length))
        ]
        tokens = pad(rows, PADDING).view(len(examples), num_rows, -1)
        return tokens, torch.tensor([example.targets for example in examples])

    def make_module(self, model: Any, examples: Sequence[Example]) -> Ranker:
        return HeadRanker(model) if self.score == "head" else LikelihoodRanker(model)

    def predict(self, tuned: "Tuned", samples: Sequence[Choice]) -> list[Prediction]:
        """The candidates, the best first, each with its share of the probability of all."""
        find = self._likelihoods if self.score == "likelihood" else self._head_scores
        return [ranking(sample.candidates, find(tuned, sample)) for sample in samples]

    def _likelihoods(self, tuned: "Tuned", sample: Choice) -> list[float]:
        context, candidates, _ = self.parts(sample, tuned.tokenizer, tuned.max_len)
        ranked = tuned.generator.rank(context, candidates)
        return [r.mean_logprob for r in sorted(ranked, key=lambda r: r.index)]

    def _head_scores(self, tuned: "Tuned", sample: Choice) -> list[float]:
        context, candidates, _ = self.parts(sample, tuned.tokenizer, tuned.max_len)
        rows = hidden_of_candidates(tuned.decoder, context, candidates, tuned.batch_size)
        return tuned.module.scores(torch.from_numpy(np.concatenate(list(rows)))).flatten().tolist()

    def report(
        self, samples: Sequence[Choice], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        ranks = [
            rank_of(p["scores"], sample.chosen)
            for sample, p in zip(samples, predictions, strict=True)
        ]
        return Report.of_metrics(
            {
                "accuracy": accuracy(ranks),
                "mrr": mean_reciprocal_rank(ranks),
                f"ndcg@{self.ndcg_at}": ndcg(ranks, self.ndcg_at),
            }
        )


def ranking(candidates: Sequence[str], scores: Sequence[float]) -> Prediction:
    """Of scores whose differences are those of log-probabilities."""
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    order = sorted(range(len(candidates)), key=lambda i: -scores[i])
    return {
        "best": candidates[order[0]],
        "ranking": [
            {"candidate": candidates[i], "probability": weights[i] / sum(weights)} for i in order
        ],
        "scores": list(scores),  # in the order of the candidates
    }
