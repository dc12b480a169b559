"""Messages to the user: errors, warnings, the log, and reports of progress.

Every error that the library raises on purpose is one of these:

    AdapterError
    ├── ConfigError        a configuration (file or object) is invalid, contradictory or not supported
    ├── FileError          a path cannot be read or written: missing, no permission, disk full, wrong kind
    │   └── FormatError    the bytes are not what they claim to be: truncated, overlapping, lying header
    ├── KeyMapError        a keymap is wrong, or does not fit the model
    │   └── MismatchError  tensors are missing, unexpected, claimed twice or wrongly shaped
    ├── TargetError        `target_modules` (or another selection) matches nothing, or nothing that can be adapted
    └── AttachError        a layer cannot compute the adapter exactly, or the tree has no (or another) adapter

A message names the file, path or tensor, the expected and the found value, and a way out. One error lists all problems
of one kind. `warn` reports a fact that the user should know although no call failed. `close_matches` finds names that
are similar to one that matched nothing.

`escape_text` makes untrusted text (names of tensors and modules, values, a server's messages) safe to print on a
terminal.

Every function that moves bytes has the argument `progress=`. None reports nothing. True draws bars on a terminal or in
a notebook, for tasks of at least 1 MiB, and nothing elsewhere. A function is called with the task, the number of bytes
done and the total number of bytes. An exception that it raises ends the task like any other failure: no partial result
remains. The task is "save", "load", "read", "merge", "unmerge", "export", "import", "upload", or the name of a
downloaded file.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeVar

# ---------------------------------------------------------------- errors


_N = TypeVar("_N", str, int)
_PACKAGE = __file__.removesuffix("core/errors.py")


class AdapterError(Exception):
    """The base class of every error that jaxadapt raises on purpose."""


class ConfigError(AdapterError):
    """A configuration is invalid, contradictory or not supported."""


class FileError(AdapterError):
    """A path cannot be read or written."""


class FormatError(FileError):
    """A file's bytes are not what they claim to be."""


class KeyMapError(AdapterError):
    """A keymap is wrong, or does not fit the model it is applied to."""


class MismatchError(KeyMapError):
    """Tensors are missing, unexpected, claimed twice or wrongly shaped."""


class TargetError(AdapterError):
    """A selection matches nothing in the model, or nothing that can be adapted."""


class AttachError(AdapterError):
    """A layer cannot compute the adapter exactly, a tree has no (or another) adapter, or arguments do not fit it."""


def bullets(items: Iterable[str], limit: int = 8) -> str:
    """Return up to `limit` items for an error message, one indented line each.

    >>> print(bullets(["a", "b"], limit=1))
      a
      … and 1 more
    """
    lines = list(items)
    text = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        text.append(f"  … and {len(lines) - limit} more")
    return "\n".join(text)


def repeated(names: Iterable[_N]) -> list[_N]:
    """Return the names that occur more than once, sorted.

    >>> repeated(["b", "a", "b"])
    ['b']
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)


def problems_text(problems: Sequence[str], shown: int = 10) -> str:
    """Join the problems of one kind into one text, with a count of those not shown."""
    text = "; ".join(problems[:shown])
    return text if len(problems) <= shown else f"{text}; and {len(problems) - shown} more"


def met(problems: Mapping[str, object]) -> list[str]:
    """Return the problems whose conditions are true, from `{problem: condition}`.

    >>> met({"too small": 5 < 3, "too large": 5 > 3})
    ['too large']
    """
    return [problem for problem, is_met in problems.items() if is_met]


def raise_listed(
    error: type[AdapterError], message: str, items: Iterable[str], advice: str = "", limit: int = 8
) -> None:
    """Raise one error that lists all items, the problems of one kind; do nothing if there are none.

    Args:
        error: the class of the error.
        message: the first line: what failed, and why.
        items: the problems, or the names of what they concern.
        advice: text for the end of the message, with its own line break.
        limit: the number of items to list.

    >>> raise_listed(MismatchError, "cannot merge: these weights are missing:", ["q.kernel"])
    Traceback (most recent call last):
    ...
    jaxadapt.core.errors.MismatchError: cannot merge: these weights are missing:
      q.kernel
    """
    lines = list(items)
    if lines:
        raise error(f"{message}\n{bullets(lines, limit)}{advice}")


@contextlib.contextmanager
def raise_as(error: type[Exception], text: str, *kinds: type[Exception], advice: str = "") -> Generator[None]:
    """Raise errors of these kinds within a context as one of another class, with a text and a colon before theirs.

    `advice` is the end of the message.

    >>> with raise_as(FormatError, "a.json: expected a number", ValueError):
    ...     int("x")
    Traceback (most recent call last):
    ...
    jaxadapt.core.errors.FormatError: a.json: expected a number: invalid literal for int() with base 10: 'x'
    """
    try:
        yield
    except kinds as problem:
        raise error(f"{text}: {problem}{advice}") from problem


def warn(message: str) -> None:
    """Issue a `UserWarning` that points at the user's line that called into this library."""
    frame, level, stacklevel = inspect.currentframe(), 0, 1
    while frame is not None:
        level += 1
        stacklevel = level + 1 if frame.f_code.co_filename.startswith(_PACKAGE) else stacklevel
        frame = frame.f_back
    warnings.warn(message, stacklevel=stacklevel)


# ---------------------------------------------------------------- suggest


# The largest number of names that an error lists.
_MAX_LISTED = 30


def close_matches(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the last segments and the full names that are similar to one of `targets`."""
    similar: dict[str, None] = {}
    segments = sorted({name.rpartition(".")[2] for name in names})
    full = sorted(set(names))[:500]  # difflib is slow, and a few hundred comparisons suffice
    for target in targets[:20]:
        last = target.rpartition(".")[2]
        by_case = [segment for segment in segments if segment.lower() == last.lower() and segment != target]
        close = difflib.get_close_matches(last, segments, n=3, cutoff=0.6)
        close_full = difflib.get_close_matches(target, full, n=2, cutoff=0.8) if "." in target else []
        similar.update(dict.fromkeys([*by_case, *(item for item in close if item != target), *close_full]))
    return list(similar)


def describe_available(names: Sequence[str]) -> str:
    """Return a phrase that lists the last segments of the available module names."""
    segments = sorted({name.rpartition(".")[2] for name in names} - {""})  # the root module has an empty name
    return f"the last segments {quote_list(segments)}" if segments else "no modules at all"


def quote_list(items: Sequence[str]) -> str:
    """Return the items separated by commas, and the number of those beyond the limit."""
    rest = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + rest


# ---------------------------------------------------------------- terminal


def escape_text(text: str, keep: str = "") -> str:
    r"""Return the text with every non-printable character written as an escape sequence.

    A terminal obeys control characters: they move the cursor, change colors or rename the window. Direction marks show
    a name backwards, and zero-width characters make two names look the same.

    Args:
        keep: characters to leave unescaped, such as "\n" in a text of several lines.

    >>> print(escape_text("q\x1b[2J\u202e.weight\n"), escape_text("Gewicht ü × 重み"))
    q\x1b[2J\u202e.weight\n Gewicht ü × 重み
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------- progress


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
