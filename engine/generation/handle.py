"""What `Generator.submit` returns: a request in work, for whoever waits for its text."""

from collections.abc import AsyncIterator, Generator, Iterator
from functools import partial
from typing import Any

from .batcher import Batcher
from .completion import Completion
from .job import Generation


class Handle:
    """A request that was submitted.

    Any thread may use it. `await handle` is `handle.result()`, `async for` is `for`, both without blocking the event loop.
    When nobody holds it any more, the request is cancelled.
    """

    def __init__(self, job: Generation, batcher: Batcher) -> None:
        self._job = job
        self._batcher = batcher

    def __del__(self) -> None:
        self._batcher.abandon(self._job)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to wait for: complete, cancelled or failed."""
        return self._job.is_done

    def cancel(self) -> None:
        """End the work and free its memory; on return that has happened. After the end it does nothing."""
        self._batcher.cancel([self._job])

    def result(self, timeout: float | None = None) -> list[Completion]:
        """The `n` completions, once they are finished.

        Raises:
            TimeoutError: they are not for `timeout` seconds; the work goes on.
            concurrent.futures.CancelledError: it was cancelled.
            RuntimeError: the generator was closed, or what went wrong in the decoder.
        """
        if not self._job.wait(timeout=timeout):
            raise TimeoutError(f"the request is not done after {timeout} seconds")
        return self._completions()

    def __await__(self) -> Generator[Any, None, list[Completion]]:
        yield from self._job.wait_async().__await__()
        return self._completions()

    def __iter__(self) -> Iterator[str]:
        """The text of the one completion, in pieces as they become certain, from the first on.

        Leaving the loop does not end the work; `cancel` does.

        Raises:
            ValueError: the request has several completions, or the generator no tokenizer.
            As `result`, behind the pieces that were certain.
        """
        self._check_is_text()
        return self._pieces()

    def __aiter__(self) -> AsyncIterator[str]:
        self._check_is_text()
        return self._pieces_async()

    def _pieces(self) -> Iterator[str]:
        num_given = 0
        while True:
            self._job.wait(partial(self._job.pieces, num_given))
            is_last = self.done
            for piece in self._job.pieces(num_given):
                num_given += 1
                yield piece
            if is_last:
                self._job.raise_error()
                return

    async def _pieces_async(self) -> AsyncIterator[str]:
        num_given = 0
        while True:
            await self._job.wait_async(partial(self._job.pieces, num_given))
            is_last = self.done
            for piece in self._job.pieces(num_given):
                num_given += 1
                yield piece
            if is_last:
                self._job.raise_error()
                return

    def _completions(self) -> list[Completion]:
        self._job.raise_error()
        return self._job.completions()

    def _check_is_text(self) -> None:
        if self._job.request.params.n != 1:
            raise ValueError(
                f"a stream has one completion, got n={self._job.request.params.n}: use result()"
            )
        if self._job.request.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer: Generator(model, tokenizer)")
