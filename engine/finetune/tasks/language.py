"""What the tasks share whose answer is text: examples of a language model, and generation of answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...generation.completion import Completion
from ..modules import LanguageModule
from ..padding import IGNORED, pad
from .base import Example, Sample, Task, collate_tokens


@dataclass(frozen=True)
class LanguageTask(Task[Sample]):
    """A task whose module is the language model itself."""

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        targets = pad([example.targets for example in examples], IGNORED)
        return collate_tokens(examples), targets

    def make_module(self, model: Any, examples: Sequence[Example]) -> LanguageModule:
        del examples
        return LanguageModule(model)


def shifted(tokens: Sequence[int], is_target: Sequence[bool], is_cut: bool) -> Example:
    """The example in which each token predicts the next one, where that is a target."""
    targets = [
        token if wanted else IGNORED
        for token, wanted in zip(tokens[1:], is_target[1:], strict=True)
    ]
    return Example(list(tokens[:-1]), targets, is_cut)


def probability(completion: Completion) -> float:
    """Of the whole answer."""
    return math.exp(math.fsum(completion.logprobs or ()))


def perplexity(loss: float) -> float:
    """`exp(loss)`, finite as JSON wants it."""
    return math.exp(min(loss, 700.0))
