"""Every error the library raises on purpose.

    AdapterError
    ├── ConfigError        a configuration (file or object) is invalid, contradictory or not supported
    ├── FileError          a path cannot be read or written: missing, no permission, disk full, wrong kind
    │   └── FormatError    the bytes are not what they claim to be: truncated, overlapping, lying header
    ├── KeyMapError        a keymap is wrong, or does not fit the model
    │   └── MismatchError  tensors are missing, unexpected, claimed twice or wrongly shaped
    ├── TargetError        `target_modules` (or another selection) matches nothing, or nothing that can be adapted
    └── AttachError        a layer cannot carry the adapter exactly, or the tree carries no (or another) adapter

A message names the file, path or tensor, the expected and the found value, and a way out. One error lists all problems
of one kind. `warn` reports a fact that the user should know although no call failed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable

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
    """A layer cannot carry the adapter exactly, or a tree carries no (or another) adapter."""


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


def warn(message: str) -> None:
    """Issue a `UserWarning` that points at the user's line that called into this library."""
    frame, level, stacklevel = inspect.currentframe(), 0, 1
    while frame is not None:
        level += 1
        stacklevel = level + 1 if frame.f_code.co_filename.startswith(_PACKAGE) else stacklevel
        frame = frame.f_back
    warnings.warn(message, stacklevel=stacklevel)
