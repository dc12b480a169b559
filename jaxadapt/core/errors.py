"""Every error the library raises on purpose.

    AdapterError
    ├── ConfigError        a configuration (file or object) is invalid, contradictory or not supported
    ├── FileError          a path cannot be read or written: missing, no permission, disk full, wrong kind
    │   └── FormatError    the bytes are not what they claim to be: truncated, overlapping, lying header
    ├── KeyMapError        a table of names is wrong, or does not fit the model
    │   └── MismatchError  tensors are missing, unexpected, doubly claimed or wrongly shaped
    ├── TargetError        `target_modules` (or another selection) names nothing, or nothing that can be adapted
    └── AttachError        a layer cannot carry the adapter exactly, or the tree carries no (or another) adapter

Messages name the file, path or tensor, what was expected, what was found, and the way out; all
problems of one kind stand in one error. What a person should know, though nothing is wrong, is a warning: `warn`.
"""

from __future__ import annotations

import inspect
import warnings

_OURS = __file__.removesuffix("core/errors.py")


class AdapterError(Exception):
    """The root of every error jaxadapt raises on purpose."""


class ConfigError(AdapterError):
    """A configuration is invalid, contradictory, or asks for what is not supported."""


class FileError(AdapterError):
    """A path cannot be read or written."""


class FormatError(FileError):
    """A file's bytes are not what they claim to be."""


class KeyMapError(AdapterError):
    """A table of names is wrong, or does not fit the model it is applied to."""


class MismatchError(KeyMapError):
    """Tensors are missing, unexpected, doubly claimed or wrongly shaped."""


class TargetError(AdapterError):
    """A selection names nothing in the model, or nothing that can be adapted."""


class AttachError(AdapterError):
    """A layer cannot carry the adapter exactly, or a tree carries no (or another) adapter."""


def warn(message: str) -> None:
    """A `UserWarning` that points at the line from which this library was entered, whatever lies between."""
    frame, level, entered = inspect.currentframe(), 0, 1
    while frame is not None:
        level += 1
        entered = level + 1 if frame.f_code.co_filename.startswith(_OURS) else entered
        frame = frame.f_back
    warnings.warn(message, stacklevel=entered)
