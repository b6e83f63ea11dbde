"""The thread that runs a decoder for all callers, and the queue in front of it.

There is a thread only as long as there is work: it starts with the first job and ends after the last one, so that an idle
generator holds nothing and needs no closing. Nobody but this thread touches the decoder.
"""

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager

from .job import Computation, Generation, Job
from .scheduler import Scheduler


class Batcher:
    """Feeds the generations of any number of threads to one scheduler, and runs computations between its steps.

    Args:
        scheduler: nobody else may use it, or its decoder, while there is work.
        max_waiting: generations that may wait for their start before `submit` blocks.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._inbox: deque[Job] = deque()
        self._to_cancel: deque[Job] = deque()
        self._computations: deque[Computation] = deque()  # one runs at a time, the first
        self._thread: threading.Thread | None = None
        self._is_closed = False
        _open_batchers.add(self)

    def submit(self, jobs: Sequence[Job], timeout: float | None = None) -> None:
        """Queue jobs, all of them one behind the other, as soon as there is room for the first.

        Raises:
            TimeoutError: there was none for `timeout` seconds.
            RuntimeError: the batcher is closed.
        """
        with self._has_room:
            if not self._has_room.wait_for(self._is_open_to_jobs, timeout):
                raise TimeoutError(
                    f"{self.max_waiting} prompts wait already (max_waiting): try again later, or wait longer"
                )
            if self._is_closed:
                raise RuntimeError("the generator is closed: make a new one")
            self._inbox += jobs
            self._start_thread()

    @contextmanager
    def running(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Submit jobs, and cancel those that are not done at the end of the `with` block."""
        try:
            self.submit(jobs)
            yield
        finally:
            self.cancel(jobs)

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs, in whatever state they are; on return that has happened."""
        for job in jobs:
            self.abandon(job)
        with self._lock:
            if not all(job.is_done for job in jobs):
                self._start_thread()  # Ctrl-C may have come before `submit` did
        for job in jobs:
            job.wait()

    def abandon(self, job: Job) -> None:
        """Have a job ended after the step that is running."""
        # no lock: the garbage collector may call this, in the middle of anything
        if not job.is_done:
            self._to_cancel.append(job)

    def close(self) -> None:
        """End all jobs with an error, and wait until the thread has left the decoder."""
        with self._has_room:
            self._is_closed = True
            self._has_room.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _start_thread(self) -> None:
        # not alive though there: in a process that was forked
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="leangpt", daemon=True)
            self._thread.start()

    def _is_open_to_jobs(self) -> bool:
        num_waiting = self._scheduler.num_waiting + len(self._inbox)
        return self._is_closed or num_waiting < self.max_waiting

    def _run(self) -> None:
        while self._take_in():
            self._compute()
            # what waits for pages must get them, however many generations come
            is_starved = bool(self._computations) and not self._computations[0].is_started
            self._scheduler.step(may_begin=not is_starved)

    def _take_in(self) -> bool:
        """Take what was submitted, and end what was cancelled; whether there is work."""
        with self._has_room:
            while self._inbox:
                job = self._inbox.popleft()
                if job.is_done:  # cancelled already
                    continue
                if isinstance(job, Computation):
                    self._computations.append(job)
                elif isinstance(job, Generation):
                    self._scheduler.add(job)
            while self._to_cancel:
                self._end(self._to_cancel.popleft(), CancelledError("it was cancelled"))
            if self._is_closed:
                for job in (*self._scheduler.jobs, *self._computations):
                    self._end(job, RuntimeError("the generator was closed"))
            has_work = self._scheduler.has_work or bool(self._computations)
            if not has_work:
                self._thread = None
            self._has_room.notify_all()
            return has_work

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        if job.is_done:
            return
        if isinstance(job, Generation):
            self._scheduler.end(job, error)
        elif isinstance(job, Computation):
            if job in self._computations:
                self._computations.remove(job)
            if job.is_started:
                job.steps.close()
                self._scheduler.budget.give_back(job.num_blocks)
            job.finish(error)

    def _compute(self) -> None:
        """Run a step of the first computation, if the pages it may need are free."""
        if not self._computations:
            return
        job, budget = self._computations[0], self._scheduler.budget
        if not job.is_started and budget.has_room(job.num_blocks):
            budget.promise(job.num_blocks)
            job.is_started = True
        if job.is_started:
            try:
                is_last = job.advance()
            except BaseException as error:  # not ours: whoever waits for the result shall see it
                self._end(job, error)
            else:
                if is_last:
                    self._end(job)


# a thread must not be inside the decoder while the interpreter is taken apart
_open_batchers: weakref.WeakSet[Batcher] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for batcher in tuple(_open_batchers):
        batcher.close()
