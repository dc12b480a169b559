"""One training step written to disk or to an object store: a safetensors file, replaced as a whole, durably.

Of arrays that several processes share each writes its own part of the file. In an object store nobody can: there
process 0 gathers them, and puts the object at once.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxadapt.arrays import regions as boxes
from jaxadapt.core.progress import Report, byte_counter
from jaxadapt.persistence import multihost
from jaxadapt.persistence.run_folder import META, NAME, SCHEMA, Said
from jaxadapt.storage import atomic, flush, parallel_write, safetensors
from jaxadapt.storage.coordination import Group
from jaxadapt.storage.dtypes import can_hold
from jaxadapt.storage.local_files import file_error
from jaxadapt.storage.location import Address, Place
from jaxadapt.training.checkpoint.snapshot import Snapshot


def _document(taken: Snapshot, said: Said, odd: Mapping[str, str]) -> dict[str, Any]:
    return {"schema": SCHEMA, **said._asdict(), "odd": dict(odd), **taken.to_json()}


# ---------------------------------------------------------------- onto the host


def copy_to_host(arrays: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """The values as they are now, off the device when this returns; each is put together when it is asked for.

    On the CPU a view: what a view looks at is never written to, since donating an array of which there is one
    copies it (tests/training/test_checkpoint.py holds JAX to that). numpy's own arrays are copied: anybody may write to
    them.
    """
    pieces: dict[str, list[tuple[Any, jax.Array]]] = {}
    for name, leaf in arrays.items():  # all transfers begin before the first is waited for
        if isinstance(leaf, jax.Array):
            devices = leaf.sharding.device_set
            pieces[name] = [(None, leaf)] if len(devices) == 1 else _pieces(leaf)
            if next(iter(devices)).platform != "cpu":
                for _, piece in pieces[name]:
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
    if leaf.is_fully_replicated:
        return [(None, leaf.addressable_data(0))]
    return [
        (box, leaf.addressable_data(at)) for box, at in multihost.addressable_indices(leaf.sharding, leaf.shape).items()
    ]


def _join(shape: tuple[int, ...], pieces: list[tuple[Any, np.ndarray]]) -> np.ndarray:
    if pieces[0][0] is None:
        return pieces[0][1]
    out = np.empty(shape, pieces[0][1].dtype)
    for box, piece in pieces:
        out[boxes.to_slices(box)] = piece
    return out


# ---------------------------------------------------------------- writing


def write_step(
    path: Place,
    taken: Snapshot,
    said: Said,
    values: Mapping[str, Callable[[], np.ndarray]],
    report: Report,
) -> None:
    """Writes a step as one file, durably and atomically; `values` give the arrays one by one."""
    specs, odd = _specs(taken)

    def get(name: str) -> np.ndarray:
        value = values[name]()
        return _as_bytes(value) if name in odd else value

    more = byte_counter(report, "save", sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs.values()))
    safetensors.write(path, specs, get, {META: json.dumps(_document(taken, said, odd))}, progress=more)


def _specs(taken: Snapshot) -> tuple[dict[str, tuple[np.dtype[Any], tuple[int, ...]]], dict[str, str]]:
    """The layout of the file, and the dtypes of arrays that safetensors has no type for."""
    specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    odd: dict[str, str] = {}
    for name, leaf in taken.arrays.items():
        dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
        if not can_hold(dtype):
            odd[name] = dtype.name
            dtype, shape = np.dtype("uint8"), (*shape, dtype.itemsize)
        specs[name] = (dtype, shape)
    return specs, odd


def _as_bytes(value: np.ndarray) -> np.ndarray:
    value = value.astype(value.dtype.newbyteorder("="), copy=False)
    return np.frombuffer(value.tobytes(), np.uint8).reshape(*value.shape, value.dtype.itemsize)


def prepare_shared_write(path: Place, taken: Snapshot, said: Said, timeout: float) -> Callable[[Report], None]:
    """What this process is to write of a step, off the device when this returns; the result writes it with all others.

    Every process must call this, in the same order as its other saves, and then what it returns, in any thread: what
    they say to each other passes by the devices. That raises `FileError` in all processes if one failed, died, or
    sees another file system; `MismatchError` where what each process has of its own is not the same in all.

    Into an object store, where nobody can write a part of a file, process 0 writes what it gathers here.
    """
    alone = copy_to_host({name: leaf for name, leaf in taken.arrays.items() if multihost.is_local(leaf)})
    spread = {name: leaf for name, leaf in taken.arrays.items() if name not in alone}
    shared = not isinstance(path, Address)
    held = multihost.owned_regions(spread, jax.process_index()) if shared else _gathered(spread)
    group = Group(str(path), timeout, multihost.STAGES)

    def finish(report: Report) -> None:
        specs, odd = _specs(taken)
        document = _document(taken, said, odd)
        alike = {name: parallel_write.digest(value()) for name, value in alone.items()} | _digests(document)
        if group.index == 0:
            held.update({name: {boxes.full_region(value().shape): value()} for name, value in alone.items()})
        layout = safetensors.named_specs(specs)

        def parts(_: bool) -> Iterator[parallel_write.TensorPart]:
            more = byte_counter(report, "save", sum(x.nbytes for boxes in held.values() for x in boxes.values()))
            for name in sorted(held):
                for box, values in multihost.join_regions(held[name], tuple(taken.arrays[name].shape)):
                    if name in odd:
                        values = _as_bytes(values)
                        box = (*box, (0, values.shape[-1]))
                    yield parallel_write.TensorPart(name, specs[name][1], box, values)
                    more(values.nbytes)

        if group.index > 0:
            parallel_write.write_as_follower(str(path), layout, parts, group, shared, alike | {"step": path.name})
            group.receive("result")
            return
        try:
            metadata = {META: json.dumps(document)}
            with atomic.open_replacement(path) as writer:
                parallel_write.write_as_leader(
                    writer, layout, metadata, parts, group, shared, alike | {"step": path.name}
                )
        except BaseException as error:
            group.send_failure(error)
            raise
        group.send("result")

    return finish


def _gathered(arrays: Mapping[str, Any]) -> dict[str, dict[boxes.Box, np.ndarray]]:
    """All of each array, in process 0 and nowhere else; one at a time."""
    held: dict[str, dict[boxes.Box, np.ndarray]] = {}
    for name in sorted(arrays):
        value = multihost.gather_array(arrays[name])
        if jax.process_index() == 0:
            held[name] = {boxes.full_region(value.shape): value}
    return held


def _digests(document: Mapping[str, Any]) -> dict[str, str]:
    """Of everything that is no array, by name."""
    items = {part: values if isinstance(values, dict) else {"": values} for part, values in document.items()}
    return {
        f"{part} {name}".strip(): parallel_write.digest(json.dumps(value))
        for part, values in items.items()
        for name, value in values.items()
    }


def remove_leftovers(folder: Place) -> None:
    """Removes what killed writers left."""
    if not isinstance(folder, Address):  # what is put at once leaves nothing
        atomic.remove_leftovers(folder, NAME.pattern)


def remove_step(path: Place) -> None:
    """Removes a step. Raises `FileError`."""
    try:
        path.unlink() if isinstance(path, Address) else atomic.remove_file(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise file_error("delete", str(path), error) from error


def make_run_folder(folder: Place) -> None:
    """Makes the folder of a run. Raises `FileError`."""
    if isinstance(folder, Address):
        return
    flush.make_folder(folder)
