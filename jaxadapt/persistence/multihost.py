"""Save arrays that are spread over processes: each process writes the regions that it owns into one file.

`regions.assign_owners` assigns the regions, `regions.file_regions` maps them to the file, `storage.sharded_write`
writes them.
"""

from __future__ import annotations

import collections
import dataclasses
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
from jaxadapt.arrays import regions as array_regions
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.arrays.regions import Region
from jaxadapt.core.progress import Report, no_report
from jaxadapt.keymaps.plan import Encoded, PlanEntry
from jaxadapt.persistence import folder
from jaxadapt.storage import location, sharded_write
from jaxadapt.storage.sharded_write import Group, TensorPart
from jaxadapt.storage.source import cast


def is_distributed(leaves: Iterable[Any]) -> bool:
    """Return True if some of these arrays are partly in other processes."""
    return jax.process_count() > 1 and not all(map(is_local, leaves))


def write_shared(
    tensors: PeftTensors,
    path: str | os.PathLike[str],
    dtype: Any,
    shared: bool | None,
    timeout: float,
    report: Report = no_report,
) -> None:
    """Write an adapter folder as `folder.write` does; all processes call this.

    Args:
        tensors: an adapter whose tensors are `Encoded`.
        dtype: the dtype of the floating-point tensors; None: their own.
        shared: True if all processes see the folder; None: detect it. If not, process 0 writes everything.
        timeout: in seconds, for each answer of another process.
        report: called with ("save", bytes, bytes in all) for the bytes that this process writes.

    Raises:
        FileError: in all processes, if one of them failed, died, or did not call. The old adapter then remains.
    """
    encoded: Encoded = tensors.tensors  # pyright: ignore[reportAssignmentType]
    target = location.to_location(path)
    group = sharded_write.start(target, timeout)
    stored = encoded if dtype is None else cast(encoded, dtype)
    tensors = dataclasses.replace(tensors, tensors=stored)
    specs = {key: (spec.dtype, spec.shape) for key, spec in stored.specs.items()}

    def size(values: Iterable[Any]) -> int:
        return sum(x.size * (dtype or x.dtype).itemsize for x in values)

    def parts(file_is_shared: bool) -> tuple[int, Iterator[TensorPart]]:
        if file_is_shared:
            owned = owned_regions(encoded.leaves, group.index)
            return size(x for each in owned.values() for x in each.values()), _owned_parts(encoded, owned, dtype)
        total = size(encoded.leaves.values()) if group.index == 0 else 0
        return total, _gathered_parts(encoded, group.index, dtype)

    def commit(put: sharded_write.Put) -> None:
        folder.write_with(tensors, target, lambda writer, _, metadata: put(writer, metadata), None)

    alike = local_digests(encoded.leaves) | {"the configuration": sharded_write.digest(tensors.config.to_json())}
    sharded_write.write(target / folder.WEIGHTS, specs, parts, group, commit, shared=shared, alike=alike, report=report)


def run_on_leader(task: str, work: Callable[[], Any], timeout: float) -> Any:
    """Run `work` on process 0 and return its JSON result in all processes. Collective.

    It starts once every process has called, so no process is still reading a file that it deletes. Raises `FileError`
    in all processes if it failed, or if a process did not answer for `timeout` seconds.
    """
    group = Group(task, timeout, ("made",))
    if group.index > 0:
        group.send("here")
        return group.receive("made")
    with group.announce_failure():
        group.receive_all("here")
        value = work()
    group.send("made", value)
    return value


def combine_values(task: str, value: Any, combine: Callable[[list[Any]], Any], timeout: float) -> Any:
    """Return `combine` of the JSON values of all processes, which process 0 computes. Collective.

    Raises `FileError` in all processes if `combine` failed, or if a process did not answer for `timeout` seconds.
    """
    group = Group(task, timeout, ("combined",))
    if group.index > 0:
        group.send("value", value)
        return group.receive("combined")
    with group.announce_failure():
        others = group.receive_all("value")
        combined = combine([value, *(others[process] for process in sorted(others))])
    group.send("combined", combined)
    return combined


def is_local(leaf: Any) -> bool:
    """Return True if this process has all of an array; other processes then have their own array, or none."""
    # A traced array has no devices yet, so JAX does not know if it is addressable.
    return not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or leaf.is_fully_addressable


def local_digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Return digests of the arrays that each process has in full; they must agree, since process 0 writes its own."""
    with name_donated_arrays(leaves):
        return {path: sharded_write.digest(np.asarray(leaf)) for path, leaf in leaves.items() if is_local(leaf)}


def owned_regions(leaves: Mapping[str, Any], process: int) -> dict[str, dict[Region, np.ndarray]]:
    """Return {path: {box: values}} of the regions that this process writes, copied off the device.

    On the CPU they are views, which keep their arrays alive: see `step_files.copy_to_host`.
    """
    with name_donated_arrays(leaves):
        owned: dict[str, dict[Region, Any]] = {}
        for path, owners in array_regions.assign_owners(leaves).items():
            leaf = leaves[path]
            if is_local(leaf):
                owned[path] = {box: leaf for box, owner in owners.items() if owner == process}
                continue
            local = addressable_indices(leaf.sharding, leaf.shape).items()
            owned[path] = {box: leaf.addressable_data(i) for box, i in local if owners[box] == process}
        for path, parts in owned.items():  # start all transfers before waiting for the first
            if isinstance(leaves[path], jax.Array) and next(iter(leaves[path].sharding.device_set)).platform != "cpu":
                for value in parts.values():
                    value.copy_to_host_async()
        return {
            path: {box: np.asarray(value) for box, value in parts.items()} for path, parts in owned.items() if parts
        }


@functools.lru_cache(maxsize=1024)
def addressable_indices(sharding: Sharding, shape: tuple[int, ...]) -> dict[Region, int]:
    """Return {box: index for `jax.Array.addressable_data`} of the regions that this process has, each once.

    Computed once for each sharding and shape: `addressable_shards` of thousands of arrays would delay training.
    """
    like = jax.make_array_from_callback(shape, sharding, np.broadcast_to(np.uint8(0), shape).__getitem__)
    numbers = {shard.device: number for number, shard in enumerate(like.addressable_shards)}
    return {box: numbers[device] for box, device in array_regions.addressable_regions(sharding, shape).items()}


def join_regions(
    regions: Mapping[Region, np.ndarray], layout: FileLayout | array_regions.Shape
) -> Iterator[tuple[Region, np.ndarray]]:
    """Join regions into fewer and larger ones by `cover_regions`, without a copy where one region suffices."""
    for outer, members in cover_regions(tuple(regions), layout, next((x.itemsize for x in regions.values()), 1)):
        if len(members) == 1:
            yield outer, regions[outer]
            continue
        joined = np.empty(array_regions.region_shape(outer), regions[members[0][0]].dtype)
        for box, index in members:
            joined[index] = regions[box]
        yield outer, joined


_LARGE = 16 << 10
"""Regions of at least this many bytes are written without joining them, as in `storage.strided`."""


@functools.lru_cache(maxsize=1024)
def cover_regions(
    parts: tuple[Region, ...], layout: FileLayout | array_regions.Shape, itemsize: int
) -> list[tuple[Region, list[tuple[Region, tuple[slice, ...]]]]]:
    """Merge neighbouring array_regions; return [(merged box, [(box, its slices in the merged box)])].

    Large array_regions that are contiguous in the file stay separate.

    Args:
        layout: the array's layout in the file: over several tensors, or as one tensor of this shape.
    """
    separate = all(itemsize * array_regions.region_size(box) >= _LARGE and _is_one_run(box, layout) for box in parts)
    merged = {box: [box] for box in parts} if separate else array_regions.merge_neighbours(parts)
    return [
        (outer, [(box, array_regions.relative_slices(box, outer)) for box in members])
        for outer, members in merged.items()
    ]


def _is_one_run(box: Region, layout: FileLayout | array_regions.Shape) -> bool:
    """Return True if a region of an array is one run of bytes in the file."""
    if not isinstance(layout, FileLayout):
        return array_regions.is_contiguous(layout, box)
    in_file = array_regions.file_regions(layout, box)
    return len(in_file) == 1 and array_regions.is_contiguous(in_file[0].shape, in_file[0].tensor_region)


def gather_array(leaf: Any) -> np.ndarray:
    """Gather an array in every process. Collective."""
    complete = is_local(leaf) or leaf.is_fully_replicated
    return np.asarray(leaf if complete else multihost_utils.process_allgather(leaf, tiled=True))


def _owned_parts(
    encoded: Encoded, owned: dict[str, dict[Region, np.ndarray]], dtype: Any = None
) -> Iterator[TensorPart]:
    """Yield this process's parts of a shared file, in file order; remove them from `owned` to free memory."""
    left = collections.Counter(e.path for e in encoded.plan.entries)  # a tied leaf has several entries
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        left[entry.path] -= 1
        regions = owned.get(entry.path, {}) if left[entry.path] else owned.pop(entry.path, {})
        for box, values in join_regions(regions, entry.form):
            yield from _parts(entry, box, values, dtype)


def _gathered_parts(encoded: Encoded, process: int, dtype: Any = None) -> Iterator[TensorPart]:
    """Yield all parts in process 0, one leaf after the other; yield nothing in the others, which only send."""
    for entry in sorted(encoded.plan.entries, key=lambda e: e.keys[0]):
        with name_donated_arrays(encoded.leaves):
            value = gather_array(encoded.leaves[entry.path])
        if process == 0:
            yield from _parts(entry, array_regions.full_region(entry.shape), value, dtype)


def _parts(entry: PlanEntry, box: Region, values: np.ndarray, dtype: Any) -> Iterator[TensorPart]:
    """Yield the file parts of one region of a leaf."""
    for piece in array_regions.file_regions(entry.form, box):
        tile = piece.encode(values[array_regions.relative_slices(piece.region, box)])
        keys = entry.keys_of(piece.number)
        tile = tile if dtype is None else cast({keys[0]: tile}, dtype)[keys[0]]
        for key in keys:
            yield TensorPart(key, piece.shape, piece.tensor_region, tile)
