"""How long work says where it is: `progress=` of everything that moves bytes.

None is quiet, True draws bars on a terminal (nothing elsewhere), and a function is called with what is being done, how
much of it is done, and how much there is (bytes, or steps where the name says so).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Generator
from typing import Any

Report = Callable[[str, int, int], None]
Progress = Report | bool | None

LOGGER = logging.getLogger("jaxadapt")
"""The library's one logger. It has no handlers; `logging.basicConfig(level="INFO")` shows what it says."""


def _nothing(what: str, done: int, total: int) -> None:
    pass


@contextlib.contextmanager
def reporting(progress: Progress) -> Generator[Report]:
    """The function to call while the work is done.

    >>> with reporting(print) as report:
    ...     report("weights", 3, 12)
    weights 3 12
    """
    if progress is None or progress is False:
        yield _nothing
    elif progress is True:
        with _bars() as report:
            yield report
    else:
        yield progress


@contextlib.contextmanager
def _bars() -> Generator[Report]:
    if not sys.stderr.isatty():
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns: list[Any] = [
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
