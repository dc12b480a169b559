"""How long work says where it is: `progress=` of everything that moves bytes, and the library's one logger.

None is quiet, and True draws bars on a terminal or in a notebook (nothing elsewhere, and nothing of what is over before
it is seen). A function is called with what is being done, how many bytes of it are done, and how many there are; an
exception that it raises ends the work as any other failure does, with nothing half-done.

What is done is called "save", "load", "read", "merge", "unmerge", "export", "import" or "upload", or by the name of
the file that is fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Generator
from typing import Any

from jaxadapt.core.terminal import escape_text

Report = Callable[[str, int, int], None]
Progress = Report | bool | None

LOGGER = logging.getLogger("jaxadapt")
"""The library's one logger. It has no handlers; `logging.basicConfig(level="INFO")` shows what it says."""

SHORT = 1 << 20
"""Bytes: for less no bar appears."""


def no_report(what: str, done: int, total: int) -> None:
    """The report of work that nobody watches."""


def byte_counter(report: Report, what: str, total: int) -> Callable[[int], None]:
    """A function that is told how many bytes more are done.

    >>> more = byte_counter(print, "save", 12)
    save 0 12
    >>> more(5); more(7)
    save 5 12
    save 12 12
    """
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        report(what, done, total)

    more(0)
    return more


@contextlib.contextmanager
def reporter(progress: Progress) -> Generator[Report]:
    """The function to call while the work is done.

    >>> with reporter(print) as report:
    ...     report("save", 3, 12)
    save 3 12
    """
    if progress is None or progress is False:
        yield no_report
    elif progress is True:
        with _bars() as report:
            yield report
    else:
        yield progress


def is_watched() -> bool:
    """Whether somebody sees a bar: standard error is a terminal, or this is a notebook that can draw one."""
    from rich.console import Console

    if sys.stderr.isatty():  # not what rich calls one: FORCE_COLOR makes no terminal of a log
        return True
    return Console(stderr=True).is_jupyter and importlib.util.find_spec("ipywidgets") is not None


@contextlib.contextmanager
def _bars() -> Generator[Report]:
    if not is_watched():
        yield no_report
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]  # fmt: skip
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if total < SHORT:
            return
        if not tasks:
            bars.start()
        if what not in tasks:
            tasks[what] = bars.add_task(escape_text(what), total=total)
        bars.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:  # rich ends what it never began with an empty line, where the terminal is a dumb one
            bars.stop()
