"""safetensors files: header, reading (whole, lazily, by slices) and durable, atomic writing.

Our own implementation of the format, byte for byte what the safetensors library writes. Reading a header
needs the standard library only; numpy (and ml_dtypes, for bfloat16 and float8) come in with the first tensor.
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
    "MAX_HEADER",
    "SMALL",
    "FileTensorSpec",
    "Header",
    "TensorFile",
    "TensorInfo",
    "encode",
    "little_bits",
    "named_specs",
    "open_tensors",
    "read",
    "read_header",
    "write",
    "write_to",
]

# Small and strided tensors are gathered in a buffer of this size; larger ones leave the processor's cache.
_STAGE = 1 << 20
SMALL = 64 << 20
"""What is read ahead is in memory at once, and reading more takes so long that little would be won."""
# Bytes of tensors read with one call: small enough that several threads get some.
_GROUP = 16 << 20


def _open(path: str | os.PathLike[str]) -> local_files.Source:
    place = location.to_location(path)
    return (
        ranged_reads.RemoteObject(place)
        if isinstance(place, location.Address)
        else local_files.LocalFile(os.fspath(path))
    )


def _header_of(source: local_files.Source) -> Header:
    return parse(source.path, _header_bytes(source), source.size)


def _header_bytes(source: local_files.Source) -> bytes:
    first = _exactly(source, min(source.size, 8), 0, "header length")
    if problem := length_problem(first, source.size):
        raise FormatError(f"{source.path}: not a valid safetensors file: {problem}")
    return _exactly(source, int.from_bytes(first, "little"), 8, "header")


def _exactly(source: local_files.Source, size: int, offset: int, what: str) -> bytes:
    buffer = bytearray(size)
    source.read_into([(what, memoryview(buffer))], offset)
    return bytes(buffer)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The validated header of a file; reads no tensor and imports neither numpy nor jax.

    Raises:
        FormatError: the bytes are no safetensors file, or contradict themselves; names each tensor concerned.
        FileError: missing, a directory, not permitted.
    """
    source = _open(path)
    try:
        header = _header_of(source)
        source.check()
        return header
    finally:
        source.close()


class FileTensorSpec(NamedTuple):
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFile(Mapping[str, "np.ndarray"]):
    """An open file: each `[key]` reads that tensor's bytes into a new array (C order, 64-byte aligned).

    It keeps the one descriptor it opened, so a file replaced meanwhile does not mix with the old one; of an address
    leaving the block raises a `FormatError` then. Use as a context manager, or call `close`. Reading from several
    threads at once is safe.
    """

    def __init__(self, path: str | os.PathLike[str], ahead: bool = False) -> None:
        """Raises what `read_header` raises. `is_prefetched` as in `open_tensors`."""
        self._source = _open(path)
        self._ahead: Prefetch | None = None
        self.path = self._source.path
        try:
            raw = _header_bytes(self._source)
            start = 8 + len(raw)
            if ahead and 0 < self._source.size - start <= SMALL:
                self._ahead = Prefetch(self._source, start)
            self.header = parse(self.path, raw, self._source.size)
        except BaseException:
            self.close()
            raise
        if self._ahead is not None:
            self._ahead.waiting.update(self.header.tensors)

    def _find(self, key: str) -> tuple[TensorInfo, np.dtype]:
        info = self.header.tensors[key]
        if self._source.closed:
            raise FileError(f"{self.path}: tensor {key!r}: the file was closed; read inside the `with` block")
        try:
            return info, numpy_dtype(info.dtype)
        except FormatError as error:
            raise FormatError(f"{self.path}: tensor {key!r}: {error}") from None

    def __getitem__(self, key: str) -> np.ndarray:
        return self.read_into(key, None)

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        """`self[key]` in the first bytes of `memory` (uint8, aligned for the dtype); in new memory if None.

        What was read ahead is handed out where it is, once, if it is aligned there.
        """
        info, dtype = self._find(key)
        if self._ahead is not None and self._ahead.take({key: (info.start, info.stop)}):
            data = self._ahead.bytes_of(info.start, info.stop, memory)
        else:
            data = local_files.aligned_empty(info.nbytes) if memory is None else memory[: info.nbytes]
            self._source.read_into([(f"tensor {key!r}", data.data)], self.header.data_start + info.start)
        return data.view(dtype).reshape(info.shape)

    def spec(self, key: str) -> FileTensorSpec:
        """Shape and dtype of one tensor."""
        info, dtype = self._find(key)
        return FileTensorSpec(info.shape, dtype)

    def nbytes(self, key: str) -> int:
        """The size of one tensor, without reading it."""
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
            return {key: self.spec(key) for key in self.header.tensors}  # which says which tensor it is

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)

    def __contains__(self, key: object) -> bool:
        return key in self.header.tensors  # Mapping's own would read the tensor

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        """`self[key][slices]`, reading only the bytes of the slice (gaps under 16 KiB are read along).

        Args:
            key: the tensor.
            slices: one slice an axis, with any bounds and step; missing ones at the end mean the whole axis.
                What `jax.make_array_from_callback` hands out fits.
            shape: another one for the same bytes in C order, which `slices` then refer to.

        Raises:
            FormatError: the file was truncated meanwhile.
            IndexError: more slices than axes.
        """
        info, dtype = self._find(key)
        begin = self.header.data_start + info.start

        def read_at(view: memoryview, offset: int) -> None:
            self._source.read_into([(f"tensor {key!r}", view)], begin + offset)

        return strided.read_region(read_at, info.shape if shape is None else shape, dtype, slices)

    def read_many(self, keys: Iterable[str], progress: Callable[[int], None] | None = None) -> dict[str, np.ndarray]:
        """The tensors of `keys`, faster than one by one.

        Small neighbours share an allocation (of 3 MB), which lives as long as one of them. `progress` is
        called with the number of bytes read since its last call.
        """
        groups = self.groups(keys, _GROUP)
        out: dict[str, np.ndarray] = {}
        reads = (
            functools.partial(self.read_group, g, local_files.aligned_empties(list(map(self.nbytes, g))))
            for g in groups
        )
        # few large tasks: their time goes into the kernel's copy and page faults, which hold no lock of Python's
        with contextlib.closing(threads.run_in_order(reads, min(threads.THREADS, len(groups)))) as made:
            for group, arrays in zip(groups, made, strict=True):
                out |= zip(group, arrays, strict=True)
                if progress is not None:
                    progress(sum(map(self.nbytes, group)))
        return out

    def groups(self, keys: Iterable[str], most: int) -> list[list[str]]:
        """Neighbours in the file, in its order, of about `most` bytes in all: what `read_group` takes."""
        groups: list[list[str]] = []
        size, stop = 0, -1
        for key in sorted(set(keys), key=lambda key: self.header.tensors[key][2:]):
            info = self.header.tensors[key]
            if info.start != stop or size + info.nbytes > most:
                groups.append([])
                size = 0
            groups[-1].append(key)
            size, stop = size + info.nbytes, info.stop
        return groups

    @property
    def is_prefetched(self) -> bool:
        """Whether all was, or is being, read ahead."""
        return self._ahead is not None

    def read_group(self, keys: Sequence[str], memory: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        """Neighbours in the file, in order, with one call.

        Args:
            memory: for each of them, as in `read_into`; without it new memory, which small ones share.
        """
        found = [self._find(key) for key in keys]
        spans = {key: (info.start, info.stop) for key, (info, _) in zip(keys, found, strict=True)}
        if self._ahead is not None and self._ahead.take(spans):
            there = self._ahead
            return [
                there.bytes_of(info.start, info.stop, None).view(dtype).reshape(info.shape) for info, dtype in found
            ]
        sizes = [info.nbytes for info, _ in found]
        memory = (
            local_files.aligned_empties(sizes)
            if memory is None
            else [m[:n] for m, n in zip(memory, sizes, strict=True)]
        )
        parts = [(f"tensor {key!r}", place.data) for key, place in zip(keys, memory, strict=True)]
        self._source.read_into(parts, self.header.data_start + found[0][0].start)
        return [place.view(dtype).reshape(info.shape) for place, (info, dtype) in zip(memory, found, strict=True)]

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
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


def open_tensors(path: str | os.PathLike[str], ahead: bool = False) -> TensorFile:
    """Opens a file for lazy reading; see `TensorFile`.

    Args:
        ahead: begin to read all tensors of a small file (64 MB) in the background; `read_into` then hands them out.

    Raises:
        FormatError, FileError: see `read_header`.
    """
    return TensorFile(path, ahead)


def read(path: str | os.PathLike[str], keys: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """All tensors of a file, or those named, in memory that XLA's CPU client takes without a copy.

    Raises:
        FormatError, FileError: see `read_header`.
        MismatchError: the file lacks some of `keys`; names them all.
    """
    with open_tensors(path) as file:
        wanted = list(file) if keys is None else list(keys)
        if missing := [key for key in wanted if key not in file]:
            raise MismatchError(
                f"{file.path}: expected tensors {problems_text([repr(key) for key in missing])}, "
                f"but the file lacks them; it holds {problems_text([repr(key) for key in file])}"
            )
        found = file.read_many(wanted)
        return {key: found[key] for key in wanted}


def _checked(path: str, key: str, value: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The array as unsigned integers in little endian, any strides: numpy copies those fastest."""
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
    """An array's bytes as the file has them, as unsigned integers."""
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
    """Writes a file durably and atomically in one pass, holding one tensor at a time.

    The bytes are those that `safetensors.torch.save_file` writes; `metadata` is sorted by key.

    Args:
        path: replaced when everything is on the disk; on any exception it is as it was.
        specs: (dtype, shape) by key; a dtype is a safetensors name ("BF16") or anything numpy takes for one.
        get: gives the array of a key: any memory layout or byte order, dtype and shape as in `specs`. Called
            once a key, in the file's order; what it returns must not change before the file is written.
        metadata: strings.
        progress: called with the number of bytes handed on since its last call.

    Returns:
        The header of the file.

    Raises:
        FileError: disk full, no permission, …; a spec the format cannot hold; a header over 100 MB.
        MismatchError: `get` returned another dtype or shape than its spec.
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
    """`write` for a file that is open already: one of several that are to take their places together."""
    first, header = encode(writer.path, named_specs(specs), metadata or {})
    stage = strided.Stage(writer.write, _STAGE)
    stage.add_bytes(first)
    for key, info in header.tensors.items():
        stage.add(_checked(writer.path, key, get(key), info))
        if progress is not None:
            progress(info.nbytes)
    stage.flush()
    return header


def named_specs(specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]]) -> dict[str, tuple[str, Sequence[int]]]:
    """The same with safetensors' dtype names."""

    def named(dtype: npt.DTypeLike) -> str:
        return dtype if isinstance(dtype, str) and dtype.isupper() else dtype_name(dtype)

    return {key: (named(dtype), shape) for key, (dtype, shape) in specs.items()}
