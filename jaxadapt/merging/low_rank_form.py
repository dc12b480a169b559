"""The plain LoRA of an adapter whose method computes the factors of its change, such as VeRA or LoHa."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt import methods
from jaxadapt.adapters import selection
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.sites import Site, Sites, sites_of
from jaxadapt.configs import Config, LoraConfig, matching
from jaxadapt.core import paths
from jaxadapt.keymaps.weight import Modules
from jaxadapt.merging import factors
from jaxadapt.merging.site_entries import entry_stems, factor_entries, select_rows, tensor_name

Array = Any
Shapes = Mapping[str, tuple[int, ...]]


def plain_config(config: Config, r: int) -> LoraConfig:
    """Return a plain LoRA configuration for the same modules of the same base."""
    names = ("task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "auto_mapping")
    further_names = ("layers_to_transform", "layers_pattern", "fan_in_fan_out")
    fields = {name: value for name in names + further_names if (value := config.get(name)) is not None}
    return LoraConfig(r=r, lora_alpha=r, **fields)


def plain_sites(adapter: Adapter, sites: Sites, r: int, shapes: Shapes) -> tuple[LoraConfig, Sites]:
    """Return the configuration and the sites of a plain LoRA on the weights that an adapter changes.

    Args:
        sites: the adapter's sites.
        shapes: `{leaf: shape}` of the base.
    """
    config = plain_config(adapter.config, r)
    modules = sorted({module for site in sites for module in site.modules})
    if not all(matching.is_target(config, module) for module in modules):
        config = config.replace(target_modules=modules, exclude_modules=None)
    return config, selection.select_sites(config, adapter.keymap, {leaf: shapes[leaf] for leaf in adapter.sites})


def low_rank_form(adapter: Adapter, shapes: Shapes) -> Adapter | None:
    """Return a plain LoRA, float32 at least, with the factors that an adapter's method computes.

    Its rank is the method's `plain_rank`. It computes the same, up to rounding. None if the method does not compute
    factors, or not for all weights of the adapter: for embeddings, convolutions, experts and full copies.
    """
    method, sites = methods.get_method(adapter.config), sites_of(adapter)
    rank = method.plain_rank(adapter.config)
    if rank is None or any(site.method.copies or site.match.weight.kind != "linear" for site in sites):
        return None
    config, made = plain_sites(adapter, sites, rank, shapes)
    by_leaf = {site.leaf: site for site in sites}
    if not all(factors.has_one_pair(site) for site in made):
        return None
    params: dict[str, Array] = {}
    shared = {name: methods.at_least_float32(jnp.asarray(x)) for name, x in adapter.shared.items()}
    with jax.default_matmul_precision("highest"):
        for site in made:
            tensors = adapter.sites[site.leaf] | shared
            a, b = _site_factors(by_leaf[site.leaf], site, tensors, adapter)
            _, leaves = factors.matrices_to_leaves(site, *factors.pad_rank(a, b, rank))
            params |= leaves
    return Adapter(config, paths.unflatten(params), adapter.keymap)


def _site_factors(site: Site, plain: Site, tensors: Mapping[str, Array], adapter: Adapter) -> tuple[Array, Array]:
    """Return A (n, r, in) and B (n, out, r) of one site's modules, in the order of the plain LoRA's A.

    Args:
        plain: the same leaf's site of the plain LoRA.
        tensors: the site's tensors and the shared ones.
    """
    method: Any = site.method
    stems, shape = entry_stems(plain, factor_entries(plain)[0]), factors.matrix_sizes(plain)
    rows = {
        name: select_rows(entry.form.to_rows(x), entry_stems(site, entry), stems)
        for entry in site.entries
        for name in [tensor_name(entry)]
        for x in [methods.at_least_float32(jnp.asarray(tensors[name]))]
    }
    shared = {name: x for name, x in tensors.items() if name not in rows}
    pairs: list[tuple[Array, Array]] = []
    for number, stem in enumerate(stems):
        module = Modules((stem.removeprefix(adapter.keymap.prefix),))
        own = method.own(adapter.config, dataclasses.replace(site.target, modules=module))
        pairs.append(method.factors(own, {name: x[number] for name, x in rows.items()} | shared, shape))
    a, b = (jnp.stack(side) for side in zip(*pairs, strict=True))
    return a, b
