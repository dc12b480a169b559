"""Opening and reading files: every `OSError` becomes a `FileError` that names the path and the way out."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections import deque
from collections.abc import Generator, Sequence
from itertools import accumulate, islice
from typing import IO, TYPE_CHECKING, Any, Protocol

from jaxadapt.core.errors import FileError, FormatError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ALIGNED",
    "MAX_TEXT",
    "MAX_VIEWS",
    "LocalFile",
    "Source",
    "aligned_empties",
    "aligned_empty",
    "close_after",
    "file_error",
    "open_binary",
    "pread_exact",
    "read_into",
]

_WAY_OUT = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.EISDIR: "the path is a directory, a file is needed",
    errno.EACCES: "check the permissions of the file and its directory",
    errno.EPERM: "check the permissions and attributes of the file and its directory",
    errno.EROFS: "the file system is mounted read-only: choose another path",
    errno.ENOSPC: "free some space, or choose another path",
    errno.EDQUOT: "the disk quota is used up: free some space, or choose another path",
    errno.EFBIG: "the file system or the process limit (ulimit -f) allows no file this large",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "the process has too many open files: close some, or raise `ulimit -n`",
    errno.ELOOP: "the symbolic links of the path form a loop",
}

# Linux moves at most 0x7ffff000 bytes a call, and macOS refuses more than INT_MAX.
_MAX_CALL = 1 << 30
MAX_VIEWS = 512  # of one call; the least that a system in use allows is 1024


MAX_TEXT = 16 << 20
"""Bytes that a configuration or a model card may have. The largest known has 1 MB."""


def file_error(action: str, path: str, error: OSError | ValueError, more: str = "") -> FileError:
    """A `FileError` saying what could not be done with `path`, why, and the way out.

    >>> print(file_error("write", "a/b", OSError(errno.ENOSPC, "No space left on device")))
    a/b: cannot write: No space left on device; free some space, or choose another path
    """
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    parts = [f"{path}: cannot {action}: {reason}", more, _WAY_OUT.get(number or 0, "")]
    return FileError("; ".join(part for part in parts if part))


def _opener(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for its writer; regular files do not care.
    return os.open(path, flags | os.O_NONBLOCK)


def open_binary(path: str) -> tuple[io.FileIO, int]:
    """Opens a regular file for reading; returns it with its size in bytes.

    Raises:
        FileError: missing, a directory, not permitted, not a regular file.
    """
    try:
        file = io.FileIO(path, "rb", opener=_opener)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error("read", path, error) from error
    try:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            return file, status.st_size
        raise FileError(f"{path}: cannot read: expected a regular file, found a device, pipe or socket")
    except OSError as error:
        close(file)
        raise file_error("read", path, error) from error
    except FileError:
        close(file)
        raise


def close(file: IO[Any]) -> None:
    """Closes a file that was read, or that nothing was written to since it was flushed: an error would say nothing."""
    with contextlib.suppress(OSError):
        file.close()


@contextlib.contextmanager
def close_after(file: IO[Any]) -> Generator[None]:
    """Closes a file as `close` does."""
    try:
        yield
    finally:
        close(file)


def read_into(fd: int, parts: Sequence[tuple[str, memoryview]], offset: int, path: str) -> None:
    """Fills views, one after the other, with the bytes from `offset` on.

    Args:
        fd: an open file.
        parts: what it is (for messages) and contiguous bytes to fill.
        offset: of the first view's first byte in the file.
        path: for messages.

    Raises:
        FormatError: the file ends before all views are full.
        FileError: the operating system cannot read.
    """
    pending = deque((what, view) for what, view in parts if len(view))
    while pending:
        batch = [view for _, view in islice(pending, MAX_VIEWS)]
        if len(batch[0]) > _MAX_CALL:
            batch = [batch[0][:_MAX_CALL]]
        try:
            count = os.preadv(fd, batch, offset)
        except OSError as error:
            raise file_error("read", path, error) from error
        if count == 0:
            what, view = pending[0]
            raise FormatError(
                f"{path}: {what}: expected {len(view)} more bytes at offset {offset}, found the end of the "
                "file; it was truncated after it was opened"
            )
        offset += count
        while count:
            what, view = pending.popleft()
            if count < len(view):
                pending.appendleft((what, view[count:]))
            count -= min(count, len(view))


class Source(Protocol):
    """What tensors are read from."""

    path: str
    size: int
    closed: bool

    def read_into(self, parts: Sequence[tuple[str, memoryview]], offset: int) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


class LocalFile:
    """An open file of this machine: a `Source`. It keeps its one descriptor, whatever takes its place meanwhile."""

    def __init__(self, path: str) -> None:
        """Raises what `open_binary` raises."""
        self.path = path
        self.closed = False
        self._file, self.size = open_binary(path)
        self._fd = self._file.fileno()

    def read_into(self, parts: Sequence[tuple[str, memoryview]], offset: int) -> None:
        read_into(self._fd, parts, offset, self.path)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        close(self._file)


def pread_exact(fd: int, size: int, offset: int, path: str, what: str) -> bytes:
    """Like `read_into`, into new bytes."""
    buffer = bytearray(size)
    read_into(fd, [(what, memoryview(buffer))], offset, path)
    return bytes(buffer)


ALIGNED = 64
"""XLA's CPU client shares memory that begins at a multiple of so many bytes."""


def aligned_empty(nbytes: int) -> np.ndarray:
    """Uninitialised uint8 of `nbytes`, aligned."""
    import numpy as np

    raw = np.empty(nbytes + ALIGNED - 1, np.uint8)
    skip = -raw.__array_interface__["data"][0] % ALIGNED  # ten times cheaper than raw.ctypes.data
    return raw[skip : skip + nbytes]


BLOCK = 3 << 20
"""Bytes of an allocation that malloc uses again when it was freed.

Of 4 MB and more numpy wants new and huge pages, and from 32 MB on malloc gives new ones: reading 50 MB into those took
up to 110 ms on a virtual machine whose host takes back what is free, and 4 into pages in use. Of less than 3 MB malloc
more often gave all of it back: 500 MB, read again and again, took 70 ms into blocks of 3 MB, 170 into those of 2.
"""


def aligned_empties(sizes: Sequence[int]) -> list[np.ndarray]:
    """Uninitialised uint8 of so many bytes each, all aligned; small ones share an allocation, which all keep alive."""
    out: list[np.ndarray] = []
    batch: list[int] = []
    total = 0
    for size in (*sizes, None):
        space = 0 if size is None else -(-size // ALIGNED) * ALIGNED
        if batch and (size is None or total + space > BLOCK):
            memory = aligned_empty(total)
            starts = accumulate((-(-one // ALIGNED) * ALIGNED for one in batch), initial=0)
            out += [memory[start : start + one] for one, start in zip(batch, starts, strict=False)]
            batch, total = [], 0
        if size is not None:
            batch.append(size)
            total += space
    return out
