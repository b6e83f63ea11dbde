"""Ctrl-C and SIGTERM, remembered until the loop comes to a point where it can stop."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_WISH_SECONDS = 2.0


class Interrupt:
    """Within the `with` block the first such signal sets `requested`; a later one acts as it does elsewhere.

    One within `SAME_WISH_SECONDS` of the first is the same wish: a terminal sends Ctrl-C to every process, and torchrun passes
    it on to its own once more. Only the main thread can receive signals: in another one, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
        elif now - self._first > SAME_WISH_SECONDS:
            self.__exit__()
            signal.raise_signal(signum)
