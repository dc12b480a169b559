"""Threads for what waits in the kernel: reading, and the pages that are read into."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

THREADS = min(8, os.cpu_count() or 1)

_T = TypeVar("_T")


def run_in_order(tasks: Iterable[Callable[[], _T]], threads: int = THREADS) -> Generator[_T]:
    """What each task returns, in order; with one thread they run in the caller's.

    The caller's thread takes the tasks from the iterable, a few before they run. What is allocated in making a task
    should be all that is to outlive it: malloc gives each new thread the next of up to eight arenas a core, each keeps
    pages that were freed, and loading 500 MB again and again left 3 GB in those of two cores.

    >>> list(run_in_order([lambda: 1, lambda: 2]))
    [1, 2]
    """
    if threads <= 1:
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
