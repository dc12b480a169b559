"""Reports of progress (the argument `progress=` of every function that moves bytes), and the library's logger.

`progress=None` reports nothing.
`progress=True` draws bars on a terminal or in a notebook, for tasks of at least 1 MiB, and nothing elsewhere. A
function is called with the task, the number of bytes done and the total number of bytes. An exception that it raises
ends the task like any other failure: no partial result remains.

The task is "save", "load", "read", "merge", "unmerge", "export", "import", "upload", or the name of a downloaded file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Generator
from typing import Any

from jaxadapt.core.errors import escape_text

Report = Callable[[str, int, int], None]
Progress = Report | bool | None

LOGGER = logging.getLogger("jaxadapt")
"""The library's logger. It has no handlers; `logging.basicConfig(level="INFO")` shows its messages."""

SHORT = 1 << 20
"""The smallest total, in bytes, for which a bar appears."""


def no_report(task: str, done: int, total: int) -> None:
    """Do nothing: the report function of `progress=None`."""


def byte_counter(report: Report, task: str, total: int) -> Callable[[int], None]:
    """Return a function that takes the number of newly processed bytes and reports the sum.

    >>> add_bytes = byte_counter(print, "save", 12)
    save 0 12
    >>> add_bytes(5); add_bytes(7)
    save 5 12
    save 12 12
    """
    done = 0

    def add_bytes(count: int) -> None:
        nonlocal done
        done += count
        report(task, done, total)

    add_bytes(0)
    return add_bytes


@contextlib.contextmanager
def reporter(progress: Progress) -> Generator[Report]:
    """Yield the report function for a value of `progress=`.

    >>> with reporter(print) as report:
    ...     report("save", 3, 12)
    save 3 12
    """
    if progress is not None and not isinstance(progress, bool):
        yield progress
    elif progress and is_watched():
        with _bars() as report:
            yield report
    else:
        yield no_report


def is_watched() -> bool:
    """Return True if standard error is a terminal, or if this is a notebook that can draw bars."""
    from rich.console import Console

    if sys.stderr.isatty():  # rich's own check also accepts a log file if FORCE_COLOR is set
        return True
    return Console(stderr=True).is_jupyter and importlib.util.find_spec("ipywidgets") is not None


@contextlib.contextmanager
def _bars() -> Generator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]  # fmt: skip
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    bar_ids: dict[str, Any] = {}

    def report(task: str, done: int, total: int) -> None:
        if total < SHORT:
            return
        if not bar_ids:
            bars.start()
        if task not in bar_ids:
            bar_ids[task] = bars.add_task(escape_text(task), total=total)
        bars.update(bar_ids[task], completed=done, total=total)

    try:
        yield report
    finally:
        if bar_ids:  # on a dumb terminal, rich prints an empty line when it stops bars that never started
            bars.stop()
