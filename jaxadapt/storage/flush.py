"""Creating folders and flushing files to the disk, so that they survive a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from pathlib import Path

from jaxadapt.core.errors import FileError
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Address, Location


def make_folder(folder: Location) -> list[Path]:
    """Create a folder and its missing parents durably. Return the new folders, innermost first.

    Does nothing for an address, since object stores have no folders.

    Raises:
        FileError: no permission, or a part of the path is a file. Then no new folder remains.
    """
    if isinstance(folder, Address):
        return []
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            # A writable folder need not be readable, and a folder that cannot be opened cannot be flushed.
            with contextlib.suppress(PermissionError):
                flush_directory(path.parent)
    except (OSError, ValueError) as error:
        for path in new:
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()
        raise file_error("create the folder", str(folder), error, "choose another path") from error
    return new


def flush_tree(folder: Path, display_path: Path) -> None:
    """Flush every file and directory under a folder to the disk.

    Args:
        folder: the folder to flush.
        display_path: the name of the folder in errors.

    Raises:
        FileError: the disk reports an error.
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
        raise write_error(str(display_path), error) from error


def flush_directory(directory: Path) -> None:
    """Flush the entries of a directory to the disk. Raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush_folder_fd(fd)
    finally:
        close_fd(fd)


def flush_folder_fd(fd: int) -> None:
    """Flush an open directory, if its file system can. Raises `OSError`."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush directories
            raise


def write_error(path: str, error: OSError | ValueError) -> FileError:
    """Return the `FileError` for a failed write that left the target unchanged."""
    return file_error("write", path, error, "the previous content of the path is untouched")


def flush_fd(fd: int) -> None:
    """Wait until the bytes of a file are on the disk. Raises `OSError`."""
    if sys.platform == "darwin":
        # On macOS, fsync() only reaches the drive's own cache.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def close_fd(fd: int) -> None:
    """Close a descriptor to which nothing was written since its last flush, ignoring errors: the data is safe."""
    with contextlib.suppress(OSError):
        os.close(fd)
