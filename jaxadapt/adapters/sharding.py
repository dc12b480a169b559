"""Where arrays are: an adapter's shardings from its base's, and the arrays put there.

base weight's sharding ──follow──► adapter tensor's sharding ──boxes.py──► what each device holds
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from jaxadapt.arrays import quantized
from jaxadapt.arrays.layout import Arrangement
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import Site

if TYPE_CHECKING:
    from jaxadapt.adapters.sites import Bound


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

    >>> from jaxadapt.keymaps.weight import Weight
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
    if not isinstance(shardings, Sharding | Mapping):
        raise AttachError(f"shardings: expected one, or a tree like the adapter's, found {type(shardings).__name__}")
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
    return isinstance(jax.device_put(np.float32(0)), Tracer)  # a value made without compiling anything


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
