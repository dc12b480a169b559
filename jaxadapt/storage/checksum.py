"""Checksums of arrays at the speed of memory, also from parts that several processes hold.

The checksum is the CRC-32 of the parities of the bytes: the XOR of the 512 words in each 4 KiB. It detects each flipped
bit, exchanged and lost blocks, and two flipped bits unless both are the same bit of two words in the same 4 KiB. It
takes half the time of a CRC of all bytes. It is linear: the checksum of one part, with zeros in place of all others, is
the part's share, and the XOR of all shares and of the checksum of zeros is the checksum of the whole.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jaxadapt.storage import strided

if TYPE_CHECKING:
    import numpy as np

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

    strided.write_region(add, shape, bits, region)
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
