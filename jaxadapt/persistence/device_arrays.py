"""Load tensors of a file, or of memory, as device arrays in the model's layout.

Threads read the regions that devices need, and transpose them where the layouts differ, into memory that XLA's CPU
client accepts without a copy. The caller's thread transfers arrays as they become ready. So the data is in memory once,
and the device does not wait for the whole file.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxadapt.arrays import finite, regions
from jaxadapt.arrays.regions import FileRegion, Region
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.keymaps.plan import Plan, PlanEntry
from jaxadapt.storage import local_files
from jaxadapt.storage.source import TensorSource, as_source

# Bytes of the leaves of one job: small enough to share the work between threads.
_JOB = 8 << 20


def load_arrays(
    plan: Plan,
    tensors: Mapping[str, Any],
    dtypes: Mapping[str, Any],
    dtype: Any = None,
    shardings: Mapping[str, Sharding] | None = None,
    report: Report = no_report,
    stage: str = "load",
    name: str = "the file",
    check: bool = False,
) -> dict[str, Any]:
    """Return {path: array} from {key: tensor}.

    Args:
        plan: the leaves and their tensors.
        tensors: a `TensorSource`, or arrays in memory (traced ones inside jit). They are copied, never shared.
        dtypes: the tensors' dtypes, by key.
        dtype: the arrays' dtype, one or, for a `TensorSource`, `{path: dtype}`; by default that of each leaf's tensors.
        shardings: the arrays' shardings, by path; arrays without one go to the default device. Reads from a file only
            the bytes that devices of this process need (those of replicas once), and gaps between them.
        report: called with (stage, bytes done, bytes in all) as arrays are created.
        stage: the first argument of `report`.
        name: the origin of the tensors, for messages.
        check: warn of tensors that hold NaN or infinity.

    Raises `MismatchError` if finite values are NaN or infinite in the dtype of their array. Traced arrays have no
    values to check.
    """
    shardings = {path: regions.concrete_sharding(place) for path, place in (shardings or {}).items()}
    requested = dtype if isinstance(dtype, Mapping) else dict.fromkeys((e.path for e in plan.entries), dtype)
    if not isinstance(tensors, TensorSource) and any(isinstance(x, jax.Array) for x in tensors.values()):
        leaves = plan.decode({key: x if isinstance(x, jax.Array) else jnp.array(x) for key, x in tensors.items()})
        leaves = leaves if dtype is None else finite.cast_tree(leaves, dtype, name)
        return {path: regions.move_to(x, shardings[path]) if path in shardings else x for path, x in leaves.items()}
    source = as_source(tensors)
    new_dtypes = {
        e.path: e.dtype(dtypes) if requested[e.path] is None else np.dtype(requested[e.path]) for e in plan.entries
    }
    position = {key: number for number, key in enumerate(source)}
    order = sorted(plan.entries, key=lambda e: position[e.keys[0]])  # file order
    sizes = {
        e.path: new_dtypes[e.path].itemsize
        * (regions.addressable_size(shardings[e.path], e.shape) if e.path in shardings else e.form.size)
        for e in order
    }
    count = byte_counter(report, stage, sum(sizes.values()))
    out: dict[str, Any] = {e.path: None for e in plan.entries}
    jobs = local_files.split_by_size(order, lambda e: sizes[e.path], _JOB)
    checked = {
        e.path
        for e in order
        if check or any(source.specs[key].dtype != new_dtypes[e.path] for key in e.keys[: e.form.count])
    }
    suspects: dict[str, int] = {}
    made = (_make_job(job, source, shardings, new_dtypes, checked, suspects) for job in jobs)
    ready = local_files.run_in_order(made, len(jobs))
    with contextlib.closing(ready):
        for job, arrays in zip(jobs, ready, strict=True):
            out |= _transfer(job, arrays, shardings, new_dtypes)
            count(sum(sizes[e.path] for e in job))
    found = [(e.keys[: e.form.count], new_dtypes[e.path], suspects[e.path]) for e in order if e.path in suspects]
    counts = finite.explain_not_finite(found, lambda key: source.read_into(key, None), name)
    if check:
        finite.warn_not_finite(counts, name)
    return out


_Arrays = Mapping[str, Mapping[Region, np.ndarray]]
"""`{path: {region: array}}`: the regions of each leaf that this process needs."""


def _make_job(
    job: Sequence[PlanEntry],
    source: TensorSource,
    shardings: Mapping[str, Sharding],
    dtypes: Mapping[str, np.dtype],
    checked: Collection[str],
    suspects: dict[str, int],
) -> Callable[[], _Arrays]:
    """Return a task that reads the regions of each leaf, and counts NaN and infinity of those in `checked`."""
    arrays: dict[str, dict[Region, np.ndarray]] = {}
    for entry in job:
        place, dtype = shardings.get(entry.path), dtypes[entry.path]
        # Allocated here, in the caller's thread; see `threads.run_in_order`.
        if place is None:
            arrays[entry.path] = {regions.full_region(entry.shape): _allocate(entry, entry.shape, dtype)}
            continue
        boxes = regions.addressable_regions(place, entry.shape)
        arrays[entry.path] = {box: _allocate(entry, regions.region_shape(box), dtype) for box in boxes}

    def read() -> _Arrays:
        with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
            for entry in job:
                own = arrays[entry.path]
                _read_leaf(entry, source, own)
                # Now, while the processor has them in its cache.
                if entry.path in checked and not all(map(finite.is_finite, own.values())):
                    suspects[entry.path] = sum(map(finite.count_not_finite, own.values()))
        return arrays

    return read


def _transfer(
    job: Sequence[PlanEntry], arrays: _Arrays, shardings: Mapping[str, Sharding], dtypes: Mapping[str, np.dtype]
) -> dict[str, Any]:
    """Return the arrays of one job, on their devices."""
    # The memory is aligned and not used elsewhere, so XLA may share it. One call for all: each costs 0.1 ms.
    plain = {e.path: next(iter(arrays[e.path].values())) for e in job if e.path not in shardings}
    out: dict[str, Any] = dict(zip(plain, jax.device_put([*plain.values()], may_alias=True), strict=True))
    for path, shape in ((e.path, e.shape) for e in job if e.path in shardings):
        dtype = jax.dtypes.canonicalize_dtype(dtypes[path])
        # four times as fast as device_put of single-device arrays
        get = functools.partial(_part, arrays[path], shape)
        out[path] = jax.make_array_from_callback(shape, shardings[path], get, dtype)
    return out


def _part(parts: Mapping[Region, np.ndarray], shape: tuple[int, ...], index: Any) -> np.ndarray:
    return parts[regions.region_from_slices(index, shape)]


def _allocate(entry: PlanEntry, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate the array of a region, in memory that XLA's CPU client accepts without a copy."""
    array = local_files.aligned_empty(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    if entry.form.is_partial:  # the file does not contain all of it
        array[...] = 0
    return array


def _read_leaf(entry: PlanEntry, source: TensorSource, places: Mapping[Region, np.ndarray]) -> None:
    """Read the regions of a leaf into their arrays."""
    covers = regions.merge_neighbours(places) if len(places) > 1 else {box: [box] for box in places}
    for outer, members in covers.items():
        for piece in regions.file_regions(entry.form, outer):
            key = entry.keys[piece.number]
            target = places.get(outer)
            if target is not None and _read_in_place(
                source, key, piece, target[regions.relative_slices(piece.region, outer)]
            ):
                continue
            tile = _read_tile(source, key, piece)
            dtype = places[members[0]].dtype
            if not piece.is_exact and dtype.itemsize > tile.dtype.itemsize:
                tile = tile.astype(dtype)  # cast before decoding, which rounds only once then
            part = piece.decode(tile)
            for box in members:
                common = regions.intersection(box, piece.region)
                if common is not None:
                    _copy(
                        places[box][regions.relative_slices(common, box)],
                        part[regions.relative_slices(common, piece.region)],
                    )


def _read_in_place(source: TensorSource, key: str, piece: FileRegion, place: np.ndarray) -> bool:
    """Read a tensor directly into its place; return False, and do nothing, if the layouts differ."""
    if not piece.is_exact or not piece.is_full or place.dtype != source.specs[key].dtype:
        return False
    tile = piece.encode(place) if place.flags.c_contiguous else place
    if not tile.flags.c_contiguous:
        return False
    memory = tile.reshape(-1).view(np.uint8)
    data = source.read_into(key, memory)
    if not np.may_share_memory(data, memory):  # in memory already
        _copy(tile, data.reshape(tile.shape))
    return True


def _read_tile(source: TensorSource, key: str, piece: FileRegion) -> np.ndarray:
    """Return a region of one tensor, in the file's layout."""
    if piece.is_full:
        return source.read_into(key, None).reshape(piece.shape)
    return source.read_slice(key, regions.to_slices(piece.tensor_region), piece.shape)


def _copy(place: np.ndarray, part: np.ndarray) -> None:
    """Copy an array to its place, with a cast if the dtypes differ."""
    if place.dtype == part.dtype and place.ndim:  # numpy copies unsigned integers fastest
        bits = np.dtype(f"u{place.dtype.itemsize}")
        place, part = place.view(bits), part.view(bits)
    np.copyto(place, part, casting="unsafe")  # the caller chose the dtype
