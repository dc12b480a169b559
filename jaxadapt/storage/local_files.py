"""Opening and reading files: every `OSError` becomes a `FileError` that names the path and the remedy.

Work that waits in the kernel, such as reading and page faults, runs in threads (`map_ahead`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from jaxadapt.core.errors import FileError, FormatError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np


# ---------------------------------------------------------------- local files


_REMEDIES = {
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

MAX_CALL = 1 << 30
"""Bytes of one read or write. Linux transfers at most 0x7ffff000 bytes a call, and macOS refuses more than INT_MAX."""


MAX_TEXT = 16 << 20
"""The largest size of a configuration or a model card in bytes. The largest known has 1 MB."""


def file_error(action: str, path: str, error: OSError | ValueError, detail: str = "") -> FileError:
    """Return a `FileError` that says which action on `path` failed, why, and the remedy.

    >>> print(file_error("write", "a/b", OSError(errno.ENOSPC, "No space left on device")))
    a/b: cannot write: No space left on device; free some space, or choose another path
    """
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    parts = [f"{path}: cannot {action}: {reason}", detail, _REMEDIES.get(number or 0, "")]
    return FileError("; ".join(part for part in parts if part))


def _opener(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for its writer. Regular files ignore the flag.
    return os.open(path, flags | os.O_NONBLOCK)


def open_binary(path: str) -> tuple[io.FileIO, int]:
    """Open a regular file for reading. Return it and its size in bytes.

    Raises:
        FileError: missing, not permitted, or not a regular file.
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
    """Close a file that has no unflushed writes, ignoring errors: the data is safe."""
    with contextlib.suppress(OSError):
        file.close()


@contextlib.contextmanager
def close_after(file: IO[Any]) -> Generator[None]:
    """Close a file at the end of the block; see `close`."""
    try:
        yield
    finally:
        close(file)


def read_into(fd: int, view: memoryview, offset: int, path: str, label: str) -> None:
    """Fill a view with the bytes of a file from `offset` on.

    Args:
        fd: an open file.
        view: the contiguous view to fill.
        offset: the position of the first byte in the file.
        path: the file's path, for messages.
        label: the name of the bytes, for messages.

    Raises:
        FormatError: the file ends before the view is full.
        FileError: the operating system reports an error.
    """
    while len(view):
        try:
            count = os.preadv(fd, [view[:MAX_CALL]], offset)
        except OSError as error:
            raise file_error("read", path, error) from error
        if count == 0:
            raise FormatError(
                f"{path}: {label}: expected {len(view)} more bytes at offset {offset}, found the end of the "
                "file; it was truncated after it was opened"
            )
        view, offset = view[count:], offset + count


class ByteSource(Protocol):
    """A file or object from which tensors are read."""

    path: str
    size: int
    closed: bool

    def read_into(self, label: str, view: memoryview, offset: int) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


class LocalFile:
    """An open file of this machine: a `ByteSource`. It keeps its descriptor if the file is replaced."""

    def __init__(self, path: str) -> None:
        """Open the file. Raises the errors of `open_binary`."""
        self.path = path
        self.closed = False
        self._file, self.size = open_binary(path)
        self._fd = self._file.fileno()

    def read_into(self, label: str, view: memoryview, offset: int) -> None:
        read_into(self._fd, view, offset, self.path, label)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
        close(self._file)


def pread_exact(fd: int, size: int, offset: int, path: str, label: str) -> bytes:
    """Read exactly `size` bytes; see `read_into`."""
    buffer = bytearray(size)
    read_into(fd, memoryview(buffer), offset, path, label)
    return bytes(buffer)


ALIGNED = 64
"""XLA's CPU client uses memory without a copy if its address is a multiple of this number of bytes."""


def aligned_empty(nbytes: int) -> np.ndarray:
    """Return an uninitialised, aligned uint8 array of `nbytes`."""
    import numpy as np

    raw = np.empty(nbytes + ALIGNED - 1, np.uint8)
    skip = -raw.__array_interface__["data"][0] % ALIGNED  # ten times cheaper than raw.ctypes.data
    return raw[skip : skip + nbytes]


# ---------------------------------------------------------------- threads


_THREADS = min(8, os.cpu_count() or 1)

_S = TypeVar("_S")
_T = TypeVar("_T")


def run_in_order(tasks: Iterable[Callable[[], _T]], count: int, threads: int = _THREADS) -> Generator[_T]:
    """Run `count` tasks in threads and yield their results in order. A single task runs in the caller's thread.

    At most 2 · `threads` + 1 results or running tasks are in memory.

    The caller's thread takes tasks from the iterable, a few ahead of their execution. Memory that outlives a task
    should be allocated when the task is made: malloc gives each new thread one of up to eight arenas a core, and each
    arena keeps freed pages. Loading 500 MB repeatedly left 3 GB in the arenas of two cores.

    >>> list(run_in_order([lambda: 1, lambda: 2], 2))
    [1, 2]
    """
    threads = min(threads, count)
    if threads <= 1 and (count <= 1 or _THREADS <= 1):
        yield from (task() for task in tasks)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_T]] = deque()
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def start(function: Callable[[], _T]) -> Future[_T]:
    """Run a function in a thread of its own, also while the program ends, when executors accept no work.

    >>> start(lambda: 1 + 1).result()
    2
    """
    from concurrent.futures import Future

    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised by `result`
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future


def map_ahead(function: Callable[[_S], _T], items: Collection[_S]) -> Generator[_T]:
    """Yield `function(item)` for each item; a thread computes the next two while the caller uses one.

    >>> list(map_ahead(str.upper, ["a", "b"]))
    ['A', 'B']
    """
    return run_in_order((functools.partial(function, item) for item in items), len(items), 1)


def split_by_size(items: Iterable[_T], size: Callable[[_T], int], limit: int) -> list[list[_T]]:
    """Split items, in order, into lists of at most `limit` bytes, or of one larger item.

    >>> split_by_size([3, 1, 2, 9, 1], lambda n: n, 4)
    [[3, 1], [2], [9], [1]]
    """
    out: list[list[_T]] = []
    total = 0
    for item in items:
        nbytes = size(item)
        if not out or total + nbytes > limit:
            out.append([])
            total = 0
        out[-1].append(item)
        total += nbytes
    return out
