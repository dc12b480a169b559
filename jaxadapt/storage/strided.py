"""Conversion between arrays of any memory layout and a file's flat bytes: reading regions, writing strided arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxadapt.storage.local_files import aligned_empty

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Stage", "blocks", "read_region", "write_region"]

# Reading a gap of this many bytes costs about as much as another system call.
_GAP = 16 << 10
# Reads that include gaps pass through a buffer of about this size.
_STRIP = 4 << 20
# Separate runs are made contiguous in portions of this size, or in one run if that is longer.
_STAGED = 1 << 20
# Contiguous memory of at least this size is written in place. Copying less costs no more than another buffer.
_DIRECT = 16 << 10


def _to_slice(part: range) -> slice:
    # A descending range to index 0 stops at -1, which a slice would take for the last index.
    return slice(part.start, part.stop if part.stop >= 0 else None, part.step)


def _shift(part: range, by: int) -> range:
    return range(part.start - by, part.stop - by, part.step)


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
    inner, step, exact = ranges[axis], abs(ranges[axis].step), all(complete[axis + 1 :])
    starts = [sum(i * s for i, s in zip(index, strides, strict=False)) for index in itertools.product(*ranges[:axis])]

    if exact and inner.step == 1:
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
            rows[number, first : first + count] = values[(_to_slice(_shift(group, low)), *rest)]
    return out


def write_region(
    write_at: Callable[[memoryview, int, int, int], None],
    shape: Sequence[int],
    array: np.ndarray,
    region: Sequence[tuple[int, int]],
) -> None:
    """Write a region of a C-contiguous array in a file, one write for each contiguous run.

    Args:
        write_at: takes contiguous bytes, their offset within the array, the size in bytes of each run in them, and the
            distance in bytes between the starts of two runs.
        shape: the shape of the array in the file.
        array: the region's elements, integers of any strides.
        region: `(start, stop)` of each axis.
    """
    import numpy as np

    def flat(part: np.ndarray) -> memoryview:
        return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data

    if not array.size:
        return
    strides = [math.prod(shape[axis + 1 :]) * array.itemsize for axis in range(len(shape))]
    axis = max(0, len(shape) - 1)  # the indices of `axis` form one run; the later axes are complete
    while axis > 0 and tuple(region[axis]) == (0, shape[axis]):
        axis -= 1
    start = sum(low * stride for (low, _), stride in zip(region, strides, strict=True))
    if axis == 0:
        for block in [array] if array.flags.c_contiguous else blocks(array, _STAGED):
            write_at(flat(block), start, block.nbytes, 0)
            start += block.nbytes
        return
    step = strides[axis - 1]
    for index in itertools.product(*(range(size) for size in array.shape[: axis - 1])):
        rows = array[index]
        run = rows.nbytes // len(rows)
        offset = start + sum(i * stride for i, stride in zip(index, strides, strict=False))
        for group in blocks(rows, max(run, _STAGED)):
            write_at(flat(group), offset, run, step)
            offset += len(group) * step


def blocks(array: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Split an array along its leading axes into blocks of at most `limit` bytes, in C order."""
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
    """A stage that turns arrays of any memory layout into contiguous bytes, in few calls of `write`.

    Contiguous arrays are written in place; the rest passes through one buffer. So no memory is allocated for a tensor,
    however large. A second thread that writes during the copies gave no speedup: the disk is busy anyway (see
    `atomic.Writer`).
    """

    def __init__(self, write: Callable[..., None], size: int) -> None:
        """Create a stage with a buffer of `size` bytes.

        Args:
            write: called with one or several contiguous parts, of about `size` bytes in all or one larger array.
            size: bytes of the buffer.
        """
        import numpy as np

        self._write = write
        self._buffer = np.empty(size, np.uint8)
        self._used = self._pending_bytes = 0  # bytes, in the buffer and in all
        self._parts: list[memoryview] = []

    def flush(self) -> None:
        """Write the remaining bytes."""
        if self._parts:
            self._write(*self._parts)
            self._parts, self._used, self._pending_bytes = [], 0, 0

    def add(self, array: np.ndarray) -> None:
        """Write an array's elements in C order: integers of any strides, which must not change before `flush`."""
        import numpy as np

        if array.flags.c_contiguous and array.nbytes >= _DIRECT:
            self._append(array.reshape(-1).view(np.uint8).data)
            return
        for block in blocks(array, self._buffer.size):
            if self._used + block.nbytes > self._buffer.size:
                self.flush()
            # `target` may be unaligned; numpy copies to unaligned memory as well.
            target = self._buffer[self._used : self._used + block.nbytes]
            target.view(block.dtype).reshape(block.shape)[...] = block
            self._used += block.nbytes
            self._append(target.data)

    def _append(self, part: memoryview) -> None:
        self._parts.append(part)
        self._pending_bytes += len(part)
        if self._pending_bytes >= self._buffer.size:
            self.flush()

    def add_bytes(self, data: bytes) -> None:
        """Write bytes."""
        import numpy as np

        self.add(np.frombuffer(data, np.uint8))
