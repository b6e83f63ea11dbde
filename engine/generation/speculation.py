"""Prompt lookup: guessing what comes next from where the last tokens stood before.

A step of the decoder checks several guessed tokens nearly as fast as it draws one, and the draw of each position does not
depend on how it was reached: guesses change how soon a text comes, never the text.

Reference: Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from collections.abc import Sequence

_NGRAMS = (3, 2)  # the longest that stood before counts
_LONGEST_REST = 16


class PromptLookup:
    """Guesses for one text, at most `most` at a time, and fewer where they turned out wrong.

    After guesses that were all right it guesses twice as many, after others one more than were right; after each useless
    step in a row it rests for a step longer.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._count = most
        self._num_useless = 0
        self._rest = 0
        # n-gram -> place after its last occurrence
        self._followers: dict[tuple[int, ...], int] = {}
        self._num_seen = 0  # tokens whose n-grams are in it

    def guess(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow the text, which has grown since the last call."""
        for end in range(self._num_seen + 1, len(tokens)):
            for n in _NGRAMS:
                if end >= n:
                    self._followers[tuple(tokens[end - n : end])] = end
        self._num_seen = len(tokens) - 1
        if self._rest:
            self._rest -= 1
            return []
        for n in _NGRAMS:
            start = self._followers.get(tuple(tokens[-n:]))
            if start is not None:
                return _copy(tokens, start, min(self._count, limit))
        return []

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Tell how many of the last guesses were right."""
        if num_right == num_guessed:
            self._count = min(max(self._count, 2 * num_right), self.most)
        else:
            self._count = min(num_right + 1, self.most)
        self._num_useless = 0 if num_right else self._num_useless + 1
        self._rest = min(max(self._num_useless - 1, 0), _LONGEST_REST)


def _copy(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start`; beyond the end it goes on with its own, which repeats a period."""
    copied: list[int] = []
    for place in range(start, start + count):
        is_inside = place < len(tokens)
        copied.append(tokens[place] if is_inside else copied[place - len(tokens)])
    return copied
