"""Orbax checkpoints: named trees of arrays and JSON documents in one folder, committed at once.

The only module that touches Orbax. It uses Orbax's v1 API, which also reads what v0 wrote. Recognising a folder and
reading its JSON load neither jax nor Orbax.

What Orbax leaves to its caller, and is seen to here:

- a leaf that is not in the checkpoint comes back as a `ShapeDtypeStruct`, and a leaf of another dtype is cast, both
  silently: every leaf is compared before, and looked at after
- names are joined by dots, so `{"a.b": x, "a": {"b": y}}` is corrupted: dots within a name are refused
- two writers on one path share one temporary folder, and overwriting deletes the old checkpoint before the new one
  exists: a process that writes alone writes into a folder of its own and renames it, and nothing is overwritten
- what it writes besides the arrays is not flushed to the disk
- `s3://` fails half-way, or becomes a local folder called "s3:": refused; `gs://` is not renamed but gets a file at
  the end that says it is whole, which is looked for
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, FormatError, MismatchError
from jaxadapt.storage import atomic, flush, location
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Address, Place
from jaxadapt.storage.safetensors_header import MAX_HEADER

if TYPE_CHECKING:
    import jax
    import numpy as np

__all__ = ["Pending", "is_checkpoint", "leaf_specs", "load", "read_json", "save", "start_save"]

# What Orbax takes a folder for a checkpoint by, in its v1 and v0 layouts.
_MARKERS = ("orbax.checkpoint", "_CHECKPOINT_METADATA", "_METADATA")
_FLAT = ""  # the item of a v0 checkpoint whose tree lies in the folder itself
_JSON = "data.json"
COMMITTED = "commit_success.txt"
"""What Orbax writes last into a folder of an object store, where it cannot rename."""

Tree = Mapping[str, Any]
Spec = tuple[tuple[int, ...], str]


def _place(path: str | os.PathLike[str]) -> Place:
    """An absolute path, or an address that Orbax can use. Raises `FileError` for one that it cannot."""
    place = location.absolute(location.to_location(path))
    if isinstance(place, Address) and place.scheme != "gs":
        raise FileError(
            f"{place}: Orbax cannot use {place.scheme}:// (it fails half-way, or makes a local folder of that name);"
            " save to a local folder and copy that, or use format='safetensors'"
        )
    return place


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path holds an Orbax checkpoint, whole."""
    place = location.to_location(path)
    if isinstance(place, Path):
        return any(location.exists(place / marker, shown=place) for marker in _MARKERS)
    if place.scheme == "hf":  # the Hub's adapters are looked at in its cache
        return False
    try:
        names = {inside.name for inside in place.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return False
    return bool(names & set(_MARKERS)) and COMMITTED in names


def read_json(path: str | os.PathLike[str], item: str) -> Any:
    """A JSON document of a checkpoint; None if it has none of that name. Raises `FileError` or `FormatError`."""
    file = _place(path) / item / _JSON
    try:
        return json.loads(location.read_text_bytes(file, MAX_HEADER)) if file.exists() else None
    except OSError as error:  # of `exists`
        raise file_error("read", str(file), error) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: expected JSON: {error}") from error


# ---------------------------------------------------------------- Orbax itself


def _context(documents: Sequence[str] = (), partial: bool = False) -> Any:
    from orbax.checkpoint import v1 as ocp

    registry = ocp.handlers.local_registry()
    for name in documents:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.use_compression = False  # trained numbers hardly compress: a third of the time for 5 %
    context.pytree.loading.partial_load = partial
    return context


def _orbax_error(action: str, place: Place, error: Exception) -> FileError:
    if isinstance(error, OSError) and error.errno is not None:
        return file_error(action, str(place), error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
        if os.strerror(number) in str(error):  # tensorstore's errors have no number
            return file_error(action, str(place), OSError(number, os.strerror(number)))
    return FileError(f"{place}: Orbax cannot {action} it: {type(error).__name__}: {error}")


def _check_names(place: Place, trees: Mapping[str, Tree]) -> None:
    bad: list[str] = []

    def walk(node: Any, where: str) -> None:
        for key, value in node.items():
            if type(key) is not str or "." in key or not key:
                bad.append(f"{where}: {key!r}")
            if isinstance(value, Mapping):
                walk(value, f"{where}/{key}")

    for item, tree in trees.items():
        walk(tree, item)
    if bad:
        raise FileError(f"{place}: Orbax joins names by dots; expected names without any:\n" + paths.bullets(bad))


class Pending:
    """A save under way. `result` waits for it, and raises what went wrong."""

    def __init__(self, place: Place, response: Any) -> None:
        self.place = place
        self._response = response

    def result(self) -> None:
        """Raises `FileError`."""
        try:
            self._response.result()
        except Exception as error:
            raise _orbax_error("write", self.place, error) from error


def start_save(
    path: str | os.PathLike[str], trees: Mapping[str, Tree], documents: Mapping[str, Any], named: Place | None = None
) -> Pending:
    """Begins a save, and returns when the values are off the device. Every process must call it, with the same path.

    Args:
        path: must not exist; its parent folder must.
        trees: nested dicts of arrays, by name; keys without dots.
        documents: JSON values, by name.
        named: what errors call the path.

    Raises `FileError`.
    """
    from orbax.checkpoint import v1 as ocp

    place = _place(path)
    shown = place if named is None else named
    _check_names(shown, trees)
    try:
        with _context(list(documents)):
            response = ocp.save_checkpointables_async(str(place), {**trees, **documents})
    except Exception as error:
        raise _orbax_error("write", shown, error) from error
    return Pending(shown, response)


def save(path: str | os.PathLike[str], trees: Mapping[str, Tree], documents: Mapping[str, Any], alone: bool) -> None:
    """Writes a checkpoint durably and atomically; when it returns, it is there. Arguments as in `start_save`.

    Args:
        alone: this process is the only one; else every process must call it, with the same path.

    Raises `FileError`: something is there already, no space, no permission, … Then the path is as it was.
    """
    place = _place(path)
    _check_names(place, trees)
    if isinstance(place, Path):
        flush.make_folder(place.parent)
        atomic.remove_leftovers(place.parent, re.escape(place.name), folders=True)
        if alone:  # of several processes Orbax sees to it itself
            for stale in place.parent.glob(f"{glob.escape(place.name)}.orbax-checkpoint-tmp*"):
                shutil.rmtree(stale, ignore_errors=True)
        with contextlib.suppress(OSError):  # there is something in it, or another process was faster
            place.rmdir()  # an empty folder is as good as none
    if location.exists(place) or (alone and os.path.lexists(place)):
        raise FileError(
            f"{place}: there is something already, and an Orbax checkpoint is not overwritten, since the old one would"
            " be gone before the new one is there; choose another path, or delete it"
        )
    if not alone or isinstance(place, Address):
        start_save(place, trees, documents).result()
        return
    with atomic.staging_folder(place) as inside:
        start_save(inside, trees, documents, named=place).result()
        flush.flush_tree(inside, place)
        try:
            inside.rename(place)
        except OSError as error:
            raise file_error("write", str(place), error, "another writer may have been faster") from error


# ---------------------------------------------------------------- reading


def leaf_specs(path: str | os.PathLike[str]) -> dict[str, dict[tuple[str, ...], Spec]]:
    """`{item: {key path: (shape, dtype name)}}` of all arrays of a checkpoint, without reading one.

    The item of a checkpoint that is one bare tree (as v0 writes it) is "". Raises `FileError`, `FormatError`.
    """
    from orbax.checkpoint import v1 as ocp

    place = _place(path)
    if not is_checkpoint(place):
        raise FileError(f"{place}: no Orbax checkpoint; expected a folder that holds one of {', '.join(_MARKERS)}")
    named = [item for item in _items(place) if not location.exists(place / item / _JSON)]
    try:
        with _context():
            if location.exists(place / "_METADATA"):
                return {_FLAT: _flat(ocp.metadata(str(place), checkpointable_name=None).metadata)}
            return {item: _flat(ocp.metadata(str(place), checkpointable_name=item).metadata) for item in named}
    except Exception as error:
        raise FormatError(f"{place}: this Orbax checkpoint cannot be read: {type(error).__name__}: {error}") from error


def _items(place: Place) -> list[str]:
    try:
        return sorted(p.name for p in place.iterdir() if location.exists(p / "_METADATA"))
    except OSError as error:
        raise file_error("read", str(place), error) from error


def _flat(tree: Any) -> dict[tuple[str, ...], Spec]:
    import jax

    out: dict[tuple[str, ...], Spec] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        # Orbax's descriptions of arrays have both; those of Python's numbers and strings have neither.
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is not None and dtype is not None:
            out[tuple(_text(entry) for entry in path)] = (tuple(shape), str(dtype))
    return out


def _text(entry: Any) -> str:
    import jax

    match entry:
        case jax.tree_util.DictKey() | jax.tree_util.FlattenedIndexKey():
            return str(entry.key)
        case jax.tree_util.SequenceKey():
            return str(entry.idx)
        case _:
            return str(entry).removeprefix(".")


def load(
    path: str | os.PathLike[str], item: str, wanted: Mapping[tuple[str, ...], jax.ShapeDtypeStruct | None]
) -> dict[tuple[str, ...], jax.Array | np.ndarray]:
    """Some arrays of one item, straight onto their devices.

    Args:
        wanted: by key path, a spec with a sharding; None for a numpy array of the stored shape and dtype.

    Raises `MismatchError` naming every leaf that is missing or of another shape or dtype; `FormatError`.
    """
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    place = _place(path)
    have = leaf_specs(place).get(item, {})
    problems: list[str] = []
    for key, spec in wanted.items():
        name = "/".join(key)
        if key not in have:
            problems.append(f"{name}: not in the checkpoint")
        elif spec is not None and have[key] != (tuple(spec.shape), np.dtype(spec.dtype).name):
            problems.append(f"{name}: {have[key][1]} {have[key][0]} saved, {spec.dtype} {tuple(spec.shape)} expected")
    if problems:
        raise MismatchError(f"{place} does not fit:\n" + paths.bullets(problems, 16))
    if not wanted:
        return {}
    tree: dict[str, Any] = {}
    for key, spec in wanted.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = _host(*have[key]) if spec is None else spec
    try:
        with _context(partial=True):
            got = ocp.load(str(place), tree, checkpointable_name=item or None)
    except Exception as error:
        raise FormatError(f"{place}: this Orbax checkpoint cannot be read: {type(error).__name__}: {error}") from error
    out: dict[tuple[str, ...], Any] = {}
    for key in wanted:
        leaf: Any = got
        for part in key:
            leaf = leaf[part]
        if not isinstance(leaf, jax.Array | np.ndarray):
            problems.append(f"{'/'.join(key)}: Orbax gave {type(leaf).__name__}")
        out[key] = leaf
    if problems:
        raise FormatError(f"{place}: leaves are missing:\n" + paths.bullets(problems, 16))
    return out


def _host(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """What Orbax restores as a numpy array: an example that takes no memory."""
    import jax.numpy as jnp
    import numpy as np

    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape)
