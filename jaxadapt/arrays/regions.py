"""Arrays of JAX: their shardings and placement, the regions that each device holds, and values that are not finite.

    sharding ──addressable_regions──► regions of a leaf ◄──file_regions──► regions of file tensors

Saving and loading use the same regions: a process writes the regions it owns, and reads the regions its devices
need. The functions of regions compute with shapes and shardings only; they read no files and no arrays.

NaN and infinity come from a diverged run, a damaged file, or an overflow in 16 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from jaxadapt.arrays import quantized
from jaxadapt.arrays.layout import FileLayout, part_sizes, to_file_scale, to_model_scale
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, MismatchError, bullets, warn

# ---------------------------------------------------------------- regions


Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]
"""A region of an array: `(start, stop)` of each axis."""


# ---------------------------------------------------------------- regions of devices and processes


@functools.lru_cache(maxsize=1024)
def device_regions(sharding: Sharding, shape: Shape) -> dict[Region, tuple[Any, ...]]:
    """Return `{region: devices}`: the distinct regions of a sharded array and the devices with each."""
    indices = sharding.devices_indices_map(shape).items()
    by_region = paths.group((region_from_slices(index, shape), device) for device, index in indices)
    return {region: tuple(devices) for region, devices in by_region.items()}


@functools.lru_cache(maxsize=1024)
def addressable_regions(sharding: Sharding, shape: Shape) -> dict[Region, Any]:
    """Return `{region: device}`: the regions that this process holds, each with one of its devices that hold it."""
    local = sharding.addressable_devices
    holders = {
        region: [d for d in devices if d in local] for region, devices in device_regions(sharding, shape).items()
    }
    return {region: devices[0] for region, devices in holders.items() if devices}


def addressable_size(sharding: Sharding, shape: Shape) -> int:
    """Return the number of elements that this process holds, counting replicas once."""
    return sum(map(region_size, addressable_regions(sharding, shape)))


def is_contiguous(shape: Shape, region: Region) -> bool:
    """Return True if the elements of a region are contiguous in an array of this shape.

    >>> [is_contiguous((4, 3), region) for region in (((1, 3), (0, 3)), ((1, 3), (0, 2)), ((1, 2), (0, 2)))]
    [True, False, True]
    """
    large = next((axis for axis, (start, stop) in enumerate(region) if stop - start > 1), len(shape))
    return region[large + 1 :] == full_region(shape)[large + 1 :]


@functools.lru_cache(maxsize=1024)
def _holders(sharding: Sharding, shape: Shape) -> list[tuple[tuple[int, ...], list[Region], int]]:
    """Return groups of regions held by the same processes: the processes, the regions and their number of elements."""
    groups = paths.group(
        (tuple(sorted({d.process_index for d in devices})), region)
        for region, devices in device_regions(sharding, shape).items()
    )
    return [(processes, regions, sum(map(region_size, regions))) for processes, regions in groups.items()]


def region_from_slices(index: Sequence[slice], shape: Shape) -> Region:
    """Return the region of a tuple of slices, such as the `index` of a shard."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


@functools.lru_cache(maxsize=1024)
def full_region(shape: Shape) -> Region:
    """Return the region that covers a whole array."""
    return tuple((0, size) for size in shape)


def to_slices(region: Region) -> tuple[slice, ...]:
    """Return a region as an index of slices."""
    return tuple(slice(*part) for part in region)


@functools.lru_cache(maxsize=1024)
def relative_slices(region: Region, outer: Region) -> tuple[slice, ...]:
    """Return the slices of a region in an array that holds the region `outer`."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(region, outer, strict=True))


def intersection(a: Region, b: Region) -> Region | None:
    """Return the intersection of two regions; None if it is empty."""
    both = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


@functools.lru_cache(maxsize=1024)
def region_shape(region: Region) -> Shape:
    """Return the shape of a region."""
    return tuple(stop - start for start, stop in region)


def region_size(region: Region) -> int:
    """Return the number of elements of a region."""
    return math.prod(region_shape(region))


def merge_neighbors(parts: Iterable[Region]) -> dict[Region, list[Region]]:
    """Merge neighboring disjoint regions into larger ones; return `{merged region: its parts}`.

    The larger a region is, the longer are its contiguous runs of bytes in the file.

    >>> merge_neighbors([((0, 2), (0, 4)), ((2, 4), (0, 4)), ((6, 8), (0, 4))])
    {((0, 4), (0, 4)): [((0, 2), (0, 4)), ((2, 4), (0, 4))], ((6, 8), (0, 4)): [((6, 8), (0, 4))]}
    """
    out = {region: [region] for region in parts}
    for axis in reversed(range(len(next(iter(out), ())))):
        joined: dict[Region, list[Region]] = {}
        run: Region = ()
        # In this order, a region follows its neighbor along the axis.
        for region in sorted(out, key=lambda region: (region[:axis], region[axis + 1 :], region[axis])):
            before, (start, stop), behind = region[:axis], region[axis], region[axis + 1 :]
            if run and run == (*before, (run[axis][0], start), *behind):
                members = joined.pop(run)
                run = (*before, (run[axis][0], stop), *behind)
                members += out[region]
            else:
                run, members = region, out[region]
            joined[run] = members
        out = joined
    return out


def assign_owners(leaves: Mapping[str, Any]) -> dict[str, dict[Region, int]]:
    """Assign each region of each leaf to the process that writes it; return `{path: {region: process}}`.

    Every process computes the same result. Among the processes that hold a region, the one with the fewest bytes so far
    is its owner. All regions of a leaf that the same processes hold get one owner. An array that is local to each
    process is assumed to be equal in all of them, and process 0 writes it.
    """
    load: dict[int, int] = {}
    out: dict[str, dict[Region, int]] = {}
    for path in sorted(leaves):
        leaf = leaves[path]
        shape = tuple(leaf.shape)
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            out[path] = {full_region(shape): 0}
            load[0] = load.get(0, 0) + leaf.nbytes
            continue
        out[path] = {}
        for processes, regions, count in _holders(leaf.sharding, shape):
            owner = min(processes, key=lambda process: (load.get(process, 0), process))
            load[owner] = load.get(owner, 0) + count * leaf.dtype.itemsize
            out[path] |= dict.fromkeys(regions, owner)
    return out


# ---------------------------------------------------------------- regions on the host


@functools.lru_cache(maxsize=1024)
def addressable_indices(sharding: Sharding, shape: Shape) -> dict[Region, int]:
    """Return {region: index for `jax.Array.addressable_data`} of the regions that this process has, each once.

    Computed once for each sharding and shape: `addressable_shards` of thousands of arrays would delay training.
    """
    like = jax.make_array_from_callback(shape, sharding, np.broadcast_to(np.uint8(0), shape).__getitem__)
    numbers = {shard.device: number for number, shard in enumerate(like.addressable_shards)}
    return {region: numbers[device] for region, device in addressable_regions(sharding, shape).items()}


def shards_of(leaf: Any) -> dict[Region, Any]:
    """Return shards that cover what this process has of an array, each once, by region."""
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return {full_region(leaf.shape): leaf}
    if leaf.is_fully_replicated:
        return {full_region(leaf.shape): leaf.addressable_data(0)}
    indices = addressable_indices(leaf.sharding, leaf.shape)
    return {region: leaf.addressable_data(index) for region, index in indices.items()}


def to_host(parts: Mapping[str, Mapping[Region, Any]]) -> dict[str, dict[Region, np.ndarray]]:
    """Copy regions of arrays off the device, by name and region.

    Those of the CPU are views, which keep their arrays alive. This is safe, because JAX copies a donated array if a
    view of it exists (tests/training/test_checkpoint.py checks this).
    """
    for value in (value for each in parts.values() for value in each.values()):
        if isinstance(value, jax.Array) and next(iter(value.sharding.device_set)).platform != "cpu":
            value.copy_to_host_async()  # start all transfers before waiting for the first
    return {name: {region: np.asarray(value) for region, value in each.items()} for name, each in parts.items()}


def assemble(parts: Mapping[Region, np.ndarray], shape: Shape) -> np.ndarray:
    """Return an array of this shape from the regions that cover it, without a copy if it is one."""
    if (full := full_region(shape)) in parts:
        return parts[full]
    array = np.empty(shape, next(iter(parts.values())).dtype)
    for region, values in parts.items():
        array[to_slices(region)] = values
    return array


# ---------------------------------------------------------------- regions of leaves and of file tensors


@dataclasses.dataclass(frozen=True)
class FileRegion:
    """A region of a leaf that is a region of one file tensor.

    Attributes:
        region: the region of the leaf.
        number: the index of the tensor among those of the leaf.
        tensor_region: the region of the tensor, before its axes are merged.
        form: the layout of the tensor in its part of the leaf.
    """

    region: Region
    number: int
    tensor_region: Region
    form: FileLayout

    @property
    def shape(self) -> Shape:
        """The shape of the tensor before its axes are merged (the same bytes in C order)."""
        return tuple(self.form.flat.values())

    @functools.cached_property
    def is_full(self) -> bool:
        """True if this is the whole tensor."""
        return self.tensor_region == full_region(self.shape)

    @functools.cached_property
    def is_exact(self) -> bool:
        """True if the tensor and the leaf hold the same values."""
        return self.form.factor == 1 and self.form.shift == 0

    def encode(self, part: Any) -> Any:
        """Convert the values of the leaf's region to the tensor's: a view, unless a factor or a shift applies."""
        sizes = region_shape(self.tensor_region)
        tile = part.reshape([sizes[axis] for axis in self.form.orders[1]]).transpose(self.form.orders[0])
        return to_file_scale(tile, self.form.factor, self.form.shift)

    def decode(self, tile: Any) -> Any:
        """Convert the values of the tensor's region to the leaf's: a view, unless a factor or a shift applies."""
        part = tile.transpose(self.form.orders[1]).reshape(region_shape(self.region))
        return to_model_scale(part, self.form.factor, self.form.shift)


@functools.lru_cache(maxsize=4096)
def file_regions(form: FileLayout, region: Region) -> tuple[FileRegion, ...]:
    """Split a region of a leaf into regions of single file tensors: one per layer or fused part.

    There are several per tensor if an axis of the leaf merges PyTorch axes in another order and the region cuts it.

    >>> form = FileLayout((2, 4, 3), ("{l}", "i", "~r"), (("~r",), ("i",)), (0,))
    >>> [(piece.number, piece.shape, piece.tensor_region) for piece in file_regions(form, ((1, 2), (0, 2), (0, 3)))]
    [(1, (3, 4), ((0, 3), (0, 2)))]
    """
    if form.split or form.ranks is not None:
        return tuple(_file_regions_by_tensor(form, region))
    fixed = dict(form.sizes)
    sizes = [tuple(part_sizes(*axis, fixed).values()) for axis in zip(form.left, form.shape, strict=True)]
    out: list[FileRegion] = []
    for chosen in itertools.product(*(_split_range(*span, parts) for span, parts in zip(region, sizes, strict=True))):
        spans = [span for _, _, inner in chosen for span in inner]
        tensor_region = tuple(spans[axis] for axis in form.orders[0])
        out.append(FileRegion(tuple(part[:2] for part in chosen), 0, tensor_region, form))
    return tuple(out)


def _file_regions_by_tensor(form: FileLayout, region: Region) -> Iterator[FileRegion]:
    """Yield the file regions of each tensor by its own layout; those of unequal ranks end at their rank."""
    for at in itertools.product(*(range(*region[axis]) for axis in form.split)):
        entry = 0
        for axis, i in zip(form.split, at, strict=True):
            entry = entry * form.shape[axis] + i
        number = form.number_of.get(entry)
        if number is None:
            continue
        outer = {axis: (i, i + 1) for axis, i in zip(form.split, at, strict=True)}
        inner: Region | None = tuple(span for axis, span in enumerate(region) if axis not in outer)
        tensor_layout = form.part_layout(number)
        if form.ranks is not None:
            inner = intersection(inner, full_region(tensor_layout.shape))
        for piece in () if inner is None else file_regions(tensor_layout, inner):
            spans = iter(piece.region)
            leaf_region = tuple(outer[axis] if axis in outer else next(spans) for axis in range(len(region)))
            yield dataclasses.replace(piece, region=leaf_region, number=number)


def _split_range(start: int, stop: int, sizes: Shape) -> Iterator[tuple[int, int, Region]]:
    """Split a range of a merged axis into regions of the axes that it merges; yield `(start, stop, region)`.

    >>> list(_split_range(1, 6, (3, 2)))
    [(1, 2, ((0, 1), (1, 2))), (2, 6, ((1, 3), (0, 2)))]
    """
    if len(sizes) == 1:
        yield start, stop, ((start, stop),)
        return
    inner = math.prod(sizes[1:])
    while start < stop:
        row, at = divmod(start, inner)
        if at == 0 and stop - start >= inner:  # all complete rows at once
            end = stop - stop % inner
            yield start, end, ((row, end // inner), *full_region(sizes[1:]))
        else:
            end = min(stop, (row + 1) * inner)
            for low, high, region in _split_range(at, at + end - start, sizes[1:]):
                yield row * inner + low, row * inner + high, ((row, row + 1), *region)
        start = end


# ---------------------------------------------------------------- placement


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Return the `NamedSharding` of an array, a spec, or (on a mesh with explicit axes) a tracer; None if it has none.

    For a quantized weight it is the sharding of the dense weight.
    """
    leaf = leaf if isinstance(leaf, jax.Array) else quantized.storage_array(leaf)
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if not sharding.mesh.empty and sharding.mesh.are_all_axes_explicit else None
    has_sharding = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | quantized.Quantized)
    sharding = leaf.sharding if has_sharding else None
    if not isinstance(sharding, NamedSharding):
        return None
    # Under an automatic mesh, eval_shape reports every array of unknown sharding as replicated.
    mesh = sharding.mesh
    unknown = isinstance(mesh, AbstractMesh) and not mesh.are_all_axes_explicit and not any(sharding.spec)
    return None if unknown else sharding


def is_unplaced(leaf: Any) -> bool:
    """Return True if a leaf has no sharding yet (a spec, or a value inside jit), so that its annotation applies."""
    return isinstance(leaf, Tracer | jax.ShapeDtypeStruct) and sharding_of(leaf) is None


def sharding_from_spec(spec: Sequence[Any], mesh: Any = None) -> NamedSharding | None:
    """Return the sharding that an annotation describes, on `mesh` or else on the mesh of `jax.set_mesh`.

    None without a mesh, or if the mesh lacks an axis of the annotation (a logical name without an active rule).
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axis_names = {name for axis in spec for name in (axis if isinstance(axis, tuple) else (axis,))} - {None}
    if mesh.empty or not axis_names <= set(mesh.axis_names):
        return None
    return NamedSharding(mesh, PartitionSpec(*spec))


def concrete_sharding(sharding: Sharding) -> Sharding:
    """Return a sharding with its abstract mesh replaced by the mesh of `jax.set_mesh`; unchanged inside jit.

    Raises `AttachError` if the current mesh is another one.
    """
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh) or is_tracing():
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh != sharding.mesh:
        raise AttachError(
            f"cannot place arrays: the base is sharded over the abstract mesh {sharding.mesh}, which has no devices;"
            " call this inside `with jax.set_mesh(mesh):`, or pass shardings="
        )
    return NamedSharding(mesh, sharding.spec)


def is_tracing(*values: Any) -> bool:
    """Return True inside jit, even if no argument is traced, and if one of the values is traced, as inside vmap."""
    return is_traced(jax.device_put(np.float32(0)), *values)  # device_put compiles nothing


def is_traced(*values: Any) -> bool:
    """Return True if one of the values is traced, so that none of its elements are known."""
    return any(isinstance(x, Tracer) for x in values)


def move_to(x: Any, sharding: Sharding) -> Any:
    """Put `x` under a sharding; inside jit, constrain its sharding."""
    if not is_tracing():
        return jax.device_put(x, concrete_sharding(sharding))
    if isinstance(sharding, NamedSharding) and sharding.mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def put_on_devices(arrays: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> dict[str, Any]:
    """Put arrays of the host on devices, by path. Each process puts only its own parts of arrays that have a sharding.

    Inside jit, constrain their shardings as `move_to` does.
    """
    if is_tracing():
        values = {path: jnp.asarray(x) for path, x in arrays.items()}
        return {path: move_to(x, shardings[path]) if path in shardings else x for path, x in values.items()}
    by_path = {path: concrete_sharding(sharding) for path, sharding in shardings.items()}
    sharded = {
        path: jax.make_array_from_callback(x.shape, by_path[path], x.__getitem__)
        for path, x in arrays.items()
        if path in by_path
    }
    # One call for all, since each takes 0.1 ms. Copies, since arrays are donated one by one.
    rest = jax.device_put({path: x for path, x in arrays.items() if path not in by_path}, may_alias=False)
    return {path: sharded[path] if path in by_path else rest[path] for path in arrays}


# ---------------------------------------------------------------- values that are not finite


_CHUNK = 1 << 18
"""The number of values per step, small enough that they fit in the processor's cache."""

_INFINITY = {np.dtype("float16"): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
"""{dtype: the bits of infinity}. Among those of one sign, only NaN has larger bits."""

_all_finite = jax.jit(lambda x: jnp.isfinite(x).all())


def names_not_finite(arrays: Mapping[str, Any]) -> list[str]:
    """Return the names of arrays that hold a NaN or an infinity.

    Arrays on accelerators are reduced there, and all results are fetched together. The result is empty if any array is
    traced, since it has no values yet. Values other than arrays of floats count as finite.
    """
    if is_traced(*arrays.values()):
        return []
    finite: dict[str, Any] = {}
    with jax.ensure_compile_time_eval():  # a traced function may close over arrays with values
        for name, x in arrays.items():
            if not isinstance(x, np.ndarray | jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
                continue
            if isinstance(x, np.ndarray):
                finite[name] = is_finite(x)
            elif x.is_fully_addressable and {device.platform for device in x.devices()} == {"cpu"}:
                finite[name] = all(is_finite(np.asarray(s.data)) for s in x.addressable_shards if s.replica_id == 0)
            else:
                finite[name] = _all_finite(x)
        return [name for name, ok in finite.items() if not bool(ok)]


def require_finite(arrays: Mapping[str, Any], way_out: str, source: str = "") -> None:
    """Raise `MismatchError` for arrays that hold a NaN or an infinity; `source` stands before the message."""
    if names := names_not_finite(arrays):
        raise MismatchError(f"{source}{not_finite_message(names, way_out)}")


def is_finite(x: np.ndarray) -> bool:
    """Return True if an array on the host holds neither NaN nor infinity."""
    flat, infinity = x.ravel(order="K"), _INFINITY.get(x.dtype)
    if infinity is None and not jnp.issubdtype(x.dtype, jnp.floating):
        return True
    for first in range(0, flat.size, _CHUNK):
        part = flat[first : first + _CHUNK]
        if infinity is None:
            if not np.isfinite(part).all():
                return False
        elif part.view(np.int16).max() >= infinity or part.view(np.uint16).max() >= infinity | 0x8000:
            return False  # NumPy's `isfinite` is slow for 16-bit dtypes
    return True


def count_not_finite(x: Any) -> int:
    """Return the number of values that are NaN or infinite, in a NumPy or JAX array of floats."""
    return int(x.size - (np if isinstance(x, np.ndarray) else jnp).isfinite(x).sum())


def count_lost(before: Any, after: Any) -> int:
    """Return the number of finite values that are NaN or infinite after a cast."""
    xp = np if isinstance(before, np.ndarray) else jnp
    return int((xp.isfinite(before) & ~xp.isfinite(after)).sum())


def cast_tree(tree: Any, dtype: Any, source: str) -> Any:
    """Return a tree with its arrays of floats (or of integers) in another dtype of floats (or of integers).

    Raises `MismatchError` as `overflow_error` does.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    floats = jnp.issubdtype(dtype, jnp.floating)
    with np.errstate(over="ignore"):  # an overflow to infinity raises an error with the tensor's name
        cast = {k: x.astype(dtype) if floats == jnp.issubdtype(x.dtype, jnp.floating) else x for k, x in arrays.items()}
    lost = {name: count_lost(arrays[name], cast[name]) for name in names_not_finite(cast)}
    if any(lost.values()):
        raise overflow_error(lost, dtype, source)
    return jax.tree.unflatten(structure, cast.values())


def overflow_error(lost: Mapping[str, int], dtype: Any, source: str) -> MismatchError:
    """Return the error about finite values that are none in a dtype, from their number in each tensor."""
    lost = {name: number for name, number in lost.items() if number}
    dtype = np.dtype(dtype)
    return MismatchError(
        f"{source}: {sum(lost.values())} finite values overflow {dtype.name}, whose largest is"
        f" {float(ml_dtypes.finfo(dtype).max):g}; use bfloat16 or float32, or keep the dtype:\n"
        + bullets(f"{name}: {number}" for name, number in lost.items())
    )


def explain_not_finite(
    arrays: Iterable[tuple[Sequence[str], Any, int]], read: Callable[[str], Any], source: str, warns: bool = True
) -> None:
    """Warn of a file's tensors with NaN or infinite values, with their number in each.

    Raises `MismatchError` if finite values of a tensor became so in its array, because its dtype cannot hold them.

    Args:
        arrays: for each array that is not finite, the keys of its tensors, its dtype and the number of such values, or
            0 if other values than the file's are in it.
        read: returns the tensor of a key.
        source: the file, for the message.
        warns: False only to raise the error.
    """
    lost: dict[str, int] = {}
    counts: dict[str, int] = {}
    dtype = None
    for keys, dtype, number in arrays:
        tensors = {key: read(key) for key in keys}
        with np.errstate(over="ignore"):
            here = {key: count_lost(x, x.astype(dtype)) for key, x in tensors.items()}
        present = {key: count_not_finite(x) for key, x in tensors.items()}
        if number and not any((*here.values(), *present.values())):  # the factor of the layout made them so large
            here = {keys[0]: number}
        lost |= here
        counts |= {key: number for key, number in present.items() if number}
    if any(lost.values()):
        raise overflow_error(lost, dtype, source)
    if warns and counts:
        warn(
            f"{source}: {sum(counts.values())} values are NaN or infinite; the training diverged, or 16 bits"
            " overflowed. Take an earlier checkpoint:\n"
            + bullets(f"{name}: {number}" for name, number in counts.items())
        )


def check_while_reading(
    get: Callable[[str], np.ndarray], count: int, why: Callable[[list[str]], Exception]
) -> Callable[[str], np.ndarray]:
    """Wrap `get` so that reading the last of `count` arrays raises `why(keys)` for those that are not finite.

    >>> get = check_while_reading({"a": np.ones(2), "b": np.array([np.nan])}.__getitem__, 2, ValueError)
    >>> get("a"), get("b")
    Traceback (most recent call last):
    ValueError: ['b']
    """
    finite: dict[str, bool] = {}

    def get_checked(key: str) -> np.ndarray:
        value = get(key)
        finite[key] = is_finite(value)
        if len(finite) == count and not all(finite.values()):
            raise why([key for key, ok in finite.items() if not ok])
        return value

    return get_checked


def not_finite_message(names: Iterable[str], way_out: str) -> str:
    """Return the message of an error about arrays that are not finite."""
    return f"these tensors hold a NaN or an infinity; {way_out}:\n" + bullets(names)
