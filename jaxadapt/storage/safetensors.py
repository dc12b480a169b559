"""safetensors files: headers, reading (complete, lazy, by slices) and durable, atomic writing.

A file consists of 8 bytes (the header's length, little endian), the header (JSON, padded with spaces to a multiple of
8), and the tensors' bytes without gaps. Format: https://huggingface.co/docs/safetensors

This is an own implementation of the format; its files equal those of the safetensors library byte for byte. Reading a
header, with full validation, needs only the standard library. numpy and ml_dtypes are imported with the first tensor.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, cast

from jaxadapt.arrays.tensor_source import NAMES, TensorSource, TensorSpec, aligned_empty, dtype_name, numpy_dtype
from jaxadapt.core.errors import (
    FileError,
    FormatError,
    MismatchError,
    problems_text,
    raise_listed,
    repeated,
)
from jaxadapt.core.lazy import np, npt
from jaxadapt.storage import atomic, local_files, location

# ---------------------------------------------------------------- safetensors header


MAX_HEADER = 100_000_000
"""Largest header in bytes that readers accept."""

# Bits of an element by dtype. Tensors in a file are sorted by the reverse of this order.
BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_RANK = {name: rank for rank, name in enumerate(BITS)}
_MAX_AXES = 64  # numpy's limit
_MAX_BYTES = 2**63 - 1


class TensorInfo(NamedTuple):
    """One tensor of a file: dtype, shape, and byte range `[start, stop)` from `Header.data_start` on."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Header(NamedTuple):
    """The header of a safetensors file.

    `tensors` is in the order of the bytes. `data_start` is the offset of the first tensor's bytes, and `size` the size
    of the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    size: int


def _show(value: object, limit: int = 80) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a very large number"
    except RecursionError:
        text = "a value nested too deeply"
    return text if len(text) <= limit else text[:limit] + "…"


def naturals(value: object) -> tuple[int, ...] | None:
    """Return the values of a list or tuple if all are integers of at least 0; else None."""
    items = cast("Sequence[object]", value) if type(value) in (list, tuple) else (None,)
    # bool is a subclass of int in Python, but `true` is not a number in JSON.
    return tuple(cast("Sequence[int]", items)) if all(type(item) is int and item >= 0 for item in items) else None


def _parse_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Convert an object of the header, each of whose keys must differ."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"duplicate keys {_show(repeated(key for key, _ in pairs))}")
    return result


def _reject_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _parse_integer(text: str) -> int:
    if text == "-0":  # an int in Python, but invalid for the safetensors library
        raise ValueError("expected integers >= 0, found -0")
    return int(text)


_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


def _is_described(value: object) -> bool:
    """Return True for the description of a tensor."""
    fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    # If three tensors have these names, data_offsets is an object, not a list.
    return fields.keys() == _FIELDS and type(fields["data_offsets"]) is list


def _byte_size(dtype: object, shape: object) -> int:
    """Return the number of bytes of a tensor. Raises `ValueError` with the problem of its dtype or its shape."""
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"expected a dtype of the format (F32, BF16, …), found {_show(dtype)}")
    sizes = naturals(shape)
    if sizes is None:
        raise ValueError(f"expected a shape of integers >= 0, found {_show(shape)}")
    if len(sizes) > _MAX_AXES:  # checked first: the product of many axes is slow
        raise ValueError(f"expected at most {_MAX_AXES} axes, found {len(sizes)}")
    count = math.prod(sizes)
    # Axes of size 0 must not hide an overflow of the others: numpy multiplies axes one by one.
    if (count or math.prod(size or 1 for size in sizes)) * BITS[dtype] // 8 > _MAX_BYTES:
        raise ValueError(f"shape {_show(list(sizes))} overflows 63 bits")
    nbytes, bits = divmod(count * BITS[dtype], 8)
    if bits:
        raise ValueError(f"shape {_show(list(sizes))} of {dtype} does not fill whole bytes")
    return nbytes


def _parse_info(value: object) -> TensorInfo:
    """Return the description of one tensor. Raises `ValueError` with its problem."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {_show(value)}")
    entry = cast("dict[str, object]", value)
    if not _is_described(entry):
        found = f"data_offsets {_show(entry['data_offsets'])}" if entry.keys() == _FIELDS else _show([*entry])
        raise ValueError(f"expected the fields dtype, shape and data_offsets [start, stop], found {found}")
    dtype, shape, found = entry["dtype"], entry["shape"], entry["data_offsets"]
    expected, offsets = _byte_size(dtype, shape), naturals(found)
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"expected data_offsets [start, stop] with 0 <= start <= stop, found {_show(found)}")
    start, stop = offsets
    if stop > _MAX_BYTES:
        raise ValueError(f"data_offsets {_show(list(offsets))} overflow 63 bits")
    if stop - start != expected:
        raise ValueError(
            f"expected {expected} bytes for {dtype} {shape}, found {stop - start} (data_offsets {list(offsets)})"
        )
    return TensorInfo(cast("str", dtype), tuple(cast("list[int]", shape)), start, stop)


def _length_problem(first: bytes, size: int) -> str | None:
    """Return the problem of a file of `size` bytes that begins with `first` (up to 8 bytes), or None."""
    length = int.from_bytes(first, "little")
    # Guess the file type only if the length is impossible: a header of 640 bytes begins like a pickle.
    if len(first) == 8 and length <= min(MAX_HEADER, size - 8):
        return None
    if first.startswith(b"version "):
        return "this is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"
    if first.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "this is a PyTorch file: read it as a .bin"
    if size < 8:
        return f"expected at least 8 bytes, found {size}; the file is truncated"
    if length > MAX_HEADER:
        return f"header length: expected at most {MAX_HEADER} bytes, found {length}"
    return f"header length: expected at most the {size - 8} bytes left, found {length}; the file is damaged"


def _describe(key: str | None) -> str:
    return "the header" if key is None else f"tensor {_show(key)}"


def parse(path: str, raw: bytes, size: int) -> Header:
    """Parse and validate the JSON of a header (without the 8 bytes before it).

    Args:
        path: the file's path, for messages.
        raw: the header's bytes.
        size: the size of the file in bytes.

    Raises:
        FormatError: the header is invalid; names every invalid tensor.
    """

    try:
        rest, plain = _split_plain(raw)
        items = _read_items(rest)
        if plain and len(items) > ("__metadata__" in items):
            items, plain = _read_items(raw), {}
        found = items.pop("__metadata__", None)
        # MLX writes null for none, which the reference reader takes.
        metadata = cast("dict[str, str]", {} if found is None else found)
        if not isinstance(found, dict | None) or {*map(type, metadata.values())} - {str}:
            raise ValueError(f"__metadata__: expected an object of strings, found {_show(found)}")
        tensors = plain or _read_tensors(items)
        _check_layout(tensors, 8 + len(raw), size)
        # "\ud800" is valid JSON, but not valid text: it can be neither printed nor written.
        "".join([*tensors, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        name = _show(error.object[error.start])
        raise FormatError(
            f"{path}: not a valid safetensors file: header: a name holds a lone surrogate, {name}"
        ) from error
    except ValueError as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}") from error
    return Header(tensors, metadata, 8 + len(raw), size)


_SIZE = "[1-9][0-9]{0,17}"  # fewer than 63 bits
_TENSOR = re.compile(
    rf'"([^"\\\x00-\x1f]*)":{{"dtype":"({"|".join(BITS)})","shape":\[((?:{_SIZE}(?:,{_SIZE}){{0,7}})?)\],'
    rf'"data_offsets":\[(0|{_SIZE}),({_SIZE})\]}}(?:,(?=")|}} *\Z)'
)


def _split_plain(raw: bytes) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the part of a header before the tensors, and the tensors, if the header is written as by `encode`.

    Otherwise return the whole header, and no tensors; also for tensors without values or with many axes. This takes a
    third of the time of `json`.
    """
    head, *found = _TENSOR.split(raw.decode("ascii")) if raw.isascii() else ("",)
    keys, dtypes, shapes, *offsets, gaps = (found[i::6] for i in range(6))
    starts, stops = (list(map(int, each)) for each in offsets)
    sizes = {text: tuple(map(int, filter(None, text.split(",")))) for text in set(shapes)}
    bits = {
        (dtype, text): math.prod(sizes[text]) * BITS[dtype] for dtype, text in set(zip(dtypes, shapes, strict=True))
    }
    if (
        any(gaps)
        or not (head == "{" or head.endswith("},"))
        or len({*keys, "__metadata__"}) <= len(keys)
        or [*starts, *stops[-1:]] != [0, *stops]
        or [8 * (stop - start) for start, stop in zip(starts, stops, strict=True)]
        != [bits[pair] for pair in zip(dtypes, shapes, strict=True)]
    ):
        return raw, {}
    infos = map(TensorInfo, dtypes, map(sizes.__getitem__, shapes), starts, stops)
    return f"{head.removesuffix(',')}}}".encode(), dict(zip(keys, infos, strict=True))


def _read_items(raw: bytes) -> dict[str, object]:
    """Return the JSON of a header. Raises `ValueError` with the problem."""
    if not raw.startswith(b"{"):
        raise ValueError(f"header: expected a JSON object, found bytes that begin with {_show(raw[:16])}")
    try:
        # A Python function for each number is slow, so it is passed only if there may be a -0.
        integer = _parse_integer if b"-0" in raw else None
        parsed: object = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_parse_object, parse_constant=_reject_constant, parse_int=integer
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"header: expected UTF-8, found byte 0x{raw[error.start]:02x} at {error.start}") from error
    except RecursionError as error:
        raise ValueError("header: JSON nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"header: expected JSON, found: {error}") from error
    if _is_described(parsed):
        raise ValueError("header: expected an object of tensors, found the description of one")
    return cast("dict[str, object]", parsed)


def _read_tensors(items: Mapping[str, object]) -> dict[str, TensorInfo]:
    """Return the tensors in the order of their bytes. Raises `ValueError` with all problems."""
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for key, value in items.items():
        try:
            tensors[key] = _parse_info(value)
        except ValueError as error:
            problems.append(f"tensor {_show(key)}: {error}")
    if problems:
        raise ValueError(problems_text(problems))
    return dict(sorted(tensors.items(), key=lambda item: item[1][2:]))


def _check_layout(tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Raise `ValueError` if the tensors do not fill a file of `size` bytes from `data_start` on without gaps."""
    problems: list[str] = []
    position, last = 0, None
    for key, (_, _, start, stop) in tensors.items():
        if start != position:
            kind = "overlaps" if start < position else "leaves a gap after"
            problems.append(f"tensor {_show(key)} {kind} {_describe(last)}: expected start {position}, found {start}")
        position, last = stop, key
    if position != size - data_start:
        end = data_start + position
        short = "; it is truncated: fetch or save it again" if end > size else ""
        problems.append(f"expected the file to end with {_describe(last)} at {end} bytes, found {size} bytes{short}")
    if problems:
        raise ValueError(problems_text(problems))


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode(
    path: str, specs: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, Header]:
    """Return the first bytes of a file (length and header) for these tensors, and the header they encode.

    The bytes equal those of the safetensors library: metadata first, sorted by key; then the tensors, wide dtypes first
    and then by name. Processes that call it with equal arguments get equal offsets.

    Args:
        path: the file's path, for messages.
        specs: `(dtype, shape)` by key, with a dtype of `BITS`.
        metadata: strings by key.

    Raises:
        FileError: specs that the format cannot hold (all are named), or a header over `MAX_HEADER`.

    >>> raw, header = encode("x", {"a": ("F32", (2,)), "b": ("F64", ())}, {"format": "pt"})
    >>> header.tensors
    {'b': TensorInfo(dtype='F64', shape=(), start=0, stop=8),
     'a': TensorInfo(dtype='F32', shape=(2,), start=8, stop=16)}
    >>> len(raw) % 8
    0
    """
    problems: list[str] = []
    sizes: dict[str, int] = {}
    if not all(type(k) is str and type(v) is str for k, v in metadata.items()):
        problems.append(f"metadata: expected strings, found {_show(dict(metadata))}")
    for key, (dtype, shape) in specs.items():
        if key == "__metadata__":
            problems.append("tensor '__metadata__': the name is reserved")
        try:
            sizes[key] = _byte_size(dtype, shape)
        except ValueError as error:
            problems.append(f"tensor {_show(key)}: {error}")
    raise_listed(FileError, f"{path}: cannot write:", problems)
    tensors: dict[str, TensorInfo] = {}
    sorted_metadata = dict(sorted(metadata.items()))
    # Format the text directly: an object a tensor for `json` would cost more than all the rest.
    entries = [f'"__metadata__":{_json(sorted_metadata)}'] if metadata else []
    position = 0
    for key in sorted(specs, key=lambda key: (-_RANK[specs[key][0]], key)):
        dtype, shape = specs[key][0], tuple(specs[key][1])
        stop = position + sizes[key]
        tensors[key] = TensorInfo(dtype, shape, position, stop)
        axes = ",".join(map(str, shape))
        entries.append(f'{_json(key)}:{{"dtype":"{dtype}","shape":[{axes}],"data_offsets":[{position},{stop}]}}')
        position = stop
    try:
        text = ("{" + ",".join(entries) + "}").encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(
            f"{path}: cannot write: a name is not valid text: {_show(error.object[error.start : error.end])}"
        ) from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FileError(
            f"{path}: cannot write: header: expected at most {MAX_HEADER} bytes, found {len(text)}; "
            "shorten the metadata or the names, since no reader opens such a file"
        )
    raw = len(text).to_bytes(8, "little") + text
    return raw, Header(tensors, sorted_metadata, len(raw), len(raw) + position)


# ---------------------------------------------------------------- safetensors


# Bytes of tensors that one thread reads before it takes more: small enough to share a file among several threads.
_JOB_BYTES = 16 << 20


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and validate the header of a file. Reads no tensor and imports neither numpy nor jax.

    Raises:
        FormatError: not a valid safetensors file; names each invalid tensor.
        FileError: missing, a directory, or not permitted.
    """
    with TensorFile(path) as file:
        return file.header


class TensorFile(TensorSource):
    """An open file: `[key]` reads a tensor into a new array (C order, 64-byte aligned).

    The file keeps its descriptor, so the contents of a replaced file are never mixed. If an object of a store is
    replaced, the end of the `with` block raises `FormatError`. Use as a context manager, or call `close`. Several
    threads may read at once.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file at a path or an address. Raises the errors of `read_header`."""
        self._file = location.open_source(location.to_location(path))
        self.path: str = self._file.path
        self.source: str = self.path
        try:
            size = self._file.size
            first = self._file.read_exactly("header length", min(size, 8), 0)
            if problem := _length_problem(first, size):
                raise FormatError(f"{self.path}: not a valid safetensors file: {problem}")
            self.header: Header = parse(
                self.path, self._file.read_exactly("header", int.from_bytes(first, "little"), 8), size
            )
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
        data = aligned_empty(info.nbytes) if memory is None else memory[: info.nbytes]
        self._file.read_into(f"tensor {key!r}", data.data, self.header.data_start + info.start)
        return data.view(dtype).reshape(info.shape)

    def read_block(self, keys: Sequence[str], memory: np.ndarray) -> bool:
        """Read tensors that follow one another in the file, by one call; see `TensorSource.read_block`."""
        infos = [self._find(key)[0] for key in keys]
        if any(a.stop != b.start for a, b in itertools.pairwise(infos)) or infos[-1].stop - infos[0].start != len(
            memory
        ):
            return False
        label = f"tensors {keys[0]!r} to {keys[-1]!r}"
        self._file.read_into(label, memory.data, self.header.data_start + infos[0].start)
        return True

    @property
    def kinds(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtypes, as the file names them, and the shapes by key."""
        return {key: (info.dtype, info.shape) for key, info in self.header.tensors.items()}

    def nbytes(self, key: str) -> int:
        """Return the number of bytes of one tensor, also of a dtype that numpy lacks."""
        return self.header.tensors[key].nbytes

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes by key.

        Raises:
            FormatError: numpy has no such dtype.
        """
        kinds = {info[:2]: key for key, info in self.header.tensors.items()}  # few, so one spec for many tensors
        specs = {(dtype, shape): TensorSpec(shape, self._dtype(key)) for (dtype, shape), key in kinds.items()}
        return {key: specs[info[:2]] for key, info in self.header.tensors.items()}

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

        return local_files.read_region(read_at, info.shape if shape is None else shape, dtype, slices)

    def read_many(self, keys: Iterable[str], progress: Callable[[int], None] = lambda _: None) -> dict[str, np.ndarray]:
        """Return several tensors; see `TensorSource`. Several threads read them."""
        order = sorted(set(keys), key=lambda key: self.header.tensors[key][2:])
        jobs = local_files.split_by_size(order, self.nbytes, _JOB_BYTES)
        # Allocated here, in the caller's thread; see `local_files.run_in_order`.
        tasks = (
            functools.partial(list, map(self.read_into, job, [aligned_empty(self.nbytes(k)) for k in job]))
            for job in jobs
        )
        out: dict[str, np.ndarray] = {}
        with contextlib.closing(local_files.run_in_order(tasks, len(jobs))) as results:
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


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all tensors of a file into memory that XLA's CPU client uses without a copy; see `read_header`."""
    with TensorFile(path) as file:
        return file.read_many(file)


def checked_bits(path: str, key: str, value: np.ndarray, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Check an array against its spec and return its bits as integers, which numpy copies fastest."""
    array = np.asarray(value)
    name = NAMES.get(array.dtype.name, array.dtype.name)
    if name != dtype or array.shape != tuple(shape):
        raise MismatchError(
            f"{path}: cannot write: tensor {key!r}: expected {dtype} {list(shape)}, found {name} {list(array.shape)}"
        )
    return little_bits(array)


def little_bits(array: np.ndarray) -> np.ndarray:
    """Return an array's bits in the file's byte order, as unsigned integers."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def write(
    path: str | os.PathLike[str],
    specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]],
    get: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Callable[[int], None] = lambda _: None,
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
    progress: Callable[[int], None] = lambda _: None,
    ahead: bool = False,
) -> Header:
    """Write an open file, one of several that are replaced together; see `write`.

    With `ahead`, a thread calls `get` for the next two tensors while one is written.
    """
    first, header = encode(writer.path, named_specs(specs), metadata or {})
    writer.write(first)
    keys = header.tensors
    with contextlib.closing(local_files.map_ahead(get, keys) if ahead else (get(key) for key in keys)) as values:
        for key, info in keys.items():
            _write_array(writer, checked_bits(writer.path, key, next(values), info.dtype, info.shape))
            progress(info.nbytes)
    return header


def _write_array(writer: atomic.Writer, bits: np.ndarray) -> None:
    """Append an array. On return no name holds its memory, which `get` may need for the next tensor."""
    for part in local_files.contiguous_parts(bits):
        writer.write(part)


def named_specs(specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the specs with safetensors' dtype names."""
    return {
        key: (dtype if isinstance(dtype, str) and dtype.isupper() else dtype_name(dtype), tuple(shape))
        for key, (dtype, shape) in specs.items()
    }
