"""Shardings of an adapter, derived from those of its base.

base weight's sharding ──propagate_axes──► adapter tensor's sharding ──arrays.regions──► each device's region
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxadapt.adapters.sites import Site, shared_tensors
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.keymap import Match

# ---------------------------------------------------------------- from the base weight to the adapter


def propagate_axes(match: Match, form: FileLayout, axes: Sequence[Any]) -> tuple[Any, ...]:
    """Return values for the axes of one adapter tensor, from values for the axes of its base weight.

    Args:
        axes: one value for each axis of the base leaf: mesh axes (of a `PartitionSpec`) or logical names. None means
            none, and missing values at the end count as None.

    Every axis that the tensor shares with the weight takes the weight's value, whatever the method: inputs in `lora_A`,
    outputs in `lora_B`, stacked layers, fused parts, experts. The keymap defines these axes. An axis of the method
    itself (the rank) has None: it is replicated. A fused axis with only some parts adapted has None too: its size is
    not the weight's. Shared axes have the weight's size, so a mesh that divides the weight divides the tensor.

    >>> from jaxadapt.keymaps.weight import Weight
    >>> match = Match("q.kernel", Weight("q.kernel", "q.weight", "d n h -> (n h) d"))
    >>> b = FileLayout((2, 4, 8), ("~r", "n", "h"), (("n", "h"), ("~r",)), ())
    >>> propagate_axes(match, b, ("fsdp", "tp"))
    (None, 'tp', None)
    """
    values = dict(itertools.zip_longest(match.weight.left, axes))
    if match.parts is not None:
        values[match.roles["batch"][0]] = None
    return tuple(values.get(name) for name in form.left)


def tensor_sharding(match: Match, form: FileLayout, base: Sharding | None) -> NamedSharding | None:
    """Return the sharding of one adapter tensor on the mesh of its base weight; None if that has no `NamedSharding`.

    Other shardings (one device, or one that the compiler chose) do not name axes. Such an adapter is created where JAX
    puts new arrays, and moves to its base inside jit.
    """
    if not isinstance(base, NamedSharding):
        return None
    return _named_sharding(base.mesh, propagate_axes(match, form, tuple(base.spec)))


@functools.lru_cache(maxsize=1024)
def _named_sharding(mesh: Any, axes: tuple[Any, ...]) -> NamedSharding:
    """Return one object for all layers, so that JAX and the caches here recognise it without comparing."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def adapter_shardings(sites: Sequence[Site], base: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Return `{path: sharding}` for an adapter's tensors from the `{leaf: sharding}` that the base has."""
    shardings = {
        entry.path: tensor_sharding(site.match, entry.form, base.get(site.leaf))
        for site in sites
        for entry in site.entries
    }
    meshes = [spec.mesh for spec in base.values() if isinstance(spec, NamedSharding)]
    for each in shared_tensors(sites):  # all sites read them, so every device has them
        shardings[each.entry.path] = _named_sharding(meshes[0], ()) if meshes else None
    return {path: sharding for path, sharding in shardings.items() if sharding is not None}


def requested_shardings(shardings: Any, sites: Sequence[Site]) -> dict[str, Sharding]:
    """Return `{path: sharding}` from one sharding for all tensors, or a tree of them.

    Raises `AttachError` if a sharding is missing or does not fit.
    """
    shapes = {entry.path: entry.shape for site in sites for entry in site.entries}
    shapes |= {each.entry.path: each.entry.shape for each in shared_tensors(sites)}
    if not isinstance(shardings, Sharding | Mapping):
        raise AttachError(
            f"shardings: expected a Sharding, or a tree like the adapter's, found {type(shardings).__name__}"
        )
    requested = dict.fromkeys(shapes, shardings) if isinstance(shardings, Sharding) else paths.flatten(shardings)
    problems = [f"{path}: the adapter has no such parameter" for path in requested if path not in shapes]
    for path, shape in shapes.items():
        sharding = requested.get(path)
        if not isinstance(sharding, Sharding):
            problems.append(f"{path}: expected a Sharding, found {type(sharding).__name__}")
            continue
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            problems.append(f"{path} {shape}: {error}")
    raise_listed(
        AttachError, "shardings: expected one Sharding, or a tree with one that fits each parameter:", problems
    )
    return requested
