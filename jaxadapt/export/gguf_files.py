"""GGUF files, by the package `gguf`: tensors by name with their types, and the fields before them.

The only module of the library that imports `gguf`. Tensors are numpy arrays in PyTorch's layout (rows first); the file
lists the sizes of an axis in the opposite order.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import mmap
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.arrays.tensor_source import numpy_dtype
from jaxadapt.core.errors import FileError, FormatError, MismatchError, raise_listed
from jaxadapt.storage import atomic, local_files, location

INSTALL = "pip install 'jaxadapt[gguf]'"
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""{dtype: type of a GGUF tensor}, of the types that are written."""

Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""`{tensor: (type, shape)}`, with the types of `TYPES`."""


class Field(NamedTuple):
    """A field of a GGUF file. The types are GGUF's names ("STRING", "UINT32", "ARRAY"); `item` is that of an array."""

    value: Any
    type: str
    item: str | None = None


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise FileError(f"GGUF files need the package gguf, which is not installed; run: {INSTALL}") from error


def tensor_names(architecture: str, layers: int) -> Callable[[str], tuple[str, str] | None]:
    """Return a function from a PyTorch key to its GGUF tensor: (kind, name), as llama.cpp's converter names it.

    >>> tensor_names("llama", 1)("model.layers.0.self_attn.q_proj.weight")
    ('ATTN_Q', 'blk.0.attn_q.weight')
    """
    gguf = _gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], 1)  # as large as its number of layers, which a file may state

    def name_of(key: str) -> tuple[str, str] | None:
        number = _LAYER.search(key)
        if number is not None and int(number[0]) >= layers:
            return None
        found = table.get_type_and_name(_LAYER.sub("0", key, 1), try_suffixes=(".weight", ".bias"))
        if found is None:
            return None
        return found[0].name, found[1] if number is None else found[1].replace("blk.0.", f"blk.{number[0]}.", 1)

    return name_of


_LAYER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,17})(?=\.)")
"""The number of a layer in a key."""


def write(
    path: str | os.PathLike[str],
    architecture: str,
    fields: Mapping[str, Field],
    specs: Specs,
    get: Callable[[str], np.ndarray],
    count: Callable[[int], None],
    *,
    ahead: bool = False,
) -> int:
    """Write a GGUF file durably and atomically, holding one tensor at a time. Return its size in bytes.

    Args:
        path: the file.
        architecture: the field general.architecture.
        fields: the other fields.
        specs: the type and shape of each tensor, in the file's order.
        get: returns a tensor of that shape; it is converted to the type of its spec.
        count: called with the number of bytes of each tensor that was written.
        ahead: True to call `get` in a thread for the next two tensors while one is written.

    Raises:
        FileError: the package is missing, or the file cannot be written; an existing file is then unchanged.
    """
    gguf = _gguf()
    target = location.to_location(path)
    if isinstance(target, location.Address):
        raise FileError(f"{target}: expected a local path for a GGUF file; copy it to the object store afterwards")

    def packed(name: str) -> np.ndarray:
        return _pack_finite(target, name, get(name), specs[name][0])

    header, sizes, alignment = _header(gguf, target, architecture, fields, specs)
    with atomic.open_replacement(target) as replacement:
        replacement.write(memoryview(header + bytes(-len(header) % alignment)))
        with contextlib.closing(local_files.map_ahead(packed, specs) if ahead else (packed(x) for x in specs)) as data:
            for name in specs:
                replacement.write(next(data).reshape(-1).data)
                replacement.write(memoryview(bytes(-sizes[name] % alignment)))
                count(sizes[name])
    return Path(target).stat().st_size


def _header(
    gguf: Any, target: Path, architecture: str, fields: Mapping[str, Field], specs: Specs
) -> tuple[bytes, dict[str, int], int]:
    """Return the bytes before the tensors, the size of each tensor in bytes, and the alignment of all."""
    sizes = {name: _nbytes(gguf, kind, shape) for name, (kind, shape) in specs.items()}
    empty = [name for name, field in fields.items() if field.type == "ARRAY" and not field.value]
    raise_listed(FormatError, f"{target}: the package gguf cannot write these fields, empty arrays:", empty)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"  # the package writes only files
        writer = gguf.GGUFWriter(path, architecture)
        if "general.alignment" in fields:  # readers place the tensors by this field
            writer.data_alignment = int(fields["general.alignment"].value)
        for name, field in fields.items():
            item = None if field.item is None else gguf.GGUFValueType[field.item]
            writer.add_key_value(name, field.value, gguf.GGUFValueType[field.type], item)
        for name, (kind, shape) in specs.items():
            writer.add_tensor_info(name, shape, np.dtype("float32"), sizes[name], gguf.GGMLQuantizationType[kind])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        except OSError as error:
            raise FileError(f"{target}: cannot write: {error.strerror or error}") from error
        finally:
            writer.close()
        return path.read_bytes(), sizes, writer.data_alignment


def total_bytes(specs: Specs) -> int:
    """Return the size of all tensors in bytes."""
    gguf = _gguf()
    return sum(_nbytes(gguf, kind, shape) for kind, shape in specs.values())


def _nbytes(gguf: Any, kind: str, shape: Sequence[int]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def _pack_finite(target: object, name: str, values: np.ndarray, kind: str) -> np.ndarray:
    """Pack a tensor. Raises `MismatchError` if a finite value is infinite in the type."""
    with np.errstate(over="ignore"):
        packed = pack(values, kind)
    is_finite = kind != "F16" or np.isfinite(packed.view("float16")).all()
    if not is_finite and np.isfinite(np.asarray(values, "float32")).all():
        raise MismatchError(f"{target}: {name}: values above 65504 do not fit float16; write bfloat16 or float32")
    return packed


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    """Return a tensor as the bytes of a GGUF type.

    >>> pack(np.ones((1, 32), "float32"), "Q8_0").shape
    (1, 34)
    """
    if kind != "Q8_0":
        return np.ascontiguousarray(values, numpy_dtype(kind)).view("uint8")  # gguf's own BF16 is 20 times slower
    gguf = _gguf()
    return gguf.quants.quantize(np.ascontiguousarray(values, "float32"), gguf.GGMLQuantizationType[kind])


_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""{number of a type of a field: letter of `struct`}; 8 is a string and 9 an array."""
_MAX_AXES = 4


class _Tensor(NamedTuple):
    """A tensor in a file: its type, its shape (rows first), the place of its bytes and their number."""

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Header:
    """The fields and tensors of a file, read with each count and length checked against the file's size.

    The package's own reader checks none, and needs 1,400 bytes for each string of an array.
    """

    def __init__(self, gguf: Any, data: mmap.mmap) -> None:
        """Read a header. Raises `ValueError` if it is damaged."""
        self._data, self._place, self._types = data, 0, gguf.GGUFValueType
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = self._numbers(4)
        if version not in (2, 3):
            is_swapped = version % 65536 == 0
            raise ValueError("big-endian; convert it to little-endian" if is_swapped else f"version {version}")
        tensors, fields = self._numbers(10, 2)
        self.fields = dict(self._unique(fields, self._field))
        alignment = self.fields.get("general.alignment", Field(32, "UINT32"))
        if alignment.type != "UINT32" or alignment.value.bit_count() != 1:
            raise ValueError(f"general.alignment: {alignment.value!r}")
        found = dict(self._unique(tensors, lambda: self._tensor(gguf)))
        begin = self._place + -self._place % alignment.value
        self.tensors = {name: tensor._replace(start=begin + tensor.start) for name, tensor in found.items()}
        for name, tensor in self.tensors.items():
            if tensor.start + tensor.nbytes > len(data):
                raise ValueError(f"{name}: {tensor.nbytes} bytes at byte {tensor.start} of {len(data)}")

    def _take(self, count: int) -> bytes:
        begin = self._place
        if count > len(self._data) - begin:
            raise ValueError(f"{count} bytes at byte {begin} of {len(self._data)}")
        self._place += count
        return self._data[begin : self._place]

    def _numbers(self, kind: int, count: int = 1) -> tuple[Any, ...]:
        raw = self._take(count * struct.calcsize(f"<{_FORMS[kind]}"))
        return struct.unpack(f"<{count}{_FORMS[kind]}", raw)

    def _text(self) -> str:
        return self._take(*self._numbers(10)).decode()

    def _unique(self, count: int, read: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
        """Yield names with what follows each; a count that is too large ends at the file's end."""
        names = set[str]()
        for _ in range(count):
            name = self._text()
            if name in names:
                raise ValueError(f"twice {name!r}")
            names.add(name)
            yield name, read()

    def _field(self) -> Field:
        (kind,) = self._numbers(4)
        if kind != 9:
            return Field(self._text() if kind == 8 else self._numbers(kind)[0], self._types(kind).name)
        (item,), (count,) = self._numbers(4), self._numbers(10)
        if item == 9:
            raise ValueError("an array of arrays")
        values = [self._text() for _ in range(count)] if item == 8 else list(self._numbers(item, count))
        return Field(values, "ARRAY", self._types(item).name if count else None)

    def _tensor(self, gguf: Any) -> _Tensor:
        (axes,) = self._numbers(4)
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        shape = self._numbers(10, axes)[::-1]
        if 0 in shape:
            raise ValueError(f"a tensor of the shape {list(shape)}")
        kind = gguf.GGMLQuantizationType(*self._numbers(4))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"a row of {shape[-1]} values in blocks of {block}")
        (offset,) = self._numbers(10)
        return _Tensor(kind.name, shape, offset, math.prod(shape) // block * size)


class File:
    """An opened GGUF file. Its tensors stay in the file, by a memory map, until they are read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file.

        Raises:
            FileError: the file or the package `gguf` is missing.
            FormatError: it is no GGUF file.
        """
        gguf = _gguf()
        self.path = location.to_location(path)
        if isinstance(self.path, location.Address) or not location.is_file(self.path):
            raise FileError(f"{self.path}: expected a local GGUF file, found none")
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _Header(gguf, self._data)
        except OSError as error:
            raise local_files.file_error("read", str(self.path), error) from error
        except (ValueError, KeyError) as error:
            raise FormatError(f"{self.path}: expected a GGUF file, found other bytes ({error})") from error
        self._fields, self._tensors = header.fields, header.tensors

    def fields(self) -> dict[str, Field]:
        """Return the fields, without those of the file's structure."""
        return dict(self._fields)

    def value(self, name: str, default: Any = None) -> Any:
        """Return the value of a field, or the default."""
        field = self._fields.get(name)
        return default if field is None else field.value

    @property
    def names(self) -> list[str]:
        """The tensors, in the file's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, rows first."""
        return self._tensors[name].shape

    def kind(self, name: str) -> str:
        """Return the type of a tensor, such as "Q4_1"."""
        return self._tensors[name].kind

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in float32. Raises `FormatError` for a type that the package cannot read."""
        gguf, tensor = _gguf(), self._tensors[name]
        rows = np.frombuffer(self._data, "uint8", tensor.nbytes, tensor.start).reshape(*tensor.shape[:-1], -1)
        try:
            values: np.ndarray = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])
        except NotImplementedError as error:
            raise FormatError(f"{self.path}: {name}: cannot read the type {tensor.kind}") from error
        return values.reshape(tensor.shape)
