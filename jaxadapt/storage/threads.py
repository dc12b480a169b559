"""Threads for work that waits in the kernel, such as reading and page faults."""

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
    """Run tasks in threads and yield their results in order. With one thread, tasks run in the caller's.

    The caller's thread takes tasks from the iterable, a few ahead of their execution. Memory that outlives a task
    should be allocated when the task is made: malloc gives each new thread one of up to eight arenas a core, and each
    arena keeps freed pages. Loading 500 MB repeatedly left 3 GB in the arenas of two cores.

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
