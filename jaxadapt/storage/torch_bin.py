"""PyTorch `.bin`/`.pt` state dicts, read and written without torch.

Both the zip format and the one before PyTorch 1.6 are read; the zip format, as `torch.load(weights_only=True)` reads
it, is written. The bounds of storages are checked, and a file cannot cause allocations much larger than itself.

No code in a file is executed. Python's unpickler calls the functions that a file names. This reader builds only
strings, numbers, tuples, lists and dicts. It accepts only a list of names, those that PyTorch's state dicts use, and
passes the arguments of a call to its own `_rebuild`. Any other name or opcode is an error. `pickletools` only splits
the bytes into opcodes; it executes nothing.

A file that is written consists of uncompressed records: `data.pkl`, a pickle that rebuilds the tensors from storages,
`byteorder`, one record for each storage, and `version`. Each storage holds one tensor in C order and begins at a
multiple of 64 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TypeVar, cast

from jaxadapt.arrays.tensor_source import NAMES, Whole, aligned_empty, numpy_dtype
from jaxadapt.core import paths
from jaxadapt.core.errors import FormatError, raise_as, raise_listed
from jaxadapt.core.lazy import np, npt
from jaxadapt.storage import atomic, location, safetensors
from jaxadapt.storage.local_files import LocalFile, file_error, flat_bytes

# ---------------------------------------------------------------- pickle ops


class UnsupportedPickle(Exception):
    """The bytes are not a pickle, or need more than data. The caller adds the file's name."""


@dataclass(frozen=True, slots=True)
class Global:
    """An allowed name: data, never the object of that name."""

    name: str


_MARK = object()


def load(stream: io.BytesIO | _Stream, persistent: Callable[[object], object]) -> object:
    """Read one pickle, leaving the stream at its end.

    Args:
        stream: buffered bytes, whose `read` allocates no more bytes than the file has, whatever size is requested.
        persistent: called with a persistent id (a storage of PyTorch); returns its value.

    Raises:
        UnsupportedPickle: the pickle uses another name or opcode (which the error names), or is damaged.

    >>> import io, pickle
    >>> load(io.BytesIO(pickle.dumps({"a": (1, [2.5])}, 2)), lambda id: None)
    {'a': (1, [2.5])}
    >>> load(io.BytesIO(pickle.dumps(print)), lambda id: None)
    Traceback (most recent call last):
    jaxadapt.storage.torch_bin.UnsupportedPickle: it refers to 'builtins.print', which no state dict needs; ...
    """
    stack: list[object] = []
    memo: dict[object, object] = {}
    try:
        for opcode, argument, _ in pickletools.genops(cast("bytes", stream)):  # accepts streams too
            code, taken = opcode.name, _take(stack, opcode.stack_before)
            if code == "STOP":
                return taken[0]
            if code in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1] if stack else None
            elif code == "MEMOIZE":
                memo[len(memo)] = taken[0]
                stack += taken
            elif code in ("BINGET", "LONG_BINGET"):
                if argument not in memo:
                    raise UnsupportedPickle(f"the pickle recalls value {argument}, which it never stored")
                stack.append(memo[argument])
            elif code == "BINPERSID":
                stack.append(persistent(taken[0]))
            elif code in _VALUES:
                stack.append(_VALUES[code](argument, taken))
            elif code not in ("PROTO", "FRAME"):
                raise UnsupportedPickle(f"it uses the opcode {code}, which no state dict needs")
    except (ValueError, EOFError, OverflowError) as error:  # raised by genops for damaged bytes
        raise UnsupportedPickle(f"the pickle is damaged: {error}") from error
    raise UnsupportedPickle("the pickle has no end")


def _take(stack: list[object], kinds: Sequence[pickletools.StackObject]) -> list[object]:
    """Take the values that an opcode uses from the stack, those of a group one by one."""
    taken: list[object] = []
    for kind in reversed(kinds):
        if kind is pickletools.stackslice:
            while stack and stack[-1] is not _MARK:
                taken.append(stack.pop())
        elif kind is pickletools.markobject:
            if not stack:
                raise UnsupportedPickle("the pickle closes a group that was not opened")
            stack.pop()
        elif not stack or stack[-1] is _MARK:
            raise UnsupportedPickle("the pickle takes a value from an empty stack")
        else:
            taken.append(stack.pop())
    return taken[::-1]


def _find(module: object, name: object) -> Global:
    """Return an allowed name as data."""
    full = f"{module}.{name}" if type(module) is str and type(name) is str else "(not a name)"
    if full not in _ALLOWED:
        raise UnsupportedPickle(f"it refers to {full!r}, which no state dict needs; nothing in a file is executed")
    return Global(full)


def _fill(code: str, target: object, *items: object) -> object:
    """Add items to a list or a dict, and return it."""
    kind = list if code.startswith("APPEND") else dict
    if type(target) is not kind:
        raise UnsupportedPickle(f"the pickle adds items to a value that is not a {kind.__name__}")
    if code.startswith("APPEND"):
        cast("list[object]", target).extend(items)
    elif code != "BUILD":  # which sets attributes of an OrderedDict, such as `_metadata`: no tensors
        if len(items) % 2:
            raise UnsupportedPickle("the pickle sets a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys are not needed, and hashing deeply nested tuples would overflow the C stack.
            if type(key) is not str and type(key) is not int:
                raise UnsupportedPickle(f"expected keys that are strings, found one of type {type(key).__name__}")
            cast("dict[str | int, object]", target)[key] = value
    return target


def _call(function: object, arguments: object) -> object:
    """Return as data the value that a call of a function of PyTorch would return."""
    if type(function) is not Global or type(arguments) is not tuple:
        raise UnsupportedPickle("the pickle calls a value that is not a function")
    return _rebuild(function.name, cast("tuple[object, ...]", arguments))


_VALUES: Mapping[str, Callable[[object, list[object]], object]] = {
    "NONE": lambda argument, taken: None,
    "NEWTRUE": lambda argument, taken: True,
    "NEWFALSE": lambda argument, taken: False,
    "MARK": lambda argument, taken: _MARK,
    "EMPTY_DICT": lambda argument, taken: {},
    "EMPTY_LIST": lambda argument, taken: [],
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
         "BINSTRING", "SHORT_BINSTRING"),
        lambda argument, taken: argument,
    ),
    **dict.fromkeys(
        ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), lambda argument, taken: tuple(taken)
    ),
    "APPEND": lambda argument, taken: _fill("APPEND", *taken),
    "APPENDS": lambda argument, taken: _fill("APPENDS", *taken),
    "SETITEM": lambda argument, taken: _fill("SETITEM", *taken),
    "SETITEMS": lambda argument, taken: _fill("SETITEMS", *taken),
    "BUILD": lambda argument, taken: _fill("BUILD", *taken),
    "GLOBAL": lambda argument, taken: _find(*str(argument).split(" ", 1)),
    "STACK_GLOBAL": lambda argument, taken: _find(*taken),
    "REDUCE": lambda argument, taken: _call(*taken),
}  # fmt: skip
"""{opcode: its value, from the argument of the opcode and the values that it takes}. All other opcodes are refused."""


# ---------------------------------------------------------------- torch bin


T = TypeVar("T")

# By PyTorch's names of dtypes. safetensors lacks C128.
_DTYPES = {**NAMES, "complex128": "C128"}
SIZES = {name: 16 if name == "C128" else safetensors.BITS[name] // 8 for name in _DTYPES.values()}
"""The bytes of an element by dtype."""
STORAGES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16",
    "IntStorage": "I32", "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "FloatStorage": "F32", "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
}  # fmt: skip
"""{PyTorch's name of a typed storage: dtype}."""
UNTYPED = "torch.storage.UntypedStorage"
_ALLOWED = frozenset({
    "collections.OrderedDict", UNTYPED, *(f"torch.{name}" for name in (*STORAGES, *_DTYPES)),
    *(f"torch._utils._rebuild_{name}" for name in (
        "tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state",
    )),
})  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the format before PyTorch 1.6
_PROTOCOL = 1001
# Expanded or shared tensors may exceed their storage by this factor. More is treated as an attack on memory.
_MAX_GROWTH = 16
_FREE_GROWTH = 1 << 20
_INTEGER_LIMIT = 2**63  # for every count in a file
_MAX_AXES = 64
_MAX_PARTS = 16  # arguments of PyTorch's functions; known files use up to 8


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str | None  # None: untyped, counted in bytes
    total: int  # elements in the file
    offset: int = 0  # the view of the elements [offset, offset + count)
    count: int = 0


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int  # in elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def _check_naturals(value: object, name: str) -> tuple[int, ...]:
    """Check a tuple of integers that fit 63 bits. It must be short, since a file can make us read it repeatedly."""
    items = cast("tuple[object, ...]", value) if type(value) is tuple else (None,)
    if len(items) > _MAX_AXES:
        raise UnsupportedPickle(f"{name}: expected at most {_MAX_AXES} integers, found {len(items)}")
    if not all(type(item) is int and item >= 0 for item in items):
        raise UnsupportedPickle(f"expected {name} of integers >= 0, found a negative integer or another type")
    integers = cast("tuple[int, ...]", items)
    if any(item >= _INTEGER_LIMIT for item in integers):
        raise UnsupportedPickle(f"{name}: expected integers below 2^63, found one that overflows 63 bits")
    return integers


def _parse_storage(identity: object) -> _Storage:
    """Parse PyTorch's ("storage", type, key, location, count), in old files with a view (key, offset, count)."""
    parts = list(cast("tuple[object, ...]", identity)[:7]) if type(identity) is tuple else [None]
    if len(parts) not in (5, 6) or parts[0] != "storage":
        raise UnsupportedPickle(
            "expected the description of a storage, found other fields. If a whole module was saved,"
            " save its state_dict()"
        )
    kind, key = parts[1], parts[2]
    (total,) = _check_naturals((parts[4],), "a storage's size")
    dtype = STORAGES.get(kind.name.removeprefix("torch.")) if type(kind) is Global else None
    if type(key) is not str or type(kind) is not Global or (dtype is None and kind.name != UNTYPED):
        raise UnsupportedPickle(f"expected a storage's type and key, found {type(kind).__name__}, {type(key).__name__}")
    view = cast("tuple[object, ...]", (key, 0, total) if len(parts) == 5 or parts[5] is None else parts[5])
    offset, count = _check_naturals(view[1:] if type(view) is tuple and len(view) == 3 else None, "a view")
    if offset + count > total:
        raise UnsupportedPickle(f"storage {key!r}: a view ends beyond its {total} elements")
    return _Storage(key, dtype, total, offset, count)


def _rebuild(name: str, arguments: tuple[object, ...]) -> object:
    """Return as data the value that a function of PyTorch would build."""
    if len(arguments) > _MAX_PARTS:
        raise UnsupportedPickle(f"it calls {name!r} with {len(arguments)} arguments")
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name.startswith("torch._utils._rebuild_parameter") and arguments and type(arguments[0]) is _Tensor:
        return arguments[0]
    if name.startswith("torch._utils._rebuild_tensor") and len(arguments) >= 4 and type(arguments[0]) is _Storage:
        return _build_tensor(arguments[0], arguments[1:], has_dtype=name.endswith("_v3"))
    raise UnsupportedPickle(f"it calls {name!r} with arguments that PyTorch never uses")


def _build_tensor(storage: _Storage, arguments: tuple[object, ...], *, has_dtype: bool) -> _Tensor:
    # (offset, shape, strides, requires_grad, hooks[, dtype][, metadata])
    (offset,) = _check_naturals(arguments[:1], "an offset")
    shape, strides = _check_naturals(arguments[1], "a shape"), _check_naturals(arguments[2], "strides")
    rest = arguments[5:]
    dtype = storage.dtype
    if has_dtype:
        kind, rest = (rest[0] if rest else None), rest[1:]
        dtype = _DTYPES.get(kind.name.removeprefix("torch.")) if type(kind) is Global else None
    if dtype is None:
        raise UnsupportedPickle(f"storage {storage.key!r}: expected a dtype, found none")
    if any(rest) and not _is_plain(rest[0]):
        raise UnsupportedPickle(
            f"storage {storage.key!r}: expected a plain tensor, found a lazily conjugated or negated one"
        )
    if len(shape) != len(strides):
        raise UnsupportedPickle(f"expected as many strides as axes, found {len(strides)} and {len(shape)}")
    size = SIZES[dtype]
    limit = storage.count if storage.dtype is not None else storage.count // size
    if math.prod(max(dim, 1) for dim in shape) * size >= 2**63:
        raise UnsupportedPickle(f"storage {storage.key!r}: the shape {shape} overflows 63 bits")
    last = offset + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= limit:
        raise UnsupportedPickle(
            f"storage {storage.key!r}: a tensor of shape {shape}, strides {strides}, offset {offset} "
            f"ends beyond its {limit} elements"
        )
    return _Tensor(storage, dtype, offset, shape, strides)


def _is_plain(metadata: object) -> bool:
    """Return True if a tensor's metadata leaves its stored values unchanged."""
    flags = cast("dict[object, object]", metadata) if type(metadata) is dict else {None: True}
    return len(flags) <= _MAX_PARTS and not any(flags.values())


def _check_state_dict(value: object, path: str, size: int) -> dict[str, _Tensor]:
    if type(value) is not dict:
        raise FormatError(f"{path}: expected a state dict, found {_describe(value)}")
    problems: list[str] = []
    tensors: dict[str, _Tensor] = {}
    for key, item in cast("dict[object, object]", value).items():
        if type(key) is not str or any("\ud800" <= char <= "\udfff" for char in key):
            problems.append(f"{key!a}: expected a key of valid text")
        elif type(item) is not _Tensor:
            problems.append(f"{key!r}: expected a tensor, found {_describe(item)}")
        else:
            tensors[key] = item
    raise_listed(
        FormatError,
        f"{path}: expected a state dict of tensors only:",
        problems,
        "\nSave only the state dict of a training checkpoint",
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_GROWTH * size + _FREE_GROWTH:
        raise FormatError(f"{path}: the tensors claim {total} bytes, more than a file of {size} bytes can hold")
    return tensors


def _describe(value: object) -> str:
    if type(value) is dict:
        return "a dict"
    return "a tensor" if type(value) is _Tensor else f"a value of type {type(value).__name__}"


class _Zip:
    """The format since PyTorch 1.6: a zip file of uncompressed records in one folder."""

    def __init__(self, source: LocalFile) -> None:
        self._zip = zipfile.ZipFile(source.file)
        self._size = source.size
        names = self._zip.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(set(names)) < len(names):
            raise FormatError(f"{source.path}: expected a PyTorch file with one record data.pkl, found {len(roots)}")
        self._root = roots[0]
        order = self._record("byteorder") if self._root + "byteorder" in names else b"little"
        if order not in (b"little", b"big"):
            raise FormatError(f"{source.path}: record byteorder: expected little or big, found {order[:20]!r}")
        self.big_endian = order == b"big"
        self.state = load(io.BytesIO(self._record("data.pkl")), _parse_storage)

    def _record(self, name: str) -> bytes:
        with raise_as(zipfile.BadZipFile, f"record {name!r} is missing", KeyError):
            info = self._zip.getinfo(self._root + name)
        # torch stores records uncompressed; a compressed record could unpack to any size.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > self._size:
            raise zipfile.BadZipFile(f"record {name!r} is compressed, or claims more bytes than the file has")
        return self._zip.read(info)  # checks the CRC

    def storage(self, storage: _Storage) -> bytes:
        return self._record(f"data/{storage.key}")


class _Stream:
    """A file's bytes. Unlike `BufferedReader.read`, `read` allocates no more bytes than the file has."""

    def __init__(self, source: LocalFile) -> None:
        self.buffered: io.BufferedReader = io.BufferedReader(source.file)
        self._size = source.size
        self.readline: Callable[..., bytes] = self.buffered.readline

    def read(self, size: int, /) -> bytes:
        return self.buffered.read(min(size, self._size) if size >= 0 else self._size)


class _Legacy:
    """The format before PyTorch 1.6: five pickles, then the storages, each after its element count."""

    big_endian = False  # on any machine

    def __init__(self, source: LocalFile) -> None:
        self._source = source
        self._storages: dict[str, _Storage] = {}
        stream = _Stream(source)
        try:
            if load(stream, self._parse_storage) != _MAGIC:
                raise FormatError(
                    f"{source.path}: expected a PyTorch file, found a pickle that torch.save did not write"
                )
            # The version, the writer's type sizes (unused), the content, and the keys of the storages.
            version, _, self.state, self._keys = [load(stream, self._parse_storage) for _ in range(4)]
            self._start = stream.buffered.tell()
        finally:
            stream.buffered.detach()  # so that its destructor does not close the file
        if version != _PROTOCOL:
            raise FormatError(f"{source.path}: expected version {_PROTOCOL} of the format, found another version")

    def _parse_storage(self, identity: object) -> _Storage:
        storage = _parse_storage(identity)
        known = self._storages.setdefault(storage.key, storage)
        if (known.dtype, known.total) != (storage.dtype, storage.total):
            raise UnsupportedPickle(f"storage {storage.key!r} has two different descriptions")
        return storage

    @functools.cached_property
    def _offsets(self) -> dict[str, int]:
        """The offset of each storage in the file, by key."""
        offsets: dict[str, int] = {}
        offset = self._start
        for key in cast("list[object]", self._keys) if type(self._keys) is list else [None]:
            storage = self._storages.get(key) if type(key) is str else None
            if storage is None:
                raise FormatError(f"{self._source.path}: the list of its storages does not match its tensors")
            count = int.from_bytes(self._source.read_exactly(f"storage {key!r}", 8, offset), "little", signed=True)
            if count != storage.total:
                raise FormatError(
                    f"{self._source.path}: storage {key!r}: expected {storage.total} elements, found {count}"
                )
            offsets[storage.key] = offset + 8
            offset += 8 + _nbytes(storage)
        return offsets

    def storage(self, storage: _Storage) -> bytes:
        source, size = self._source, _nbytes(storage)
        offset = self._offsets.get(storage.key, source.size)
        if offset + size > source.size:
            raise FormatError(
                f"{source.path}: storage {storage.key!r}: expected {size} bytes at offset {offset}, "
                f"found a file of {source.size} bytes; the file is truncated"
            )
        return source.read_exactly(f"storage {storage.key!r}", size, offset)


def _nbytes(storage: _Storage) -> int:
    return storage.total * (SIZES[storage.dtype] if storage.dtype else 1)


def _load(path: str | os.PathLike[str], use: Callable[[_Zip | _Legacy, dict[str, _Tensor]], T]) -> T:
    """Open a file of either format and call `use` with its reader and tensors."""
    name = os.fspath(path)
    place = location.to_location(path)
    opened = location.fetch_object(place) if isinstance(place, location.Address) else LocalFile(name)
    with contextlib.closing(opened) as source:
        first = source.read_exactly("file", min(source.size, 16), 0)
        if first.startswith(b"version "):
            raise FormatError(f"{name}: found a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        if not first.startswith((b"PK\x03\x04", b"\x80")):
            raise FormatError(
                f"{name}: expected a PyTorch file (a zip file or a pickle), "
                f"found {source.size} bytes that begin with {first!r}"
            )
        try:
            reader = (_Zip if first.startswith(b"PK") else _Legacy)(source)
            return use(reader, _check_state_dict(reader.state, name, source.size))
        except UnsupportedPickle as error:
            raise FormatError(f"{name}: not a state dict: {error}") from error
        # raised by zipfile for damaged, encrypted and unusual files
        except (zipfile.BadZipFile, struct.error, EOFError, ValueError, RuntimeError, OverflowError) as error:
            raise FormatError(f"{name}: not a valid PyTorch file: {error or type(error).__name__}") from error
        except OSError as error:
            if error.errno == errno.EINVAL:  # a damaged offset, too large to seek to
                raise FormatError(
                    f"{name}: not a valid PyTorch file: a record is beyond the end of the file"
                ) from error
            raise file_error("read", name, error) from error


def keys_and_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the (dtype, shape) of every tensor, with safetensors' dtype names. Reads no tensor, imports no numpy.

    Raises:
        FormatError, FileError: see `read`.
    """
    return _load(path, lambda _, tensors: {key: (item.dtype, item.shape) for key, item in tensors.items()})


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all tensors of a PyTorch state dict as new C-contiguous arrays, in the order of the dict.

    Raises:
        FormatError: not a PyTorch file, damaged, truncated, or not only tensors, such as a reference to code (the error
            names it; it is not executed).
        FileError: missing, a directory, or not permitted.
    """
    name = os.fspath(path)
    return _load(path, lambda reader, tensors: _to_arrays(reader, tensors, name))


def open_tensors(path: str | os.PathLike[str]) -> Whole:
    """Return the tensors of a state dict, all read at the first access. Raises the errors of `read`."""
    return Whole(os.fspath(path), keys_and_shapes(path), functools.partial(read, path))


def _to_arrays(reader: _Zip | _Legacy, tensors: Mapping[str, _Tensor], path: str) -> dict[str, np.ndarray]:
    users = paths.group((tensor.storage.key, key) for key, tensor in tensors.items())
    arrays: dict[str, np.ndarray] = {}
    for shared in users.values():  # each storage is read once, and released before the next
        raw = reader.storage(tensors[shared[0]].storage)
        for key in shared:
            storage = tensors[key].storage
            if len(raw) != _nbytes(storage):
                raise FormatError(
                    f"{path}: tensor {key!r}: storage {storage.key!r}: expected {_nbytes(storage)} bytes, "
                    f"found {len(raw)}"
                )
            arrays[key] = _to_array(raw, tensors[key], big_endian=reader.big_endian)
    return {key: arrays[key] for key in tensors}


def _to_array(raw: bytes, tensor: _Tensor, *, big_endian: bool) -> np.ndarray:
    dtype = np.dtype("complex128") if tensor.dtype == "C128" else numpy_dtype(tensor.dtype)
    out = aligned_empty(tensor.nbytes).view(dtype).reshape(tensor.shape)
    if not out.size:
        return out
    storage = tensor.storage
    begin = storage.offset * (SIZES[storage.dtype] if storage.dtype else 1) + tensor.offset * dtype.itemsize
    # `_build_tensor` has checked the bounds. Axes of length 1 may have any stride.
    strides = [
        stride * dtype.itemsize if dim > 1 else 0 for dim, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    out[...] = np.ndarray(tensor.shape, dtype, raw, begin, strides)
    if big_endian:
        part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
        out.reshape(-1).view(f"u{part}").byteswap(inplace=True)
    return out


# ---------------------------------------------------------------- writing


_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
# Dtypes that came after PyTorch's typed storages: their storage is untyped, and the tensor states the dtype.
_LATER = {dtype: name for name, dtype in NAMES.items() if dtype not in _STORAGE_OF}
_ROOT = "adapter_model"
_ALIGNMENT = 64
_LOCAL_HEADER = 30 + 20 + 4  # bytes beside the name: the fields, those of ZIP64, and the header of the padding


def write_to(
    writer: atomic.Writer,
    specs: Mapping[str, tuple[npt.DTypeLike, Sequence[int]]],
    get: Callable[[str], np.ndarray],
    progress: Callable[[int], None] = lambda _: None,
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
    named = safetensors.named_specs(specs)
    with zipfile.ZipFile(cast("IO[bytes]", writer), "w") as archive:
        _add(archive, writer.size, "data.pkl", _pickle(named))
        _add(archive, writer.size, "byteorder", b"little")
        for number, (key, spec) in enumerate(named.items()):
            data = flat_bytes(safetensors.checked_bits(writer.path, key, get(key), *spec))
            _add(archive, writer.size, f"data/{number}", data)
            progress(len(data))
        _add(archive, writer.size, "version", b"3\n")
    return writer.size


def _add(archive: zipfile.ZipFile, offset: int, name: str, data: bytes | memoryview) -> None:
    """Append an uncompressed record at an offset; its data begins at a multiple of 64 bytes."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    padding = -(offset + _LOCAL_HEADER + len(info.filename)) % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        record.write(data)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    """Return the pickle opcode of an integer.

    >>> import pickletools
    >>> [next(pickletools.genops(_integer(n) + b"."))[1] for n in (-(1 << 31), (1 << 31) - 1, 1 << 31, -(1 << 40))]
    [-2147483648, 2147483647, 2147483648, -1099511627776]
    """
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
        typed = dtype in _STORAGE_OF
        size = count if typed else count * SIZES[dtype]
        kind = f"torch.{_STORAGE_OF[dtype]}" if typed else UNTYPED
        storage = _tuple([_text("storage"), _global(kind), _text(str(number)), _text("cpu"), _integer(size)]) + b"Q"
        fields = [
            storage, _integer(0), _tuple([*map(_integer, shape)]), _tuple([*map(_integer, strides)]), b"\x89",
            _global("collections.OrderedDict") + b")R", *([] if typed else [_global(f"torch.{_LATER[dtype]}")]),
        ]  # fmt: skip
        parts.append(_text(key) + _global(f"torch._utils._rebuild_tensor_v{2 if typed else 3}") + _tuple(fields) + b"R")
    return b"".join([*parts, b"u."])
