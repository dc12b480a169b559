"""The recipe of a new adapter: its resolved configuration and its keymap, from the shapes of a base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxadapt.adapters import layer_replication, selection
from jaxadapt.adapters.adapter import Recipe
from jaxadapt.adapters.sites import Shape, Sites, with_copy_entries
from jaxadapt.configs import Config
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight


def make_recipe(
    config: Config,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    entries: Collection[Weight] = (),
    *,
    unsure: frozenset[str] = selection.NONE,
    found: Mapping[str, Shape] | None = None,
    check: Callable[[Config, KeyMap], None] | None = None,
    weights: Callable[[], Mapping[str, Any]] | None = None,
) -> tuple[Recipe, Sites]:
    """Resolve a configuration on a base, select its sites, and return the recipe and the sites.

    Args:
        shapes: `{dotted path: shape}` of the base leaves.
        entries: the model's own entries, which come before those of the keymap. The recipe stores those of the sites.
        unsure: leaves for whose axes the keymap could only guess.
        found: the shapes of the tensors of an adapter file, by key, if the sites are for a file.
        check: called with the resolved configuration and the keymap with `entries`, before the selection.
        weights: returns the base weights, whose values replicated layers are compared by.

    Raises `TargetError`, `KeyMapError` or `ConfigError`, as `selection.resolve_config` and `select_sites` do.
    """
    full = keymap.with_entries(entries)
    config = selection.resolve_config(config, full, shapes, unsure)
    if check is not None:
        check(config, full)
    sites = selection.select_sites(config, full, shapes, unsure, found)
    if weights is not None:
        layer_replication.check_values(config, full, weights)
    selected = {site.leaf for site in sites}
    used = keymap.with_entries(entry for entry in entries if entry.leaf in selected)
    return Recipe(config, with_copy_entries(used, sites), len(sites)), sites
