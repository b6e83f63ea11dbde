"""Worker processes that tokenize: batches of texts go out, their tokens come back in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .shards import Tokens, token_dtype
from .tokenizer import Tokenizer, load_tokenizer


class Task(NamedTuple):
    """Documents of one split that are tokenized together."""

    split: str
    texts: list[str]
    num_bytes: int  # UTF-8


def tokenize(
    tasks: Iterable[Task], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[Task, Tokens]]:
    """Yield each task with the tokens of its texts, each followed by the end of text.

    Args:
        tasks: read as results are taken: at most two tasks a process are under way.
        folder: where `tokenizer` is saved, for the processes to load it.
        workers: processes; 1: this one does the work.

    Raises:
        RuntimeError: a process died.
    """
    if workers == 1:
        for task in tasks:
            yield task, _encode(tokenizer, task.texts)
        return
    # not forked: that deadlocks where libraries run threads
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (folder,))
    running: deque[tuple[Task, Future[Tokens]]] = deque()
    try:
        for task in tasks:
            running.append((task, executor.submit(_encode_in_worker, task.texts)))
            if len(running) > 2 * workers:
                oldest, future = running.popleft()
                yield oldest, future.result()
        for task, future in running:
            yield task, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died: out of memory, killed, or started by a script without "
            "`if __name__ == '__main__':`; with workers=1 there are none"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    tokens = [np.array([*tokenizer.encode(text), tokenizer.eos_id], np.uint32) for text in texts]
    return np.concatenate(tokens).astype(token_dtype(tokenizer.vocab_size))


_tokenizer: Tokenizer  # of a worker process


def _start_worker(folder: Path) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(folder)


def _exit_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for it forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: Sequence[str]) -> Tokens:
    return _encode(_tokenizer, texts)
