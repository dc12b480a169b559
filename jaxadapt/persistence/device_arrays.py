"""Load tensors of a file, or of memory, as device arrays in the model's layout.

Tensors with the same layout in file and model are read directly, many in one call, into memory that XLA's CPU client
accepts without a copy. For the others, threads read one tensor at a time into a buffer that stays in the processor's
cache, and transpose it into such memory. The caller's thread transfers arrays as they become ready. So the data is in
memory once, and neither planning nor the device waits for the whole file.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxadapt.arrays import placement, regions
from jaxadapt.arrays.regions import FileRegion, Region
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.keymaps.plan import Encoded, Plan, PlanEntry, TensorSpec
from jaxadapt.storage import local_files, threads
from jaxadapt.storage.hf_model import ModelTensors
from jaxadapt.storage.safetensors import SMALL, TensorFile

# Bytes of the leaves of one job: small enough to share the work between threads.
_JOB = 8 << 20


def tensor_specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return shapes and dtypes by key, without reading or encoding a tensor."""
    if isinstance(tensors, Encoded | TensorFile | ModelTensors):
        return tensors.specs
    return {key: TensorSpec(tuple(x.shape), np.dtype(x.dtype)) for key, x in tensors.items()}


def load_arrays(
    plan: Plan,
    tensors: Mapping[str, Any],
    dtypes: Mapping[str, Any],
    dtype: Any = None,
    shardings: Mapping[str, Sharding] | None = None,
    report: Report = no_report,
    stage: str = "load",
) -> dict[str, Any]:
    """Return {path: array} from {key: tensor}.

    Args:
        tensors: an open file, or arrays in memory (traced ones inside jit). They are copied, never shared.
        dtypes: the tensors' dtypes, by key.
        dtype: the arrays' dtype, one or `{path: dtype}`; by default that of each leaf's tensors.
        where: the arrays' shardings, by path; arrays without one go to the default device. Reads from a file only the
            bytes that devices of this process need (those of replicas once), and gaps between them.
        report, what: called with (what, bytes done, bytes in all) as arrays are created.
    """
    shardings = {path: placement.concrete_sharding(place) for path, place in (shardings or {}).items()}
    requested = dtype if isinstance(dtype, Mapping) else dict.fromkeys((e.path for e in plan.entries), dtype)
    in_files = isinstance(tensors, TensorFile | ModelTensors | Encoded)
    if not in_files and any(isinstance(x, jax.Array) for x in tensors.values()):
        leaves = plan.decode({key: x if isinstance(x, jax.Array) else jnp.array(x) for key, x in tensors.items()})
        leaves = {
            path: leaf if requested[path] is None else leaf.astype(requested[path]) for path, leaf in leaves.items()
        }
        return {path: placement.move_to(x, shardings[path]) if path in shardings else x for path, x in leaves.items()}
    new_dtypes = {
        e.path: e.dtype(dtypes) if requested[e.path] is None else np.dtype(requested[e.path]) for e in plan.entries
    }
    position = {key: number for number, key in enumerate(tensors)}
    order = sorted(plan.entries, key=lambda e: position[e.keys[0]])  # file order
    file = tensors if isinstance(tensors, TensorFile) else None
    verbatim = [] if file is None else _verbatim_leaves(order, file, new_dtypes, shardings)
    verbatim_paths = {e.path for e in verbatim}
    others = [e for e in order if e.path not in verbatim_paths]
    boxes = {e.path: _local_boxes(shardings.get(e.path), e.shape) for e in others}
    sizes = {
        e.path: (regions.addressable_size(shardings[e.path], e.form.shape) if e.path in shardings else e.form.size)
        * new_dtypes[e.path].itemsize
        for e in order
    }
    count = byte_counter(report, stage, sum(sizes.values()))
    out: dict[str, Any] = {e.path: None for e in plan.entries}

    jobs = list[Sequence[PlanEntry]](_jobs(others, sizes))
    if file is not None:
        by_key = {e.keys[0]: e for e in verbatim}
        groups = file.groups(by_key, _JOB)
        jobs = [*([by_key[key] for key in group] for group in groups), *jobs]

    def make_task(job: Sequence[PlanEntry]) -> Callable[[], dict[str, list[np.ndarray]]]:
        if job[0].path in verbatim_paths and file is not None:
            return _read_job(job, file, shardings, sizes)
        return _decode_job(job, tensors, boxes, new_dtypes)

    # For a small file threads only contend for Python's lock: 50 MB took 40 ms instead of 27.
    small = not others and sum(sizes.values()) <= SMALL
    ready = threads.run_in_order(map(make_task, jobs), 1 if small else min(threads.THREADS, len(jobs)))
    with contextlib.closing(ready):
        for job, parts in zip(jobs, ready, strict=True):
            out |= _transfer(job, parts, shardings, new_dtypes)
            count(sum(sizes[e.path] for e in job))
    return out


LeafBoxes = Mapping[str, Sequence[Region]]
"""`{path: boxes}`: the regions of each leaf that this process needs."""


def _local_boxes(place: Sharding | None, shape: tuple[int, ...]) -> Sequence[Region]:
    return (regions.full_region(shape),) if place is None else tuple(regions.addressable_regions(place, shape))


def _verbatim_leaves(
    entries: Iterable[PlanEntry], file: TensorFile, dtypes: Mapping[str, np.dtype], where: Mapping[str, Sharding]
) -> list[PlanEntry]:
    """Return the leaves that equal one tensor of the file byte for byte, if this process needs at least half of them.

    Such a tensor is read completely: the bytes not needed are mostly gaps between the others, and would be read anyway.
    """
    specs = file.specs
    return [
        e
        for e in entries
        if len(e.keys) == 1
        and e.form.is_verbatim
        and specs[e.keys[0]].dtype == dtypes[e.path]
        and (e.path not in where or 2 * regions.addressable_size(where[e.path], e.form.shape) >= e.form.size)
    ]


def _read_job(
    job: Sequence[PlanEntry], file: TensorFile, where: Mapping[str, Sharding], sizes: Mapping[str, int]
) -> Callable[[], dict[str, list[np.ndarray]]]:
    """Return a task that reads the regions that devices need of verbatim leaves.

    Regions stay in the memory they were read to if XLA accepts it, else the task copies them.
    """
    keys = [e.keys[0] for e in job]
    widths = [file.specs[key].dtype.itemsize for key in keys]
    cuts = [
        regions.addressable_slices(where[e.path], e.form.shape, local_files.ALIGNED // width)
        if e.path in where
        else _WHOLE_LEAF
        for e, width in zip(job, widths, strict=True)
    ]
    memory: list[np.ndarray] | None = None
    if not file.is_prefetched:  # separate memory for leaves that are copied, so that it can be freed
        nbytes = list(map(file.nbytes, keys))
        kept = local_files.aligned_empties(
            [size if stays else 0 for size, (_, stays) in zip(nbytes, cuts, strict=True)]
        )
        temporary = local_files.aligned_empties(
            [0 if stays else size for size, (_, stays) in zip(nbytes, cuts, strict=True)]
        )
        memory = [a if stays else b for a, b, (_, stays) in zip(kept, temporary, cuts, strict=True)]
    copies = local_files.aligned_empties(
        [0 if stays else sizes[e.path] for e, (_, stays) in zip(job, cuts, strict=True)]
    )

    def read() -> dict[str, list[np.ndarray]]:
        out: dict[str, list[np.ndarray]] = {}
        for e, array, (indexes, stays), copy in zip(job, file.read_group(keys, memory), cuts, copies, strict=True):
            leaf = array.reshape(e.form.shape)
            if stays:
                out[e.path] = [leaf[index] for index in indexes]
                continue
            bits = leaf.view(f"u{leaf.dtype.itemsize}")  # numpy copies unsigned integers fastest
            parts = [bits[index] for index in indexes]
            first, *rest = parts[0].shape  # the regions of a leaf have one shape
            joined = copy.view(bits.dtype).reshape(len(parts) * first, *rest)
            np.concatenate(parts, out=joined)
            out[e.path] = list(joined.view(leaf.dtype).reshape(len(parts), first, *rest))
        return out

    return read


_WHOLE_LEAF: tuple[list[Any], bool] = ([...], True)


def _transfer(
    job: Sequence[PlanEntry],
    made: Mapping[str, Sequence[np.ndarray]],
    where: Mapping[str, Sharding],
    dtypes: Mapping[str, np.dtype],
) -> dict[str, Any]:
    """Return the arrays of one job, on their devices."""
    # The memory is aligned and not used elsewhere, so XLA may share it. One call for all: each costs 0.1 ms.
    plain = [e.path for e in job if e.path not in where]
    out: dict[str, Any] = dict(
        zip(plain, jax.device_put([made[path][0] for path in plain], may_alias=True), strict=True)
    )
    sharded = {e.path: e.form.shape for e in job if e.path in where}
    kinds = {dtype: jax.dtypes.canonicalize_dtype(dtype) for dtype in {dtypes[path] for path in sharded}}
    for path, shape in sharded.items():  # four times as fast as device_put of single-device arrays
        parts = dict(zip(regions.addressable_starts(where[path], shape), made[path], strict=True))
        get = functools.partial(_part, parts)
        out[path] = jax.make_array_from_callback(shape, where[path], get, kinds[dtypes[path]])
    return out


def _part(parts: Mapping[tuple[int, ...], np.ndarray], index: Any) -> np.ndarray:
    return parts[tuple([part.start or 0 for part in index])]


def _jobs(entries: Iterable[PlanEntry], sizes: Mapping[str, int]) -> Iterator[list[PlanEntry]]:
    """Group entries into jobs of about `_JOB` bytes."""
    job: list[PlanEntry] = []
    total = 0
    for entry in entries:
        if job and total + sizes[entry.path] > _JOB:
            yield job
            job, total = [], 0
        job.append(entry)
        total += sizes[entry.path]
    if job:
        yield job


def _decode_job(
    job: Sequence[PlanEntry], tensors: Mapping[str, Any], boxes: LeafBoxes, dtypes: Mapping[str, np.dtype]
) -> Callable[[], dict[str, list[np.ndarray]]]:
    """Return a task that decodes the regions of each leaf, in the order of `boxes`."""
    arrays = _allocate(job, boxes, dtypes)
    scratch: np.ndarray | None = None
    if isinstance(tensors, TensorFile | ModelTensors):
        scratch = local_files.aligned_empty(max(tensors.nbytes(key) for e in job for key in e.keys))

    def make() -> dict[str, list[np.ndarray]]:
        for entry in job:
            places = dict(zip(boxes[entry.path], arrays[entry.path], strict=True))
            covers = regions.merge_neighbours(places) if len(places) > 1 else {box: [box] for box in places}
            for outer, members in covers.items():
                for piece in regions.file_regions(entry.form, outer):
                    key = entry.keys[piece.number]
                    target = places.get(outer)
                    if target is not None and _read_in_place(
                        tensors, key, piece, target[regions.relative_slices(piece.region, outer)]
                    ):
                        continue
                    tile = _read_tile(tensors, key, piece, scratch)
                    if not piece.is_exact and dtypes[entry.path].itemsize > tile.dtype.itemsize:
                        tile = tile.astype(dtypes[entry.path])  # cast before decoding, which rounds only once then
                    part = piece.decode(tile)
                    for box in members:
                        common = regions.intersection(box, piece.region)
                        if common is not None:
                            _copy(
                                places[box][regions.relative_slices(common, box)],
                                part[regions.relative_slices(common, piece.region)],
                            )
        return arrays

    return make


def _read_in_place(tensors: Mapping[str, Any], key: str, piece: FileRegion, place: np.ndarray) -> bool:
    """Read a tensor directly into its place; return False, and do nothing, if the layouts differ."""
    if (
        not piece.is_exact
        or not isinstance(tensors, TensorFile | ModelTensors)
        or piece.tensor_region != regions.full_region(piece.shape)
    ):
        return False
    tile = piece.encode(place) if place.flags.c_contiguous else place
    if place.dtype != tensors.spec(key).dtype or not tile.flags.c_contiguous:
        return False
    memory = tile.reshape(-1).view(np.uint8)
    data = tensors.read_into(key, memory)
    if not np.may_share_memory(data, memory):  # prefetched data
        _copy(tile, data.reshape(tile.shape))
    return True


def _allocate(
    job: Sequence[PlanEntry], boxes: LeafBoxes, dtypes: Mapping[str, np.dtype]
) -> dict[str, list[np.ndarray]]:
    """Allocate arrays for the regions of each leaf, in memory that XLA's CPU client accepts without a copy."""
    parts = [(e.path, regions.region_shape(box), dtypes[e.path]) for e in job for box in boxes[e.path]]
    memory = local_files.aligned_empties([math.prod(shape) * dtype.itemsize for _, shape, dtype in parts])
    made: dict[str, list[np.ndarray]] = {e.path: [] for e in job}
    for (path, shape, dtype), place in zip(parts, memory, strict=True):
        made[path].append(place.view(dtype).reshape(shape))
    for entry in job:
        if entry.form.is_partial:  # the file does not contain all of it
            for part in made[entry.path]:
                part[...] = 0
    return made


def _read_tile(tensors: Mapping[str, Any], key: str, piece: FileRegion, scratch: np.ndarray | None) -> np.ndarray:
    """Return a region of one tensor, in the file's layout."""
    if not isinstance(tensors, TensorFile | ModelTensors):
        return np.asarray(tensors[key]).reshape(piece.shape)[regions.to_slices(piece.tensor_region)]
    if piece.tensor_region == regions.full_region(piece.shape):
        return tensors.read_into(key, scratch).reshape(piece.shape)
    return tensors.read_slice(key, regions.to_slices(piece.tensor_region), piece.shape)


def _copy(place: np.ndarray, part: np.ndarray) -> None:
    """Copy an array to its place, with a cast if the dtypes differ."""
    if place.dtype == part.dtype and place.ndim:  # numpy copies unsigned integers fastest
        bits = np.dtype(f"u{place.dtype.itemsize}")
        place, part = place.view(bits), part.view(bits)
    np.copyto(place, part, casting="unsafe")  # the caller chose the dtype
