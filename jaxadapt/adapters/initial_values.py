"""The parameters that an adapter begins with: drawn, constant, or made from the base weights, each where it belongs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters import sharding, sites
from jaxadapt.arrays import placement, quantized, random_draws
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.tensor_spec import MethodTensor

BASE = "base"
"""Instead of a dtype: each parameter has that of the weight it adapts (PEFT's `autocast_adapter_dtype=False`)."""


def init_values(
    config: Config,
    bounds: Sequence[sites.Site],
    key: Any,
    dtype: Any = None,
    abstract: bool = False,
    base: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Initial parameters, `{path: array}`, each from its own fold of `key`; specs only if `abstract`.

    float32 unless `dtype` says otherwise, whatever the base's dtype is (PEFT's `autocast_adapter_dtype`), or as the
    base's with `BASE`; a copy of a leaf has the leaf's own dtype.

    Args:
        base: `{leaf: array}` of the base parameters, for tensors that follow from them.
        where: `{leaf: sharding}` of the base parameters that have one; each tensor is made where it belongs.
    """
    places = sharding.adapter_shardings(bounds, where or {})
    as_base, dtype = dtype == BASE, jnp.dtype(jnp.float32 if dtype in (None, BASE) else dtype)
    base = base or {}
    blind = [
        b.leaf for b in bounds if any(t.from_base for t in b.tensors) and not has_value(base.get(b.leaf), abstract)
    ]
    if blind:
        raise AttachError(
            "these adapters begin from the values of the base weights, which are not at hand:\n" + paths.bullets(blind)
        )
    wanted = {
        e.path: (b, t, e.shape) for b in bounds for t, e in zip(b.tensors, b.entries, strict=True) if not t.from_base
    }
    if abstract:
        made = {p: jax.ShapeDtypeStruct(shape, dtype, sharding=places.get(p)) for p, (_, _, shape) in wanted.items()}
    else:
        made = placement.put_on_devices(_drawn(config, bounds, wanted, key, dtype), places)
    out: dict[str, Any] = {}
    for bound in bounds:
        named = dict(zip((t.name for t in bound.tensors), bound.entries, strict=True))
        mine: dict[str, Any] = {name: made[e.path] for name, e in named.items() if e.path in made}
        for tensor in (t for t in bound.tensors if t.from_base):
            kind = base[bound.leaf].dtype if tensor.is_copy else dtype
            place = places.get(named[tensor.name].path)
            if abstract:
                mine[tensor.name] = jax.ShapeDtypeStruct(named[tensor.name].shape, kind, sharding=place)
            else:
                w = jnp.asarray(quantized.to_dense(base[bound.leaf]))
                derived = sites.map_stack(bound, lambda a, w: a.from_base(w), mine, w)
                derived = named[tensor.name].form.cleared(derived[tensor.name])
                # A copy even where nothing changed: the base's own array must not be donated with the adapter's.
                copy = jnp.array(derived, dtype=kind, copy=True)
                mine[tensor.name] = copy if place is None else placement.move_to(copy, place)
        if as_base and jnp.issubdtype(base[bound.leaf].dtype, jnp.floating):
            mine = {name: _cast(x, base[bound.leaf].dtype) for name, x in mine.items()}
        out |= {entry.path: mine[name] for name, entry in named.items()}
    return out


def _drawn(
    config: Config, bounds: Sequence[sites.Site], wanted: Mapping[str, Any], key: Any, dtype: Any
) -> dict[str, Any]:
    try:
        draws = {p: (b.method.fresh(config, t, b.fan_in), shape) for p, (b, t, shape) in wanted.items()}
        apart = {p: s for p, (b, t, _) in wanted.items() if (s := _by_tensor(config, b, t)) is not None}
    except ConfigError as error:  # random numbers do not do, which only matters if values are asked for
        if not placement.is_tracing():
            raise
        return {p: random_draws.missing(shape, dtype, str(error)) for p, (_, _, shape) in wanted.items()}
    made = random_draws.draw_arrays(key, draws, dtype)
    forms = {e.path: e.form for b in bounds for e in b.entries}
    unit = {p: (dataclasses.replace(draws[p][0], scale=1.0), draws[p][1]) for p in apart}
    plain = random_draws.draw_arrays(key, unit, jnp.float32)
    made |= {p: (x * forms[p].by_tensor(apart[p])).astype(dtype) for p, x in plain.items()}
    return {p: forms[p].cleared(x) for p, x in made.items()}


def _by_tensor(config: Config, bound: sites.Site, tensor: MethodTensor) -> list[float] | None:
    """How wide the values of each tensor are drawn where their ranks differ; None if all are drawn alike."""
    sizes = [size for size in tensor.used or () if size]
    if len(set(sizes)) < 2:
        return None
    own = [tuple((name, size if name == "r" else n) for name, n in tensor.own) for size in sizes]
    draws = [bound.method.fresh(config, dataclasses.replace(tensor, own=o), bound.fan_in) for o in own]
    if draws[0].kind == "constant" or len(set(draws)) == 1:
        return None
    ((entry,),) = ([e for t, e in zip(bound.tensors, bound.entries, strict=True) if t == tensor],)
    scales = dict(zip(sizes, (draw.scale for draw in draws), strict=True))
    return [scales[rank] for rank in entry.form.ranks or ()]


def _cast(x: Any, dtype: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype)


def has_value(leaf: Any, abstract: bool) -> bool:
    """Whether a base leaf has values, or at least a shape where that is all that is asked for."""
    return leaf is not None and (abstract or not isinstance(leaf, jax.ShapeDtypeStruct))
