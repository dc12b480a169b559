"""Named tensors that are read on demand, their dtypes, and views over them.

A `TensorSource` is the interface of files, of views over files, and of encoded leaves. Views give the tensors of other
sources new names, or transpose, cut, stack and cast them. Dtypes have safetensors' names and numpy's. numpy is imported
only with the first tensor.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxadapt.core.errors import ConfigError, FileError, FormatError, MismatchError, problems_text
from jaxadapt.core.lazy import np, npt

# ---------------------------------------------------------------- dtypes


_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64",
    "I64": "int64", "U64": "uint64",
    "BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""{safetensors' name: numpy's}; those of the last two lines are of ml_dtypes."""
NAMES = {name: code for code, name in _DTYPES.items()}
_FLOATS = tuple(name for name in NAMES if name.startswith(("float", "bfloat")) and name != "float8_e8m0fnu")
_SPELLINGS = {NAMES[name].lower(): name for name in _FLOATS} | {f"fp{bits}": f"float{bits}" for bits in (16, 32, 64)}
"""{spelling: name}: safetensors' names in lower case, and PyTorch's and transformers' short ones."""


@functools.cache
def numpy_dtype(name: str) -> np.dtype:
    """Return the numpy dtype of a safetensors dtype name.

    Raises:
        FormatError: numpy has no such dtype (the 4- and 6-bit types, whose elements share bytes).

    >>> numpy_dtype("BF16"), numpy_dtype("F32")
    (dtype(bfloat16), dtype('float32'))
    """
    import ml_dtypes

    if name not in _DTYPES:
        raise FormatError(f"dtype {name}: no numpy array can hold it; expected one of {', '.join(_DTYPES)}")
    return np.dtype(getattr(ml_dtypes, _DTYPES[name], _DTYPES[name]))


def dtype_name(dtype: npt.DTypeLike) -> str:
    """Return the safetensors name of a numpy dtype of either byte order.

    Raises:
        FileError: the format has no such dtype.

    >>> dtype_name("float16")
    'F16'
    """
    name = np.dtype(dtype).name
    if name not in NAMES:
        raise FileError(f"dtype {name}: safetensors files cannot hold it; convert to one of {', '.join(NAMES)}")
    return NAMES[name]


def float_dtype(dtype: Any, option: str = "dtype") -> np.dtype:
    """Return the floating-point dtype that a caller names; "bf16", "fp16" and safetensors' names are accepted too.

    Raises:
        ConfigError: it is no dtype, or one of integers or booleans; `option` names the argument in the message.

    >>> float_dtype("bf16"), float_dtype("float16")
    (dtype(bfloat16), dtype('float16'))
    """
    name = dtype.lower() if isinstance(dtype, str) else None
    name = _SPELLINGS.get(name or "", name)
    if name not in _FLOATS:
        try:
            name = np.dtype(dtype).name
        except (TypeError, ValueError):
            name = None
    if name not in _FLOATS:
        raise ConfigError(f"{option}={dtype!r}: expected a floating-point dtype: {', '.join(_FLOATS)}")
    return numpy_dtype(NAMES[name])


def is_float(dtype: npt.DTypeLike) -> bool:
    """Return True for a dtype of floating-point numbers, also of the 8- and 16-bit ones that numpy lacks."""
    return np.dtype(dtype).kind == "f" or np.dtype(dtype).name.startswith(("bfloat", "float"))


def common_dtype(dtypes: Iterable[npt.DTypeLike]) -> np.dtype:
    """Return the dtype that represents the values of all `dtypes`; where floats differ, float32 or wider.

    NumPy's own promotion of the 8- and 16-bit floats that NumPy lacks depends on the version of ml_dtypes.

    >>> common_dtype(["float16", "float16"]), common_dtype(["float16", "bfloat16"])
    (dtype('float16'), dtype('float32'))
    """
    distinct = {np.dtype(dtype) for dtype in dtypes}
    if len(distinct) == 1:
        return distinct.pop()
    return np.result_type(*(np.promote_types(d, np.float32) if is_float(d) else d for d in distinct))


ALIGNED = 64
"""XLA's CPU client uses memory without a copy if its address is a multiple of this number of bytes."""


def bitwise_same(a: Any, b: Any) -> bool:
    """Return True if two arrays are bitwise equal, so that a NaN equals itself and 0.0 differs from -0.0."""
    x, y = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return (x.dtype, x.shape) == (y.dtype, y.shape) and np.array_equal(x.view(np.uint8), y.view(np.uint8))


def aligned_empty(nbytes: int) -> np.ndarray:
    """Return an uninitialized, aligned uint8 array of `nbytes`."""
    raw = np.empty(nbytes + ALIGNED - 1, np.uint8)
    skip = -raw.__array_interface__["data"][0] % ALIGNED  # ten times cheaper than raw.ctypes.data
    return raw[skip : skip + nbytes]


def aligned_block(sizes: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Return an uninitialized uint8 array, and the aligned starts of its parts with these sizes in bytes, in order."""
    *starts, end = itertools.accumulate((size + -size % ALIGNED for size in sizes), initial=0)
    return aligned_empty(end), starts


# ---------------------------------------------------------------- the interface


Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
"""{key: (dtype, shape)}, with safetensors' names of dtypes."""


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: Any


class TensorSource(Mapping[str, Any]):
    """Tensors by key, each read or computed when it is needed.

    A subclass defines `specs` and `read`, and those of the other methods that it can do with less memory or fewer
    bytes. Several threads may read at once.
    """

    source: str = "these tensors"
    """The origin of the tensors, for messages."""

    @functools.cached_property
    @abstractmethod
    def specs(self) -> Mapping[str, TensorSpec]:
        """The shapes and dtypes by key. No tensor is read."""

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by key. No tensor is read."""
        return {key: tuple(spec.shape) for key, spec in self.specs.items()}

    @property
    def kinds(self) -> Kinds:
        """The dtypes, under safetensors' names, and the shapes by key. Of files, also dtypes that NumPy lacks."""
        return {key: (dtype_name(spec.dtype), tuple(spec.shape)) for key, spec in self.specs.items()}

    @abstractmethod
    def read(self, key: str) -> Any:
        """Return one tensor. Raises `KeyError` if there is none of this name."""

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        """Return one tensor on the host.

        It is in the first bytes of `memory` (uint8, aligned for the dtype), or elsewhere if that takes no copy.
        """
        return np.asarray(self.read(key))

    def read_block(self, keys: Sequence[str], memory: np.ndarray) -> bool:
        """Read tensors into `memory` (uint8), one after another; return False, and do nothing, if they are not so here.

        They are so in a file that holds exactly these tensors in this order in one place.
        """
        return False

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        """Return a part of one tensor on the host.

        Args:
            key: the tensor.
            slices: one slice for each axis. Missing slices at the end select whole axes.
            shape: another shape for the same elements in C order, to which `slices` refer.
        """
        array = self.read_into(key, None)
        return array.reshape(array.shape if shape is None else shape)[tuple(slices)]

    def read_many(self, keys: Iterable[str], progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Return several tensors. `progress` is called with the number of bytes read since its last call."""
        out: dict[str, Any] = {}
        for key in keys:
            out[key] = self.read(key)
            progress(out[key].nbytes)
        return out

    def nbytes(self, key: str) -> int:
        """Return the number of bytes of one tensor. No tensor is read."""
        shape, dtype = self.specs[key]
        return math.prod(shape) * dtype.itemsize

    def __getitem__(self, key: str) -> Any:
        return self.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, key: object) -> bool:
        return key in self.specs  # Mapping.__contains__ would read the tensor


class Arrays(TensorSource):
    """Arrays in memory."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: TensorSpec(tuple(x.shape), np.dtype(x.dtype)) for key, x in self._arrays.items()}

    def read(self, key: str) -> Any:
        return self._arrays[key]


def as_source(tensors: Mapping[str, Any]) -> TensorSource:
    """Return a source, or wrap the arrays in memory of another mapping."""
    return tensors if isinstance(tensors, TensorSource) else Arrays(tensors)


class Whole(TensorSource):
    """Tensors that can only be read together: all of them are, at the first access."""

    def __init__(self, source: str, kinds: Kinds, read: Callable[[], Mapping[str, Any]]) -> None:
        """Create a source of the tensors that `read` returns."""
        self.source: str = source
        self._kinds, self._read = kinds, read

    @property
    def kinds(self) -> Kinds:
        return self._kinds

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: TensorSpec(shape, numpy_dtype(dtype)) for key, (dtype, shape) in self._kinds.items()}

    @functools.cached_property
    def _tensors(self) -> Mapping[str, Any]:
        return self._read()

    def read(self, key: str) -> Any:
        return self._tensors[key]


# ---------------------------------------------------------------- views


class View(TensorSource):
    """Tensors of one or several sources under new names."""

    def __init__(self, source: str, origins: Mapping[str, tuple[TensorSource, str]]) -> None:
        """Create a view; `origins` maps each key to the source of the tensor and to its key there."""
        self.source = source
        self._origins = origins

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: part.specs[name] for key, (part, name) in self._origins.items()}

    def read(self, key: str) -> Any:
        part, name = self._origins[key]
        return part.read(name)

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        part, name = self._origins[key]
        return part.read_into(name, memory)

    def read_block(self, keys: Sequence[str], memory: np.ndarray) -> bool:
        parts = [self._origins[key] for key in keys]
        (first, _), *_ = parts
        return all(part is first for part, _ in parts) and first.read_block([name for _, name in parts], memory)

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        part, name = self._origins[key]
        return part.read_slice(name, slices, shape)


def combine(source: str, parts: Sequence[TensorSource]) -> View:
    """Return the tensors of several sources; `source` names them in messages."""
    return View(source, {key: (part, key) for part in parts for key in part})


def rename(tensors: TensorSource, names: Mapping[str, str]) -> View:
    """Return tensors under new names, from `{new name: name}`. One tensor may have several new names."""
    return View(tensors.source, {key: (tensors, name) for key, name in names.items()})


class Derived(TensorSource):
    """Tensors that are made from others when they are read."""

    def __init__(
        self,
        source: str,
        keys: Iterable[str],
        spec: Callable[[str], TensorSpec],
        read: Callable[[str, Sequence[slice]], np.ndarray],
    ) -> None:
        """Create a source; `spec` returns the shape and dtype of a key's tensor, and `read` a part of the tensor."""
        self.source: str = source
        self._keys, self._spec, self._read = keys, spec, read

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: self._spec(key) for key in self._keys}

    def read(self, key: str) -> np.ndarray:
        return self._read(key, ())

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        if shape is not None and tuple(shape) != self.specs[key].shape:
            return super().read_slice(key, slices, shape)
        return self._read(key, slices)


def _replace(tensors: TensorSource, replaced: set[str], new: TensorSource, names: Mapping[str, str]) -> View:
    origins = {key: (tensors, key) for key in tensors if key not in replaced} | {
        key: (tensors, name) for key, name in names.items()
    }
    return View(tensors.source, origins | {key: (new, key) for key in new})


def transpose(tensors: TensorSource, names: Mapping[str, str]) -> TensorSource:
    """Return the transposes of matrices, from `{new name: name}`; each is transposed when it is read."""

    def spec(key: str) -> TensorSpec:
        shape, dtype = tensors.specs[names[key]]
        return TensorSpec(shape[::-1], dtype)

    def read(key: str, slices: Sequence[slice]) -> np.ndarray:
        padded = (*slices, *(slice(None) for _ in range(2 - len(slices))))
        values = tensors.read_slice(names[key], padded[::-1])
        # As integers: numpy copies the 16-bit floats of other packages element by element.
        return np.ascontiguousarray(values.view(f"u{values.itemsize}").T).view(values.dtype)

    return Derived(tensors.source, names, spec, read)


def cut(tensors: TensorSource, parts: Mapping[str, tuple[str, tuple[slice, ...]]]) -> View:
    """Replace some tensors by their parts, from `{new name: (name, slices)}`. Parts are cut when they are read."""

    def spec(key: str) -> TensorSpec:
        name, slices = parts[key]
        shape, dtype = tensors.specs[name]
        sizes = [len(range(size)[one]) for size, one in zip(shape, slices, strict=False)]
        return TensorSpec((*sizes, *shape[len(slices) :]), dtype)

    def read(key: str, slices: Sequence[slice]) -> np.ndarray:
        return tensors.read_slice(*parts[key])[tuple(slices)]

    return _replace(tensors, {name for name, _ in parts.values()}, Derived(tensors.source, parts, spec, read), {})


def stack(tensors: TensorSource, rows: Mapping[str, Sequence[Sequence[str]]], names: Mapping[str, str]) -> View:
    """Replace tensors by stacks of them, and rename others. Stacks are assembled when they are read.

    Args:
        tensors: the tensors.
        rows: by new name, the rows of a stack: one index of the new first axis each, its tensors concatenated along
            their first axis.
        names: `{new name: name}` of the tensors to rename.

    Raises:
        MismatchError: the rows of a stack differ in their shapes or dtypes.
    """

    def spec(key: str) -> TensorSpec:
        kinds = {tuple(tensors.specs[name] for name in row) for row in rows[key]}
        kind = next(iter(kinds))
        if len(kinds) > 1 or len({(spec.shape[1:], spec.dtype) for spec in kind}) > 1:
            found = sorted({f"{spec.dtype.name} {list(spec.shape)}" for row in kinds for spec in row})
            raise MismatchError(
                f"{tensors.source}: cannot stack the tensors of {key}: expected equal shapes and dtypes, found"
                f" {problems_text(found)}"
            )
        return TensorSpec((len(rows[key]), sum(spec.shape[0] for spec in kind), *kind[0].shape[1:]), kind[0].dtype)

    def read(key: str, slices: Sequence[slice]) -> np.ndarray:
        # Only slices of the first two axes save reading.
        whole, dtype = new.specs[key]
        padded = [*slices, *(slice(None) for _ in whole[len(slices) :])]
        chosen = rows[key][padded[0]]
        first, last, _ = padded[1].indices(whole[1])
        size = math.prod(whole[2:]) * len(chosen) * (last - first)
        out = aligned_empty(size * dtype.itemsize).view(dtype).reshape(len(chosen), last - first, *whole[2:])
        for values, row in zip(out, chosen, strict=True):
            offset = 0
            for name in row:
                length = tensors.specs[name].shape[0]
                overlap = slice(max(first - offset, 0), min(last - offset, length))
                if overlap.start < overlap.stop:
                    begin = offset + overlap.start - first
                    values[begin : offset + overlap.stop - first] = tensors.read_slice(name, (overlap,))
                offset += length
        return out[(slice(None), slice(None, None, padded[1].step), *padded[2:])]

    new = Derived(tensors.source, rows, spec, read)
    stacked = {name for rows_of_one in rows.values() for row in rows_of_one for name in row}
    return _replace(tensors, stacked | set(names.values()), new, names)


def cast(tensors: Mapping[str, Any], dtype: Any) -> TensorSource:
    """Return tensors with those of floats in another dtype; each is cast when it is read.

    Reading raises `MismatchError` if finite values are NaN or infinite in that dtype.
    """
    source = as_source(tensors)

    def spec(key: str) -> TensorSpec:
        shape, own = source.specs[key]
        return TensorSpec(shape, dtype if is_float(own) else own)

    def read(key: str, slices: Sequence[slice]) -> np.ndarray:
        from jaxadapt.arrays import regions  # imports JAX, which only a cast needs

        values = np.asarray(source.read_slice(key, slices))
        if values.dtype == spec(key).dtype:
            return values
        with np.errstate(over="ignore"):  # an overflow to infinity raises an error with the tensor's name
            new = values.astype(dtype)
            if regions.is_finite(new) or not regions.count_lost(values, new):
                return new
            lost = dict[str, int]()
            for name in (name for name, each in source.specs.items() if is_float(each.dtype)):
                values = np.asarray(source.read(name))
                lost[name] = regions.count_lost(values, values.astype(dtype))
        raise regions.overflow_error(lost, dtype, source.source)

    return Derived(source.source, source, spec, read)
