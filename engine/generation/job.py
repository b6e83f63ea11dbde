"""Work for the thread of a `Batcher`, and how other threads wait for it: a `Generation` of text, or a `Computation`."""

import asyncio
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from .completion import Completion, Draft, Request


class Job:
    """It ends once, well or with an error. The batcher's thread changes it; any thread may wait for a change."""

    def __init__(self) -> None:
        self.is_done = False
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._watchers: list[Callable[[], None]] = []  # called after each change

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error
        self.is_done = True
        self.notify()

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            for watcher in self._watchers:
                watcher()

    def wait(
        self, is_ready: Callable[[], object] = lambda: None, timeout: float | None = None
    ) -> bool:
        """Wait until the job is done, or ready; whether it came so far in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_done or bool(is_ready()), timeout)

    async def wait_async(self, is_ready: Callable[[], object] = lambda: None) -> None:
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def watcher() -> None:
            with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(event.set)

        with self._changed:
            self._watchers.append(watcher)
        try:
            while not (self.is_done or is_ready()):
                await event.wait()
                event.clear()
        finally:
            with self._changed:
                self._watchers.remove(watcher)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


class Generation(Job):
    """A request in work.

    Args:
        report: called by the batcher's thread with each draft that is finished, or with the error that ends them all.
    """

    def __init__(
        self, request: Request, report: Callable[[Draft | BaseException], Any] | None = None
    ) -> None:
        super().__init__()
        self.request = request
        self.drafts: list[Draft] = []  # those that were started, in the order of their index
        self._report = report

    def report(self, draft: Draft) -> None:
        if self._report is not None:
            self._report(draft)

    def finish(self, error: BaseException | None = None) -> None:
        super().finish(error)
        if error is not None and self._report is not None:
            self._report(error)

    def pieces(self, start: int) -> list[str]:
        """The pieces of text of the only completion, from one on."""
        return self.drafts[0].pieces[start:] if self.drafts else []

    def completions(self) -> list[Completion]:
        return [draft.completion() for draft in self.drafts]


class Computation(Job):
    """Steps of a decoder other than drawing text.

    Args:
        steps: yields after each step, and drops its sequences at the end or when it is closed.
        num_blocks: pages of the cache that it may need.
    """

    def __init__(self, steps: Generator[None, None, None], num_blocks: int) -> None:
        super().__init__()
        self.steps = steps
        self.num_blocks = num_blocks
        self.is_started = False

    def advance(self) -> bool:
        """Run the next step; whether that was the last."""
        for _ in self.steps:
            return False
        return True
