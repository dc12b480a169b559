"""A whole model's weights as Hugging Face keeps them: `model.safetensors`, or several files and their index.

One rename puts a new set in the place of the old one: the single file's, or the index's. Only then do the files of
the old set go.
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
from jaxadapt.storage.location import Place
from jaxadapt.storage.safetensors_header import MAX_HEADER, problems_text

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ModelTensors", "open_model", "write_model"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

Specs = Mapping[str, "tuple[Any, Sequence[int]]"]


class ModelTensors(Mapping[str, "np.ndarray"]):
    """The tensors of all files of a model; each `[key]` reads one. Several threads may read at once."""

    def __init__(self, source: str, home: Mapping[str, tuple[Mapping[str, np.ndarray], str]]) -> None:
        """`home` says which file holds a tensor, and under which name."""
        self.source = source
        self._home = home

    def with_names(self, names: Mapping[str, str]) -> ModelTensors:
        """The tensors of `{new name: name here}`; one may serve several."""
        return ModelTensors(self.source, {key: self._home[name] for key, name in names.items()})

    def with_parts(self, parts: Mapping[str, tuple[str, tuple[slice, ...]]]) -> ModelTensors:
        """With parts of some tensors in the place of these, `{new name: (name here, where)}`, cut as they are read."""
        gone = {name for name, _ in parts.values()}
        kept = {key: home for key, home in self._home.items() if key not in gone}
        held = TensorParts(self, parts)
        return ModelTensors(self.source, {**kept, **{key: (held, key) for key in parts}})

    def with_stacks(self, rows: Mapping[str, Sequence[Sequence[str]]], names: Mapping[str, str]) -> ModelTensors:
        """Tensors put together as they are read, each row of `rows` an entry of a new first axis; others renamed."""
        gone = {key for lines in rows.values() for line in lines for key in line} | set(names.values())
        kept = {key: home for key, home in self._home.items() if key not in gone}
        kept |= {name: self._home[key] for name, key in names.items()}
        held = StackedTensors(self, rows)
        return ModelTensors(self.source, {**kept, **{name: (held, name) for name in rows}})

    @property
    def specs(self) -> dict[str, safetensors.FileTensorSpec]:
        """Shapes and dtypes by key, without reading a tensor of a safetensors file."""
        seen: dict[int, Mapping[str, safetensors.FileTensorSpec]] = {}
        out: dict[str, safetensors.FileTensorSpec] = {}
        for key, (part, name) in self._home.items():
            if isinstance(part, safetensors.TensorFile):
                if id(part) not in seen:
                    seen[id(part)] = part.specs
                out[key] = seen[id(part)][name]
            else:
                out[key] = self.spec(key)
        return out

    def spec(self, key: str) -> safetensors.FileTensorSpec:
        """Shape and dtype of one tensor."""
        part, name = self._home[key]
        if isinstance(part, safetensors.TensorFile | StackedTensors | TensorParts):
            return part.spec(name)
        return safetensors.FileTensorSpec(part[name].shape, part[name].dtype)

    def nbytes(self, key: str) -> int:
        """The size of one tensor, without reading it."""
        part, name = self._home[key]
        if isinstance(part, safetensors.TensorFile):
            return part.nbytes(name)
        shape, dtype = self.spec(key)
        return math.prod(shape) * dtype.itemsize

    def read_into(self, key: str, memory: np.ndarray | None) -> np.ndarray:
        """`self[key]`, in the first bytes of `memory` if that saves an allocation."""
        part, name = self._home[key]
        return part.read_into(name, memory) if isinstance(part, safetensors.TensorFile) else part[name]

    def read_slice(self, key: str, slices: Sequence[slice], shape: Sequence[int] | None = None) -> np.ndarray:
        """`self[key].reshape(shape)[slices]`, reading only the bytes of the slice."""
        part, name = self._home[key]
        if isinstance(part, safetensors.TensorFile):
            return part.read_slice(name, slices, shape)
        if isinstance(part, StackedTensors) and shape is None:
            return part.read_slice(name, slices)
        return part[name].reshape(part[name].shape if shape is None else shape)[tuple(slices)]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.read_into(key, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, key: object) -> bool:
        return key in self._home  # Mapping's own would read the tensor


class StackedTensors(Mapping[str, "np.ndarray"]):
    """Tensors that are made of several when they are asked for: one row after the other, its parts side by side."""

    def __init__(self, tensors: ModelTensors, rows: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._tensors, self._rows = tensors, rows

    def spec(self, key: str) -> safetensors.FileTensorSpec:
        """Shape and dtype; `MismatchError` where the rows are not alike."""
        kinds = {tuple(self._tensors.spec(name) for name in line) for line in self._rows[key]}
        kind = next(iter(kinds))
        if len(kinds) > 1 or len({(spec.shape[1:], spec.dtype) for spec in kind}) > 1:
            found = sorted({f"{spec.dtype.name} {list(spec.shape)}" for line in kinds for spec in line})
            raise MismatchError(f"{self._tensors.source}: {key} is one tensor here, of these: {problems_text(found)}")
        wide = sum(spec.shape[0] for spec in kind)
        return safetensors.FileTensorSpec((len(self._rows[key]), wide, *kind[0].shape[1:]), kind[0].dtype)

    def __getitem__(self, key: str) -> np.ndarray:
        return self.read_slice(key, ())

    def read_slice(self, key: str, slices: Sequence[slice]) -> np.ndarray:
        """`self[key][slices]`, of which nothing but those of the first two axes saves reading."""
        shape, dtype = self.spec(key)
        every = [*slices, *(slice(None) for _ in shape[len(slices) :])]
        lines = self._rows[key][every[0]]
        first, last, _ = every[1].indices(shape[1])
        size = math.prod(shape[2:]) * len(lines) * (last - first)
        out = local_files.aligned_empty(size * dtype.itemsize).view(dtype).reshape(len(lines), last - first, *shape[2:])
        for row, line in zip(out, lines, strict=True):
            at = 0
            for name in line:
                length = self._tensors.spec(name).shape[0]
                mine = slice(max(first - at, 0), min(last - at, length))
                if mine.start < mine.stop:
                    row[at + mine.start - first : at + mine.stop - first] = self._tensors.read_slice(name, (mine,))
                at += length
        return out[(slice(None), slice(None, None, every[1].step), *every[2:])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class TensorParts(Mapping[str, "np.ndarray"]):
    """Parts of tensors, read when they are asked for."""

    def __init__(self, tensors: ModelTensors, parts: Mapping[str, tuple[str, tuple[slice, ...]]]) -> None:
        self._tensors, self._parts = tensors, parts

    def spec(self, key: str) -> safetensors.FileTensorSpec:
        """Shape and dtype."""
        name, where = self._parts[key]
        shape, dtype = self._tensors.spec(name)
        sizes = [len(range(size)[at]) for size, at in zip(shape, where, strict=False)]
        return safetensors.FileTensorSpec((*sizes, *shape[len(where) :]), dtype)

    def __getitem__(self, key: str) -> np.ndarray:
        return self._tensors.read_slice(*self._parts[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _of(source: str, parts: Iterable[Mapping[str, np.ndarray]]) -> ModelTensors:
    return ModelTensors(source, {key: (part, key) for part in parts for key in part})


def _index(path: Place) -> dict[str, str]:
    """`{key: file name}` of an index."""
    try:
        data: Any = json.loads(location.read_text_bytes(path, MAX_HEADER))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, found: {error}") from error
    found: Any = cast("dict[str, Any]", data).get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise FormatError(f"{path}: expected an object weight_map of file names, found {str(found)[:80]}")
    names = cast("dict[str, str]", found)
    astray = sorted({name for name in names.values() if Path(name).name != name or name in ("", ".", "..")})
    if astray:
        raise FormatError(f"{path}: expected names of files beside it, found {problems_text(astray)}")
    return names


@contextlib.contextmanager
def open_model(path: Place) -> Generator[ModelTensors]:
    """The weights of a model's folder, or of one file, open for reading.

    Looked for in transformers' order: model.safetensors, its index, pytorch_model.bin, its index.

    Raises:
        FileError: there are none, or a file of the index is missing.
        FormatError: damaged, or index and files disagree.
    """
    with contextlib.ExitStack() as stack:

        def part(file: Place) -> Mapping[str, np.ndarray]:
            if file.suffix == ".bin":
                return torch_bin.read(file)
            return stack.enter_context(safetensors.open_tensors(file))

        if isinstance(path, Path) and not location.exists(path):
            raise FileError(
                f"{path}: no such folder or file; a model of the Hub comes with `hf download ORG/NAME --local-dir"
                " FOLDER`"
            )
        if not location.is_dir(path):
            yield _of(str(path), [part(path)])
            return
        found = next((name for name in (WHOLE, INDEX, BIN, BIN_INDEX) if location.exists(path / name)), None)
        if found is None:
            raise FileError(f"{path}: expected {WHOLE}, {INDEX} or {BIN}, found none of them; check the path")
        if found in (WHOLE, BIN):
            yield _of(str(path / found), [part(path / found)])
            return
        index = _index(path / found)
        names = dict.fromkeys(index.values())
        missing = [name for name in names if not location.exists(path / name)]
        if missing:
            raise FileError(f"{path}: {found} names files that are not there: {problems_text(missing)}")
        parts = {name: part(path / name) for name in names}
        wrong = [f"{key} is not in {name}" for key, name in index.items() if key not in parts[name]]
        wrong += [f"{key} of {name} is not in the index" for name in names for key in parts[name] if key not in index]
        twice = [f"{key} is also in {name}" for name in names for key in parts[name] if index.get(key, name) != name]
        if wrong or twice:
            raise FormatError(f"{path / found}: {problems_text([*wrong, *twice])}")
        yield _of(str(path), parts.values())


# What lies beside a weight that is stored as codes, by the end of its name or a part of it.
_PACKED = {
    ".nested_absmax": "bitsandbytes in 4 bits, with double quantisation",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes in 4 bits",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes in 4 bits",
    ".SCB": "bitsandbytes in 8 bits",
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "blocks of 8 bits",
    ".weight_scale": "a scale for each weight or row",
}


def refuse_packed(tensors: ModelTensors) -> None:
    """Raise `FormatError` where a folder holds codes: they are no weights, also to whoever takes what fits."""
    held = {mark: [key for key in tensors.specs if key.endswith(mark)] for mark in _PACKED}
    how = next((mark for mark, keys in held.items() if keys), None)
    if how is not None:
        raise FormatError(
            f"{tensors.source}: its weights are quantised ({_PACKED[how]}), and only dense ones are read:\n"
            + paths.bullets(held[how])
            + "\nMake them dense where they were quantised (transformers: model.dequantize(), save_pretrained) and read"
            " that; jaxadapt.models.quantize holds it in 4 bits again, nf4 to bitsandbytes' very numbers"
        )


def _portions(specs: Specs, limit: int) -> list[list[str]]:
    """The keys in their order, in portions of at most `limit` bytes (or one tensor)."""
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


def _names(folder: Place, count: int) -> list[str]:
    """File names for a set of `count`: none that is taken, since the old set must stay whole until the new one is."""
    if count == 1:
        return [WHOLE]
    for generation in itertools.count(1):
        stem = "model" if generation == 1 else f"model-{generation}"
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if not any(location.exists(folder / name) for name in names):
            return names
    raise AssertionError


def write_model(folder: Place, specs: Specs, get: Callable[[str], np.ndarray], limit: int) -> None:
    """Write a model's weights, durably and atomically, holding one tensor at a time.

    Args:
        folder: exists; what it holds besides weights is left alone.
        specs: (safetensors dtype name, shape) by key.
        get: gives the array of a key; called once a key, file by file.
        limit: of a file's bytes; more make several files and an index.

    Raises:
        FileError, MismatchError: as `safetensors.write`; then the weights that were there still are.
    """
    portions = _portions(specs, limit)
    names = _names(folder, len(portions))
    replaced = _set(folder)
    metadata = {"format": "pt"}
    index = [folder / INDEX] if len(portions) > 1 else []
    with atomic.replacing_all([*(folder / name for name in names), *index]) as writers:  # the index last
        for writer, keys in zip(writers, portions, strict=False):
            safetensors.write_to(writer, {key: specs[key] for key in keys}, get, metadata)
        if index:
            where = {key: name for name, keys in zip(names, portions, strict=True) for key in keys}
            total = sum(math.prod(s) * numpy_dtype(d).itemsize for d, s in specs.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
            writers[-1].write(memoryview(f"{text}\n".encode()))
    # transformers takes the single file before the index, other readers every file they see
    new = {*names, INDEX} if len(names) > 1 else set(names)
    left: list[str] = []
    for name in sorted(replaced - new):
        try:
            (folder / name).unlink(missing_ok=True)
        except (OSError, FileError) as error:
            left.append(f"{name} ({error})")
    if left:
        raise FileError(
            f"{folder}: the new weights are in place, but these files of the old ones could not be deleted, and readers"
            f" may take them instead; delete them: {problems_text(left)}"
        )


def _set(folder: Place) -> set[str]:
    """The files of the set of weights a folder holds, which the new set will replace."""
    found = {name for name in (WHOLE, INDEX) if location.is_file(folder / name)}
    return found | set(_index(folder / INDEX).values()) if INDEX in found else found
