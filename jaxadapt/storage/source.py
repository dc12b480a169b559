"""Tensor sources in memory, and views over other sources: renamed, transposed, cut, stacked and cast tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxadapt.arrays.tensor_source import TensorSource, TensorSpec
from jaxadapt.core.errors import MismatchError
from jaxadapt.storage import local_files
from jaxadapt.storage.safetensors import TensorFile, problems_text
from jaxadapt.storage.strided import dtype_name, is_float, numpy_dtype

if TYPE_CHECKING:
    import numpy as np

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
"""{key: (dtype, shape)}, with safetensors' names of dtypes."""


def as_source(tensors: Mapping[str, Any]) -> TensorSource:
    """Return a source, or wrap the arrays in memory of another mapping."""
    return tensors if isinstance(tensors, TensorSource) else _Arrays(tensors)


class _Arrays(TensorSource):
    """Arrays in memory."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        import numpy as np

        return {key: TensorSpec(tuple(x.shape), np.dtype(x.dtype)) for key, x in self._arrays.items()}

    def read(self, key: str) -> Any:
        return self._arrays[key]


class Whole(TensorSource):
    """Tensors that can only be read together: all of them are, at the first access."""

    def __init__(self, source: str, kinds: Kinds, read: Callable[[], Mapping[str, Any]]) -> None:
        """Create a source of the tensors that `read` returns."""
        self.source, self.kinds, self._read = source, kinds, read

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: TensorSpec(shape, numpy_dtype(dtype)) for key, (dtype, shape) in self.kinds.items()}

    @functools.cached_property
    def _tensors(self) -> Mapping[str, Any]:
        return self._read()

    def read(self, key: str) -> Any:
        return self._tensors[key]


def dtypes_and_shapes(tensors: TensorSource) -> Kinds:
    """Return {key: (dtype, shape)} with safetensors' names of dtypes. Of files, also dtypes that NumPy lacks."""
    if isinstance(tensors, TensorFile | Whole):
        return tensors.kinds
    return {key: (dtype_name(spec.dtype), tuple(spec.shape)) for key, spec in tensors.specs.items()}


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

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        part, name = self._origins[key]
        return part.read_slice(name, slices, shape)


def combine(source: str, parts: Sequence[TensorSource]) -> View:
    """Return the tensors of several sources; `source` names them in messages."""
    return View(source, {key: (part, key) for part in parts for key in part})


def rename(tensors: TensorSource, names: Mapping[str, str]) -> View:
    """Return tensors under new names, from `{new name: name}`. One tensor may have several new names."""
    return View(tensors.source, {key: (tensors, name) for key, name in names.items()})


def transpose(tensors: TensorSource, names: Mapping[str, str]) -> TensorSource:
    """Return the transposes of matrices, from `{new name: name}`; each is transposed when it is read."""
    return _Transposed(tensors, names)


def cut(tensors: TensorSource, parts: Mapping[str, tuple[str, tuple[slice, ...]]]) -> View:
    """Replace some tensors by their parts, from `{new name: (name, slices)}`. Parts are cut when they are read."""
    return _replace(tensors, {name for name, _ in parts.values()}, _Parts(tensors, parts), {})


def stack(tensors: TensorSource, rows: Mapping[str, Sequence[Sequence[str]]], names: Mapping[str, str]) -> View:
    """Replace tensors by stacks of them, and rename others. Stacks are assembled when they are read.

    Args:
        tensors: the tensors.
        rows: by new name, the rows of a stack: one index of the new first axis each, its tensors concatenated.
        names: `{new name: name}` of the tensors to rename.
    """
    stacked = {key for rows_of_one in rows.values() for row in rows_of_one for key in row}
    return _replace(tensors, stacked | set(names.values()), _Stacks(tensors, rows), names)


def cast(tensors: Mapping[str, Any], dtype: Any) -> TensorSource:
    """Return tensors with those of floats in another dtype; each is cast when it is read.

    Reading raises `MismatchError` if finite values are NaN or infinite in that dtype.
    """
    return _Cast(as_source(tensors), dtype)


def _replace(tensors: TensorSource, replaced: set[str], new: TensorSource, names: Mapping[str, str]) -> View:
    origins = {key: (tensors, key) for key in tensors if key not in replaced}
    origins |= {key: (tensors, name) for key, name in names.items()}
    return View(tensors.source, origins | {key: (new, key) for key in new})


class _Transposed(TensorSource):
    """Matrices that are transposed when they are read."""

    def __init__(self, tensors: TensorSource, names: Mapping[str, str]) -> None:
        self._tensors, self._names, self.source = tensors, names, tensors.source

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        specs = {key: self._tensors.specs[name] for key, name in self._names.items()}
        return {key: TensorSpec(spec.shape[::-1], spec.dtype) for key, spec in specs.items()}

    def read(self, key: str) -> np.ndarray:
        return self.read_slice(key, ())

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        if shape is not None and tuple(shape) != self.specs[key].shape:
            return super().read_slice(key, slices, shape)
        padded = (*slices, *(slice(None) for _ in range(2 - len(slices))))
        values = self._tensors.read_slice(self._names[key], padded[::-1])
        import numpy as np

        # As integers: numpy copies the 16-bit floats of other packages element by element.
        return np.ascontiguousarray(values.view(f"u{values.itemsize}").T).view(values.dtype)


class _Parts(TensorSource):
    """Parts of tensors, cut when they are read."""

    def __init__(self, tensors: TensorSource, parts: Mapping[str, tuple[str, tuple[slice, ...]]]) -> None:
        self._tensors, self._parts = tensors, parts

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: self._spec(*part) for key, part in self._parts.items()}

    def _spec(self, name: str, slices: tuple[slice, ...]) -> TensorSpec:
        shape, dtype = self._tensors.specs[name]
        sizes = [len(range(size)[part]) for size, part in zip(shape, slices, strict=False)]
        return TensorSpec((*sizes, *shape[len(slices) :]), dtype)

    def read(self, key: str) -> np.ndarray:
        return self._tensors.read_slice(*self._parts[key])


class _Stacks(TensorSource):
    """Tensors that are stacked when they are read: each row concatenates tensors along their first axis."""

    def __init__(self, tensors: TensorSource, rows: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._tensors, self._rows = tensors, rows

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {key: self._spec(key) for key in self._rows}

    def _spec(self, key: str) -> TensorSpec:
        """Return the shape and dtype. Raises `MismatchError` if the rows differ."""
        kinds = {tuple(self._tensors.specs[name] for name in row) for row in self._rows[key]}
        kind = next(iter(kinds))
        if len(kinds) > 1 or len({(spec.shape[1:], spec.dtype) for spec in kind}) > 1:
            found = sorted({f"{spec.dtype.name} {list(spec.shape)}" for row in kinds for spec in row})
            raise MismatchError(
                f"{self._tensors.source}: cannot stack the tensors of {key}: expected equal shapes and dtypes, found"
                f" {problems_text(found)}"
            )
        width = sum(spec.shape[0] for spec in kind)
        return TensorSpec((len(self._rows[key]), width, *kind[0].shape[1:]), kind[0].dtype)

    def read(self, key: str) -> np.ndarray:
        return self.read_slice(key, ())

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        """Return a part of a stack. Only slices of the first two axes save reading."""
        whole, dtype = self.specs[key]
        if shape is not None and tuple(shape) != whole:
            return super().read_slice(key, slices, shape)
        padded = [*slices, *(slice(None) for _ in whole[len(slices) :])]
        rows = self._rows[key][padded[0]]
        first, last, _ = padded[1].indices(whole[1])
        size = math.prod(whole[2:]) * len(rows) * (last - first)
        out = local_files.aligned_empty(size * dtype.itemsize).view(dtype).reshape(len(rows), last - first, *whole[2:])
        for values, names in zip(out, rows, strict=True):
            offset = 0
            for name in names:
                length = self._tensors.specs[name].shape[0]
                overlap = slice(max(first - offset, 0), min(last - offset, length))
                if overlap.start < overlap.stop:
                    start, stop = offset + overlap.start - first, offset + overlap.stop - first
                    values[start:stop] = self._tensors.read_slice(name, (overlap,))
                offset += length
        return out[(slice(None), slice(None, None, padded[1].step), *padded[2:])]


class _Cast(TensorSource):
    """Tensors that are cast when they are read; integers keep their dtype."""

    def __init__(self, tensors: TensorSource, dtype: Any) -> None:
        self._tensors, self._dtype, self.source = tensors, dtype, tensors.source

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        return {
            key: TensorSpec(spec.shape, self._dtype if is_float(spec.dtype) else spec.dtype)
            for key, spec in self._tensors.specs.items()
        }

    def read(self, key: str) -> np.ndarray:
        return self._cast(key, self._tensors.read(key))

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        return self._cast(key, self._tensors.read_slice(key, slices, shape))

    def _cast(self, key: str, values: Any) -> np.ndarray:
        import numpy as np

        from jaxadapt.arrays import finite  # imports JAX, which only a cast needs

        values = np.asarray(values)
        if values.dtype == self.specs[key].dtype:
            return values
        with np.errstate(over="ignore"):  # an overflow to infinity raises an error with the tensor's name
            new = values.astype(self._dtype)
            if finite.is_finite(new) or not finite.count_lost(values, new):
                return new
            lost = dict[str, int]()
            for name in (key for key, spec in self._tensors.specs.items() if is_float(spec.dtype)):
                values = np.asarray(self._tensors.read(name))
                lost[name] = finite.count_lost(values, values.astype(self._dtype))
        raise finite.overflow_error(lost, self._dtype, self.source)
