"""From the tensors of a file, or of memory, to device arrays in the model's layout.

The fast road of `load`: what lies in the file as in the model is read, many tensors with a call, into memory that XLA's
CPU client takes without a copy; of the rest threads read one tensor at a time into a buffer that stays in the
processor's cache, and put it transposed into such memory. The caller's thread hands over what is ready. So the data
is in memory once, and neither planning nor the device waits for the whole file.
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
from jaxadapt.arrays.regions import Box, FileRegion
from jaxadapt.core.progress import Report, byte_counter, no_report
from jaxadapt.keymaps.plan import Encoded, Plan, PlanEntry, TensorSpec
from jaxadapt.storage import local_files, threads
from jaxadapt.storage.hf_model import ModelTensors
from jaxadapt.storage.safetensors import SMALL, TensorFile

# Bytes of the leaves that one job makes: small enough that threads share the work.
_JOB = 8 << 20


def tensor_specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Shapes and dtypes by key, without reading or making a tensor."""
    if isinstance(tensors, Encoded | TensorFile | ModelTensors):
        return tensors.specs
    return {key: TensorSpec(tuple(x.shape), np.dtype(x.dtype)) for key, x in tensors.items()}


def load_arrays(
    plan: Plan,
    tensors: Mapping[str, Any],
    dtypes: Mapping[str, Any],
    dtype: Any = None,
    where: Mapping[str, Sharding] | None = None,
    report: Report = no_report,
    what: str = "load",
) -> dict[str, Any]:
    """`{path: array}` from `{key: tensor}`.

    Args:
        tensors: an open file, or arrays in memory (traced ones inside jit). They are copied, never shared.
        dtypes: of the tensors, by key.
        dtype: of the arrays, one or `{path: dtype}`; by default each leaf's tensors' own.
        where: the shardings of the arrays, by path; without one they go to the default device. Of a file only the
            bytes are read that the devices of this process hold, those of replicas once, and what lies between them.
        report, what: where it is with the bytes of the arrays that are made here.
    """
    where = {path: placement.concrete_sharding(place) for path, place in (where or {}).items()}
    asked = dtype if isinstance(dtype, Mapping) else dict.fromkeys((e.path for e in plan.entries), dtype)
    in_files = isinstance(tensors, TensorFile | ModelTensors | Encoded)
    if not in_files and any(isinstance(x, jax.Array) for x in tensors.values()):
        leaves = plan.decode({key: x if isinstance(x, jax.Array) else jnp.array(x) for key, x in tensors.items()})
        leaves = {path: leaf if asked[path] is None else leaf.astype(asked[path]) for path, leaf in leaves.items()}
        return {path: placement.move_to(x, where[path]) if path in where else x for path, x in leaves.items()}
    wanted = {e.path: e.dtype(dtypes) if asked[e.path] is None else np.dtype(asked[e.path]) for e in plan.entries}
    place = {key: number for number, key in enumerate(tensors)}
    order = sorted(plan.entries, key=lambda e: place[e.keys[0]])  # the file's
    file = tensors if isinstance(tensors, TensorFile) else None
    alike = [] if file is None else _alike(order, file, wanted, where)
    taken = {e.path for e in alike}
    others = [e for e in order if e.path not in taken]
    held = {e.path: _here(where.get(e.path), e.shape) for e in others}
    sizes = {
        e.path: (regions.addressable_size(where[e.path], e.form.shape) if e.path in where else e.form.size)
        * wanted[e.path].itemsize
        for e in order
    }
    more = byte_counter(report, what, sum(sizes.values()))
    out: dict[str, Any] = {e.path: None for e in plan.entries}

    jobs = list[Sequence[PlanEntry]](_jobs(others, sizes))
    if file is not None:
        by_key = {e.keys[0]: e for e in alike}
        groups = file.groups(by_key, _JOB)
        jobs = [*([by_key[key] for key in group] for group in groups), *jobs]

    def made(job: Sequence[PlanEntry]) -> Callable[[], dict[str, list[np.ndarray]]]:
        if job[0].path in taken and file is not None:
            return _cut(job, file, where, sizes)
        return _make(job, tensors, held, wanted)

    # Threads would only fight for Python's lock over a small file: 50 MB took 40 ms instead of 27.
    small = not others and sum(sizes.values()) <= SMALL
    ready = threads.run_in_order(map(made, jobs), 1 if small else min(threads.THREADS, len(jobs)))
    with contextlib.closing(ready):
        for job, parts in zip(jobs, ready, strict=True):
            out |= _handed_over(job, parts, where, wanted)
            more(sum(sizes[e.path] for e in job))
    return out


Held = Mapping[str, Sequence[Box]]
"""`{path: boxes}`: the parts of each leaf that are needed here."""


def _here(place: Sharding | None, shape: tuple[int, ...]) -> Sequence[Box]:
    return (regions.full_region(shape),) if place is None else tuple(regions.addressable_regions(place, shape))


def _alike(
    entries: Iterable[PlanEntry], file: TensorFile, dtypes: Mapping[str, np.dtype], where: Mapping[str, Sharding]
) -> list[PlanEntry]:
    """Those leaves that are one tensor of the file, byte for byte, of which this process needs half or more.

    Such a tensor is read as a whole: what is not needed lies between the rest mostly, and would be read along.
    """
    found = file.specs
    return [
        e
        for e in entries
        if len(e.keys) == 1
        and e.form.is_verbatim
        and found[e.keys[0]].dtype == dtypes[e.path]
        and (e.path not in where or 2 * regions.addressable_size(where[e.path], e.form.shape) >= e.form.size)
    ]


def _cut(
    job: Sequence[PlanEntry], file: TensorFile, where: Mapping[str, Sharding], sizes: Mapping[str, int]
) -> Callable[[], dict[str, list[np.ndarray]]]:
    """To read the parts of tensors that devices hold: they stay where they were read to if XLA takes them so, else they
    are copied from there."""
    keys = [e.keys[0] for e in job]
    widths = [file.specs[key].dtype.itemsize for key in keys]
    cuts = [
        regions.addressable_slices(where[e.path], e.form.shape, local_files.ALIGNED // width)
        if e.path in where
        else _UNCUT
        for e, width in zip(job, widths, strict=True)
    ]
    memory: list[np.ndarray] | None = None
    if not file.is_prefetched:  # what is only copied from is not to live on, so it is by itself
        nbytes = list(map(file.nbytes, keys))
        kept = local_files.aligned_empties(
            [size if stays else 0 for size, (_, stays) in zip(nbytes, cuts, strict=True)]
        )
        passing = local_files.aligned_empties(
            [0 if stays else size for size, (_, stays) in zip(nbytes, cuts, strict=True)]
        )
        memory = [a if stays else b for a, b, (_, stays) in zip(kept, passing, cuts, strict=True)]
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
            bits = leaf.view(f"u{leaf.dtype.itemsize}")  # which numpy copies fastest
            parts = [bits[index] for index in indexes]
            first, *rest = parts[0].shape  # a leaf's parts are of one shape
            together = copy.view(bits.dtype).reshape(len(parts) * first, *rest)
            np.concatenate(parts, out=together)
            out[e.path] = list(together.view(leaf.dtype).reshape(len(parts), first, *rest))
        return out

    return read


_UNCUT: tuple[list[Any], bool] = ([...], True)


def _handed_over(
    job: Sequence[PlanEntry],
    made: Mapping[str, Sequence[np.ndarray]],
    where: Mapping[str, Sharding],
    dtypes: Mapping[str, np.dtype],
) -> dict[str, Any]:
    """The arrays of one job, on their devices."""
    # The memory is aligned and our own, so it may be shared; a list at once, since each call costs a tenth of a ms.
    plain = [e.path for e in job if e.path not in where]
    out: dict[str, Any] = dict(
        zip(plain, jax.device_put([made[path][0] for path in plain], may_alias=True), strict=True)
    )
    spread = {e.path: e.form.shape for e in job if e.path in where}
    kinds = {dtype: jax.dtypes.canonicalize_dtype(dtype) for dtype in {dtypes[path] for path in spread}}
    for path, shape in spread.items():  # a quarter of what device_put takes for as many arrays of one device each
        parts = dict(zip(regions.addressable_starts(where[path], shape), made[path], strict=True))
        get = functools.partial(_part, parts)
        out[path] = jax.make_array_from_callback(shape, where[path], get, kinds[dtypes[path]])
    return out


def _part(parts: Mapping[tuple[int, ...], np.ndarray], index: Any) -> np.ndarray:
    return parts[tuple([part.start or 0 for part in index])]


def _jobs(entries: Iterable[PlanEntry], sizes: Mapping[str, int]) -> Iterator[list[PlanEntry]]:
    """The same in portions of so many bytes."""
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


def _make(
    job: Sequence[PlanEntry], tensors: Mapping[str, Any], held: Held, dtypes: Mapping[str, np.dtype]
) -> Callable[[], dict[str, list[np.ndarray]]]:
    """To make the parts of each leaf that are needed here, in the order of `held`."""
    made = _allocated(job, held, dtypes)
    scratch: np.ndarray | None = None
    if isinstance(tensors, TensorFile | ModelTensors):
        scratch = local_files.aligned_empty(max(tensors.nbytes(key) for e in job for key in e.keys))

    def make() -> dict[str, list[np.ndarray]]:
        for entry in job:
            places = dict(zip(held[entry.path], made[entry.path], strict=True))
            covers = regions.merge_neighbours(places) if len(places) > 1 else {box: [box] for box in places}
            for outer, members in covers.items():
                for piece in regions.file_regions(entry.form, outer):
                    key = entry.keys[piece.number]
                    whole = places.get(outer)
                    if whole is not None and _read(
                        tensors, key, piece, whole[regions.relative_slices(piece.region, outer)]
                    ):
                        continue
                    tile = _tile(tensors, key, piece, scratch)
                    if not piece.plain and dtypes[entry.path].itemsize > tile.dtype.itemsize:
                        tile = tile.astype(dtypes[entry.path])  # so that it is rounded once
                    part = piece.decode(tile)
                    for box in members:
                        both = regions.intersection(box, piece.region)
                        if both is not None:
                            _copy(
                                places[box][regions.relative_slices(both, box)],
                                part[regions.relative_slices(both, piece.region)],
                            )
        return made

    return make


def _read(tensors: Mapping[str, Any], key: str, piece: FileRegion, place: np.ndarray) -> bool:
    """Reads a tensor to where it is needed; False, and nothing done, if it lies there otherwise than in the file."""
    if (
        not piece.plain
        or not isinstance(tensors, TensorFile | ModelTensors)
        or piece.box != regions.full_region(piece.shape)
    ):
        return False
    tile = piece.encode(place) if place.flags.c_contiguous else place
    if place.dtype != tensors.spec(key).dtype or not tile.flags.c_contiguous:
        return False
    memory = tile.reshape(-1).view(np.uint8)
    found = tensors.read_into(key, memory)
    if not np.may_share_memory(found, memory):  # it was in memory already
        _copy(tile, found.reshape(tile.shape))
    return True


def _allocated(job: Sequence[PlanEntry], held: Held, dtypes: Mapping[str, np.dtype]) -> dict[str, list[np.ndarray]]:
    """New arrays for the parts of each leaf: what XLA's CPU client takes as it is."""
    parts = [(e.path, regions.region_shape(box), dtypes[e.path]) for e in job for box in held[e.path]]
    memory = local_files.aligned_empties([math.prod(shape) * dtype.itemsize for _, shape, dtype in parts])
    made: dict[str, list[np.ndarray]] = {e.path: [] for e in job}
    for (path, shape, dtype), place in zip(parts, memory, strict=True):
        made[path].append(place.view(dtype).reshape(shape))
    for entry in job:
        if entry.form.partial:  # (not all of it is in the file)
            for part in made[entry.path]:
                part[...] = 0
    return made


def _tile(tensors: Mapping[str, Any], key: str, piece: FileRegion, scratch: np.ndarray | None) -> np.ndarray:
    """The box of one tensor, in the file's layout."""
    if not isinstance(tensors, TensorFile | ModelTensors):
        return np.asarray(tensors[key]).reshape(piece.shape)[regions.to_slices(piece.box)]
    if piece.box == regions.full_region(piece.shape):
        return tensors.read_into(key, scratch).reshape(piece.shape)
    return tensors.read_slice(key, regions.to_slices(piece.box), piece.shape)


def _copy(place: np.ndarray, part: np.ndarray) -> None:
    if place.dtype == part.dtype and place.ndim:  # numpy copies plain bits fastest
        bits = np.dtype(f"u{place.dtype.itemsize}")
        place, part = place.view(bits), part.view(bits)
    np.copyto(place, part, casting="unsafe")  # the caller chose the dtype
