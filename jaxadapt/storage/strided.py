"""Between arrays of any memory layout and a file's flat bytes: reading boxes, writing strided arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxadapt.storage.local_files import aligned_empty

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Stage", "blocks", "read_box", "write_box"]

# Reading a gap of this many bytes along costs about as much as another system call.
_GAP = 16 << 10
# What is read along with its gaps passes through a buffer of about this size.
_STRIP = 4 << 20
# Runs that are written one by one are made contiguous in portions of this size, or one run if that is longer.
_STAGED = 1 << 20
# Contiguous memory of at least this size is written from where it lies: copying less costs no more than saying so.
_DIRECT = 16 << 10


def _slice(part: range) -> slice:
    # going down to index 0, range stops at -1, which a slice takes for the last index
    return slice(part.start, part.stop if part.stop >= 0 else None, part.step)


def _shifted(part: range, by: int) -> range:
    return range(part.start - by, part.stop - by, part.step)


def read_box(
    read_at: Callable[[memoryview, int], None], shape: Sequence[int], dtype: np.dtype, slices: Sequence[slice]
) -> np.ndarray:
    """Reads `array[slices]` of an array that lies C-contiguous somewhere, in as few runs as sensible.

    Args:
        read_at: fills a view from a byte offset within the array.
        shape: of the whole array.
        dtype: of the array.
        slices: any bounds and steps; missing ones at the end mean the whole axis.

    Returns:
        A new array, C-contiguous, 64-byte aligned.

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

    whole = [part == range(size) for part, size in zip(ranges, shape, strict=True)]
    strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
    # The indices of `axis` make one run; the axes after it are whole, or cheaper to read whole.
    axis = len(shape) - 1
    while axis > 0 and (whole[axis] or strides[axis - 1] <= _GAP):
        axis -= 1
    inner, step, exact = ranges[axis], abs(ranges[axis].step), all(whole[axis + 1 :])
    starts = [sum(i * s for i, s in zip(index, strides, strict=False)) for index in itertools.product(*ranges[:axis])]

    if exact and inner.step == 1:
        run = flat.size // len(starts)
        for number, start in enumerate(starts):
            read_at(flat.data[number * run : (number + 1) * run], start + inner.start * strides[axis])
        return out

    rows = out.reshape(len(starts), *lengths[axis:])
    count = 1 if step > 1 and step * strides[axis] > _GAP else max(1, _STRIP // (strides[axis] * step))
    rest = tuple(_slice(part) for part in ranges[axis + 1 :])
    for number, start in enumerate(starts):
        for at in range(0, len(inner), count):
            group = inner[at : at + count]
            low, high = min(group), max(group) + 1
            strip = aligned_empty((high - low) * strides[axis])
            read_at(strip.data, start + low * strides[axis])
            box = strip.view(dtype).reshape(high - low, *shape[axis + 1 :])
            rows[number, at : at + count] = box[(_slice(_shifted(group, low)), *rest)]
    return out


def write_box(
    write_at: Callable[[memoryview, int, int, int], None],
    shape: Sequence[int],
    array: np.ndarray,
    box: Sequence[tuple[int, int]],
) -> None:
    """Writes a box of an array that lies C-contiguous somewhere, in as few runs as there are.

    Args:
        write_at: takes contiguous bytes, their offset within the whole array, into runs of how many bytes they are to
            be cut, and by how much one run begins after the other.
        shape: of the whole array.
        array: the box's elements, integers, of any strides.
        box: `(start, stop)` of each axis.
    """
    import numpy as np

    def flat(part: np.ndarray) -> memoryview:
        return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data

    if not array.size:
        return
    strides = [math.prod(shape[axis + 1 :]) * array.itemsize for axis in range(len(shape))]
    axis = max(0, len(shape) - 1)  # the indices of `axis` make one run; the axes after it are whole
    while axis > 0 and tuple(box[axis]) == (0, shape[axis]):
        axis -= 1
    start = sum(low * stride for (low, _), stride in zip(box, strides, strict=True))
    if axis == 0:
        for block in [array] if array.flags.c_contiguous else blocks(array, _STAGED):
            write_at(flat(block), start, block.nbytes, 0)
            start += block.nbytes
        return
    step = strides[axis - 1]
    for index in itertools.product(*(range(size) for size in array.shape[: axis - 1])):
        rows = array[index]
        run = rows.nbytes // len(rows)
        at = start + sum(i * stride for i, stride in zip(index, strides, strict=False))
        for group in blocks(rows, max(run, _STAGED)):
            write_at(flat(group), at, run, step)
            at += len(group) * step


def blocks(array: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Cuts an array along its leading axes into pieces of at most `limit` bytes, in C order."""
    if array.nbytes <= limit or array.ndim == 0:
        yield array
        return
    row = array.nbytes // len(array)
    if row > limit:
        for part in array:
            yield from blocks(part, limit)
        return
    count = limit // row
    for start in range(0, len(array), count):
        yield array[start : start + count]


class Stage:
    """Turns arrays of any memory layout into contiguous bytes, in few calls of `write`.

    What is contiguous is written from where it lies, the rest passes through one buffer: so no memory is allocated
    for a tensor, however large, and none of its pages need to be faulted in. A second thread that writes while this
    one copies was measured and left out: the disk is busy anyway (see `atomic.Writer`), and it gave nothing.
    """

    def __init__(self, write: Callable[..., None], size: int) -> None:
        """`write` gets contiguous bytes, in one part or several, about `size` of them unless one array has more."""
        import numpy as np

        self._write = write
        self._buffer = np.empty(size, np.uint8)
        self._used = self._waiting = 0  # bytes, in the buffer and in all
        self._parts: list[memoryview] = []

    def flush(self) -> None:
        """Writes what still waits."""
        if self._parts:
            self._write(*self._parts)
            self._parts, self._used, self._waiting = [], 0, 0

    def add(self, array: np.ndarray) -> None:
        """Writes the array's elements in C order. Integers, of any strides; they must not change before `flush`."""
        import numpy as np

        if array.flags.c_contiguous and array.nbytes >= _DIRECT:
            self._append(array.reshape(-1).view(np.uint8).data)
            return
        for block in blocks(array, self._buffer.size):
            if self._used + block.nbytes > self._buffer.size:
                self.flush()
            # the place may have any alignment; numpy copies to unaligned memory as well
            place = self._buffer[self._used : self._used + block.nbytes]
            place.view(block.dtype).reshape(block.shape)[...] = block
            self._used += block.nbytes
            self._append(place.data)

    def _append(self, part: memoryview) -> None:
        self._parts.append(part)
        self._waiting += len(part)
        if self._waiting >= self._buffer.size:
            self.flush()

    def add_bytes(self, data: bytes) -> None:
        """Writes bytes as they are."""
        import numpy as np

        self.add(np.frombuffer(data, np.uint8))
