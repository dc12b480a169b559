"""PyTorch `.bin` state dicts, written without torch: the zip format that `torch.load(weights_only=True)` reads.

The file consists of uncompressed records: `data.pkl`, a pickle that rebuilds the tensors from storages, `byteorder`,
one record for each storage, and `version`. Each storage holds one tensor in C order and begins at a multiple of 64
bytes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxadapt.core.errors import MismatchError
from jaxadapt.storage import atomic, torch_bin
from jaxadapt.storage.strided import NAMES, dtype_name

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_STORAGES = {dtype: name for name, dtype in torch_bin.STORAGES.items()}
# Dtypes that came after PyTorch's typed storages: their storage is untyped, and the tensor states the dtype.
_DTYPES = {dtype: name for name, dtype in NAMES.items() if dtype not in _STORAGES}
_ROOT = "adapter_model"
_ALIGNMENT = 64
_LARGE = 0xFFFFFFFF  # from this size or offset on, a record needs the fields of ZIP64 …
_IN_ZIP64 = 0xFFFFFFFF  # … and its short fields hold this number

Specs = Mapping[str, "tuple[npt.DTypeLike, Sequence[int]]"]


def write_to(
    writer: atomic.Writer,
    specs: Specs,
    get: Callable[[str], np.ndarray],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a state dict, holding one tensor at a time; return the size of the file in bytes.

    Args:
        writer: the open file.
        specs: (dtype, shape) by key, in the order of the state dict.
        get: returns the array of a key, with the dtype and shape of `specs`. Called once a key, in order.
        progress: called with the number of bytes of each tensor written.

    Raises:
        FileError: the disk is full, or PyTorch has no such dtype (the error names all such tensors).
        MismatchError: `get` returned an array that does not match its spec.
    """
    import numpy as np

    named = {key: (dtype_name(dtype), tuple(shape)) for key, (dtype, shape) in specs.items()}
    archive = _Archive(writer)
    archive.add("data.pkl", _pickle(named))
    archive.add("byteorder", b"little")
    for number, (key, (dtype, shape)) in enumerate(named.items()):
        value = np.asarray(get(key))
        if dtype_name(value.dtype) != dtype or value.shape != shape:
            raise MismatchError(
                f"{writer.path}: cannot write: tensor {key!r}: expected {dtype} {list(shape)}, found {value.dtype}"
                f" {list(value.shape)}"
            )
        value = np.ascontiguousarray(value)
        if not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        data = value.reshape(-1).view(np.uint8).data
        archive.add(f"data/{number}", data)
        if progress is not None:
            progress(len(data))
    archive.add("version", b"3\n")
    return archive.finish()


# ---------------------------------------------------------------- the pickle


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(raw)) + raw


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _tuple(items: Sequence[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _pickle(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the pickle, in protocol 2, of a dict of tensors whose storages are records."""
    parts = [b"\x80\x02}("]
    for number, (key, (dtype, shape)) in enumerate(specs.items()):
        count = math.prod(shape)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        typed = dtype in _STORAGES
        size = count if typed else count * torch_bin.SIZES[dtype]
        kind = f"torch.{_STORAGES[dtype]}" if typed else torch_bin.UNTYPED
        storage = _tuple([_text("storage"), _global(kind), _text(str(number)), _text("cpu"), _integer(size)]) + b"Q"
        fields = [storage, _integer(0), _tuple([*map(_integer, shape)]), _tuple([*map(_integer, strides)]), b"\x89"]
        fields.append(_global("collections.OrderedDict") + b")R")
        fields += [] if typed else [_global(f"torch.{_DTYPES[dtype]}")]
        function = f"torch._utils._rebuild_tensor_v{2 if typed else 3}"
        parts.append(_text(key) + _global(function) + _tuple(fields) + b"R")
    return b"".join([*parts, b"u."])


# ---------------------------------------------------------------- the zip file


class _Archive:
    """A zip file of uncompressed records, written in order."""

    def __init__(self, writer: atomic.Writer) -> None:
        self._writer = writer
        self._offset = 0
        self._directory: list[bytes] = []

    def _put(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._writer.write(memoryview(part))
        self._offset += sum(map(len, parts))

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Append a record whose data begins at a multiple of 64 bytes."""
        raw = f"{_ROOT}/{name}".encode()
        size, start = len(data), self._offset
        large = size >= _LARGE
        sizes = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        begin = start + 30 + len(raw) + len(sizes) + 4  # 4: the header of the padding
        padding = -begin % _ALIGNMENT
        extra = sizes + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        short = _IN_ZIP64 if large else size
        common = struct.pack("<HHHHHIII", 45 if large else 20, 0x800, 0, 0, 33, zlib.crc32(data), short, short)
        self._put(b"PK\x03\x04" + common + struct.pack("<HH", len(raw), len(extra)) + raw + extra, data)
        far = start >= _LARGE
        fields = [size, size] * large + [start] * far
        extra = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
        place = struct.pack("<HHHII", 0, 0, 0, 0, _IN_ZIP64 if far else start)
        entry = struct.pack("<HH", len(raw), len(extra)) + place + raw + extra
        self._directory.append(b"PK\x01\x02" + struct.pack("<H", 45) + common + entry)

    def finish(self) -> int:
        """Write the directory; return the size of the file."""
        start, count = self._offset, len(self._directory)
        self._put(*self._directory)
        size = self._offset - start
        short = [count, count, size, start]
        if count >= 0xFFFF or start >= _LARGE or size >= _LARGE:
            end, short = self._offset, [0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64]
            self._put(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start))
            self._put(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        self._put(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, *short, 0))
        return self._offset
