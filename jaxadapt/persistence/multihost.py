"""Saving arrays of which every process holds a part: each writes what it owns, into one file.

`regions.assign_owners` says who owns what, `regions.file_regions` where in the file that lies, `codecs.parallel` writes
it.
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

from jaxadapt.adapters.adapter import PeftTensors, name_donated_arrays
from jaxadapt.arrays import regions as boxes
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.regions import Box
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.keymaps.plan import Encoded, PlanEntry
from jaxadapt.persistence import folder
from jaxadapt.storage import location, parallel_write, safetensors
from jaxadapt.storage.coordination import Group
from jaxadapt.storage.parallel_write import TensorPart

STAGES = ("plan", "mode", "result")
"""What process 0 says in the course of one save."""


def is_distributed(leaves: Iterable[Any]) -> bool:
    """Whether some of these arrays are partly in other processes."""
    return not all(map(is_local, leaves))


def write_shared(
    tensors: PeftTensors, path: str | os.PathLike[str], shared: bool | None, timeout: float, report: Report = no_report
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
    target = location.to_location(path)
    group = Group(str(target), timeout, STAGES)
    alike = local_digests(encoded.leaves) | {"the configuration": parallel_write.digest(tensors.config.to_json())}

    def size(values: Iterable[Any]) -> int:
        return sum(x.size * (encoded.dtype or x.dtype).itemsize for x in values)

    def parts(common: bool) -> Iterator[TensorPart]:
        if common:
            held = owned_regions(encoded.leaves, group.index)
            return counted(_own(encoded, held), size(x for boxes in held.values() for x in boxes.values()))
        return counted(_gathered(encoded, group.index), size(encoded.leaves.values() if group.index == 0 else ()))

    def counted(made: Iterator[TensorPart], total: int) -> Iterator[TensorPart]:
        more = byte_counter(report, "save", total)
        for part in made:
            yield part
            more(part.array.nbytes)

    if group.index == 0:
        try:
            folder.write_with(
                tensors,
                target,
                lambda writer, specs, metadata: parallel_write.write_as_leader(
                    writer, safetensors.named_specs(specs), metadata, parts, group, shared, alike
                ),
                None,
            )
        except BaseException as error:
            group.send_failure(error)
            raise
        group.send("result")
    else:
        specs = {key: (spec.dtype, spec.shape) for key, spec in encoded.specs.items()}
        parallel_write.write_as_follower(
            os.fspath(target / folder.WEIGHTS), safetensors.named_specs(specs), parts, group, shared, alike
        )
        group.receive("result")


def run_on_leader(what: str, work: Callable[[], Any], timeout: float) -> Any:
    """What process 0 makes, a JSON value, in all processes, which all must call this.

    It begins when all have called: what it deletes, none of them is still reading. Raises `FileError` in all if it
    failed there, or if one said nothing for `timeout` seconds.
    """
    group = Group(what, timeout, ("made",))
    if group.index > 0:
        group.send("here")
        return group.receive("made")
    try:
        group.receive_all("here")
        value = work()
    except BaseException as error:
        group.send_failure(error)
        raise
    group.send("made", value)
    return value


def is_local(leaf: Any) -> bool:
    """Whether this process holds all of an array: the others have one of their own, or none."""
    # A traced array lies nowhere yet, and JAX cannot say whether it is addressable.
    return not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or leaf.is_fully_addressable


def local_digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """What each process has of its own, of which process 0 writes its: `alike` in `parallel_write.write_as_leader`."""
    with name_donated_arrays(leaves):
        return {path: parallel_write.digest(np.asarray(leaf)) for path, leaf in leaves.items() if is_local(leaf)}


def owned_regions(leaves: Mapping[str, Any], process: int) -> dict[str, dict[Box, np.ndarray]]:
    """`{path: {box: values}}`: what this process is to write of each leaf, off the device when this returns.

    On the CPU views, which hold their arrays: see `step_files.copy_to_host`.
    """
    with name_donated_arrays(leaves):
        held: dict[str, dict[Box, Any]] = {}
        for path, owners in boxes.assign_owners(leaves).items():
            leaf = leaves[path]
            if is_local(leaf):
                held[path] = {box: leaf for box, owner in owners.items() if owner == process}
                continue
            mine = addressable_indices(leaf.sharding, leaf.shape).items()
            held[path] = {box: leaf.addressable_data(at) for box, at in mine if owners[box] == process}
        for path, parts in held.items():  # all transfers begin before the first is waited for
            if isinstance(leaves[path], jax.Array) and next(iter(leaves[path].sharding.device_set)).platform != "cpu":
                for value in parts.values():
                    value.copy_to_host_async()
        return {path: {box: np.asarray(value) for box, value in parts.items()} for path, parts in held.items() if parts}


@functools.lru_cache(maxsize=1024)
def addressable_indices(placed: Sharding, shape: tuple[int, ...]) -> dict[Box, int]:
    """What this process holds of such arrays, each part once, as numbers for `jax.Array.addressable_data`.

    Found once, on an array like them: `addressable_shards` of thousands of arrays would take the training loop's time.
    """
    like = jax.make_array_from_callback(shape, placed, np.broadcast_to(np.uint8(0), shape).__getitem__)
    numbers = {shard.device: number for number, shard in enumerate(like.addressable_shards)}
    return {box: numbers[device] for box, device in boxes.addressable_regions(placed, shape).items()}


def join_regions(held: Mapping[Box, np.ndarray], laid: FileLayout | boxes.Shape) -> Iterator[tuple[Box, np.ndarray]]:
    """The same values in fewer and larger boxes, as `cover_regions` says; where `held` has them if they need no
    copy.
    """
    for outer, members in cover_regions(tuple(held), laid, next((x.itemsize for x in held.values()), 1)):
        if len(members) == 1:
            yield outer, held[outer]
            continue
        whole = np.empty(boxes.region_shape(outer), held[members[0][0]].dtype)
        for box, where in members:
            whole[where] = held[box]
        yield outer, whole


_LARGE = 16 << 10
"""Bytes that are not copied to be written with others, as in `codecs.runs`."""


@functools.lru_cache(maxsize=1024)
def cover_regions(
    parts: tuple[Box, ...], laid: FileLayout | boxes.Shape, itemsize: int
) -> list[tuple[Box, list[tuple[Box, tuple[slice, ...]]]]]:
    """`regions.merge_neighbours`, with the place of each part in the larger box; large parts that are one run each stay
    apart.

    `laid` is how the array lies in the file: in tensors of it, or as one of its shape. The same for all layers.
    """
    apart = all(itemsize * boxes.region_size(box) >= _LARGE and _one_run(box, laid) for box in parts)
    merged = {box: [box] for box in parts} if apart else boxes.merge_neighbours(parts)
    return [(outer, [(box, boxes.relative_slices(box, outer)) for box in members]) for outer, members in merged.items()]


def _one_run(box: Box, laid: FileLayout | boxes.Shape) -> bool:
    """Whether a part of an array is one run of bytes in the file."""
    if not isinstance(laid, FileLayout):
        return boxes.is_contiguous(laid, box)
    found = boxes.file_regions(laid, box)
    return len(found) == 1 and boxes.is_contiguous(found[0].shape, found[0].box)


def gather_array(leaf: Any) -> np.ndarray:
    """All of an array, in every process; all of them must call this."""
    here = is_local(leaf) or leaf.is_fully_replicated
    return np.asarray(leaf if here else multihost_utils.process_allgather(leaf, tiled=True))


def _own(encoded: Encoded, held: dict[str, dict[Box, np.ndarray]]) -> Iterator[TensorPart]:
    """What this process is to write of a shared file, in the order of the file; `held` is emptied on the way."""
    left = collections.Counter(e.path for e in encoded.plan.entries)  # a tied leaf is there under two names
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        left[entry.path] -= 1
        mine = held.get(entry.path, {}) if left[entry.path] else held.pop(entry.path, {})
        for box, values in join_regions(mine, entry.form):
            yield from _parts(encoded, entry, box, values)


def _gathered(encoded: Encoded, process: int) -> Iterator[TensorPart]:
    """Everything, one leaf after the other, for process 0; the others only send."""
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        with name_donated_arrays(encoded.leaves):
            value = gather_array(encoded.leaves[entry.path])
        if process == 0:
            yield from _parts(encoded, entry, boxes.full_region(entry.shape), value)


def _parts(encoded: Encoded, entry: PlanEntry, box: Box, held: np.ndarray) -> Iterator[TensorPart]:
    for piece in boxes.file_regions(entry.form, box):
        tile = piece.encode(held[boxes.relative_slices(piece.region, box)])
        if encoded.dtype is not None:
            tile = tile.astype(encoded.dtype, copy=False)
        yield TensorPart(entry.keys[piece.number], piece.shape, piece.box, tile)
