"""safetensors files: headers, reading (complete, lazy, by slices) and durable, atomic writing.

This is an own implementation of the format; its files equal those of the safetensors library byte for byte. Reading a
header needs only the standard library. numpy (and ml_dtypes, for bfloat16 and float8) are imported with the first
tensor.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from jaxadapt.arrays.tensor_source import TensorSource, TensorSpec
from jaxadapt.core.errors import FileError, FormatError, MismatchError
from jaxadapt.storage import atomic, local_files, location, ranged_reads, strided, threads
from jaxadapt.storage.dtypes import NAMES, dtype_name, numpy_dtype
from jaxadapt.storage.safetensors_header import (
    MAX_HEADER,
    Header,
    TensorInfo,
    encode,
    length_problem,
    parse,
    problems_text,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "MAX_HEADER", "Header", "TensorFile", "TensorInfo", "encode", "little_bits",
    "named_specs", "open_tensors", "read", "read_header", "write", "write_to",
]  # fmt: skip

# Bytes of tensors that one thread reads before it takes more: small enough to share a file among several threads.
_JOB_BYTES = 16 << 20


def _open(path: str | os.PathLike[str]) -> local_files.ByteSource:
    place = location.to_location(path)
    return (
        ranged_reads.RemoteObject(place)
        if isinstance(place, location.Address)
        else local_files.LocalFile(os.fspath(path))
    )


def _read_header(source: local_files.ByteSource) -> Header:
    first = _read_exactly(source, min(source.size, 8), 0, "header length")
    if problem := length_problem(first, source.size):
        raise FormatError(f"{source.path}: not a valid safetensors file: {problem}")
    return parse(source.path, _read_exactly(source, int.from_bytes(first, "little"), 8, "header"), source.size)


def _read_exactly(source: local_files.ByteSource, size: int, offset: int, label: str) -> bytes:
    buffer = bytearray(size)
    source.read_into(label, memoryview(buffer), offset)
    return bytes(buffer)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and validate the header of a file. Reads no tensor and imports neither numpy nor jax.

    Raises:
        FormatError: not a valid safetensors file; names each invalid tensor.
        FileError: missing, a directory, or not permitted.
    """
    source = _open(path)
    try:
        header = _read_header(source)
        source.check()
        return header
    finally:
        source.close()


class TensorFile(TensorSource):
    """An open file: `[key]` reads a tensor into a new array (C order, 64-byte aligned).

    The file keeps its descriptor, so the contents of a replaced file are never mixed. If an object of a store is
    replaced, the end of the `with` block raises `FormatError`. Use as a context manager, or call `close`. Several
    threads may read at once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file; see `open_tensors`. Raises the errors of `read_header`."""
        self._file = _open(path)
        self.path = self.source = self._file.path
        try:
            self.header = _read_header(self._file)
        except BaseException:
            self.close()
            raise

    def _dtype(self, key: str) -> np.dtype:
        try:
            return numpy_dtype(self.header.tensors[key].dtype)
        except FormatError as error:
            raise FormatError(f"{self.path}: tensor {key!r}: {error}") from None

    def _find(self, key: str) -> tuple[TensorInfo, np.dtype]:
        info = self.header.tensors[key]
        if self._file.closed:
            raise FileError(f"{self.path}: tensor {key!r}: the file is closed; read inside the `with` block")
        return info, self._dtype(key)

    def read(self, key: str) -> np.ndarray:
        """Return one tensor in new memory."""
        return self.read_into(key, None)

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        """Return one tensor, read into the first bytes of `memory` (uint8, aligned for the dtype) or new memory."""
        info, dtype = self._find(key)
        data = local_files.aligned_empty(info.nbytes) if memory is None else memory[: info.nbytes]
        self._file.read_into(f"tensor {key!r}", data.data, self.header.data_start + info.start)
        return data.view(dtype).reshape(info.shape)

    def nbytes(self, key: str) -> int:
        """Return the number of bytes of one tensor, also of a dtype that numpy lacks."""
        return self.header.tensors[key].nbytes

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes by key.

        Raises:
            FormatError: numpy has no such dtype.
        """
        return {key: TensorSpec(info.shape, self._dtype(key)) for key, info in self.header.tensors.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self.header.tensors  # Mapping.__contains__ would read the tensor

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        """Return `self[key][slices]`, reading only the bytes of the slice and gaps under 16 KiB.

        Args:
            key: the tensor.
            slices: one slice an axis, with any bounds and step, as `jax.make_array_from_callback` passes them. Missing
                slices at the end select whole axes.
            shape: another shape for the same bytes in C order, to which `slices` refer.

        Raises:
            FormatError: the file was truncated after it was opened.
            IndexError: more slices than axes.
        """
        info, dtype = self._find(key)
        begin = self.header.data_start + info.start

        def read_at(view: memoryview, offset: int) -> None:
            self._file.read_into(f"tensor {key!r}", view, begin + offset)

        return strided.read_region(read_at, info.shape if shape is None else shape, dtype, slices)

    def read_many(self, keys: Iterable[str], progress: Callable[[int], None] = lambda _: None) -> dict[str, np.ndarray]:
        """Return several tensors; see `TensorSource`. Several threads read them."""
        order = sorted(set(keys), key=lambda key: self.header.tensors[key][2:])
        jobs = threads.split_by_size(order, self.nbytes, _JOB_BYTES)
        # Allocated here, in the caller's thread; see `threads.run_in_order`.
        tasks = (
            functools.partial(list, map(self.read_into, job, [local_files.aligned_empty(self.nbytes(k)) for k in job]))
            for job in jobs
        )
        out: dict[str, np.ndarray] = {}
        with contextlib.closing(threads.run_in_order(tasks, len(jobs))) as results:
            for job, arrays in zip(jobs, results, strict=True):
                out |= zip(job, arrays, strict=True)
                progress(sum(map(self.nbytes, job)))
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.check()
        finally:
            self.close()


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a file for lazy reading; see `TensorFile`.

    Args:
        path: a path or an address.

    Raises:
        FormatError, FileError: see `read_header`.
    """
    return TensorFile(path)


def read(path: str | os.PathLike[str], keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Read all tensors of a file, or some, into memory that XLA's CPU client uses without a copy.

    Raises:
        FormatError, FileError: see `read_header`.
        MismatchError: the file lacks some of `keys`; names all of them.
    """
    with open_tensors(path) as file:
        wanted = list(file) if keys is None else list(keys)
        if missing := [key for key in wanted if key not in file]:
            raise MismatchError(
                f"{file.path}: expected tensors {problems_text([repr(key) for key in missing])}, "
                f"but the file lacks them; it holds {problems_text([repr(key) for key in file])}"
            )
        tensors = file.read_many(wanted)
        return {key: tensors[key] for key in wanted}


def _to_file_bits(path: str, key: str, value: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Check an array against its spec and return its bits as integers, which numpy copies fastest."""
    import numpy as np

    array = np.asarray(value)
    name = NAMES.get(array.dtype.name, array.dtype.name)
    if name != info.dtype or array.shape != info.shape:
        raise MismatchError(
            f"{path}: cannot write: tensor {key!r}: expected {info.dtype} {list(info.shape)}, "
            f"found {name} {list(array.shape)}"
        )
    return little_bits(array)


def little_bits(array: np.ndarray) -> np.ndarray:
    """Return an array's bits in the file's byte order, as unsigned integers."""
    import numpy as np

    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def write(
    path: str | os.PathLike[str],
    specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]],
    get: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Header:
    """Write a file durably and atomically in one pass, holding one tensor at a time.

    The file equals that of `safetensors.torch.save_file`; `metadata` is sorted by key.

    Args:
        path: replaced when all bytes are on the disk, and unchanged after an exception.
        specs: (dtype, shape) by key. A dtype is a safetensors name ("BF16") or anything numpy accepts.
        get: returns the array of a key, with the dtype and shape of `specs` and any memory layout or byte order. Called
            once a key, in the file's order. The array must not change before the file is written.
        metadata: strings by key.
        progress: called with the number of bytes written since its last call.

    Returns:
        The header of the file.

    Raises:
        FileError: the disk is full, no permission, a spec that the format cannot hold, or a header over 100 MB.
        MismatchError: `get` returned an array that does not match its spec.
    """
    with atomic.open_replacement(path) as writer:
        return write_to(writer, specs, get, metadata, progress=progress)


def write_to(
    writer: atomic.Writer,
    specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]],
    get: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    ahead: bool = False,
) -> Header:
    """Write an open file, one of several that are replaced together; see `write`.

    With `ahead`, a thread calls `get` for the next two tensors while one is written.
    """
    first, header = encode(writer.path, named_specs(specs), metadata or {})
    writer.write(memoryview(first))
    keys = header.tensors
    with contextlib.closing(threads.map_ahead(get, keys) if ahead else (get(key) for key in keys)) as values:
        for key, info in keys.items():
            _write_array(writer, _to_file_bits(writer.path, key, next(values), info))
            if progress is not None:
                progress(info.nbytes)
    return header


def _write_array(writer: atomic.Writer, bits: np.ndarray) -> None:
    """Append an array. On return no name holds its memory, which `get` may need for the next tensor."""
    for part in strided.contiguous_parts(bits):
        writer.write(part)


def named_specs(specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]]) -> dict[str, tuple[str, Sequence[int]]]:
    """Return the specs with safetensors' dtype names."""

    def to_name(dtype: npt.DTypeLike) -> str:
        return dtype if isinstance(dtype, str) and dtype.isupper() else dtype_name(dtype)

    return {key: (to_name(dtype), shape) for key, (dtype, shape) in specs.items()}
