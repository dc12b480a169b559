"""Where arrays are: their shardings, and moving them onto devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from jaxadapt.arrays import quantized
from jaxadapt.core.errors import AttachError

if TYPE_CHECKING:
    pass


def sharding_of(leaf: Any) -> NamedSharding | None:
    """The `NamedSharding` of an array, a spec, or (on meshes with explicit axes) a tracer; None if it has none.

    Of a quantised weight it is the dense one's.
    """
    leaf = quantized.storage_array(leaf)
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


def is_unplaced(leaf: Any) -> bool:
    """Whether a leaf has no place yet, so that what its annotation says counts: a spec, or a value inside jit."""
    return isinstance(leaf, Tracer | jax.ShapeDtypeStruct) and sharding_of(leaf) is None


def sharding_from_spec(spec: Sequence[Any], mesh: Any = None) -> NamedSharding | None:
    """The sharding that an annotation means, on its own mesh or else on that of `jax.set_mesh`.

    None without a mesh, or where the annotation speaks of axes which the mesh lacks (logical names, whose rules are
    not in force).
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    named = {name for axis in spec for name in (axis if isinstance(axis, tuple) else (axis,))} - {None}
    if mesh.empty or not named <= set(mesh.axis_names):
        return None
    return NamedSharding(mesh, PartitionSpec(*spec))


def concrete_sharding(sharding: Sharding) -> Sharding:
    """The same sharding on devices: an abstract mesh is that of `jax.set_mesh`, or `AttachError`. Not inside jit."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh) or is_tracing():
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh != sharding.mesh:
        raise AttachError(
            f"the base is sharded over the abstract mesh {sharding.mesh}, which names no devices; call this inside"
            " `with jax.set_mesh(mesh):`, or say where the arrays shall be with shardings="
        )
    return NamedSharding(mesh, sharding.spec)


def is_tracing() -> bool:
    """Whether this runs inside jit, whatever the arguments are."""
    return isinstance(jax.device_put(np.float32(0)), Tracer)  # a value made without compiling anything


def move_to(x: Any, sharding: Sharding) -> Any:
    """`x` with this sharding; inside jit, where it is to be."""
    if not is_tracing():
        return jax.device_put(x, concrete_sharding(sharding))
    if isinstance(sharding, NamedSharding) and sharding.mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def put_on_devices(arrays: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> dict[str, Any]:
    """Arrays of the host on their devices, by path: each process puts its own parts, of those that have a sharding.

    Inside jit, where they are traced or constants, as `move_to` does.
    """
    if is_tracing():
        found = {path: jnp.asarray(x) for path, x in arrays.items()}
        return {path: move_to(x, shardings[path]) if path in shardings else x for path, x in found.items()}
    on = {path: concrete_sharding(place) for path, place in shardings.items()}
    spread = {p: jax.make_array_from_callback(x.shape, on[p], x.__getitem__) for p, x in arrays.items() if p in on}
    # At once, since each call costs a tenth of a millisecond; copied, since arrays are donated one by one.
    rest = jax.device_put({path: x for path, x in arrays.items() if path not in on}, may_alias=False)
    return {path: spread[path] if path in on else rest[path] for path in arrays}
