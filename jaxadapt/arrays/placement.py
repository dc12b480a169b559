"""Shardings of arrays, and the placement of arrays on devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from jaxadapt.arrays import quantized
from jaxadapt.core.errors import AttachError


def sharding_of(leaf: Any) -> NamedSharding | None:
    """Return the `NamedSharding` of an array, a spec, or (on a mesh with explicit axes) a tracer; None if it has none.

    For a quantized weight it is the sharding of the dense weight.
    """
    leaf = quantized.storage_array(leaf)
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


def is_tracing() -> bool:
    """Return True inside jit, even if no argument is traced."""
    return isinstance(jax.device_put(np.float32(0)), Tracer)  # device_put compiles nothing


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
