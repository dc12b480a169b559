"""The dtypes of tensors, the conversion between arrays of any memory layout and flat bytes, and their checksums.

Dtypes have safetensors' names and numpy's. numpy is imported only when it is needed. `read_region` and
`write_region` convert regions of flat bytes to arrays, and strided arrays to flat bytes.

`checksum` works at the speed of memory, also from parts that several processes hold. The checksum is the CRC-32 of the
parities of the bytes: the XOR of the 512 words in each 4 KiB. It detects each flipped bit, exchanged and lost blocks,
and two flipped bits unless both are the same bit of two words in the same 4 KiB. It takes half the time of a CRC of all
bytes. It is linear: the checksum of one part, with zeros in place of all others, is the part's share, and the XOR of
all shares and of the checksum of zeros is the checksum of the whole.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxadapt.core.errors import ConfigError, FileError, FormatError
from jaxadapt.storage.local_files import aligned_empty

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


# ---------------------------------------------------------------- strided


# Reading a gap of this many bytes costs about as much as another system call.
_GAP = 16 << 10
# Reads that include gaps pass through a buffer of about this size.
_STRIP = 4 << 20
# Bytes of a strided array that are copied at once. More would not fit the processor's cache.
_PART = 1 << 20


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
    import numpy as np

    if not array.size:
        return
    strides = [math.prod(shape[axis + 1 :]) * array.itemsize for axis in range(len(shape))]
    axis = max(0, len(shape) - 1)  # the indices of `axis` form one run; the later axes are complete
    while axis > 0 and tuple(region[axis]) == (0, shape[axis]):
        axis -= 1
    start = sum(low * stride for (low, _), stride in zip(region, strides, strict=True))
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    run = len(data) // math.prod(array.shape[:axis])
    for number, index in enumerate(itertools.product(*map(range, array.shape[:axis]))):
        write_at(data[number * run : (number + 1) * run], start + sum(map(operator.mul, index, strides)))


def contiguous_parts(array: np.ndarray, most: int = _PART) -> Iterator[memoryview]:
    """Yield the bytes of an array in C order: in place if it is contiguous, else in copies of at most `most` bytes."""
    import numpy as np

    if array.flags.c_contiguous or array.nbytes <= most:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return
    count = max(1, most * len(array) // array.nbytes)
    for start in range(0, len(array), count):
        yield from contiguous_parts(array[start : start + count] if count > 1 else array[start], most)


# ---------------------------------------------------------------- dtypes


_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64",
    "I64": "int64", "U64": "uint64",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
NAMES = {name: code for names in (_NUMPY, _ML_DTYPES) for code, name in names.items()}
_FLOATS = tuple(name for name in NAMES if name.startswith(("float", "bfloat")) and name != "float8_e8m0fnu")
_SPELLINGS = {NAMES[name].lower(): name for name in _FLOATS} | {f"fp{bits}": f"float{bits}" for bits in (16, 32, 64)}
"""{spelling: name}: safetensors' names in lower case, and PyTorch's and transformers' short ones."""


@functools.cache
def numpy_dtype(name: str) -> np.dtype:
    """Return the numpy dtype of a safetensors dtype name.

    Raises:
        FormatError: numpy has no such dtype (the 4- and 6-bit types, whose elements share bytes).

    >>> numpy_dtype("BF16"), numpy_dtype("F32")
    (dtype(bfloat16), dtype('float32'))
    """
    import numpy as np

    if name in _NUMPY:
        return np.dtype(_NUMPY[name])
    if name in _ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES[name]))
    raise FormatError(f"dtype {name}: no numpy array can hold it; expected one of {', '.join([*_NUMPY, *_ML_DTYPES])}")


def dtype_name(dtype: npt.DTypeLike) -> str:
    """Return the safetensors name of a numpy dtype of either byte order.

    Raises:
        FileError: the format has no such dtype.

    >>> dtype_name("float16")
    'F16'
    """
    import numpy as np

    name = np.dtype(dtype).name
    if name not in NAMES:
        raise FileError(f"dtype {name}: safetensors files cannot hold it; convert to one of {', '.join(NAMES)}")
    return NAMES[name]


def float_dtype(dtype: Any, option: str = "dtype") -> np.dtype:
    """Return the floating-point dtype that a caller names; "bf16", "fp16" and safetensors' names are accepted too.

    Raises:
        ConfigError: it is no dtype, or one of integers or booleans; `option` names the argument in the message.

    >>> float_dtype("bf16"), float_dtype("float16")
    (dtype(bfloat16), dtype('float16'))
    """
    import numpy as np

    name = dtype.lower() if isinstance(dtype, str) else None
    name = _SPELLINGS.get(name or "", name)
    if name not in _FLOATS:
        try:
            name = np.dtype(dtype).name
        except (TypeError, ValueError):
            name = None
    if name not in _FLOATS:
        raise ConfigError(f"{option}={dtype!r}: expected a floating-point dtype: {', '.join(_FLOATS)}")
    return numpy_dtype(NAMES[name])


def is_float(dtype: npt.DTypeLike) -> bool:
    """Return True for a dtype of floating-point numbers, also of the 8- and 16-bit ones that numpy lacks."""
    import numpy as np

    return np.dtype(dtype).kind == "f" or np.dtype(dtype).name.startswith(("bfloat", "float"))


def can_hold(dtype: npt.DTypeLike) -> bool:
    """Return True if safetensors files can hold this dtype."""
    import numpy as np

    return np.dtype(dtype).name in NAMES


# ---------------------------------------------------------------- checksum


_ROW = 4096
_POLYNOMIAL, _ONE, _MASK = 0xEDB88320, 1 << 31, 0xFFFFFFFF  # of CRC-32; the highest bit is x**0


def checksum(bits: np.ndarray) -> int:
    """Return the checksum of an array's bytes in C order."""
    import numpy as np

    return zlib.crc32(_parities(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data))


def share(shape: Sequence[int], bits: np.ndarray, region: Sequence[tuple[int, int]]) -> int:
    """Return the share of a region of an array of this shape, `(start, stop)` for each axis, in its checksum."""
    crc = end = 0

    def add(data: memoryview, offset: int) -> None:  # in ascending order
        nonlocal crc, end
        parities, stop = _parities(data, offset % _ROW), _count(offset + len(data))
        crc = _multiply(crc, _power(8 * (stop - end))) ^ zlib.crc32(parities, _MASK) ^ _MASK
        end = stop

    write_region(add, shape, bits, region)
    return _multiply(crc, _power(8 * (_count(math.prod(shape) * bits.itemsize) - end)))


def join(shares: Iterable[int], nbytes: int) -> int:
    """Return the checksum of `nbytes` bytes from the shares of all of them.

    >>> import numpy as np
    >>> x = np.arange(12, dtype="u2").reshape(3, 4)
    >>> join([share((3, 4), x[:, :1], ((0, 3), (0, 1))), share((3, 4), x[:, 1:], ((0, 3), (1, 4)))], 24) == checksum(x)
    True
    """
    return functools.reduce(int.__xor__, shares, _multiply(_MASK, _power(8 * _count(nbytes))) ^ _MASK)


def _count(nbytes: int) -> int:
    """Return the number of parities of `nbytes` bytes."""
    return -(-nbytes // _ROW)


def _parities(data: memoryview, lead: int = 0) -> bytes:
    """Return the parities of bytes after `lead` zeros."""
    import numpy as np

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
