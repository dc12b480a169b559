"""Replacing a file durably and atomically: whatever happens, a reader finds the old bytes or the new ones.

The new bytes go to a temporary file in the same directory, which is flushed to the disk, renamed over the
target, and the directory flushed. A writer holds a lock on its temporary file: what a killed process left
behind is therefore known for certain, also on a disk that several machines share, and the next write of the
same target removes it. A target that is a symbolic link is replaced, not followed: it may point into
somebody's cache.

An address (see `places`) is replaced by one PUT of the store, which is as atomic; nothing is swept there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from _thread import start_new_thread
from collections import deque
from collections.abc import Generator
from itertools import islice
from pathlib import Path

from jaxadapt.codecs import places
from jaxadapt.codecs.files import MAX_VIEWS, file_error
from jaxadapt.errors import FileError

__all__ = [
    "Writer", "alone_in", "flush", "flush_tree", "make_parents", "remove", "replacing", "staging", "start_writeback",
    "sweep", "write_bytes",
]  # fmt: skip


# The disk is set to work each time this many bytes have gathered in the page cache.
_EARLY = 4 << 20
# How much of what was written stays in the page cache at least. Of a large file the rest makes room: it would push out
# what is read again and again, and pages that were used a moment ago are several times faster than others.
_CACHED = 64 << 20


class Writer:
    """The open temporary file of a replacement."""

    def __init__(self, fd: int, path: str, temporary: Path) -> None:
        """`path` is the target, for messages; `temporary` the file that is open."""
        self.fd = fd
        self.path = path
        self.temporary = temporary
        self._written = 0
        self._started = 0

    def write(self, *parts: memoryview) -> None:
        """Appends contiguous bytes, one part after the other; an `OSError` becomes a `FileError`."""
        pending = deque(part for part in parts if len(part))
        try:
            while pending:
                large = len(pending[0]) > _EARLY
                count = os.writev(self.fd, [pending[0][:_EARLY]] if large else list(islice(pending, MAX_VIEWS)))
                self._written += count
                self._start_writeback()
                while count:
                    part = pending.popleft()
                    if count < len(part):
                        pending.appendleft(part[count:])
                    count -= min(count, len(part))
        except OSError as error:
            raise _error(self.path, error) from error

    def _start_writeback(self) -> None:
        if self._written - self._started >= _EARLY:
            start_writeback(self.fd, self._started, self._written - self._started)
            self._started = self._written
            if self._written > _CACHED:
                start_writeback(self.fd, 0, self._written - _CACHED)


def _error(path: str, error: OSError | ValueError) -> FileError:
    return file_error("write", path, error, "what the path held before is untouched")


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Sets the disk to work on a range; without this it idles until the final fsync."""
    # Linux answers the advice by starting to write the range, and drops from its cache what is on the disk already.
    if sys.platform == "linux":
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def flush(fd: int) -> None:
    """Waits until the bytes of a file are on the disk; raises `OSError`."""
    if sys.platform == "darwin":
        # there fsync() only reaches the drive's own cache
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def _lock(fd: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by its writer, or a file system without locks: then nothing is ever swept
        return False
    return True


def sweep(directory: str | os.PathLike[str], names: str, *, folders: bool = False) -> None:
    """Removes what killed writers left of targets whose names match `names`, a regular expression. Best effort.

    `folders`: what `staging` leaves, besides the files.
    """
    pattern = re.compile(rf"\.(?:{names})\.\d+\.[0-9a-f]{{16}}\.(?:tmp|old)", re.DOTALL)
    with contextlib.suppress(OSError):
        for stale in Path(directory).iterdir():
            if not pattern.fullmatch(stale.name):
                continue
            with contextlib.suppress(OSError):
                folder = stat.S_ISDIR(stale.lstat().st_mode)
                if folder and not folders:
                    continue
                # a folder opens for reading only, and is locked all the same
                fd = os.open(stale, (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if (folder or stat.S_ISREG(os.fstat(fd).st_mode)) and _lock(fd, wait=False):
                        shutil.rmtree(stale) if folder else stale.unlink()
                finally:
                    os.close(fd)


@contextlib.contextmanager
def alone_in(directory: str | os.PathLike[str]) -> Generator[None]:
    """Waits until no other writer is in this block for the same directory: for what replaces several files that belong
    together. Where a file system locks no directories (an object store, some networks') nothing is waited for.
    """
    fd = None
    if not isinstance(directory, places.Address):
        with contextlib.suppress(OSError, ValueError):  # whoever writes there says what is wrong
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if fd is not None:
            _lock(fd, wait=True)
        yield
    finally:
        if fd is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # not by closing alone: a process forked meanwhile has it open as well
            os.close(fd)


def _create(directory: str, name: str) -> tuple[Path, int]:
    while True:
        temporary = Path(directory) / f".{name}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
        # mode 0666: the kernel takes the umask off, which Python can only read by changing it for all threads
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        # Between our open and our lock another writer may have taken the lock, to sweep the file away.
        _lock(fd, wait=True)
        if os.fstat(fd).st_nlink:
            return temporary, fd
        os.close(fd)


def _finish(writer: Writer, temporary: Path) -> int | None:
    """Flushes and renames; the file that was there before, which `_free` closes."""
    try:
        flush(writer.fd)
        old = _kept(writer.path, temporary)
        try:
            temporary.replace(writer.path)
        except OSError:
            _free(old)
            raise
    except OSError as error:
        raise _error(writer.path, error) from error
    return old


def _kept(path: str, temporary: Path) -> int | None:
    """A large file that is to be replaced, open, so that the renaming does not wait for the system to free it."""
    # By another name, gone again: where a file is open by its own, the clients of some network file systems do not
    # rename over it at one stroke, but put it aside first.
    beside, fd = temporary.with_suffix(".old"), None
    with contextlib.suppress(OSError):  # there is none, or the file system has no links
        if Path(path).lstat().st_size < _EARLY:
            return None
        os.link(path, beside, follow_symlinks=False)
        with contextlib.suppress(OSError):  # none that we may read
            fd = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        beside.unlink()
    return fd


def _free(fd: int | None) -> None:
    """Closes a file without a name behind the caller: the system takes 10 ms to free 50 MB."""
    if fd is None:
        return
    try:
        # (`threading` would wait until the thread runs; it then has the core to itself, in the kernel, for 5 ms.)
        start_new_thread(_close, (fd,))
    except RuntimeError:  # the interpreter is going down and starts no threads
        _close(fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def remove(path: Path) -> None:
    """Removes a file, without waiting for the system to free it. Raises `OSError`."""
    fd = None
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        path.unlink()
    finally:
        _free(fd)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Writer]:
    """A `Writer` for the new content; on leaving the block without an exception it becomes `path`.

    On any exception the temporary file is removed and `path` is as it was.

    Raises:
        FileError: no space, no permission, the path is a directory, its parent is missing, …
    """
    place = places.at(path)
    if isinstance(place, places.Address):
        with places.staged(place) as (fd, temporary):
            yield Writer(fd, f"{place} (by way of {temporary.parent})", temporary)
        return
    target = os.fspath(path)  # a Path would lose the slash at its end
    if "://" in target:
        target = str(place)
    directory, name = os.path.split(target)
    directory = directory or "."
    if not name or name in (".", "..") or Path(target).is_dir():
        raise FileError(f"{target}: cannot write: expected the path of a file, found a directory")
    try:
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise FileError(f"{target}: cannot write: the directory {directory} does not exist; create it first") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _error(target, error) from error
    try:
        sweep(directory, re.escape(name))
        try:
            temporary, fd = _create(directory, name)
        except (OSError, ValueError) as error:
            raise _error(target, error) from error
        try:
            writer = Writer(fd, target, temporary)
            yield writer
            old = _finish(writer, temporary)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(fd)
        try:
            os.fsync(directory_fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no directories
                raise file_error("flush its directory", target, error, "the new file is in place") from error
        finally:
            _free(old)
    finally:
        os.close(directory_fd)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces the content of `path` by `data`, durably and atomically.

    Raises:
        FileError: see `replacing`.
    """
    with replacing(path) as writer:
        writer.write(memoryview(data))


# ---------------------------------------------------------------- folders


@contextlib.contextmanager
def staging(path: str | os.PathLike[str]) -> Generator[Path]:
    """Where another library can make a folder that is to become `path`: a name in a folder of this process alone.

    The caller renames it to `path`. On leaving, the directory of `path` is flushed and whatever was not renamed is
    removed; what a killed process left is removed by the next writer beside it.

    Raises:
        FileError: no permission, the parent is missing, …
    """
    target = Path(path)
    try:
        # Of any target: who was killed between the renaming and the tidying up has no next writer of the same path.
        sweep(target.parent, ".+", folders=True)
        while True:
            holder = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
            holder.mkdir()
            fd = os.open(holder, os.O_RDONLY | os.O_DIRECTORY)
            _lock(fd, wait=True)
            if os.path.lexists(holder):  # not swept between our mkdir and our lock
                break
            os.close(fd)
    except (OSError, ValueError) as error:
        raise _error(str(target), error) from error
    try:
        yield holder / target.name
        _flush_directory(target.parent)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        os.close(fd)


def make_parents(path: Path) -> None:
    """Makes the folders above a path where they are missing.

    Raises:
        FileError: no permission, a part of the path is a file, …
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise file_error("make the folder", str(path.parent), error, "choose another path") from error


def flush_tree(folder: Path) -> None:
    """Flushes every file and directory under a folder to the disk.

    Raises:
        FileError: the disk refused.
    """
    try:
        for directory, _, names in os.walk(folder):
            for name in names:
                fd = os.open(Path(directory, name), os.O_RDONLY)
                try:
                    flush(fd)
                finally:
                    os.close(fd)
            _flush_directory(Path(directory))
    except OSError as error:
        raise _error(str(folder), error) from error


def _flush_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no directories
            raise file_error("flush its directory", str(directory), error) from error
    finally:
        os.close(fd)
