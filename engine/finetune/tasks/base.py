"""`Task`: what all tasks share. Its fields are options; what it learns from the data (labels, a template) become fields too,
so that the fields of a fitted task are all that has to be saved of it.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from ...data.tokenizer import Tokenizer
from ...generation.chat import ChatTemplate
from ..modules import TaskModule
from ..padding import IGNORED, PADDING, pad

if TYPE_CHECKING:
    from ..tuned import Tuned

Sample = TypeVar("Sample")
Prediction = dict[str, Any]  # as JSON can hold it


class Example(NamedTuple):
    """A sample as the model reads it."""

    tokens: Any  # token ids; to rank, those of the context and of each candidate
    targets: Any  # what `Task.collate` makes a tensor of
    is_cut: bool = False  # something of it was left out, for it was too long

    @property
    def length(self) -> int:
        """Tokens; to rank, candidates and context."""
        return len(self.tokens)


@dataclass(frozen=True)
class Report:
    """How good predictions are."""

    metrics: dict[str, Any]  # as JSON can hold it
    text: str  # the same for a terminal
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)  # PNG by file name

    @classmethod
    def of_metrics(cls, metrics: dict[str, Any]) -> Self:
        """One line for each number."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        return cls(metrics, "\n".join(f"{name:16} {value:.4f}" for name, value in numbers.items()))


@dataclass(frozen=True)
class Task(Generic[Sample]):
    """One task; the methods are in the order in which they are called."""

    name: ClassVar[str]

    def parse(self, values: dict[str, Any]) -> Sample:
        """Check the fields of a row.

        Raises:
            ValueError: what is wrong, without the place.
        """
        raise NotImplementedError

    def parse_input(self, values: dict[str, Any]) -> Sample:
        """`parse` of a row to predict, whose answer may be missing."""
        return self.parse(values)

    def line_field(self) -> str:
        """The field that a line of plain text is, where a row to predict needs no other.

        Raises:
            ValueError: it needs more.
        """
        raise ValueError(f"rows for {self.name} have several fields: give JSON objects, one a line")

    def check_length(self, max_len: int) -> None:
        """Check options of the task that examples of `max_len` tokens have no room for.

        Raises:
            ValueError: what does not fit.
        """

    def key(self, sample: Sample) -> Hashable:
        """Samples of the same key are duplicates: what is asked, without the answer."""
        raise NotImplementedError

    def fit(
        self, samples: Sequence[Sample], tokenizer: Tokenizer, base_template: ChatTemplate | None
    ) -> Self:
        """Learn what the task needs to know of its training samples; `base_template` is the base model's, if it can chat.

        Raises:
            ValueError: the samples do not do for the task.
        """
        del samples, tokenizer, base_template
        return self

    def encode_all(self, sample: Sample, tokenizer: Tokenizer, max_len: int) -> list[Example]:
        """The examples of a sample: one, but for long texts."""
        return [self.encode(sample, tokenizer, max_len)]

    def encode(self, sample: Sample, tokenizer: Tokenizer, max_len: int) -> Example:
        """The tokens of a sample, at most `max_len`, and its targets.

        Raises:
            ValueError: it does not fit, or has a label that the training samples had not.
        """
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Tokens `(B, T)`, padded, and targets, whose first dimension is B."""
        raise NotImplementedError

    def num_targets(self, example: Example) -> int:
        """Targets over which the mean of losses is taken."""
        _, targets = self.collate([example])
        return int((targets != IGNORED).sum())

    def make_module(self, model: Any, examples: Sequence[Example]) -> TaskModule:
        """What is trained; `examples` are those of the training, none where a saved one is loaded."""
        raise NotImplementedError

    def predict(self, tuned: "Tuned", samples: Sequence[Sample]) -> list[Prediction]:
        raise NotImplementedError

    def report(
        self, samples: Sequence[Sample], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        """Compare predictions with the answers of the samples; `loss` is the mean over their targets, in nats."""
        raise NotImplementedError

    def chat_template(self, tokenizer: Tokenizer) -> ChatTemplate | None:
        """For the generator, where the task has one."""
        del tokenizer
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}


def balanced_weights(counts: Counter[int], num_labels: int) -> Tensor:
    """`(L,)`: N / (L' count) for the L' labels that occur, so that all weigh the same in sum; 0 for the others."""
    total, num_present = counts.total(), len(counts)
    return torch.tensor(
        [total / (num_present * counts[i]) if counts[i] else 0.0 for i in range(num_labels)]
    )


def collate_tokens(examples: Sequence[Example]) -> Tensor:
    return pad([example.tokens for example in examples], PADDING)
