"""The checksum of arrays against its definition written out, and from parts of any regions."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest

from jaxadapt.storage import local_files


def written_out(data: bytes) -> int:
    """The CRC-32 of the XOR of the words of every 4096 bytes."""
    parities = b""
    for start in range(0, len(data), 4096):
        row = data[start : start + 4096]
        parity = 0
        for word in range(0, len(row), 8):
            parity ^= int.from_bytes(row[word : word + 8], "little")
        parities += parity.to_bytes(8, "little")
    return zlib.crc32(parities)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), "u4"), ((0, 3), "u2"), ((7,), "u1"), ((3, 5), "u2"), ((70, 33), "u4"), ((5, 1024), "u8"),
        ((9, 33, 31), "u2"),
    ],
)  # fmt: skip
def test_the_shares_of_the_parts_of_an_array_are_its_checksum(shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, np.iinfo(dtype).max, size=shape, dtype=dtype, endpoint=True)
    assert local_files.checksum(bits) == written_out(bits.tobytes())
    assert local_files.checksum(bits.T) == written_out(bits.T.tobytes())
    for axis, size in enumerate(shape):
        cuts = sorted({0, size, *rng.integers(0, size + 1, size=3).tolist()})
        rows = itertools.pairwise(cuts)
        regions = [tuple(row if i == axis else (0, n) for i, n in enumerate(shape)) for row in rows]
        parts = [
            local_files.checksum_share(shape, bits[tuple(slice(*r) for r in region)], region) for region in regions
        ]
        assert local_files.join_shares(parts[::-1], bits.nbytes) == local_files.checksum(bits)
