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
from typing import TYPE_CHECKING, NamedTuple

from jaxadapt.core.errors import FileError, FormatError, MismatchError
from jaxadapt.storage import atomic, local_files, location, ranged_reads, strided, threads
from jaxadapt.storage.dtypes import NAMES, dtype_name, numpy_dtype
from jaxadapt.storage.prefetch import Prefetch
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
    "MAX_HEADER", "SMALL", "FileTensorSpec", "Header", "TensorFile", "TensorInfo", "encode", "little_bits",
    "named_specs", "open_tensors", "read", "read_header", "write", "write_to",
]  # fmt: skip

# Bytes of the buffer that collects small and strided tensors. A larger one would not fit the processor's cache.
_STAGE_BYTES = 1 << 20
SMALL = 64 << 20
"""Bytes of the largest file that is prefetched. All of it is in memory at once, and larger files gain little."""
# Bytes of tensors read with one call. Small enough to divide a file among several threads.
_GROUP_BYTES = 16 << 20


def _open(path: str | os.PathLike[str]) -> local_files.Source:
    place = location.to_location(path)
    return (
        ranged_reads.RemoteObject(place)
        if isinstance(place, location.Address)
        else local_files.LocalFile(os.fspath(path))
    )


def _read_header(source: local_files.Source) -> Header:
    return parse(source.path, _read_header_bytes(source), source.size)


def _read_header_bytes(source: local_files.Source) -> bytes:
    first = _read_exactly(source, min(source.size, 8), 0, "header length")
    if problem := length_problem(first, source.size):
        raise FormatError(f"{source.path}: not a valid safetensors file: {problem}")
    return _read_exactly(source, int.from_bytes(first, "little"), 8, "header")


def _read_exactly(source: local_files.Source, size: int, offset: int, label: str) -> bytes:
    buffer = bytearray(size)
    source.read_into([(label, memoryview(buffer))], offset)
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


class FileTensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFile(Mapping[str, "np.ndarray"]):
    """An open file: `[key]` reads a tensor into a new array (C order, 64-byte aligned).

    The file keeps its descriptor, so the contents of a replaced file are never mixed. If an object of a store is
    replaced, the end of the `with` block raises `FormatError`. Use as a context manager, or call `close`. Several
    threads may read at once.
    """

    def __init__(self, path: str | os.PathLike[str], prefetch: bool = False) -> None:
        """Open a file; see `open_tensors`. Raises the errors of `read_header`."""
        self._source = _open(path)
        self._prefetch: Prefetch | None = None
        self.path = self._source.path
        try:
            raw = _read_header_bytes(self._source)
            start = 8 + len(raw)
            if prefetch and 0 < self._source.size - start <= SMALL:
                self._prefetch = Prefetch(self._source, start)
            self.header = parse(self.path, raw, self._source.size)
        except BaseException:
            self.close()
            raise
        if self._prefetch is not None:
            self._prefetch.waiting.update(self.header.tensors)

    def _find(self, key: str) -> tuple[TensorInfo, np.dtype]:
        info = self.header.tensors[key]
        if self._source.closed:
            raise FileError(f"{self.path}: tensor {key!r}: the file is closed; read inside the `with` block")
        try:
            return info, numpy_dtype(info.dtype)
        except FormatError as error:
            raise FormatError(f"{self.path}: tensor {key!r}: {error}") from None

    def __getitem__(self, key: str) -> np.ndarray:
        return self.read_into(key, None)

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        """Return `self[key]`, read into the first bytes of `memory` (uint8, aligned for the dtype) or new memory.

        A prefetched tensor is returned once in place, if it is aligned there.
        """
        info, dtype = self._find(key)
        if self._prefetch is not None and self._prefetch.take({key: (info.start, info.stop)}):
            data = self._prefetch.bytes_of(info.start, info.stop, memory)
        else:
            data = local_files.aligned_empty(info.nbytes) if memory is None else memory[: info.nbytes]
            self._source.read_into([(f"tensor {key!r}", data.data)], self.header.data_start + info.start)
        return data.view(dtype).reshape(info.shape)

    def spec(self, key: str) -> FileTensorSpec:
        """Return the shape and dtype of one tensor."""
        info, dtype = self._find(key)
        return FileTensorSpec(info.shape, dtype)

    def nbytes(self, key: str) -> int:
        """Return the bytes of one tensor, without reading it."""
        return self.header.tensors[key].nbytes

    @functools.cached_property
    def specs(self) -> dict[str, FileTensorSpec]:
        """Shapes and dtypes by key.

        Raises:
            FormatError: numpy has no such dtype.
        """
        try:
            kinds = {name: numpy_dtype(name) for name in {info.dtype for info in self.header.tensors.values()}}
            return {key: FileTensorSpec(info.shape, kinds[info.dtype]) for key, info in self.header.tensors.items()}
        except FormatError:
            return {key: self.spec(key) for key in self.header.tensors}  # the error names the tensor

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
            self._source.read_into([(f"tensor {key!r}", view)], begin + offset)

        return strided.read_region(read_at, info.shape if shape is None else shape, dtype, slices)

    def read_many(self, keys: Iterable[str], progress: Callable[[int], None] | None = None) -> dict[str, np.ndarray]:
        """Read several tensors, faster than one by one.

        Small neighbours share an allocation (of 3 MB) and keep it alive. `progress` is called with the number of bytes
        read since its last call.
        """
        groups = self.groups(keys, _GROUP_BYTES)
        out: dict[str, np.ndarray] = {}
        reads = (
            functools.partial(self.read_group, g, local_files.aligned_empties(list(map(self.nbytes, g))))
            for g in groups
        )
        # Few large tasks: copies and page faults in the kernel do not hold Python's lock.
        with contextlib.closing(threads.run_in_order(reads, min(threads.THREADS, len(groups)))) as results:
            for group, arrays in zip(groups, results, strict=True):
                out |= zip(group, arrays, strict=True)
                if progress is not None:
                    progress(sum(map(self.nbytes, group)))
        return out

    def groups(self, keys: Iterable[str], max_bytes: int) -> list[list[str]]:
        """Split keys into groups of neighbours in the file, of at most `max_bytes` each, for `read_group`."""
        groups: list[list[str]] = []
        size, stop = 0, -1
        for key in sorted(set(keys), key=lambda key: self.header.tensors[key][2:]):
            info = self.header.tensors[key]
            if info.start != stop or size + info.nbytes > max_bytes:
                groups.append([])
                size = 0
            groups[-1].append(key)
            size, stop = size + info.nbytes, info.stop
        return groups

    @property
    def is_prefetched(self) -> bool:
        """True if the file is small and is read in the background."""
        return self._prefetch is not None

    def read_group(self, keys: Sequence[str], memory: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Read neighbours in the file, in its order, with one call.

        Args:
            keys: a group of `groups`.
            memory: an array for each, as in `read_into`. None allocates memory, which small tensors share.
        """
        entries = [self._find(key) for key in keys]
        spans = {key: (info.start, info.stop) for key, (info, _) in zip(keys, entries, strict=True)}
        if self._prefetch is not None and self._prefetch.take(spans):
            prefetch = self._prefetch
            return [
                prefetch.bytes_of(info.start, info.stop, None).view(dtype).reshape(info.shape)
                for info, dtype in entries
            ]
        sizes = [info.nbytes for info, _ in entries]
        memory = (
            local_files.aligned_empties(sizes)
            if memory is None
            else [m[:n] for m, n in zip(memory, sizes, strict=True)]
        )
        parts = [(f"tensor {key!r}", array.data) for key, array in zip(keys, memory, strict=True)]
        self._source.read_into(parts, self.header.data_start + entries[0][0].start)
        return [array.view(dtype).reshape(info.shape) for array, (info, dtype) in zip(memory, entries, strict=True)]

    def close(self) -> None:
        """Close the file."""
        if self._prefetch is not None:
            self._prefetch.close()
        self._source.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._source.check()
        finally:
            self.close()


def open_tensors(path: str | os.PathLike[str], prefetch: bool = False) -> TensorFile:
    """Open a file for lazy reading; see `TensorFile`.

    Args:
        path: a path or an address.
        ahead: start to read all tensors of a small file (up to 64 MB) in the background, for `read_into`.

    Raises:
        FormatError, FileError: see `read_header`.
    """
    return TensorFile(path, prefetch)


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
) -> Header:
    """Write an open file, one of several that are replaced together; see `write`."""
    first, header = encode(writer.path, named_specs(specs), metadata or {})
    stage = strided.Stage(writer.write, _STAGE_BYTES)
    stage.add_bytes(first)
    for key, info in header.tensors.items():
        stage.add(_to_file_bits(writer.path, key, get(key), info))
        if progress is not None:
            progress(info.nbytes)
    stage.flush()
    return header


def named_specs(specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]]) -> dict[str, tuple[str, Sequence[int]]]:
    """Return the specs with safetensors' dtype names."""

    def to_name(dtype: npt.DTypeLike) -> str:
        return dtype if isinstance(dtype, str) and dtype.isupper() else dtype_name(dtype)

    return {key: (to_name(dtype), shape) for key, (dtype, shape) in specs.items()}
