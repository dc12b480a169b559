"""Threads for work that waits in the kernel, such as reading and page faults."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

_THREADS = min(8, os.cpu_count() or 1)

_S = TypeVar("_S")
_T = TypeVar("_T")


def run_in_order(tasks: Iterable[Callable[[], _T]], count: int, threads: int = _THREADS) -> Generator[_T]:
    """Run `count` tasks in threads and yield their results in order. A single task runs in the caller's thread.

    At most 2 · `threads` + 1 results or running tasks are in memory.

    The caller's thread takes tasks from the iterable, a few ahead of their execution. Memory that outlives a task
    should be allocated when the task is made: malloc gives each new thread one of up to eight arenas a core, and each
    arena keeps freed pages. Loading 500 MB repeatedly left 3 GB in the arenas of two cores.

    >>> list(run_in_order([lambda: 1, lambda: 2], 2))
    [1, 2]
    """
    threads = min(threads, count)
    if threads <= 1 and (count <= 1 or _THREADS <= 1):
        yield from (task() for task in tasks)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_T]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def start(function: Callable[[], _T]) -> Future[_T]:
    """Run a function in a thread of its own, also while the program ends, when executors accept no work.

    >>> start(lambda: 1 + 1).result()
    2
    """
    from concurrent.futures import Future

    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised by `result`
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def map_ahead(function: Callable[[_S], _T], items: Collection[_S]) -> Generator[_T]:
    """Yield `function(item)` for each item; a thread computes the next two while the caller uses one.

    >>> list(map_ahead(str.upper, ["a", "b"]))
    ['A', 'B']
    """
    return run_in_order((functools.partial(function, item) for item in items), len(items), 1)


def split_by_size(items: Iterable[_T], size: Callable[[_T], int], limit: int) -> list[list[_T]]:
    """Split items, in order, into lists of at most `limit` bytes, or of one larger item.

    >>> split_by_size([3, 1, 2, 9, 1], lambda n: n, 4)
    [[3, 1], [2], [9], [1]]
    """
    out: list[list[_T]] = []
    total = 0
    for item in items:
        nbytes = size(item)
        if not out or total + nbytes > limit:
            out.append([])
            total = 0
        out[-1].append(item)
        total += nbytes
    return out
