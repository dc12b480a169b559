"""A model's weights in the layout of Hugging Face: `model.safetensors`, or several shards and their index.

One rename replaces an old set of files by the new one: the rename of the single file, or of the index. The files of the
old set are deleted after that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, FormatError, MismatchError
from jaxadapt.storage import atomic, local_files, location, safetensors, torch_bin
from jaxadapt.storage.dtypes import numpy_dtype
from jaxadapt.storage.location import Location
from jaxadapt.storage.safetensors_header import MAX_HEADER, problems_text

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BIN", "BIN_INDEX", "INDEX", "SINGLE_FILE", "ModelTensors", "open_model", "read_index", "write_model"]

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

Specs = Mapping[str, "tuple[Any, Sequence[int]]"]


class ModelTensors(Mapping[str, "np.ndarray"]):
    """The tensors of all files of a model. `[key]` reads one. Several threads may read at once."""

    def __init__(self, source: str, origins: Mapping[str, tuple[Mapping[str, np.ndarray], str]]) -> None:
        """Wrap open files; `origins` maps each key to the mapping that holds the tensor and to its name there."""
        self.source = source
        self._origins = origins

    def with_names(self, names: Mapping[str, str]) -> ModelTensors:
        """Return the tensors under new names, from `{new name: name}`. One tensor may have several new names."""
        return ModelTensors(self.source, {key: self._origins[name] for key, name in names.items()})

    def with_parts(self, parts: Mapping[str, tuple[str, tuple[slice, ...]]]) -> ModelTensors:
        """Replace some tensors by their parts, from `{new name: (name, slices)}`. Parts are cut when they are read."""
        replaced = {name for name, _ in parts.values()}
        origins = {key: origin for key, origin in self._origins.items() if key not in replaced}
        part_tensors = TensorParts(self, parts)
        return ModelTensors(self.source, {**origins, **{key: (part_tensors, key) for key in parts}})

    def with_stacks(self, rows: Mapping[str, Sequence[Sequence[str]]], names: Mapping[str, str]) -> ModelTensors:
        """Replace tensors by stacks of them, and rename others. Stacks are assembled when they are read.

        Args:
            rows: by new name, the rows of a stack: one index of the new first axis each, its tensors concatenated.
            names: `{new name: name}` of the tensors to rename.
        """
        replaced = {key for stack in rows.values() for row in stack for key in row} | set(names.values())
        origins = {key: origin for key, origin in self._origins.items() if key not in replaced}
        origins |= {name: self._origins[key] for name, key in names.items()}
        stacks = StackedTensors(self, rows)
        return ModelTensors(self.source, {**origins, **{name: (stacks, name) for name in rows}})

    @property
    def specs(self) -> dict[str, safetensors.FileTensorSpec]:
        """Shapes and dtypes by key. Reads no tensor of a safetensors file."""
        seen: dict[int, Mapping[str, safetensors.FileTensorSpec]] = {}
        out: dict[str, safetensors.FileTensorSpec] = {}
        for key, (part, name) in self._origins.items():
            if isinstance(part, safetensors.TensorFile):
                if id(part) not in seen:
                    seen[id(part)] = part.specs
                out[key] = seen[id(part)][name]
            else:
                out[key] = self.spec(key)
        return out

    def spec(self, key: str) -> safetensors.FileTensorSpec:
        """Return the shape and dtype of one tensor."""
        part, name = self._origins[key]
        if isinstance(part, safetensors.TensorFile | StackedTensors | TensorParts):
            return part.spec(name)
        return safetensors.FileTensorSpec(part[name].shape, part[name].dtype)

    def nbytes(self, key: str) -> int:
        """Return the bytes of one tensor, without reading it."""
        part, name = self._origins[key]
        if isinstance(part, safetensors.TensorFile):
            return part.nbytes(name)
        shape, dtype = self.spec(key)
        return math.prod(shape) * dtype.itemsize

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        """Return `self[key]`, read into the first bytes of `memory` if that saves an allocation."""
        part, name = self._origins[key]
        return part.read_into(name, memory) if isinstance(part, safetensors.TensorFile) else part[name]

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        """Return `self[key].reshape(shape)[slices]`, reading only the bytes of the slice."""
        part, name = self._origins[key]
        if isinstance(part, safetensors.TensorFile):
            return part.read_slice(name, slices, shape)
        if isinstance(part, StackedTensors) and shape is None:
            return part.read_slice(name, slices)
        return part[name].reshape(part[name].shape if shape is None else shape)[tuple(slices)]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.read_into(key, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)

    def __contains__(self, key: object) -> bool:
        return key in self._origins  # Mapping.__contains__ would read the tensor


class StackedTensors(Mapping[str, "np.ndarray"]):
    """Tensors that are stacked when they are read: each row concatenates tensors along their first axis."""

    def __init__(self, tensors: ModelTensors, rows: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._tensors, self._rows = tensors, rows

    def spec(self, key: str) -> safetensors.FileTensorSpec:
        """Return the shape and dtype. Raises `MismatchError` if the rows differ."""
        kinds = {tuple(self._tensors.spec(name) for name in row) for row in self._rows[key]}
        kind = next(iter(kinds))
        if len(kinds) > 1 or len({(spec.shape[1:], spec.dtype) for spec in kind}) > 1:
            found = sorted({f"{spec.dtype.name} {list(spec.shape)}" for row in kinds for spec in row})
            raise MismatchError(
                f"{self._tensors.source}: cannot stack the tensors of {key}: expected equal shapes and dtypes, found"
                f" {problems_text(found)}"
            )
        width = sum(spec.shape[0] for spec in kind)
        return safetensors.FileTensorSpec((len(self._rows[key]), width, *kind[0].shape[1:]), kind[0].dtype)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.read_slice(key, ())

    def read_slice(self, key: str, slices: Sequence[slice]) -> np.ndarray:
        """Return `self[key][slices]`. Only slices of the first two axes save reading."""
        shape, dtype = self.spec(key)
        padded = [*slices, *(slice(None) for _ in shape[len(slices) :])]
        rows = self._rows[key][padded[0]]
        first, last, _ = padded[1].indices(shape[1])
        size = math.prod(shape[2:]) * len(rows) * (last - first)
        out = local_files.aligned_empty(size * dtype.itemsize).view(dtype).reshape(len(rows), last - first, *shape[2:])
        for values, names in zip(out, rows, strict=True):
            offset = 0
            for name in names:
                length = self._tensors.spec(name).shape[0]
                overlap = slice(max(first - offset, 0), min(last - offset, length))
                if overlap.start < overlap.stop:
                    start, stop = offset + overlap.start - first, offset + overlap.stop - first
                    values[start:stop] = self._tensors.read_slice(name, (overlap,))
                offset += length
        return out[(slice(None), slice(None, None, padded[1].step), *padded[2:])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class TensorParts(Mapping[str, "np.ndarray"]):
    """Parts of tensors, cut when they are read."""

    def __init__(self, tensors: ModelTensors, parts: Mapping[str, tuple[str, tuple[slice, ...]]]) -> None:
        self._tensors, self._parts = tensors, parts

    def spec(self, key: str) -> safetensors.FileTensorSpec:
        """Return the shape and dtype."""
        name, slices = self._parts[key]
        shape, dtype = self._tensors.spec(name)
        sizes = [len(range(size)[part]) for size, part in zip(shape, slices, strict=False)]
        return safetensors.FileTensorSpec((*sizes, *shape[len(slices) :]), dtype)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._tensors.read_slice(*self._parts[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _combine_files(source: str, parts: Iterable[Mapping[str, np.ndarray]]) -> ModelTensors:
    return ModelTensors(source, {key: (part, key) for part in parts for key in part})


def read_index(path: Location) -> dict[str, str]:
    """Return `{key: file name}` of an index."""
    try:
        data: Any = json.loads(location.read_text_bytes(path, MAX_HEADER))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, found: {error}") from error
    weight_map: Any = cast("dict[str, Any]", data).get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError(f"{path}: expected an object weight_map of file names, found {str(weight_map)[:80]}")
    names = cast("dict[str, str]", weight_map)
    outside = sorted({name for name in names.values() if Path(name).name != name or name in ("", ".", "..")})
    if outside:
        raise FormatError(f"{path}: expected names of files beside it, found {problems_text(outside)}")
    return names


@contextlib.contextmanager
def open_model(path: Location) -> Generator[ModelTensors]:
    """Open the weights of a model's folder, or of one file, for reading.

    The folder is searched in transformers' order: model.safetensors, its index, pytorch_model.bin, its index.

    Raises:
        FileError: there are no weights, or a file of the index is missing.
        FormatError: a file is damaged, or index and files disagree.
    """
    with contextlib.ExitStack() as stack:

        def open_part(file: Location) -> Mapping[str, np.ndarray]:
            if file.suffix == ".bin":
                return torch_bin.read(file)
            return stack.enter_context(safetensors.open_tensors(file))

        if isinstance(path, Path) and not location.exists(path):
            raise FileError(
                f"{path}: no such folder or file; download a model of the Hub with `hf download ORG/NAME --local-dir"
                " FOLDER`"
            )
        if not location.is_dir(path):
            yield _combine_files(str(path), [open_part(path)])
            return
        main = next((name for name in (SINGLE_FILE, INDEX, BIN, BIN_INDEX) if location.exists(path / name)), None)
        if main is None:
            raise FileError(f"{path}: expected {SINGLE_FILE}, {INDEX} or {BIN}, found none of them; check the path")
        if main in (SINGLE_FILE, BIN):
            yield _combine_files(str(path / main), [open_part(path / main)])
            return
        index = read_index(path / main)
        names = dict.fromkeys(index.values())
        missing = [name for name in names if not location.exists(path / name)]
        if missing:
            raise FileError(f"{path}: {main} names files that do not exist: {problems_text(missing)}; fetch them again")
        parts = {name: open_part(path / name) for name in names}
        wrong = [f"{key} is not in {name}" for key, name in index.items() if key not in parts[name]]
        wrong += [f"{key} of {name} is not in the index" for name in names for key in parts[name] if key not in index]
        twice = [f"{key} is also in {name}" for name in names for key in parts[name] if index.get(key, name) != name]
        if wrong or twice:
            raise FormatError(f"{path / main}: index and files disagree: {problems_text([*wrong, *twice])}")
        yield _combine_files(str(path), parts.values())


# Quantisation formats, by the suffix of a tensor that accompanies a quantised weight.
_QUANTIZED_SUFFIXES = {
    ".nested_absmax": "bitsandbytes in 4 bits, with double quantisation",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes in 4 bits",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes in 4 bits",
    ".SCB": "bitsandbytes in 8 bits",
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "blocks of 8 bits",
    ".weight_scale": "a scale for each weight or row",
}


def refuse_packed(tensors: ModelTensors) -> None:
    """Raise `FormatError` if the weights are quantised: their codes must not be taken for weights."""
    keys_by_suffix = {suffix: [key for key in tensors.specs if key.endswith(suffix)] for suffix in _QUANTIZED_SUFFIXES}
    suffix = next((suffix for suffix, keys in keys_by_suffix.items() if keys), None)
    if suffix is not None:
        raise FormatError(
            f"{tensors.source}: its weights are quantised ({_QUANTIZED_SUFFIXES[suffix]}), and only dense"
            " weights can be read:\n"
            + paths.bullets(keys_by_suffix[suffix])
            + "\nDequantise them first (transformers: model.dequantize(), save_pretrained) and read the result."
            " jaxadapt.models.quantize stores it in 4 bits again; its nf4 values equal those of bitsandbytes"
        )


def _split_by_size(specs: Specs, limit: int) -> list[list[str]]:
    """Split the keys, in order, into groups of at most `limit` bytes (or one tensor)."""
    out: list[list[str]] = [[]]
    size = 0
    for key, (dtype, shape) in specs.items():
        nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
        if out[-1] and size + nbytes > limit:
            out.append([])
            size = 0
        out[-1].append(key)
        size += nbytes
    return out


def _choose_file_names(folder: Location, count: int) -> list[str]:
    """Return `count` unused file names: the old set must stay intact until the new one is complete."""
    if count == 1:
        return [SINGLE_FILE]
    for generation in itertools.count(1):
        stem = "model" if generation == 1 else f"model-{generation}"
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if not any(location.exists(folder / name) for name in names):
            return names
    raise AssertionError


def write_model(folder: Location, specs: Specs, get: Callable[[str], np.ndarray], limit: int) -> None:
    """Write a model's weights, durably and atomically, holding one tensor at a time.

    Args:
        folder: an existing folder; its other files are kept.
        specs: (safetensors dtype name, shape) by key.
        get: returns the array of a key. Called once a key, file by file.
        limit: the largest size of a file in bytes. A larger model becomes several files and an index.

    Raises:
        FileError, MismatchError: as in `safetensors.write`. The old weights are then still in place.
    """
    groups = _split_by_size(specs, limit)
    names = _choose_file_names(folder, len(groups))
    replaced = _current_files(folder)
    metadata = {"format": "pt"}
    index = [folder / INDEX] if len(groups) > 1 else []
    with atomic.replacing_all([*(folder / name for name in names), *index]) as writers:  # the index last
        for writer, keys in zip(writers, groups, strict=False):
            safetensors.write_to(writer, {key: specs[key] for key in keys}, get, metadata)
        if index:
            weight_map = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
            total = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in specs.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
            writers[-1].write(memoryview(f"{text}\n".encode()))
    # Delete old files: transformers prefers a single file to an index, and other readers take every file.
    new = {*names, INDEX} if len(names) > 1 else set(names)
    remaining: list[str] = []
    for name in sorted(replaced - new):
        try:
            (folder / name).unlink(missing_ok=True)
        except (OSError, FileError) as error:
            remaining.append(f"{name} ({error})")
    if remaining:
        raise FileError(
            f"{folder}: the new weights are in place, but these files of the old ones could not be deleted, and readers"
            f" may take them instead; delete them yourself: {problems_text(remaining)}"
        )


def _current_files(folder: Location) -> set[str]:
    """Return the names of the folder's current weight files, which a new set replaces."""
    names = {name for name in (SINGLE_FILE, INDEX) if location.is_file(folder / name)}
    return names | set(read_index(folder / INDEX).values()) if INDEX in names else names
