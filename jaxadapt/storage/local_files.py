"""Bytes of files: opening and reading them, threads that wait for them, arrays as flat bytes, and checksums.

Every `OSError` becomes a `FileError` that names the path and the remedy. Work that waits in the kernel, such as reading
and page faults, runs in threads (`map_ahead`). `read_region` and `write_region` convert regions of flat bytes to
arrays, and arrays of any memory layout to flat bytes.

`checksum` works at the speed of memory, also from parts that several processes hold. The checksum is the CRC-32 of the
parities of the bytes: the XOR of the 512 words in each 4 KiB. It detects each flipped bit, exchanged and lost blocks,
and two flipped bits unless both are the same bit of two words in the same 4 KiB. It takes half the time of a CRC of all
bytes. It is linear: the checksum of one part, with zeros in place of all others, is the part's share, and the XOR of
all shares and of the checksum of zeros is the checksum of the whole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import math
import os
import stat
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import IO, Any, TypeVar

from jaxadapt.arrays.tensor_source import aligned_empty
from jaxadapt.core.errors import FileError, FormatError
from jaxadapt.core.lazy import np

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


@contextlib.contextmanager
def file_errors(action: str, path: object, detail: str = "") -> Generator[None]:
    """Raise the errors of the operating system within a context as `file_error` of the action on the path."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise file_error(action, str(path), error, detail) from error


read_errors: Callable[..., contextlib.AbstractContextManager[None]] = functools.partial(file_errors, "read")


def close(file: IO[Any]) -> None:
    """Close a file that has no unflushed writes, ignoring errors: the data is safe."""
    with contextlib.suppress(OSError):
        file.close()


class ByteSource(ABC):
    """A file or an object of a store, open for reading."""

    path: str
    size: int
    closed = False

    @abstractmethod
    def read_into(self, label: str, view: memoryview, offset: int) -> None:
        """Fill a contiguous view with the bytes from `offset` on; `label` names them in messages.

        Raises:
            FormatError: the file ends before the view is full.
            FileError: the operating system or the store reports an error.
        """

    def read_exactly(self, label: str, size: int, offset: int) -> bytes:
        """Return exactly `size` bytes; see `read_into`."""
        buffer = bytearray(size)
        self.read_into(label, memoryview(buffer), offset)
        return bytes(buffer)

    def check(self) -> None:  # noqa: B027 (an open file keeps its content)
        """Raise `FormatError` if parts that were read may be of two versions."""

    @abstractmethod
    def close(self) -> None:
        """Close the source."""


class LocalFile(ByteSource):
    """An open file of this machine. It keeps its descriptor if the file is replaced."""

    def __init__(self, path: str, shown: str | None = None) -> None:
        """Open a regular file; messages name it as `shown`, if given.

        Raises:
            FileError: missing, not permitted, or not a regular file.
        """
        self.path: str = path if shown is None else shown
        with read_errors(self.path):
            # O_NONBLOCK: opening a FIFO must not wait for its writer. Regular files ignore the flag.
            self.file: io.FileIO = io.FileIO(
                path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
            )
            status = os.fstat(self.file.fileno())
        self.size: int = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FileError(f"{self.path}: cannot read: expected a regular file, found a device, pipe or socket")

    def read_into(self, label: str, view: memoryview, offset: int) -> None:
        while len(view):
            with read_errors(self.path):
                count = os.preadv(self.file.fileno(), [view[:MAX_CALL]], offset)
            if count == 0:
                raise FormatError(
                    f"{self.path}: {label}: expected {len(view)} more bytes at offset {offset}, found the end of the "
                    "file; it was truncated after it was opened"
                )
            view, offset = view[count:], offset + count

    def close(self) -> None:
        self.closed = True
        close(self.file)


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
        waiting: list[Future[_T]] = []
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 2 * threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


def start(function: Callable[[], _T]) -> Future[_T]:
    """Run a function in a thread of its own, also while the program ends, when executors accept no work.

    >>> start(lambda: 1 + 1).result()
    2
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=False).start()  # also if a daemon calls: the interpreter joins the thread
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


# ---------------------------------------------------------------- arrays and flat bytes


# Reading a gap of this many bytes costs about as much as another system call.
_GAP = 16 << 10
# Reads that include gaps pass through a buffer of about this size.
_STRIP = 4 << 20
# Bytes of a strided array that are copied at once. More would not fit the processor's cache.
_PART = 1 << 20


def _to_slice(part: range) -> slice:
    # A descending range to index 0 stops at -1, which a slice would take for the last index.
    return slice(part.start, part.stop if part.stop >= 0 else None, part.step)


def read_region(
    read_at: Callable[[memoryview, int], None], shape: Sequence[int], dtype: np.dtype, slices: Sequence[slice]
) -> np.ndarray:
    """Read `array[slices]` of a C-contiguous array in a file, in few reads.

    Args:
        read_at: fills a view with the bytes from an offset within the array.
        shape: the shape of the array.
        dtype: the dtype of the array.
        slices: one slice an axis, with any bounds and steps. Missing slices at the end select whole axes.

    Returns:
        A new C-contiguous, 64-byte aligned array.

    Raises:
        IndexError: more slices than axes.
    """
    if len(slices) > len(shape):
        raise IndexError(f"expected at most {len(shape)} slices for shape {tuple(shape)}, found {len(slices)}")
    padded = [*slices, *[slice(None)] * (len(shape) - len(slices))]
    ranges = [range(*part.indices(size)) for part, size in zip(padded, shape, strict=True)]
    lengths = tuple(len(part) for part in ranges)
    flat = aligned_empty(math.prod(lengths) * dtype.itemsize)
    out = flat.view(dtype).reshape(lengths)
    if out.size == 0 or not shape:
        if out.size:
            read_at(flat.data, 0)
        return out

    complete = [part == range(size) for part, size in zip(ranges, shape, strict=True)]
    strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    # The indices of `axis` form one run: the later axes are complete, or cheaper to read completely.
    axis = len(shape) - 1
    while axis > 0 and (complete[axis] or strides[axis - 1] <= _GAP):
        axis -= 1
    inner, step = ranges[axis], abs(ranges[axis].step)
    starts = [sum(i * s for i, s in zip(index, strides, strict=False)) for index in itertools.product(*ranges[:axis])]

    if all(complete[axis + 1 :]) and inner.step == 1:
        run = flat.size // len(starts)
        for number, start in enumerate(starts):
            read_at(flat.data[number * run : (number + 1) * run], start + inner.start * strides[axis])
        return out

    rows = out.reshape(len(starts), *lengths[axis:])
    count = 1 if step > 1 and step * strides[axis] > _GAP else max(1, _STRIP // (strides[axis] * step))
    rest = tuple(_to_slice(part) for part in ranges[axis + 1 :])
    for number, start in enumerate(starts):
        for first in range(0, len(inner), count):
            group = inner[first : first + count]
            low, high = min(group), max(group) + 1
            strip = aligned_empty((high - low) * strides[axis])
            read_at(strip.data, start + low * strides[axis])
            values = strip.view(dtype).reshape(high - low, *shape[axis + 1 :])
            chosen = _to_slice(range(group.start - low, group.stop - low, group.step))
            rows[number, first : first + count] = values[(chosen, *rest)]
    return out


def write_region(
    write_at: Callable[[memoryview, int], None],
    shape: Sequence[int],
    array: np.ndarray,
    region: Sequence[tuple[int, int]],
) -> None:
    """Write a region of a C-contiguous array in a file, one write for each contiguous run.

    Args:
        write_at: takes contiguous bytes and their offset within the array.
        shape: the shape of the array in the file.
        array: the region's elements, of any strides. They are copied if they are not contiguous.
        region: `(start, stop)` of each axis.
    """
    if not array.size:
        return
    strides = [math.prod(shape[axis + 1 :]) * array.itemsize for axis in range(len(shape))]
    axis = max(0, len(shape) - 1)  # the indices of `axis` form one run; the later axes are complete
    while axis > 0 and tuple(region[axis]) == (0, shape[axis]):
        axis -= 1
    start = sum(low * stride for (low, _), stride in zip(region, strides, strict=True))
    data = flat_bytes(array)
    run = len(data) // math.prod(array.shape[:axis])
    for number, index in enumerate(itertools.product(*map(range, array.shape[:axis]))):
        write_at(
            data[number * run : (number + 1) * run],
            start + sum(i * stride for i, stride in zip(index, strides, strict=False)),
        )


def flat_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of an array in C order: in place if it is contiguous, else of a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def contiguous_parts(array: np.ndarray, most: int = _PART) -> Iterator[memoryview]:
    """Yield the bytes of an array in C order: in place if it is contiguous, else in copies of at most `most` bytes."""
    if array.flags.c_contiguous or array.nbytes <= most:
        yield flat_bytes(array)
        return
    count = max(1, most * len(array) // array.nbytes)
    for start in range(0, len(array), count):
        yield from contiguous_parts(array[start : start + count] if count > 1 else array[start], most)


# ---------------------------------------------------------------- checksum


_ROW = 4096
_POLYNOMIAL, _ONE, _MASK = 0xEDB88320, 1 << 31, 0xFFFFFFFF  # of CRC-32; the highest bit is x**0


def checksum(bits: np.ndarray) -> int:
    """Return the checksum of an array's bytes in C order."""
    return zlib.crc32(_parities(flat_bytes(bits)))


def checksum_share(shape: Sequence[int], bits: np.ndarray, region: Sequence[tuple[int, int]]) -> int:
    """Return the share of a region of an array of this shape, `(start, stop)` for each axis, in its checksum."""
    crc = end = 0

    def add(data: memoryview, offset: int) -> None:  # in ascending order
        nonlocal crc, end
        stop = _count(offset + len(data))
        crc = _multiply(crc, _power(8 * (stop - end))) ^ zlib.crc32(_parities(data, offset % _ROW), _MASK) ^ _MASK
        end = stop

    write_region(add, shape, bits, region)
    return _multiply(crc, _power(8 * (_count(math.prod(shape) * bits.itemsize) - end)))


def join_shares(shares: Iterable[int], nbytes: int) -> int:
    """Return the checksum of `nbytes` bytes from the shares of all of them.

    >>> import numpy as np
    >>> x = np.arange(12, dtype="u2").reshape(3, 4)
    >>> shares = [checksum_share((3, 4), x[:, a:b], ((0, 3), (a, b))) for a, b in ((0, 1), (1, 4))]
    >>> join_shares(shares, 24) == checksum(x)
    True
    """
    return functools.reduce(int.__xor__, shares, _multiply(_MASK, _power(8 * _count(nbytes))) ^ _MASK)


def _count(nbytes: int) -> int:
    """Return the number of parities of `nbytes` bytes."""
    return -(-nbytes // _ROW)


def _parities(data: memoryview, lead: int = 0) -> bytes:
    """Return the parities of bytes after `lead` zeros."""
    data = memoryview(bytes(lead) + data) if lead else data
    whole = len(data) // _ROW * _ROW
    rows = np.frombuffer(data[:whole], "u8").reshape(-1, _ROW // 8)
    rest = np.frombuffer(bytes(data[whole:]) + bytes(-len(data) % 8), "u8")
    parities = np.bitwise_xor.reduce(rows, axis=1).tobytes()
    return parities + np.bitwise_xor.reduce(rest).tobytes() if rest.size else parities


def _multiply(a: int, b: int) -> int:
    """Return the product of two polynomials over GF(2) modulo that of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & _MASK
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=4096)
def _power(count: int) -> int:
    """Return x**(8 * count), which shifts a CRC by `count` bytes of zeros."""
    result, factor = _ONE, _ONE >> 8
    while count:
        if count & 1:
            result = _multiply(result, factor)
        factor, count = _multiply(factor, factor), count >> 1
    return result
