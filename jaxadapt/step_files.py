"""One training step on disk: a safetensors file, or on gs:// what Orbax writes for several processes.

    step-000000100.safetensors     replaced as a whole, durably; the JSON of everything else is in its header. Of arrays
                                   that several processes share, each writes its own part
    step-000000100.orbax           the same content on gs://, where nobody can write a part of a file, and Orbax many

In an object store the file is an object, put at once (of several processes by the first, which gathers); Orbax's folder
has a file that says it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxadapt import paths, sharding, together
from jaxadapt.codecs import atomic, orbax, parallel, safetensors
from jaxadapt.codecs.files import file_error
from jaxadapt.codecs.group import Group
from jaxadapt.codecs.places import Address, Place
from jaxadapt.errors import AttachError, FileError
from jaxadapt.snapshot import Taken

FILE, FOLDER = ".safetensors", ".orbax"
_NAME = re.compile(r"step-(\d{9,18})(\.safetensors|\.orbax)")
META = "jaxadapt_step"
ITEM = "arrays"
SCHEMA = 1


def place(folder: Place, step: int, kind: str = FILE) -> Place:
    """Where a step goes. Padded, so that names sort as numbers do."""
    return folder / f"step-{step:09d}{kind}"


def by_orbax(folder: Place) -> bool:
    """Whether Orbax writes there what several processes share."""
    return isinstance(folder, Address) and folder.scheme in orbax.STORES


def steps(folder: Place) -> dict[int, Place]:
    """`{step: path}` of the steps that are there, whole, in ascending order."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise file_error("read", str(folder), error) from error
    found: dict[int, Place] = {}
    for name in sorted(names):  # of one step the file comes last and wins: a folder beside it is about to go
        match = _NAME.fullmatch(name)
        if match and not _half_done(folder / name):
            found[int(match[1])] = folder / name
    return dict(sorted(found.items()))


def _half_done(path: Place) -> bool:
    """Whether it is a folder that Orbax has not finished: in an object store it has its name from the beginning."""
    return isinstance(path, Address) and path.suffix == FOLDER and not orbax.found(path)


def _document(taken: Taken, metrics: Mapping[str, float], odd: Mapping[str, str]) -> dict[str, Any]:
    return {"schema": SCHEMA, "metrics": dict(metrics), "odd": dict(odd), **taken.to_json()}


# ---------------------------------------------------------------- onto the host


def on_host(arrays: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """The values as they are now, off the device when this returns; each is put together when it is asked for.

    On the CPU a view: what a view looks at is never written to, since donating an array of which there is one
    copies it (tests/test_checkpoint.py holds JAX to that). numpy's own arrays are copied: anybody may write to them.
    """
    pieces = {name: _pieces(leaf) for name, leaf in arrays.items() if isinstance(leaf, jax.Array)}
    for held in pieces.values():  # all transfers begin before the first is waited for
        for _, piece in held:
            if next(iter(piece.sharding.device_set)).platform != "cpu":
                piece.copy_to_host_async()
    out: dict[str, Callable[[], np.ndarray]] = {}
    for name, leaf in arrays.items():
        if name in pieces:
            out[name] = functools.partial(_join, leaf.shape, [(i, np.asarray(piece)) for i, piece in pieces[name]])
        else:
            out[name] = functools.partial(np.asarray, np.array(leaf))
    return out


def _pieces(leaf: jax.Array) -> list[tuple[Any, jax.Array]]:
    """The parts of an array that make the whole, each on one device, with their places; None: all of it."""
    if len(leaf.sharding.device_set) == 1:
        return [(None, leaf)]
    if leaf.is_fully_replicated:
        return [(None, leaf.addressable_data(0))]
    return [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]


def _join(shape: tuple[int, ...], pieces: list[tuple[Any, np.ndarray]]) -> np.ndarray:
    if pieces[0][0] is None:
        return pieces[0][1]
    out = np.empty(shape, pieces[0][1].dtype)
    for index, piece in pieces:
        out[index] = piece
    return out


# ---------------------------------------------------------------- writing


def write(
    path: Place, taken: Taken, metrics: Mapping[str, float], values: Mapping[str, Callable[[], np.ndarray]]
) -> None:
    """Writes a step as one file, durably and atomically; `values` give the arrays one by one."""
    specs, odd = _specs(taken)

    def get(name: str) -> np.ndarray:
        value = values[name]()
        return _as_bytes(value) if name in odd else value

    safetensors.write(path, specs, get, {META: json.dumps(_document(taken, metrics, odd))})
    other = path.with_suffix(FOLDER)
    if other.exists():
        remove(other)


def _specs(taken: Taken) -> tuple[dict[str, tuple[np.dtype[Any], tuple[int, ...]]], dict[str, str]]:
    """The layout of the file, and the dtypes of arrays that safetensors has no type for."""
    specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    odd: dict[str, str] = {}
    for name, leaf in taken.arrays.items():
        dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
        if not safetensors.can_hold(dtype):
            odd[name] = dtype.name
            dtype, shape = np.dtype("uint8"), (*shape, dtype.itemsize)
        specs[name] = (dtype, shape)
    return specs, odd


def _as_bytes(value: np.ndarray) -> np.ndarray:
    return np.frombuffer(value.tobytes(), np.uint8).reshape(*value.shape, value.dtype.itemsize)


def prepare_together(
    path: Place, taken: Taken, metrics: Mapping[str, float], timeout: float
) -> Callable[[], None]:
    """What this process is to write of a step, off the device when this returns; the result writes it with all others.

    Every process must call this, in the same order as its other saves, and then what it returns, in any thread: what
    they say to each other passes by the devices. That raises `FileError` in all processes if one failed, died, or
    sees another file system; `MismatchError` where what each process has of its own is not the same in all.

    Into an object store, where nobody can write a part of a file, process 0 writes what it gathers here.
    """
    specs, odd = _specs(taken)
    alone = on_host({name: leaf for name, leaf in taken.arrays.items() if together.local(leaf)})
    spread = {name: leaf for name, leaf in taken.arrays.items() if name not in alone}
    shared = not isinstance(path, Address)
    held = together.own(spread, jax.process_index()) if shared else _gathered(spread)
    group = Group(str(path), timeout, together.STAGES)

    def finish() -> None:
        document = _document(taken, metrics, odd)
        alike = {name: parallel.digest(value()) for name, value in alone.items()} | _digests(document)
        if group.index == 0:
            held.update({name: {sharding.whole(value().shape): value()} for name, value in alone.items()})
        layout = safetensors.named_specs(specs)
        if group.index > 0:
            parallel.follow(str(path), layout, parts, group, alike | {"step": path.name})
            group.hear("result")
            return
        try:
            metadata = {META: json.dumps(document)}
            parallel.lead(str(path), layout, metadata, parts, group, shared, alike | {"step": path.name})
        except BaseException as error:
            group.fail(error)
            raise
        group.tell("result")

    def parts(_: bool) -> Iterator[parallel.Part]:
        for name in sorted(held):
            for box, values in together.joined(held[name]):
                if name in odd:
                    values = _as_bytes(values)
                    box = (*box, (0, values.shape[-1]))
                yield parallel.Part(name, specs[name][1], box, values)

    return finish


def _gathered(arrays: Mapping[str, Any]) -> dict[str, dict[sharding.Box, np.ndarray]]:
    """All of each array, in process 0 and nowhere else; one at a time."""
    held: dict[str, dict[sharding.Box, np.ndarray]] = {}
    for name in sorted(arrays):
        value = together.gathered(arrays[name])
        if jax.process_index() == 0:
            held[name] = {sharding.whole(value.shape): value}
    return held


def _digests(document: Mapping[str, Any]) -> dict[str, str]:
    """Of everything that is no array, by name."""
    items = {part: values if isinstance(values, dict) else {"": values} for part, values in document.items()}
    return {
        f"{part} {name}".strip(): parallel.digest(json.dumps(value))
        for part, values in items.items()
        for name, value in values.items()
    }


def start(path: Place, taken: Taken, metrics: Mapping[str, float]) -> orbax.Pending:
    """Begins to write a step as an Orbax folder, with all processes. Its values are off the device on return.

    Raises `AttachError` for what each process has of its own and is not the same in all: one of them would be saved.
    """
    tree: dict[str, Any] = {}
    own: dict[str, bytes] = {}
    for name, leaf in taken.arrays.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            tree[quoted(name)] = leaf
        else:  # Orbax takes arrays of one process from the host only
            tree[quoted(name)] = value = np.array(leaf)
            own[name] = f"{value.dtype} {value.shape}".encode() + value.tobytes()
    document = _document(taken, metrics, {})
    for part, values in document.items():
        items = values.items() if isinstance(values, dict) else [("", values)]
        own |= {f"{part} {name}".strip(): json.dumps(value).encode() for name, value in items}
    _same_everywhere(own)
    return orbax.start(path, {ITEM: tree}, {META: document})


def _same_everywhere(own: Mapping[str, bytes]) -> None:
    from jax.experimental import multihost_utils

    def gathered(digests: list[bytes]) -> np.ndarray:
        rows = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
        return np.asarray(multihost_utils.process_allgather(rows))

    names = sorted(own)
    all_names = gathered([hashlib.sha256(json.dumps(names).encode()).digest()])
    if (all_names != all_names[0]).any():
        raise AttachError("the processes do not save the same tree; every process must give the same names")
    found = gathered([hashlib.sha256(own[name]).digest() for name in names])
    differ = [name for name, column in zip(names, found.swapaxes(0, 1), strict=True) if (column != column[0]).any()]
    if differ:
        raise AttachError(
            "these differ between the processes, and only one could be saved; give arrays over all processes, or gather"
            " what each has (jax.experimental.multihost_utils.process_allgather):\n" + paths.listing(differ)
        )


def quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="").replace(".", "%2E")


def sweep(folder: Place, orbax_too: bool) -> None:
    """Removes what killed writers left. `orbax_too`: also of Orbax's, which no lock tells from a living writer's."""
    if isinstance(folder, Address):  # what is put at once leaves nothing
        with contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir() if orbax_too else ():
                if _NAME.fullmatch(path.name) and _half_done(path):
                    path.remove_tree()
        return
    atomic.sweep(folder, _NAME.pattern, folders=True)
    if orbax_too:
        for stale in folder.glob("step-*.orbax.orbax-checkpoint-tmp*"):
            shutil.rmtree(stale, ignore_errors=True)


def remove(path: Place) -> None:
    """Removes a step; whatever happens, it is there whole or not at all. Raises `FileError`."""
    try:
        if isinstance(path, Address) and path.suffix == FOLDER:
            (path / orbax.COMMITTED).unlink(missing_ok=True)
            path.remove_tree()
        elif isinstance(path, Address):
            path.unlink()
        elif path.is_dir():
            aside = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
            path.rename(aside)
            shutil.rmtree(aside)
        else:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise file_error("delete", str(path), error) from error


def make(folder: Place) -> None:
    """Makes the folder of a run. Raises `FileError`."""
    if isinstance(folder, Address):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise file_error("make the folder", str(folder), error, "choose another path") from error
    if not folder.is_dir():
        raise FileError(f"{folder}: expected a folder, found a file")
