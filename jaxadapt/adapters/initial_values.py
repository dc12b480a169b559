"""Initial values of an adapter: drawn, constant, or derived from the base weights, each created on its own devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters import sharding
from jaxadapt.adapters.sites import Site, map_stack
from jaxadapt.arrays import placement, quantized, random_draws
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.tensor_spec import MethodTensor

BASE = "base"
"""In place of a dtype: each parameter has the dtype of the weight it adapts, as with `autocast_adapter_dtype=False`."""


def init_values(
    config: Config,
    sites: Sequence[Site],
    key: Any,
    dtype: Any = None,
    abstract: bool = False,
    base: Mapping[str, Any] | None = None,
    base_shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return initial parameters, `{path: array}`, each drawn from its own fold of `key`; specs if `abstract`.

    The dtype is float32 by default, whatever the base's dtype is (PEFT's `autocast_adapter_dtype`). With `BASE` it is
    the base's. A copy of a leaf keeps the leaf's dtype.

    Args:
        base: `{leaf: array}` of the base parameters, for tensors derived from them.
        where: `{leaf: sharding}` of the base parameters that have one; each tensor is created with its own sharding.
    """
    shardings = sharding.adapter_shardings(sites, base_shardings or {})
    use_base_dtype, dtype = dtype == BASE, jnp.dtype(jnp.float32 if dtype in (None, BASE) else dtype)
    base = base or {}
    without_values = [
        site.leaf
        for site in sites
        if any(tensor.from_base for tensor in site.tensors) and not has_value(base.get(site.leaf), abstract)
    ]
    if without_values:
        raise AttachError(
            "these adapters start from the values of the base weights, which have none here; pass base parameters with"
            " values:\n" + paths.bullets(without_values)
        )
    drawn = {
        entry.path: (site, tensor, entry.shape)
        for site in sites
        for tensor, entry in zip(site.tensors, site.entries, strict=True)
        if not tensor.from_base
    }
    if abstract:
        values = {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings.get(path))
            for path, (_, _, shape) in drawn.items()
        }
    else:
        values = placement.put_on_devices(_draw_values(config, sites, drawn, key, dtype), shardings)
    params: dict[str, Any] = {}
    for site in sites:
        entries = dict(zip((tensor.name for tensor in site.tensors), site.entries, strict=True))
        site_values: dict[str, Any] = {
            name: values[entry.path] for name, entry in entries.items() if entry.path in values
        }
        for tensor in (tensor for tensor in site.tensors if tensor.from_base):
            tensor_dtype = base[site.leaf].dtype if tensor.is_copy else dtype
            target = shardings.get(entries[tensor.name].path)
            if abstract:
                site_values[tensor.name] = jax.ShapeDtypeStruct(
                    entries[tensor.name].shape, tensor_dtype, sharding=target
                )
            else:
                w = jnp.asarray(quantized.to_dense(base[site.leaf]))
                derived = map_stack(site, lambda a, w: a.from_base(w), site_values, w)
                derived = entries[tensor.name].form.clear_gaps(derived[tensor.name])
                # Always copy, so that donating the adapter never donates the base's array.
                copy = jnp.array(derived, dtype=tensor_dtype, copy=True)
                site_values[tensor.name] = copy if target is None else placement.move_to(copy, target)
        if use_base_dtype and jnp.issubdtype(base[site.leaf].dtype, jnp.floating):
            site_values = {name: _cast(x, base[site.leaf].dtype) for name, x in site_values.items()}
        params |= {entry.path: site_values[name] for name, entry in entries.items()}
    return params


def _draw_values(
    config: Config, sites: Sequence[Site], drawn: Mapping[str, Any], key: Any, dtype: Any
) -> dict[str, Any]:
    """Draw random and constant values, `{path: array}`."""
    try:
        draws = {
            path: (site.method.fresh(config, tensor, site.fan_in), shape)
            for path, (site, tensor, shape) in drawn.items()
        }
        scales = {
            path: tensor_scales
            for path, (site, tensor, _) in drawn.items()
            if (tensor_scales := _scales_by_tensor(config, site, tensor)) is not None
        }
    except ConfigError as error:  # this start has no random draw; under tracing no values are needed
        if not placement.is_tracing():
            raise
        return {path: random_draws.missing_array(shape, dtype, str(error)) for path, (_, _, shape) in drawn.items()}
    values = random_draws.draw_arrays(key, draws, dtype)
    forms = {entry.path: entry.form for site in sites for entry in site.entries}
    unit_draws = {path: (dataclasses.replace(draws[path][0], scale=1.0), draws[path][1]) for path in scales}
    unit_values = random_draws.draw_arrays(key, unit_draws, jnp.float32)
    values |= {
        path: (array * forms[path].expand_by_tensor(scales[path])).astype(dtype) for path, array in unit_values.items()
    }
    return {path: forms[path].clear_gaps(array) for path, array in values.items()}


def _scales_by_tensor(config: Config, site: Site, tensor: MethodTensor) -> list[float] | None:
    """Return the scale of each tensor's draws if their ranks differ; None if all are drawn alike."""
    sizes = [size for size in tensor.used_sizes or () if size]
    if len(set(sizes)) < 2:
        return None
    all_sizes = [tuple((name, size if name == "r" else value) for name, value in tensor.own) for size in sizes]
    draws = [
        site.method.fresh(config, dataclasses.replace(tensor, own=own_sizes), site.fan_in) for own_sizes in all_sizes
    ]
    if draws[0].kind == "constant" or len(set(draws)) == 1:
        return None
    ((entry,),) = ([candidate for other, candidate in zip(site.tensors, site.entries, strict=True) if other == tensor],)
    scales = dict(zip(sizes, (draw.scale for draw in draws), strict=True))
    return [scales[rank] for rank in entry.form.ranks or ()]


def _cast(x: Any, dtype: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype)


def has_value(leaf: Any, abstract: bool) -> bool:
    """Return True if a base leaf has values, or with `abstract` at least a shape."""
    return leaf is not None and (abstract or not isinstance(leaf, jax.ShapeDtypeStruct))
