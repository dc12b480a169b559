"""Saving arrays of which every process holds a part: each writes what it owns, into one file.

`boxes.owners` says who owns what, `boxes.pieces` where in the file that lies, `codecs.parallel` writes it.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxadapt.adapters.adapter import PeftTensors, reading
from jaxadapt.arrays import regions as boxes
from jaxadapt.arrays.layout import Arrangement
from jaxadapt.arrays.regions import Box
from jaxadapt.core.progress import Report, counting, quiet
from jaxadapt.keymaps.plan import Encoded, Entry
from jaxadapt.persistence import folder
from jaxadapt.storage import location, parallel_write, safetensors
from jaxadapt.storage.coordination import Group
from jaxadapt.storage.parallel_write import Part

STAGES = ("plan", "mode", "result")
"""What process 0 says in the course of one save."""


def spread(leaves: Iterable[Any]) -> bool:
    """Whether some of these arrays are partly in other processes."""
    return not all(map(local, leaves))


def write(
    tensors: PeftTensors, path: str | os.PathLike[str], shared: bool | None, timeout: float, report: Report = quiet
) -> None:
    """`folder.write`, called by all processes; `tensors` are those of a plan.

    Args:
        shared: whether all processes see the folder; None: find out. If not, all goes through process 0.
        timeout: in seconds, for each answer of another process.
        report: of ("save", bytes, bytes in all) that this process writes.

    Raises:
        FileError: in all processes, if one of them failed, died, or did not call; then the old adapter is still there.
    """
    encoded: Encoded = tensors.tensors  # pyright: ignore[reportAssignmentType]
    target = location.at(path)
    group = Group(str(target), timeout, STAGES)
    alike = alone(encoded.leaves) | {"the configuration": parallel_write.digest(tensors.config.to_json())}

    def size(values: Iterable[Any]) -> int:
        return sum(x.size * (encoded.dtype or x.dtype).itemsize for x in values)

    def parts(common: bool) -> Iterator[Part]:
        if common:
            held = own(encoded.leaves, group.index)
            return counted(_own(encoded, held), size(x for boxes in held.values() for x in boxes.values()))
        return counted(_gathered(encoded, group.index), size(encoded.leaves.values() if group.index == 0 else ()))

    def counted(made: Iterator[Part], total: int) -> Iterator[Part]:
        more = counting(report, "save", total)
        for part in made:
            yield part
            more(part.array.nbytes)

    if group.index == 0:
        try:
            folder.write_with(
                tensors,
                target,
                lambda writer, specs, metadata: parallel_write.lead(
                    writer, safetensors.named_specs(specs), metadata, parts, group, shared, alike
                ),
                None,
            )
        except BaseException as error:
            group.fail(error)
            raise
        group.tell("result")
    else:
        specs = {key: (spec.dtype, spec.shape) for key, spec in encoded.specs.items()}
        parallel_write.follow(
            os.fspath(target / folder.WEIGHTS), safetensors.named_specs(specs), parts, group, shared, alike
        )
        group.hear("result")


def by_first(what: str, work: Callable[[], Any], timeout: float) -> Any:
    """What process 0 makes, a JSON value, in all processes, which all must call this.

    It begins when all have called: what it deletes, none of them is still reading. Raises `FileError` in all if it
    failed there, or if one said nothing for `timeout` seconds.
    """
    group = Group(what, timeout, ("made",))
    if group.index > 0:
        group.tell("here")
        return group.hear("made")
    try:
        group.hear_all("here")
        value = work()
    except BaseException as error:
        group.fail(error)
        raise
    group.tell("made", value)
    return value


def local(leaf: Any) -> bool:
    """Whether this process holds all of an array: the others have one of their own, or none."""
    # A traced array lies nowhere yet, and JAX cannot say whether it is addressable.
    return not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or leaf.is_fully_addressable


def alone(leaves: Mapping[str, Any]) -> dict[str, str]:
    """What each process has of its own, of which process 0 writes its: `alike` in `parallel.lead`."""
    with reading(leaves):
        return {path: parallel_write.digest(np.asarray(leaf)) for path, leaf in leaves.items() if local(leaf)}


def own(leaves: Mapping[str, Any], process: int) -> dict[str, dict[Box, np.ndarray]]:
    """`{path: {box: values}}`: what this process is to write of each leaf, off the device when this returns.

    On the CPU views, which hold their arrays: see `step_files.on_host`.
    """
    with reading(leaves):
        held: dict[str, dict[Box, Any]] = {}
        for path, owners in boxes.owners(leaves).items():
            leaf = leaves[path]
            if local(leaf):
                held[path] = {box: leaf for box, owner in owners.items() if owner == process}
                continue
            mine = addressable(leaf.sharding, leaf.shape).items()
            held[path] = {box: leaf.addressable_data(at) for box, at in mine if owners[box] == process}
        for path, parts in held.items():  # all transfers begin before the first is waited for
            if isinstance(leaves[path], jax.Array) and next(iter(leaves[path].sharding.device_set)).platform != "cpu":
                for value in parts.values():
                    value.copy_to_host_async()
        return {path: {box: np.asarray(value) for box, value in parts.items()} for path, parts in held.items() if parts}


@functools.lru_cache(maxsize=1024)
def addressable(placed: Sharding, shape: tuple[int, ...]) -> dict[Box, int]:
    """What this process holds of such arrays, each part once, as numbers for `jax.Array.addressable_data`.

    Found once, on an array like them: `addressable_shards` of thousands of arrays would take the training loop's time.
    """
    like = jax.make_array_from_callback(shape, placed, np.broadcast_to(np.uint8(0), shape).__getitem__)
    numbers = {shard.device: number for number, shard in enumerate(like.addressable_shards)}
    return {box: numbers[device] for box, device in boxes.here(placed, shape).items()}


def joined(held: Mapping[Box, np.ndarray], laid: Arrangement | boxes.Shape) -> Iterator[tuple[Box, np.ndarray]]:
    """The same values in fewer and larger boxes, as `covered` says; where `held` has them if they need no copy."""
    for outer, members in covered(tuple(held), laid, next((x.itemsize for x in held.values()), 1)):
        if len(members) == 1:
            yield outer, held[outer]
            continue
        whole = np.empty(boxes.extent(outer), held[members[0][0]].dtype)
        for box, where in members:
            whole[where] = held[box]
        yield outer, whole


_LARGE = 16 << 10
"""Bytes that are not copied to be written with others, as in `codecs.runs`."""


@functools.lru_cache(maxsize=1024)
def covered(
    parts: tuple[Box, ...], laid: Arrangement | boxes.Shape, itemsize: int
) -> list[tuple[Box, list[tuple[Box, tuple[slice, ...]]]]]:
    """`boxes.merged`, with the place of each part in the larger box; large parts that are one run each stay apart.

    `laid` is how the array lies in the file: in tensors of it, or as one of its shape. The same for all layers.
    """
    apart = all(itemsize * boxes.size(box) >= _LARGE and _one_run(box, laid) for box in parts)
    merged = {box: [box] for box in parts} if apart else boxes.merged(parts)
    return [(outer, [(box, boxes.within(box, outer)) for box in members]) for outer, members in merged.items()]


def _one_run(box: Box, laid: Arrangement | boxes.Shape) -> bool:
    """Whether a part of an array is one run of bytes in the file."""
    if not isinstance(laid, Arrangement):
        return boxes.one_run(laid, box)
    found = boxes.pieces(laid, box)
    return len(found) == 1 and boxes.one_run(found[0].shape, found[0].box)


def gathered(leaf: Any) -> np.ndarray:
    """All of an array, in every process; all of them must call this."""
    here = local(leaf) or leaf.is_fully_replicated
    return np.asarray(leaf if here else multihost_utils.process_allgather(leaf, tiled=True))


def _own(encoded: Encoded, held: dict[str, dict[Box, np.ndarray]]) -> Iterator[Part]:
    """What this process is to write of a shared file, in the order of the file; `held` is emptied on the way."""
    left = collections.Counter(e.path for e in encoded.plan.entries)  # a tied leaf is there under two names
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        left[entry.path] -= 1
        mine = held.get(entry.path, {}) if left[entry.path] else held.pop(entry.path, {})
        for box, values in joined(mine, entry.form):
            yield from _parts(encoded, entry, box, values)


def _gathered(encoded: Encoded, process: int) -> Iterator[Part]:
    """Everything, one leaf after the other, for process 0; the others only send."""
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        with reading(encoded.leaves):
            value = gathered(encoded.leaves[entry.path])
        if process == 0:
            yield from _parts(encoded, entry, boxes.whole(entry.shape), value)


def _parts(encoded: Encoded, entry: Entry, box: Box, held: np.ndarray) -> Iterator[Part]:
    for piece in boxes.pieces(entry.form, box):
        tile = piece.encode(held[boxes.within(piece.region, box)])
        if encoded.dtype is not None:
            tile = tile.astype(encoded.dtype, copy=False)
        yield Part(entry.keys[piece.number], piece.shape, piece.box, tile)
