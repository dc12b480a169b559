"""Removal of what killed writers left: temporary files and folders that no process locks, and empty folders."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import inspect
import os
import re
import shutil
import stat
from collections.abc import Callable, Generator
from pathlib import Path
from typing import ParamSpec, TypeVar

from jaxadapt.storage import location

_P = ParamSpec("_P")
_R = TypeVar("_R")


def lock(fd: int, *, wait: bool) -> bool:
    """Lock an open file or folder; return False if another process holds the lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by its writer; or a file system without locks, where leftovers are never removed
        return False
    return True


def remove_leftovers(directory: str | os.PathLike[str], names: str, *, folders: bool = False) -> bool:
    """Remove the leftovers of killed writers, as far as possible; return True if any were removed.

    Args:
        directory: the directory of the targets.
        names: a regular expression that the targets' names match.
        folders: also remove leftover folders of `atomic.staging_folder`.
    """
    pattern = re.compile(rf"\.(?:{names})\.\d+\.[0-9a-f]{{16}}\.(?:tmp|old)", re.DOTALL)
    removed = False
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the path
        for stale in Path(directory).iterdir():
            if not pattern.fullmatch(stale.name):
                continue
            with contextlib.suppress(OSError):
                folder = stat.S_ISDIR(stale.lstat().st_mode)
                if folder and not folders:
                    continue
                # A folder opens only for reading, which is enough to lock it.
                fd = os.open(stale, (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if (folder or stat.S_ISREG(os.fstat(fd).st_mode)) and lock(fd, wait=False):
                        shutil.rmtree(stale) if folder else stale.unlink()
                        removed = True
                finally:
                    os.close(fd)
    return removed


@contextlib.contextmanager
def clean_target(path: str | os.PathLike[str]) -> Generator[None]:
    """Remove the leftovers of killed writers of a file or folder, and its empty folders if the block fails.

    If the block raises an exception, an empty folder at the path is removed, and so are empty parents that the block
    made or that contained leftovers.
    """
    target = location.to_location(path)
    if isinstance(target, location.Address):
        yield
        return
    empty = [target, *(parent for parent in target.parents if not os.path.lexists(parent))]
    remove_leftovers(target, ".+", folders=True)
    if remove_leftovers(target.parent, re.escape(target.name), folders=True):
        empty.append(target.parent)
    try:
        yield
    except BaseException:
        for folder in empty:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()
        raise


def cleans(argument: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that runs a function in `clean_target` of the path in one of its arguments."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with clean_target(signature.bind(*args, **kwargs).arguments[argument]):
                return function(*args, **kwargs)

        return run

    return decorate
