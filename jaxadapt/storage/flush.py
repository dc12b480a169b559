"""Folders made and flushed to the disk, so that what is in them survives a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from pathlib import Path

from jaxadapt.core.errors import FileError
from jaxadapt.storage.local_files import file_error


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those above it where they are missing; those that are new, innermost first.

    They are on the disk when this returns.

    Raises:
        FileError: no permission, a part of the path is a file, …; then none of them is there.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            # A folder that may be written to need not be readable, and one that cannot be opened cannot be flushed.
            with contextlib.suppress(PermissionError):
                flush_directory(path.parent)
    except (OSError, ValueError) as error:
        for path in new:
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()
        raise file_error("make the folder", str(folder), error, "choose another path") from error
    return new


def flush_tree(folder: Path, named: Path) -> None:
    """Flushes every file and directory under a folder to the disk.

    Args:
        named: what errors call the folder.

    Raises:
        FileError: the disk refused.
    """

    def fail(error: OSError) -> None:
        raise error

    try:
        for directory, _, names in os.walk(folder, onerror=fail):
            for name in names:
                fd = os.open(Path(directory, name), os.O_RDONLY)
                try:
                    flush_fd(fd)
                finally:
                    close_fd(fd)
            flush_directory(Path(directory))
    except OSError as error:
        raise write_error(str(named), error) from error


def flush_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush_folder_fd(fd)
    finally:
        close_fd(fd)


def flush_folder_fd(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no directories
            raise


def write_error(path: str, error: OSError | ValueError) -> FileError:
    return file_error("write", path, error, "what the path held before is untouched")


def flush_fd(fd: int) -> None:
    """Waits until the bytes of a file are on the disk; raises `OSError`."""
    if sys.platform == "darwin":
        # there fsync() only reaches the drive's own cache
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def close_fd(fd: int) -> None:
    """Closes a descriptor that nothing was written to since it was flushed: an error would say nothing of the data."""
    with contextlib.suppress(OSError):
        os.close(fd)
