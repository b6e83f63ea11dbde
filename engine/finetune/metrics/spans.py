"""Spans in tags: B-PER I-PER O is one span of two words.

The prefixes B, I, E, S and O are read as the CoNLL evaluation script does: a span begins at B or S, after E, S or O, and where
the type changes, so that an I without a B begins one too. Tags of which some have no prefix (keyword, string) are spans of one
word each.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_PREFIXES = ("B-", "I-", "E-", "S-")


class Span(NamedTuple):
    label: str
    start: int  # first word
    end: int  # the word behind the last


def has_prefixes(tags: Iterable[str]) -> bool:
    return all(tag == OUTSIDE or tag.startswith(_PREFIXES) for tag in tags)


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Spans of a sentence whose tags have prefixes."""
    spans: list[Span] = []
    before = OUTSIDE
    for i, tag in enumerate(tags):
        if tag != OUTSIDE:
            prefix, label = tag[0], tag[2:]
            is_new = prefix in "BS" or before[0] in "ESO" or before[2:] != label
            if is_new:
                spans.append(Span(label, i, i + 1))
            else:
                spans[-1] = spans[-1]._replace(end=i + 1)
        before = tag
    return spans


def single_spans(tags: Sequence[str]) -> list[Span]:
    """A span for each word that has a tag."""
    return [Span(tag, i, i + 1) for i, tag in enumerate(tags) if tag != OUTSIDE]
