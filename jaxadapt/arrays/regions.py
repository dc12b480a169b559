"""Which parts of an array a device holds, and where they lie in a file's tensors.

    sharding ──here──► boxes of a leaf ◄──pieces──► boxes of file tensors

Saving and loading use the same boxes: a process writes those it owns, and reads those its devices need.
Pure: shapes, shardings and plans; no files, and no array is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Sharding

from jaxadapt.arrays import pattern
from jaxadapt.arrays.layout import FileLayout, to_file_scale, to_model_scale

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""A part of an array: `(start, stop)` of each axis."""


# ---------------------------------------------------------------- what each device holds


@functools.lru_cache(maxsize=1024)
def device_regions(sharding: Sharding, shape: Shape) -> dict[Box, tuple[Any, ...]]:
    """`{box: devices}`: the distinct parts into which an array is cut, and who holds each of them."""
    found: dict[Box, list[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        found.setdefault(region_from_slices(index, shape), []).append(device)
    return {box: tuple(devices) for box, devices in found.items()}


@functools.lru_cache(maxsize=1024)
def addressable_regions(sharding: Sharding, shape: Shape) -> dict[Box, Any]:
    """`{box: device}`: the parts that this process holds, and one of its devices that does."""
    mine = sharding.addressable_devices
    held = {box: [d for d in devices if d in mine] for box, devices in device_regions(sharding, shape).items()}
    return {box: devices[0] for box, devices in held.items() if devices}


@functools.lru_cache(maxsize=1024)
def addressable_starts(sharding: Sharding, shape: Shape) -> list[tuple[int, ...]]:
    """Where each part of `addressable_regions` begins, which tells them apart."""
    return [tuple(start for start, _ in box) for box in addressable_regions(sharding, shape)]


@functools.lru_cache(maxsize=1024)
def addressable_size(sharding: Sharding, shape: Shape) -> int:
    """How many elements this process holds, those of replicas once."""
    return sum(map(region_size, addressable_regions(sharding, shape)))


@functools.lru_cache(maxsize=1024)
def addressable_slices(sharding: Sharding, shape: Shape, step: int) -> tuple[list[tuple[slice, ...]], bool]:
    """Where the parts of `addressable_regions` lie in an array that is all here, and whether each is one run that
    begins at a multiple
    of `step` elements.

    >>> mesh = jax.make_mesh((1,), ("x",))
    >>> addressable_slices(jax.sharding.NamedSharding(mesh, jax.P("x")), (4, 3), 32)
    ([(slice(0, 4, None), slice(0, 3, None))], True)
    """
    runs = True
    for box in addressable_regions(sharding, shape):
        first = sum(start * math.prod(shape[axis + 1 :]) for axis, (start, _) in enumerate(box))
        runs &= is_contiguous(shape, box) and first % step == 0
    return [to_slices(box) for box in addressable_regions(sharding, shape)], runs


def is_contiguous(shape: Shape, box: Box) -> bool:
    """Whether a box's elements lie one after the other in an array of this shape.

    >>> [is_contiguous((4, 3), region) for region in (((1, 3), (0, 3)), ((1, 3), (0, 2)), ((1, 2), (0, 2)))]
    [True, False, True]
    """
    large = next((axis for axis, (start, stop) in enumerate(box) if stop - start > 1), len(shape))
    return box[large + 1 :] == full_region(shape)[large + 1 :]


@functools.lru_cache(maxsize=1024)
def _holders(sharding: Sharding, shape: Shape) -> list[tuple[tuple[int, ...], list[Box], int]]:
    """Which processes hold the same parts, these parts, and how many elements they have."""
    groups: dict[tuple[int, ...], list[Box]] = {}
    for box, devices in device_regions(sharding, shape).items():
        groups.setdefault(tuple(sorted({d.process_index for d in devices})), []).append(box)
    return [(processes, mine, sum(map(region_size, mine))) for processes, mine in groups.items()]


def region_from_slices(index: Sequence[slice], shape: Shape) -> Box:
    """The box of a tuple of slices, as a shard's `index` gives them."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def full_region(shape: Shape) -> Box:
    """The box that is all of an array."""
    return tuple((0, size) for size in shape)


def to_slices(box: Box) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(*part) for part in box)


def relative_slices(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies inside an array that holds `outer`."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer, strict=True))


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share, None if that is nothing."""
    both = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def region_shape(box: Box) -> Shape:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def region_size(box: Box) -> int:
    """The number of elements."""
    return math.prod(region_shape(box))


def merge_neighbours(parts: Iterable[Box]) -> dict[Box, list[Box]]:
    """Disjoint boxes joined to larger ones where they are neighbours, each with those it is made of.

    The more of a tensor one box has, the longer are its runs of bytes in the file.

    >>> merge_neighbours([((0, 2), (0, 4)), ((2, 4), (0, 4)), ((6, 8), (0, 4))])
    {((0, 4), (0, 4)): [((0, 2), (0, 4)), ((2, 4), (0, 4))], ((6, 8), (0, 4)): [((6, 8), (0, 4))]}
    """
    out = {box: [box] for box in parts}
    for axis in reversed(range(len(next(iter(out), ())))):
        rows: dict[tuple[Any, ...], list[Box]] = {}
        for box in out:
            rows.setdefault((box[:axis], box[axis + 1 :]), []).append(box)
        joined: dict[Box, list[Box]] = {}
        for row in rows.values():
            row.sort(key=lambda box: box[axis])
            run = row[0]
            members = list(out[run])
            for box in row[1:]:
                if box[axis][0] == run[axis][1]:
                    run = (*run[:axis], (run[axis][0], box[axis][1]), *run[axis + 1 :])
                    members += out[box]
                else:
                    joined[run] = members
                    run, members = box, list(out[box])
            joined[run] = members
        out = joined
    return out


def assign_owners(leaves: Mapping[str, Any]) -> dict[str, dict[Box, int]]:
    """Which process writes which part of which leaf: `{path: {box: process}}`; every process finds the same.

    Every part has one owner among those that hold it. Parts that several processes hold go to the one with the
    fewest bytes so far, and parts of one leaf that the same processes hold go to one of them, in one piece. An array
    that lives in its own process only is taken to be the same in all, and is the first's to write.
    """
    load: dict[int, int] = {}
    out: dict[str, dict[Box, int]] = {}
    for path in sorted(leaves):
        leaf = leaves[path]
        shape = tuple(leaf.shape)
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            out[path] = {full_region(shape): 0}
            load[0] = load.get(0, 0) + leaf.nbytes
            continue
        out[path] = {}
        for processes, mine, count in _holders(leaf.sharding, shape):
            owner = min(processes, key=lambda process: (load.get(process, 0), process))
            load[owner] = load.get(owner, 0) + count * leaf.dtype.itemsize
            out[path] |= dict.fromkeys(mine, owner)
    return out


# ---------------------------------------------------------------- boxes of leaves, boxes of file tensors


@dataclasses.dataclass(frozen=True)
class FileRegion:
    """A box of a leaf that is a box of one file tensor.

    `region` is the leaf's; `number` is the tensor's among those of its arrangement, `shape` the tensor's with its
    merged axes apart (the same bytes in C order), and `box` the part of it.
    """

    region: Box
    number: int
    shape: Shape
    box: Box
    order: tuple[int, ...]
    factor: float
    shift: float

    @property
    def plain(self) -> bool:
        """Whether the tensor's numbers are the leaf's."""
        return self.factor == 1 and self.shift == 0

    def encode(self, part: Any) -> Any:
        """The box of the tensor from the region of the leaf: a view, unless a factor or a shift makes new numbers."""
        tile = part.reshape(self._fine).transpose(self.order)
        return to_file_scale(tile, self.factor, self.shift)

    def decode(self, tile: Any) -> Any:
        """The region of the leaf from the box of the tensor, likewise."""
        back = [self.order.index(at) for at in range(len(self.order))]
        part = tile.transpose(back).reshape(region_shape(self.region))
        return to_model_scale(part, self.factor, self.shift)

    @functools.cached_property
    def _fine(self) -> Shape:
        sizes = region_shape(self.box)
        return tuple(sizes[self.order.index(at)] for at in range(len(self.order)))


@functools.lru_cache(maxsize=4096)
def file_regions(form: FileLayout, box: Box) -> tuple[FileRegion, ...]:
    """A box of a leaf, cut so that each piece is a box of one file tensor: one for each layer or fused part in it.

    (Several, where a leaf's axis is PyTorch's axes in another order, and is cut across them.)

    >>> form = FileLayout((2, 4, 3), ("{l}", "i", "~r"), (("~r",), ("i",)), (0,))
    >>> [(piece.number, piece.shape, piece.box) for piece in file_regions(form, ((1, 2), (0, 2), (0, 3)))]
    [(1, (3, 4), ((0, 3), (0, 2)))]
    """
    if form.ranks is not None:
        return tuple(_ragged(form, box))
    place = None if form.held is None else dict(zip(form.held, range(form.count), strict=True))
    kept = [axis for axis in range(len(form.left)) if axis not in form.split]
    parts = [pattern.part_sizes(form.left[axis], form.shape[axis], dict(form.sizes)) for axis in kept]
    names = [name for part in parts for name in part]
    sizes = [n for part in parts for n in part.values()]
    order = tuple(names.index(name) for group in form.right for name in group)
    shape = tuple(sizes[at] for at in order)
    cuts = [list(_cut(*box[axis], tuple(part.values()))) for axis, part in zip(kept, parts, strict=True)]
    out: list[FileRegion] = []
    for index in itertools.product(*(range(*box[axis]) for axis in form.split)):
        region = list(box)
        number = 0
        for axis, at in zip(form.split, index, strict=True):
            region[axis] = (at, at + 1)
            number = number * form.shape[axis] + at
        if place is not None:
            if number not in place:
                continue
            number = place[number]
        for chosen in itertools.product(*cuts):
            for axis, (start, stop, _) in zip(kept, chosen, strict=True):
                region[axis] = (start, stop)
            fine = [one for _, _, inside in chosen for one in inside]
            where = tuple(fine[at] for at in order)
            out.append(FileRegion(tuple(region), number, shape, where, order, form.factor, form.shift))
    return tuple(out)


def _ragged(form: FileLayout, box: Box) -> Iterator[FileRegion]:
    """The pieces where tensors have ranks of their own: those of each tensor, as if it were the only one."""
    for i in range(form.count):
        index = form.index(i)
        whole_part = tuple(
            (at, at + 1) if isinstance(at, int) else (0, n if at.stop is None else at.stop)
            for at, n in zip(index, form.shape, strict=True)
        )
        mine = intersection(box, whole_part)
        if mine is None:
            continue
        inner = tuple(span for span, at in zip(mine, index, strict=True) if not isinstance(at, int))
        for piece in file_regions(form.part(i), inner):
            spans = iter(piece.region)
            region = tuple(outer if isinstance(at, int) else next(spans) for outer, at in zip(mine, index, strict=True))
            yield dataclasses.replace(piece, region=region, number=i)


def _cut(start: int, stop: int, sizes: Shape) -> Iterator[tuple[int, int, Box]]:
    """A range of a merged axis as boxes over the axes it merges: `(start, stop, box)` of each.

    >>> list(_cut(1, 6, (3, 2)))
    [(1, 2, ((0, 1), (1, 2))), (2, 6, ((1, 3), (0, 2)))]
    """
    if len(sizes) == 1:
        yield start, stop, ((start, stop),)
        return
    inner = math.prod(sizes[1:])
    while start < stop:
        row, at = divmod(start, inner)
        if at == 0 and stop - start >= inner:  # whole rows at once
            end = stop - stop % inner
            yield start, end, ((row, end // inner), *full_region(sizes[1:]))
        else:
            end = min(stop, (row + 1) * inner)
            for low, high, box in _cut(at, at + end - start, sizes[1:]):
                yield row * inner + low, row * inner + high, ((row, row + 1), *box)
        start = end
