"""Who holds which bytes: an adapter's shardings from its base's, and file tensors cut along device shards.

    base weight's sharding ──follow──► adapter tensor's sharding ──boxes──► what each device holds
                                                        box of a leaf ◄──pieces──► boxes of file tensors

Saving and loading use the same boxes: a process writes those it owns, and reads those its devices need.
Pure: shapes, shardings and plans; no files, and no array is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from jaxadapt import paths, pattern, quantized
from jaxadapt.arrangement import Arrangement, ours, theirs
from jaxadapt.errors import AttachError
from jaxadapt.keymap import Site

if TYPE_CHECKING:
    from jaxadapt.bind import Bound

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""A part of an array: `(start, stop)` of each axis."""


# ---------------------------------------------------------------- from the base weight to the adapter


def follow(site: Site, form: Arrangement, axes: Sequence[Any]) -> tuple[Any, ...]:
    """What is said of a base weight's axes, said of one adapter tensor's.

    Args:
        axes: one value for each axis of the base leaf, None for "nothing": mesh axes (of a `PartitionSpec`) or
            logical names alike. Missing ones at the end count as None.

    Every axis that the tensor shares with the weight (inputs in `lora_A`, outputs in `lora_B`, stacked layers,
    fused parts, experts) takes the weight's value, whatever the method: the table says which. An axis of the
    method's own (the rank) has None: replicated. So has a fused axis of which only some parts are adapted, since
    its size is another. Shared axes have the weight's own size, so what divides the weight divides the tensor.

    >>> from jaxadapt.weight import Weight
    >>> site = Site("q.kernel", Weight("q.kernel", "q.weight", "d n h -> (n h) d"))
    >>> b = Arrangement((2, 4, 8), ("~r", "n", "h"), (("n", "h"), ("~r",)), ())
    >>> follow(site, b, ("fsdp", "tp"))
    (None, 'tp', None)
    """
    said = dict(itertools.zip_longest(site.weight.left, axes))
    if site.parts is not None:
        said[site.roles["batch"][0]] = None
    return tuple(said.get(name) for name in form.left)


def followed(site: Site, form: Arrangement, base: Sharding | None) -> NamedSharding | None:
    """The sharding of one adapter tensor, on the mesh of the base weight's; None where the base has none.

    Only a `NamedSharding` says what it does axis by axis. Any other (one device, or one that the compiler chose)
    is not followed: such an adapter goes where JAX puts new arrays, and moves to its base inside jit.
    """
    if not isinstance(base, NamedSharding):
        return None
    return _named(base.mesh, follow(site, form, tuple(base.spec)))


@functools.lru_cache(maxsize=1024)
def _named(mesh: Any, axes: tuple[Any, ...]) -> NamedSharding:
    """One object for all layers: JAX, and the caches here, know it again without comparing."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def for_adapter(bounds: Sequence[Bound], base: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """`{path: sharding}` of an adapter's tensors from `{leaf: sharding}` of the base; none where it has none."""
    found = {e.path: followed(b.site, e.form, base.get(b.leaf)) for b in bounds for e in b.entries}
    return {path: sharding for path, sharding in found.items() if sharding is not None}


def asked(shardings: Any, bounds: Sequence[Bound]) -> dict[str, Sharding]:
    """`{path: sharding}` from one sharding for all, or a tree of them; `AttachError` if one lacks or misfits."""
    shapes = {e.path: e.shape for b in bounds for e in b.entries}
    found = dict.fromkeys(shapes, shardings) if isinstance(shardings, Sharding) else paths.flatten(shardings)
    problems = [f"{path}: no such parameter" for path in found if path not in shapes]
    for path, shape in shapes.items():
        place = found.get(path)
        if not isinstance(place, Sharding):
            problems.append(f"{path}: expected a Sharding, found {type(place).__name__}")
            continue
        try:
            place.shard_shape(shape)
        except ValueError as error:
            problems.append(f"{path} {shape}: {error}")
    if problems:
        raise AttachError("shardings: expected one, or one for each parameter, that fits:\n" + paths.listing(problems))
    return found


def of(leaf: Any) -> NamedSharding | None:
    """The `NamedSharding` of an array, a spec, or (on meshes with explicit axes) a tracer; None if it has none.

    Of a quantised weight it is the dense one's.
    """
    leaf = quantized.whole(leaf)
    if isinstance(leaf, Tracer):
        found = jax.typeof(leaf).sharding
        return found if not found.mesh.empty and found.mesh.are_all_axes_explicit else None
    known = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | quantized.Quantized)
    found = leaf.sharding if known else None
    if not isinstance(found, NamedSharding):
        return None
    # eval_shape under an automatic mesh calls everything replicated that it knows nothing of.
    unknown = isinstance(found.mesh, AbstractMesh) and not found.mesh.are_all_axes_explicit and not any(found.spec)
    return None if unknown else found


def undecided(leaf: Any) -> bool:
    """Whether a leaf has no place yet, so that what its annotation says counts: a spec, or a value inside jit."""
    return isinstance(leaf, Tracer | jax.ShapeDtypeStruct) and of(leaf) is None


def on_mesh(spec: Sequence[Any], mesh: Any = None) -> NamedSharding | None:
    """The sharding that an annotation means, on its own mesh or else on that of `jax.set_mesh`.

    None without a mesh, or where the annotation speaks of axes which the mesh lacks (logical names, whose rules are
    not in force).
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    named = {name for axis in spec for name in (axis if isinstance(axis, tuple) else (axis,))} - {None}
    if mesh.empty or not named <= set(mesh.axis_names):
        return None
    return NamedSharding(mesh, PartitionSpec(*spec))


def concrete(sharding: Sharding) -> Sharding:
    """The same sharding on devices: an abstract mesh is that of `jax.set_mesh`, or `AttachError`. Not inside jit."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh) or tracing():
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh != sharding.mesh:
        raise AttachError(
            f"the base is sharded over the abstract mesh {sharding.mesh}, which names no devices; call this inside"
            " `with jax.set_mesh(mesh):`, or say where the arrays shall be with shardings="
        )
    return NamedSharding(mesh, sharding.spec)


def tracing() -> bool:
    """Whether this runs inside jit, whatever the arguments are."""
    return isinstance(jnp.zeros(()), Tracer)


def moved(x: Any, sharding: Sharding) -> Any:
    """`x` with this sharding; inside jit, where it is to be."""
    if not tracing():
        return jax.device_put(x, concrete(sharding))
    if isinstance(sharding, NamedSharding) and sharding.mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def placed(arrays: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> dict[str, Any]:
    """Arrays of the host on their devices, by path: each process puts its own parts, of those that have a sharding.

    Inside jit, where they are traced or constants, as `moved` does.
    """
    if tracing():
        found = {path: jnp.asarray(x) for path, x in arrays.items()}
        return {path: moved(x, shardings[path]) if path in shardings else x for path, x in found.items()}
    on = {path: concrete(place) for path, place in shardings.items()}
    spread = {p: jax.make_array_from_callback(x.shape, on[p], x.__getitem__) for p, x in arrays.items() if p in on}
    # At once, since each call costs a tenth of a millisecond; copied, since arrays are donated one by one.
    rest = jax.device_put({path: x for path, x in arrays.items() if path not in on}, may_alias=False)
    return {path: spread[path] if path in on else rest[path] for path in arrays}


# ---------------------------------------------------------------- what each device holds


@functools.lru_cache(maxsize=1024)
def boxes(sharding: Sharding, shape: Shape) -> dict[Box, tuple[Any, ...]]:
    """`{box: devices}`: the distinct parts into which an array is cut, and who holds each of them."""
    found: dict[Box, list[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        found.setdefault(box_of(index, shape), []).append(device)
    return {box: tuple(devices) for box, devices in found.items()}


@functools.lru_cache(maxsize=1024)
def here(sharding: Sharding, shape: Shape) -> dict[Box, Any]:
    """`{box: device}`: the parts that this process holds, and one of its devices that does."""
    mine = sharding.addressable_devices
    held = {box: [d for d in devices if d in mine] for box, devices in boxes(sharding, shape).items()}
    return {box: devices[0] for box, devices in held.items() if devices}


@functools.lru_cache(maxsize=1024)
def corners(sharding: Sharding, shape: Shape) -> list[tuple[int, ...]]:
    """Where each part of `here` begins, which tells them apart."""
    return [tuple(start for start, _ in box) for box in here(sharding, shape)]


@functools.lru_cache(maxsize=1024)
def size_here(sharding: Sharding, shape: Shape) -> int:
    """How many elements this process holds, those of replicas once."""
    return sum(map(size, here(sharding, shape)))


@functools.lru_cache(maxsize=1024)
def cuts(sharding: Sharding, shape: Shape) -> list[tuple[tuple[slice, ...], int | None]]:
    """Where each part of `here` lies in an array that is all here: an index, and its first element if it is one run.

    >>> mesh = jax.make_mesh((1,), ("x",))
    >>> cuts(NamedSharding(mesh, PartitionSpec("x")), (4, 3))
    [((slice(0, 4, None), slice(0, 3, None)), 0)]
    """
    out: list[tuple[tuple[slice, ...], int | None]] = []
    for box in here(sharding, shape):
        large = next((axis for axis, (start, stop) in enumerate(box) if stop - start > 1), len(shape))
        one_run = box[large + 1 :] == whole(shape)[large + 1 :]
        first = sum(start * math.prod(shape[axis + 1 :]) for axis, (start, _) in enumerate(box))
        out.append((slices(box), first if one_run else None))
    return out


@functools.lru_cache(maxsize=1024)
def _holders(sharding: Sharding, shape: Shape) -> list[tuple[tuple[int, ...], list[Box], int]]:
    """Which processes hold the same parts, these parts, and how many elements they have."""
    groups: dict[tuple[int, ...], list[Box]] = {}
    for box, devices in boxes(sharding, shape).items():
        groups.setdefault(tuple(sorted({d.process_index for d in devices})), []).append(box)
    return [(holders, parts, sum(map(size, parts))) for holders, parts in groups.items()]


def box_of(index: Sequence[slice], shape: Shape) -> Box:
    """The box of a tuple of slices, as a shard's `index` gives them."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def whole(shape: Shape) -> Box:
    """The box that is all of an array."""
    return tuple((0, size) for size in shape)


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(*part) for part in box)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies inside an array that holds `outer`."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer, strict=True))


def common(a: Box, b: Box) -> Box | None:
    """What two boxes share, None if that is nothing."""
    both = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def extent(box: Box) -> Shape:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def size(box: Box) -> int:
    """The number of elements."""
    return math.prod(extent(box))


def merged(parts: Iterable[Box]) -> dict[Box, list[Box]]:
    """Disjoint boxes joined to larger ones where they are neighbours, each with those it is made of.

    The more of a tensor one box has, the longer are its runs of bytes in the file.

    >>> merged([((0, 2), (0, 4)), ((2, 4), (0, 4)), ((6, 8), (0, 4))])
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


def owners(leaves: Mapping[str, Any]) -> dict[str, dict[Box, int]]:
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
            out[path] = {whole(shape): 0}
            load[0] = load.get(0, 0) + leaf.nbytes
            continue
        out[path] = {}
        for holders, parts, count in _holders(leaf.sharding, shape):
            owner = min(holders, key=lambda process: (load.get(process, 0), process))
            load[owner] = load.get(owner, 0) + count * leaf.dtype.itemsize
            out[path] |= dict.fromkeys(parts, owner)
    return out


# ---------------------------------------------------------------- boxes of leaves, boxes of file tensors


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of a leaf that is a box of one file tensor.

    `region` is the leaf's; `number` is the tensor's in its arrangement, `shape` the tensor's with its merged axes apart
    (the same bytes in C order), and `box` the part of it.
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
        return theirs(tile, self.factor, self.shift)

    def decode(self, tile: Any) -> Any:
        """The region of the leaf from the box of the tensor, likewise."""
        back = [self.order.index(at) for at in range(len(self.order))]
        part = tile.transpose(back).reshape(extent(self.region))
        return ours(part, self.factor, self.shift)

    @functools.cached_property
    def _fine(self) -> Shape:
        sizes = extent(self.box)
        return tuple(sizes[self.order.index(at)] for at in range(len(self.order)))


@functools.lru_cache(maxsize=4096)
def pieces(form: Arrangement, box: Box) -> tuple[Piece, ...]:
    """A box of a leaf, cut so that each piece is a box of one file tensor: one for each layer or fused part in it.

    (Several, where a leaf's axis is PyTorch's axes in another order, and is cut across them.)

    >>> form = Arrangement((2, 4, 3), ("{l}", "i", "~r"), (("~r",), ("i",)), (0,))
    >>> [(piece.number, piece.shape, piece.box) for piece in pieces(form, ((1, 2), (0, 2), (0, 3)))]
    [(1, (3, 4), ((0, 3), (0, 2)))]
    """
    kept = [axis for axis in range(len(form.left)) if axis not in form.split]
    parts = [pattern.split(form.left[axis], form.shape[axis], dict(form.sizes)) for axis in kept]
    names = [name for part in parts for name in part]
    sizes = [n for part in parts for n in part.values()]
    order = tuple(names.index(name) for group in form.right for name in group)
    shape = tuple(sizes[at] for at in order)
    cuts = [list(_cut(*box[axis], tuple(part.values()))) for axis, part in zip(kept, parts, strict=True)]
    out: list[Piece] = []
    for index in itertools.product(*(range(*box[axis]) for axis in form.split)):
        region = list(box)
        number = 0
        for axis, at in zip(form.split, index, strict=True):
            region[axis] = (at, at + 1)
            number = number * form.shape[axis] + at
        for chosen in itertools.product(*cuts):
            for axis, (start, stop, _) in zip(kept, chosen, strict=True):
                region[axis] = (start, stop)
            fine = [one for _, _, inside in chosen for one in inside]
            where = tuple(fine[at] for at in order)
            out.append(Piece(tuple(region), number, shape, where, order, form.factor, form.shift))
    return tuple(out)


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
            yield start, end, ((row, end // inner), *whole(sizes[1:]))
        else:
            end = min(stop, (row + 1) * inner)
            for low, high, box in _cut(at, at + end - start, sizes[1:]):
                yield row * inner + low, row * inner + high, ((row, row + 1), *box)
        start = end
