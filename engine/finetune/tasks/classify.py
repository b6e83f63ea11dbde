"""`classify`: one or any number of labels for a text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ...data.tokenizer import Tokenizer
from ...generation.chat import ChatTemplate
from ..decoder import hidden_states
from ..metrics.labels import LabelTable, accuracy, confusion_matrix
from ..metrics.plot import confusion_png
from ..modules import Classifier
from ..rows import SEPARATOR, text_of
from ..templates import with_bos
from .base import Example, Prediction, Report, Task, balanced_weights, collate_tokens

if TYPE_CHECKING:
    from ..tuned import Tuned


class LabelledText(NamedTuple):
    text: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Classify(Task[LabelledText]):
    """A linear head on the last token of the text, which is its end of text where the tokenizer has one."""

    name = "classify"

    text_field: str = "text"
    label_field: str = "label"
    multi_label: bool = False  # any number of labels: a list, or one text with | between
    class_weights: Literal["none", "balanced"] = "none"  # balanced: rare labels count more
    labels: tuple[str, ...] = ()  # none: those of the training data

    def parse(self, values: dict[str, Any]) -> LabelledText:
        if self.label_field not in values:
            raise ValueError(f"no field {self.label_field!r}, only {', '.join(map(repr, values))}")
        value = values[self.label_field]
        if self.multi_label:
            found = value.split(SEPARATOR) if isinstance(value, str) else value
        else:
            found = [value]
        if not isinstance(found, list) or not all(isinstance(v, str | int) for v in found):
            raise ValueError(f"{self.label_field!r} must be a label, got {value!r:.80}")
        labels = tuple(sorted({str(label).strip() for label in found} - {""}))
        if not labels and not self.multi_label:
            raise ValueError(f"{self.label_field!r} must not be empty")
        return self.parse_input(values)._replace(labels=labels)

    def parse_input(self, values: dict[str, Any]) -> LabelledText:
        return LabelledText(text_of(values, self.text_field), ())

    def line_field(self) -> str:
        return self.text_field

    def key(self, sample: LabelledText) -> str:
        return sample.text

    def fit(
        self,
        samples: Sequence[LabelledText],
        tokenizer: Tokenizer,
        base_template: ChatTemplate | None,
    ) -> Self:
        labels = self.labels or tuple(sorted({name for s in samples for name in s.labels}))
        if len(labels) < (1 if self.multi_label else 2):
            raise ValueError(f"there must be two labels or more, got {', '.join(labels) or 'none'}")
        return replace(self, labels=labels)

    def encode(self, sample: LabelledText, tokenizer: Tokenizer, max_len: int) -> Example:
        unknown = set(sample.labels) - set(self.labels)
        if unknown:
            raise ValueError(
                f"label {', '.join(sorted(unknown))} is not among those of the training data ({', '.join(self.labels)})"
            )
        ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        tokens = with_bos(tokenizer, tokenizer.encode(sample.text))
        kept = tokens[: max_len - len(ends)]
        if self.multi_label:
            targets: Any = [int(label in sample.labels) for label in self.labels]
        else:
            targets = self.labels.index(sample.labels[0]) if sample.labels else 0
        return Example([*kept, *ends], targets, is_cut=len(kept) < len(tokens))

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        return collate_tokens(examples), torch.tensor([example.targets for example in examples])

    def make_module(self, model: Any, examples: Sequence[Example]) -> Classifier:
        weights = None
        if self.class_weights == "balanced" and examples and self.multi_label:
            counts = torch.tensor([example.targets for example in examples]).sum(0)
            weights = (len(examples) - counts) / counts.clamp(min=1)
        elif self.class_weights == "balanced" and examples:
            counter = Counter(example.targets for example in examples)
            weights = balanced_weights(counter, len(self.labels))
        return Classifier(model, len(self.labels), self.multi_label, weights)

    def predict(self, tuned: "Tuned", samples: Sequence[LabelledText]) -> list[Prediction]:
        examples = [
            self.encode(sample._replace(labels=()), tuned.tokenizer, tuned.max_len)
            for sample in samples
        ]
        assert isinstance(tuned.module, Classifier)
        texts = [example.tokens for example in examples]
        hidden = list(hidden_states(tuned.decoder, texts, tuned.batch_size, last=True))
        predictions: list[Prediction] = []
        for row in tuned.module.probabilities(torch.from_numpy(np.concatenate(hidden))):
            probabilities = dict(zip(self.labels, row.tolist(), strict=True))
            if self.multi_label:
                labels = [label for label, p in probabilities.items() if p > 0.5]
                predictions.append({"labels": labels, "probabilities": probabilities})
            else:
                best = max(probabilities, key=probabilities.__getitem__)
                predictions.append({"label": best, "probabilities": probabilities})
        return predictions

    def report(
        self, samples: Sequence[LabelledText], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        return classification_report(self.labels, samples, predictions, self.multi_label)


def classification_report(
    labels: Sequence[str],
    samples: Sequence[LabelledText],
    predictions: Sequence[Prediction],
    is_multi_label: bool,
) -> Report:
    true = [sample.labels for sample in samples]
    if is_multi_label:
        predicted = [tuple(sorted(p["labels"])) for p in predictions]
    else:
        predicted = [(p["label"],) for p in predictions]
    table = LabelTable.of_sets(
        labels,
        [[(label, 0) for label in each] for each in true],
        [[(label, 0) for label in each] for each in predicted],
    )
    share = accuracy(true, predicted)
    metrics = {"accuracy": share, "labels": table.to_dict()}
    what = "texts with exactly the right labels" if is_multi_label else "accuracy"
    text = f"{table}\n\n{what} {share:.4f}"
    if is_multi_label:
        return Report(metrics, text)
    matrix = confusion_matrix(labels, [t[0] for t in true], [p[0] for p in predicted])
    return Report(
        metrics | {"confusion_matrix": matrix},
        text,
        {"confusion_matrix.png": confusion_png(labels, matrix)},
    )
