"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopText:
    """Lets text through up to the first stop string, and never a part of one.

    The first is the one that is complete first, of several such the longest. Text that may be the beginning of a stop
    string is held until more text decides.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.is_stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Take a piece of text; return the text that is certain now. Nothing comes after a stop string."""
        if self.is_stopped:
            return ""
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self.stop]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)[1]]
        split = len(text) - self._length_to_hold(text)
        self._held = text[split:]
        return text[:split]

    def flush(self) -> str:
        """The text that was held, when there is no more to come."""
        held, self._held = self._held, ""
        return "" if self.is_stopped else held

    def _length_to_hold(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return length
        return 0
