"""Orbax checkpoints: named trees of arrays and JSON documents in one folder, committed at once.

This is the only module that uses Orbax. It uses Orbax's v1 API, which also reads checkpoints of v0. Recognizing a
folder and reading its JSON import neither jax nor Orbax.

This module handles some limits of Orbax:

- A leaf that is missing from the checkpoint silently becomes a `ShapeDtypeStruct`, and a leaf of another dtype is
  silently cast. So each leaf is checked before and after loading.
- Names are joined by dots, so `{"a.b": x, "a": {"b": y}}` is corrupted. Names with dots are refused.
- Two writers of one path share a temporary folder, and overwriting deletes the old checkpoint before the new one
  exists. So a single process writes into a private folder and renames it, and existing paths are refused.
- Orbax flushes only the arrays to the disk. The other files are flushed here.
- `s3://` fails halfway, or becomes a local folder "s3:", so it is refused. `gs://` has no rename; Orbax writes a marker
  file last, which is checked.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import re
import shutil
from collections.abc import Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxadapt.core import paths
from jaxadapt.core.errors import FileError, FormatError, MismatchError, raise_listed
from jaxadapt.core.lazy import LazyModule, jax, np
from jaxadapt.storage import atomic, location
from jaxadapt.storage.local_files import file_error, file_errors, read_errors
from jaxadapt.storage.safetensors import MAX_HEADER

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
else:
    ocp = LazyModule("orbax.checkpoint")

_ROOT_ITEM = ""  # the item of a v0 checkpoint that stores its tree directly in the folder
_JSON = "data.json"
COMMITTED = "commit_success.txt"
"""The file that Orbax writes last into a folder of an object store, where it cannot rename."""

Tree = Mapping[str, Any]
Spec = tuple[tuple[int, ...], str]


def _resolve_location(path: str | os.PathLike[str]) -> location.Location:
    """Return the absolute location. Raises `FileError` for an address that Orbax cannot use.

    The first access to an address of the Hub raises, with the way out that works there: `push`.
    """
    place = location.absolute(location.to_location(path))
    if isinstance(place, location.Address) and place.scheme not in ("gs", "hf"):
        raise FileError(
            f"{place}: Orbax cannot use {place.scheme}:// (it fails halfway, or creates a local folder of that name);"
            " keep the checkpoint in a local folder, or save with format='safetensors', which works here"
        )
    return place


def is_checkpoint(place: location.Location, names: Collection[str]) -> bool:
    """Return True if a folder with these names holds a complete Orbax checkpoint."""
    return any(marker in names for marker in location.ORBAX_MARKERS) and (
        COMMITTED in names or not isinstance(place, location.Address)
    )


def read_json(path: str | os.PathLike[str], item: str) -> Any:
    """Read a JSON document of a checkpoint, or return None if it is missing. Raises `FileError`, `FormatError`."""
    file = _resolve_location(path) / item / _JSON
    return location.read_json(file, MAX_HEADER) if location.exists(file) else None


# ---------------------------------------------------------------- Orbax itself


def _context(documents: Sequence[str] = (), partial: bool = False) -> Any:
    registry = ocp.v1.handlers.local_registry()
    for name in documents:
        registry.add(ocp.v1.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.v1.Context()
    context.checkpointables.registry = registry
    context.array.saving.use_compression = False  # trained values compress by 5 %, and three times as slowly
    context.pytree.loading.partial_load = partial
    return context


@contextlib.contextmanager
def _translate_errors(place: location.Location, write: bool = False) -> Generator[None]:
    """Raise Orbax's errors as `FormatError`, or as `FileError` for a write."""
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise errors of any class
        if write:
            raise _write_error(place, error) from error
        raise FormatError(f"{place}: this Orbax checkpoint cannot be read: {type(error).__name__}: {error}") from error


def _write_error(place: location.Location, error: Exception) -> FileError:
    if isinstance(error, OSError) and error.errno is not None:
        return file_error("write", str(place), error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
        if os.strerror(number) in str(error):  # tensorstore's errors have no errno
            return file_error("write", str(place), OSError(number, os.strerror(number)))
    return FileError(f"{place}: Orbax cannot write it: {type(error).__name__}: {error}")


def _check_names(place: location.Location, trees: Mapping[str, Tree]) -> None:
    invalid: list[str] = []

    def collect(node: Any, path: str) -> None:
        for key, value in node.items():
            if type(key) is not str or "." in key or not key:
                invalid.append(f"{path}: {key!r}")
            if isinstance(value, Mapping):
                collect(value, f"{path}/{key}")

    for item, tree in trees.items():
        collect(tree, item)
    raise_listed(
        FileError, f"{place}: cannot write: Orbax joins names by dots; expected names without dots, found:", invalid
    )


def save(
    path: str | os.PathLike[str], trees: Mapping[str, Tree], documents: Mapping[str, Any], single_process: bool
) -> None:
    """Write a checkpoint durably and atomically. Return when it is complete.

    Args:
        path: must not exist.
        trees: nested dicts of arrays, by name. Keys must not contain dots.
        documents: JSON values, by name.
        single_process: True if this is the only process; else every process must call it, with the same path.

    Raises:
        FileError: the path exists, no space, or no permission. The path is then unchanged.
    """
    place = _resolve_location(path)
    _check_names(place, trees)
    if isinstance(place, Path):
        atomic.make_folder(place.parent)
        atomic.remove_leftovers(place.parent, re.escape(place.name), folders=True)
        if single_process:  # for several processes, Orbax removes leftovers itself
            for stale in place.parent.glob(f"{glob.escape(place.name)}.orbax-checkpoint-tmp*"):
                shutil.rmtree(stale, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty, or another process was faster
            place.rmdir()  # an empty folder counts as missing
    if location.exists(place) or (single_process and os.path.lexists(place)):
        raise FileError(
            f"{place}: cannot write: the path exists, and Orbax would delete an old checkpoint before the new one is"
            " complete; choose another path, or delete it"
        )
    if not single_process or isinstance(place, location.Address):
        _save_at(place, place, trees, documents)
        return
    with atomic.staging_folder(place) as staged:
        _save_at(staged, place, trees, documents)
        atomic.flush_tree(staged, place)
        with file_errors("write", place, "another writer may have been faster"):
            staged.rename(place)


def _save_at(
    place: location.Location, shown: location.Location, trees: Mapping[str, Tree], documents: Mapping[str, Any]
) -> None:
    """Write a checkpoint at a path, whose name in errors is `shown`."""
    with _translate_errors(shown, write=True):
        with _context(list(documents)):
            response = ocp.v1.save_checkpointables_async(str(place), {**trees, **documents})
        response.result()


# ---------------------------------------------------------------- reading


def leaf_specs(path: str | os.PathLike[str]) -> dict[str, dict[tuple[str, ...], Spec]]:
    """Return `{item: {key path: (shape, dtype name)}}` of all arrays of a checkpoint, without reading them.

    The item of a checkpoint that is one bare tree (as v0 writes it) is "". Raises `FileError`, `FormatError`.
    """
    place = _resolve_location(path)
    with read_errors(place):
        names = sorted(entry.name for entry in place.iterdir())
    if not is_checkpoint(place, names):
        raise FileError(
            f"{place}: not an Orbax checkpoint: expected a folder that holds one of {', '.join(location.ORBAX_MARKERS)}"
        )
    trees = [item for item in names if location.exists(place / item / "_METADATA")]
    items = [item for item in trees if not location.exists(place / item / _JSON)]
    with _translate_errors(place), _context():
        if "_METADATA" in names:
            return {_ROOT_ITEM: _array_specs(ocp.v1.metadata(str(place), checkpointable_name=None).metadata)}
        return {item: _array_specs(ocp.v1.metadata(str(place), checkpointable_name=item).metadata) for item in items}


def _array_specs(tree: Any) -> dict[tuple[str, ...], Spec]:
    out: dict[tuple[str, ...], Spec] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        # Orbax's metadata of arrays have both attributes; those of numbers and strings have neither.
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is not None and dtype is not None:
            out[tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)] = (tuple(shape), str(dtype))
    return out


def parameter_path(key: tuple[str, ...]) -> str:
    """Return the dotted path of a leaf below the last "params" of its key, as Flax's libraries save parameters."""
    names = key[:-1] if key[-1] == "value" else key
    start = max((i + 1 for i, name in enumerate(names) if name == "params"), default=0)
    return ".".join(names[start:])


def load(
    path: str | os.PathLike[str], item: str, wanted: Mapping[tuple[str, ...], jax.ShapeDtypeStruct | None]
) -> dict[tuple[str, ...], jax.Array | np.ndarray]:
    """Load some arrays of one item, directly onto their devices.

    Args:
        path: the checkpoint.
        item: the name of the tree.
        wanted: by key path, a spec with a sharding, or None for a numpy array of the stored shape and dtype.

    Raises:
        MismatchError: names every leaf that is missing or has another shape or dtype.
        FormatError: the checkpoint is damaged.
    """
    place = _resolve_location(path)
    stored = leaf_specs(place).get(item, {})
    expected = {
        "/".join(key): paths.Spec() if spec is None else paths.Spec(tuple(spec.shape), np.dtype(spec.dtype).name)
        for key, spec in wanted.items()
    }
    findings = paths.compare(expected, {"/".join(key): paths.Spec(*stored[key]) for key in wanted if key in stored})
    raise_listed(MismatchError, f"{place}: the checkpoint does not match:", map(str, findings), limit=16)
    if not wanted:
        return {}
    tree: dict[str, Any] = {}
    for key, spec in wanted.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        # An example, which uses no memory, makes Orbax restore an array of numpy.
        shape, dtype = stored[key]
        node[key[-1]] = np.broadcast_to(np.zeros((), jax.numpy.dtype(dtype)), shape) if spec is None else spec
    with _translate_errors(place), _context(partial=True):
        loaded = ocp.v1.load(str(place), tree, checkpointable_name=item or None)
    out: dict[tuple[str, ...], Any] = {
        key: functools.reduce(lambda node, part: node[part], key, loaded) for key in wanted
    }
    raise_listed(
        FormatError,
        f"{place}: Orbax could not load these arrays:",
        [
            f"{'/'.join(key)}: expected an array, found {type(leaf).__name__}"
            for key, leaf in out.items()
            if not isinstance(leaf, jax.Array | np.ndarray)
        ],
        limit=16,
    )
    return out
