"""`tag`: a label for each word, such as named entities.

A word is labelled at its last token: the model looks to the left only, and has seen the whole word there. Tokens belong to words
by their place in the text, so every tokenizer will do; where two words end in one token, the token has the label of the second.

A text that is longer than what the model reads is read in windows that overlap by half. Each token counts in the one where most of
the text stands to its left: in the first that it is in.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ...data.tokenizer import Tokenizer
from ...generation.chat import ChatTemplate
from ..decoder import hidden_states
from ..metrics.labels import LabelTable, accuracy
from ..metrics.spans import OUTSIDE, Span, has_prefixes, single_spans, spans_of
from ..modules import Tagger
from ..padding import IGNORED, pad
from ..rows import list_of, text_of
from ..templates import with_bos
from .base import Example, Prediction, Report, Task, balanced_weights, collate_tokens

if TYPE_CHECKING:
    from ..tuned import Tuned

# a Chinese, Japanese or Korean character; letters and digits; any other sign
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
_CJK_CHARACTER = re.compile(f"[{_CJK}]")


class TaggedText(NamedTuple):
    text: str
    words: tuple[tuple[int, int], ...]  # first character of each, and the one behind its last
    tags: tuple[str, ...]  # () where they are to be predicted


@dataclass(frozen=True)
class Tag(Task[TaggedText]):
    """Words with tags (CoNLL columns, or lists "words" and "tags"), or a text with spans of characters
    ("spans": [{"start": 0, "end": 5, "label": "PER"}]).
    """

    name = "tag"

    text_field: str = "text"
    class_weights: Literal["none", "balanced"] = "none"  # balanced: rare tags count more
    tags: tuple[str, ...] = ()  # none: those of the training data

    def parse(self, values: dict[str, Any]) -> TaggedText:
        sample = self.parse_input(values)
        if "words" in values:
            tags = list_of(values, "tags")
            if not isinstance(tags, list) or len(tags) != len(sample.words):
                raise ValueError(
                    f"'tags' must have a tag for each of the {len(sample.words)} words"
                )
            if not all(isinstance(tag, str) and tag for tag in tags):
                raise ValueError(f"tags must be text, got {tags!r:.80}")
            return sample._replace(tags=tuple(tags))
        return sample._replace(tags=_tags_of_spans(sample, list_of(values, "spans")))

    def parse_input(self, values: dict[str, Any]) -> TaggedText:
        if "words" not in values:
            text = text_of(values, self.text_field)
            return TaggedText(text, tuple(m.span() for m in _WORD.finditer(text)), ())
        words = list_of(values, "words")
        if not isinstance(words, list) or not words:
            raise ValueError(f"'words' must be a list of words, got {words!r:.80}")
        for word in words:
            text_of({"words": word}, "words")
        return TaggedText(*_joined(words), ())

    def line_field(self) -> str:
        return self.text_field

    def key(self, sample: TaggedText) -> str:
        return sample.text

    def fit(
        self,
        samples: Sequence[TaggedText],
        tokenizer: Tokenizer,
        base_template: ChatTemplate | None,
    ) -> Self:
        tags = self.tags or tuple(sorted({tag for sample in samples for tag in sample.tags}))
        if len(tags) < 2:
            raise ValueError(f"there must be two tags or more, got {', '.join(tags) or 'none'}")
        return replace(self, tags=tags)

    def encode_all(self, sample: TaggedText, tokenizer: Tokenizer, max_len: int) -> list[Example]:
        """A window or several; a word is a target in one of them."""
        tokens, places = self.places(sample, tokenizer)
        targets = [IGNORED] * len(tokens)
        for place, tag in zip(places, sample.tags, strict=False):
            if tag not in self.tags:
                raise ValueError(
                    f"tag {tag!r} is not among those of the training data ({', '.join(self.tags)})"
                )
            targets[place] = self.tags.index(tag)
        return [
            Example(
                tokens[start : start + max_len],
                [IGNORED] * context + targets[start + context : start + max_len],
            )
            for start, context in _windows(len(tokens), max_len)
        ]

    def places(self, sample: TaggedText, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Tokens of the text, and for each word the index of its last token."""
        ids, offsets = tokenizer.encode_with_offsets(sample.text)
        tokens = with_bos(tokenizer, ids)
        place, places = 0, []
        for _, end in sample.words:
            while place + 1 < len(ids) and offsets[place + 1][0] < end:
                place += 1
            places.append(place + len(tokens) - len(ids))
        return tokens, places

    def collate(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        return collate_tokens(examples), pad([example.targets for example in examples], IGNORED)

    def make_module(self, model: Any, examples: Sequence[Example]) -> Tagger:
        weights = None
        if self.class_weights == "balanced" and examples:
            counts = Counter(chain.from_iterable(example.targets for example in examples))
            del counts[IGNORED]
            weights = balanced_weights(counts, len(self.tags))
        return Tagger(model, len(self.tags), weights)

    def predict(self, tuned: "Tuned", samples: Sequence[TaggedText]) -> list[Prediction]:
        assert isinstance(tuned.module, Tagger)
        bare = [sample._replace(tags=()) for sample in samples]
        parts = [self.encode_all(sample, tuned.tokenizer, tuned.max_len) for sample in bare]
        texts = [example.tokens for examples in parts for example in examples]
        rows = hidden_states(tuned.decoder, texts, tuned.batch_size)
        predictions: list[Prediction] = []
        for sample in bare:
            tokens, places = self.places(sample, tuned.tokenizer)
            windows = _windows(len(tokens), tuned.max_len)
            hidden = np.concatenate([next(rows)[context:] for _, context in windows])
            best = tuned.module.probabilities(torch.from_numpy(hidden)[places]).max(-1)
            tags = [self.tags[i] for i in best.indices.tolist()]
            probabilities = best.values.tolist()
            spans = [_span_of_text(sample, span, probabilities) for span in self.spans(tags)]
            predictions.append({"tags": tags, "probabilities": probabilities, "spans": spans})
        return predictions

    def spans(self, tags: Sequence[str]) -> list[Span]:
        return spans_of(tags) if has_prefixes(self.tags) else single_spans(tags)

    def report(
        self, samples: Sequence[TaggedText], predictions: Sequence[Prediction], loss: float
    ) -> Report:
        true = [self.spans(sample.tags) for sample in samples]
        predicted = [self.spans(p["tags"]) for p in predictions]
        labels = sorted({span.label for spans in true + predicted for span in spans})
        table = LabelTable.of_sets(
            labels, [_labelled(each) for each in true], [_labelled(each) for each in predicted]
        )
        all_true = [tag for sample in samples for tag in sample.tags]
        share = accuracy(all_true, [tag for p in predictions for tag in p["tags"]])
        metrics = {"token_accuracy": share, "labels": table.to_dict()}
        return Report(metrics, f"{table}\n\ntoken accuracy {share:.4f}")


def _windows(length: int, max_len: int) -> list[tuple[int, int]]:
    """Where each window begins, and how many of its first tokens only are context of the others."""
    context = max_len // 2
    stride = max_len - context
    count = 1 + max(0, math.ceil((length - max_len) / stride))
    return [(i * stride, context if i else 0) for i in range(count)]


def _labelled(spans: Sequence[Span]) -> list[tuple[str, tuple[int, int]]]:
    return [(span.label, (span.start, span.end)) for span in spans]


def _joined(words: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Words as a text, with spaces between them but not between Chinese or Japanese characters; and their places."""
    text, places = "", []
    for word in words:
        is_close = text and _CJK_CHARACTER.match(text[-1]) and _CJK_CHARACTER.match(word)
        text += "" if not text or is_close else " "
        places.append((len(text), len(text) + len(word)))
        text += word
    return text, tuple(places)


def _tags_of_spans(sample: TaggedText, spans: Any) -> tuple[str, ...]:
    """B and I of the words that a span touches, O of the others."""
    if not isinstance(spans, list):
        raise ValueError("a row must have 'words' and 'tags', or 'spans'")
    tags = [OUTSIDE] * len(sample.words)
    for span in spans:
        start, end, label = (
            (span.get(name) for name in ("start", "end", "label"))
            if isinstance(span, dict)
            else (None,) * 3
        )
        if not isinstance(start, int) or not isinstance(end, int) or not isinstance(label, str):
            raise ValueError(f"a span must have start, end and label, got {span!r:.80}")
        if not 0 <= start < end <= len(sample.text):
            raise ValueError(
                f"a span must lie within the {len(sample.text)} characters, got {span!r}"
            )
        touched = [i for i, (s, e) in enumerate(sample.words) if s < end and e > start]
        if not touched:
            raise ValueError(f"a span must have a word in it, got {span!r}")
        if any(tags[i] != OUTSIDE for i in touched):
            raise ValueError(f"spans must not touch the same word, got {span!r}")
        for i in touched:
            tags[i] = f"I-{label}"
        tags[touched[0]] = f"B-{label}"
    return tuple(tags)


def _span_of_text(sample: TaggedText, span: Span, probabilities: Sequence[float]) -> dict[str, Any]:
    start, end = sample.words[span.start][0], sample.words[span.end - 1][1]
    probability = min(probabilities[span.start : span.end])
    text = sample.text[start:end]
    return {
        "start": start,
        "end": end,
        "label": span.label,
        "text": text,
        "probability": probability,
    }
