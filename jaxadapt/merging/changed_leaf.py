"""Leaves that an adapter changes, computed on demand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.sites import Site, map_layers, sites_of
from jaxadapt.arrays import regions
from jaxadapt.arrays.axes import Axes
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.methods import LAYER, AppliedMethod, Method, as_computable, at_least_float32

Change = Callable[[AppliedMethod, Any], Any]
"""A function of a method and an array that returns the changed array."""


@dataclasses.dataclass(frozen=True)
class LeafChange:
    """The change of a leaf without its name, so that leaves of one kind and shape are compiled once."""

    change: Change
    method: Method
    hparams: Any
    axes: Axes
    stack: tuple[int, ...]
    place: Any
    shared: tuple[str, ...] = ()

    def __call__(self, w: Any, params: Mapping[str, Any]) -> Any:
        # Add in float32 even where weight and adapter both have 16 bits.
        widened = {name: x if name == LAYER else at_least_float32(x) for name, x in params.items()}
        changed = map_layers(
            self.stack, self.method, self.hparams, self.axes, self.change, widened, as_computable(w), self.shared
        )
        changed = changed.astype(w.dtype)
        return changed if self.place is None else jax.lax.with_sharding_constraint(changed, self.place)


# One program for the full change, so that no intermediate has the weight's size unless a method makes one.
_compute = jax.jit(LeafChange.__call__, static_argnums=0)
_compute_in_place = jax.jit(LeafChange.__call__, static_argnums=0, donate_argnums=1)


@dataclasses.dataclass(frozen=True)
class ChangedLeaf:
    """A leaf as an adapter changes it, computed on demand; its base may be a `ChangedLeaf` too."""

    site: Site
    params: Mapping[str, Any]
    base: Any
    change: Change

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """The leaf's shape and dtype."""
        return self.base.spec if isinstance(self.base, ChangedLeaf) else spec_of(self.base)

    @property
    def nbytes(self) -> int:
        """The size of the leaf in bytes."""
        return math.prod(self.spec.shape) * self.spec.dtype.itemsize

    def with_base(self, base: Any) -> ChangedLeaf:
        """Return the same change of another base, including the changes before it."""
        return dataclasses.replace(self, base=self.base.with_base(base) if isinstance(self.base, ChangedLeaf) else base)

    def leaf_change(self, place: Any = None, single: bool = False) -> LeafChange:
        """Return the change without the leaf's name; `single` for one layer of each stacked axis."""
        site = self.site
        stack = () if single else site.match.stack
        shared = tuple(name for name in self.params if name not in site.shapes)
        return LeafChange(self.change, site.method, site.hparams, site.axes, stack, place, shared)

    def value(self, at: Mapping[int, int | slice] | None = None, donate: bool = False, unrounded: bool = False) -> Any:
        """Return the leaf, or its part at `{axis: index or slice}`: one layer of each stacked axis, some outputs.

        With `donate`, the result takes the memory of the base, whose array is then deleted. With `unrounded`, it is
        float32 where the base is narrower.
        """
        at = at or {}
        base, site = self.base, self.site
        w = base.value(at, donate, unrounded) if isinstance(base, ChangedLeaf) else _slice(base, range(base.ndim), at)
        w = w.astype("float32") if unrounded and w.dtype.itemsize < 4 else w
        slices = {site.match.weight.left[axis]: position for axis, position in at.items()}
        params = {
            tensor.name: _slice(self.params[tensor.name], entry.form.left, slices)
            for tensor, entry in zip(site.tensors, site.entries, strict=True)
        } | {name: _slice(x, site.match.stack, at) for name, x in site.data.items()}
        params |= {name: x for name, x in self.params.items() if name not in site.shapes}
        single = all(isinstance(at.get(axis), int) for axis in site.match.stack)
        change = self.leaf_change(None if isinstance(w, Tracer) else regions.sharding_of(w), single)
        host = isinstance(w, np.ndarray)
        changed = (_compute_in_place if donate and not host else _compute)(change, w, params)
        return np.array(changed) if host else changed  # a copy, since numpy arrays are writable

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes that can be computed slice by slice: each output has a sum of its own."""
        entry = self.site.match.weight
        return () if entry.groups > 1 else tuple(entry.left.index(name) for name in entry.roles["out"])


def refuse_dependent(adapters: Mapping[str, Adapter]) -> None:
    """Raise `AttachError` unless merging one adapter after the other gives the outputs of all of them active.

    It does if each of them scales the outputs or adds to a weight that it does not read, or if all change the weight in
    the same way and each changes what the one before it gives.
    """
    by_leaf: dict[str, dict[str, Site]] = {}
    for name, adapter in adapters.items():
        for site in sites_of(adapter) if len(adapters) > 1 else ():
            if not site.method.copies:
                by_leaf.setdefault(site.leaf, {})[name] = site
    dependent: list[str] = []
    for leaf, found in by_leaf.items():
        effects = {(site.method.peft_type, site.effects) for site in found.values()}
        from_base = any(one.weight == "adds" and one.reads for _, one in effects)
        apart = all(one.weight == "adds" or one.bias == "scales" for _, one in effects)
        if len(found) > 1 and (from_base or not (apart or len(effects) == 1)):
            dependent.append(f"{leaf}: " + ", ".join(f"{name} ({x.method.peft_type})" for name, x in found.items()))
    raise_listed(
        AttachError,
        "cannot merge several active adapters: on these weights an adapter's change depends on the weight, or changes"
        " the input that another adapter gets, so merging one after the other need not give the model's outputs."
        " Activate one of them, and merge it:",
        dependent,
    )


def spec_of(x: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _slice(x: Any, axes: Sequence[Any], at: Mapping[Any, int | slice]) -> Any:
    """Return the part at `{axis: index or slice}` of an array with these axes."""
    if not at or isinstance(x, np.ndarray):
        return x[tuple(at.get(axis, slice(None)) for axis in axes)] if at else x
    index = [at.get(axis, slice(None)) for axis in axes]
    spans = [slice(i, i + 1) if isinstance(i, int) else i for i in index]
    ranges = [span.indices(size) for span, size in zip(spans, x.shape, strict=True)]
    # Plain indexing would compile anew for each position.
    part = jax.lax.dynamic_slice(x, [first for first, _, _ in ranges], [last - first for first, last, _ in ranges])
    return part.reshape([size for size, i in zip(part.shape, index, strict=True) if not isinstance(i, int)])
