"""Ctrl-C and SIGTERM, remembered until the loop comes to a point where it can stop."""

import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Within the `with` block the first such signal sets `requested`; a second one acts as it does elsewhere.

    Only the main thread can receive signals: in another one, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._remember) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
