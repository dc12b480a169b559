"""Where arrays are: an adapter's shardings from its base's, and the arrays put there.

base weight's sharding ──follow──► adapter tensor's sharding ──boxes.py──► what each device holds
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxadapt.arrays.layout import FileLayout
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import Match

if TYPE_CHECKING:
    from jaxadapt.adapters.sites import Site


# ---------------------------------------------------------------- from the base weight to the adapter


def propagate_axes(site: Match, form: FileLayout, axes: Sequence[Any]) -> tuple[Any, ...]:
    """What is said of a base weight's axes, said of one adapter tensor's.

    Args:
        axes: one value for each axis of the base leaf, None for "nothing": mesh axes (of a `PartitionSpec`) or
            logical names alike. Missing ones at the end count as None.

    Every axis that the tensor shares with the weight (inputs in `lora_A`, outputs in `lora_B`, stacked layers,
    fused parts, experts) takes the weight's value, whatever the method: the table says which. An axis of the
    method's own (the rank) has None: replicated. So has a fused axis of which only some parts are adapted, since
    its size is another. Shared axes have the weight's own size, so what divides the weight divides the tensor.

    >>> from jaxadapt.keymaps.weight import Weight
    >>> match = Match("q.kernel", Weight("q.kernel", "q.weight", "d n h -> (n h) d"))
    >>> b = FileLayout((2, 4, 8), ("~r", "n", "h"), (("n", "h"), ("~r",)), ())
    >>> propagate_axes(match, b, ("fsdp", "tp"))
    (None, 'tp', None)
    """
    said = dict(itertools.zip_longest(site.weight.left, axes))
    if site.parts is not None:
        said[site.roles["batch"][0]] = None
    return tuple(said.get(name) for name in form.left)


def tensor_sharding(site: Match, form: FileLayout, base: Sharding | None) -> NamedSharding | None:
    """The sharding of one adapter tensor, on the mesh of the base weight's; None where the base has none.

    Only a `NamedSharding` says what it does axis by axis. Any other (one device, or one that the compiler chose)
    is not followed: such an adapter goes where JAX puts new arrays, and moves to its base inside jit.
    """
    if not isinstance(base, NamedSharding):
        return None
    return _named(base.mesh, propagate_axes(site, form, tuple(base.spec)))


@functools.lru_cache(maxsize=1024)
def _named(mesh: Any, axes: tuple[Any, ...]) -> NamedSharding:
    """One object for all layers: JAX, and the caches here, know it again without comparing."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def adapter_shardings(bounds: Sequence[Site], base: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """`{path: sharding}` of an adapter's tensors from `{leaf: sharding}` of the base; none where it has none."""
    found = {e.path: tensor_sharding(b.match, e.form, base.get(b.leaf)) for b in bounds for e in b.entries}
    return {path: sharding for path, sharding in found.items() if sharding is not None}


def requested_shardings(shardings: Any, bounds: Sequence[Site]) -> dict[str, Sharding]:
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
        raise AttachError("shardings: expected one, or one for each parameter, that fits:\n" + paths.bullets(problems))
    return found
