"""GGUF files, by the package `gguf`: tensors by name with their types, and the fields before them.

The only module of the library that imports `gguf`. Tensors are numpy arrays in PyTorch's layout (rows first); the file
lists the sizes of an axis in the opposite order.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.core.errors import FileError, FormatError, MismatchError
from jaxadapt.storage import atomic, location, threads
from jaxadapt.storage.dtypes import numpy_dtype

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


def _gguf(module: str = "gguf") -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise FileError(f"GGUF files need the package gguf, which is not installed; run: {INSTALL}") from error


def tensor_names(architecture: str, layers: int) -> Callable[[str], tuple[str, str] | None]:
    """Return a function from a PyTorch key to its GGUF tensor: (kind, name), as llama.cpp's converter names it.

    >>> tensor_names("llama", 1)("model.layers.0.self_attn.q_proj.weight")
    ('ATTN_Q', 'blk.0.attn_q.weight')
    """
    gguf = _gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], layers)

    def name_of(key: str) -> tuple[str, str] | None:
        found = table.get_type_and_name(key, try_suffixes=(".weight", ".bias"))
        return None if found is None else (found[0].name, found[1])

    return name_of


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
        with contextlib.closing(threads.map_ahead(packed, specs) if ahead else (packed(x) for x in specs)) as data:
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
            self._reader: Any = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError) as error:
            raise FormatError(f"{self.path}: expected a GGUF file, found other bytes ({error})") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def fields(self) -> dict[str, Field]:
        """Return the fields, without those of the file's structure."""
        found: dict[str, Field] = {}
        for name, field in self._reader.fields.items():
            if name.startswith("GGUF."):
                continue
            types = [kind.name for kind in field.types]
            found[name] = Field(field.contents(), types[0], types[-1] if len(types) > 1 else None)
        return found

    def value(self, name: str, default: Any = None) -> Any:
        """Return the value of a field, or the default."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    @property
    def names(self) -> list[str]:
        """The tensors, in the file's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, rows first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def kind(self, name: str) -> str:
        """Return the type of a tensor, such as "Q4_1"."""
        kind: str = self._tensors[name].tensor_type.name
        return kind

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor as it is stored."""
        values: np.ndarray = self._tensors[name].data
        return values

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in float32."""
        tensor = self._tensors[name]
        values: np.ndarray = _gguf("gguf.quants").dequantize(tensor.data, tensor.tensor_type)
        return values.reshape(self.shape(name))
