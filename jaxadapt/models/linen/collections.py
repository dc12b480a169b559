"""Linen variables as trees: unboxing and boxing of leaves, and reading and replacing of adapter collections."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import serialization
from flax.core import meta as meta  # re-exported
from flax.linen import spmd

from jaxadapt.adapters import initial_values, sites
from jaxadapt.adapters.adapter import (
    CONFIG_NODE,
    SHARED_NODE,
    Adapter,
    Recipe,
    collection_name,
    integers_name,
    is_array,
)
from jaxadapt.arrays import regions
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps import families
from jaxadapt.methods.registry import COLLECTIONS


def unbox_tree(tree: Any) -> Any:
    """Return a tree with its boxed leaves (`nn.Partitioned` …) replaced by their values."""

    def unbox(x: Any) -> Any:
        # Partitioned.unbox() is not used: it applies a sharding constraint.
        return x.value if isinstance(x, meta.Partitioned) else x.unbox() if isinstance(x, meta.AxisMetadata) else x

    return unbox(tree) if is_array(tree) else jax.tree.map(unbox, tree, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def base_shardings(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{path: sharding}` for the base leaves: the sharding of the array or spec, else that of the box."""
    shardings: dict[str, Any] = {}
    for path, leaf in leaves.items():
        value = unbox_tree(leaf)
        shardings[path] = regions.sharding_of(value)
        if regions.is_unplaced(value) and isinstance(leaf, meta.Partitioned):
            spec: Any = leaf.get_partition_spec()
            if isinstance(leaf, nn.LogicallyPartitioned):
                spec = spmd.logical_to_mesh_axes(tuple(spec), leaf.rules)
            shardings[path] = regions.sharding_from_spec(tuple(spec), leaf.mesh)
    return shardings


def box_like_base(adapter: Adapter, base: Mapping[str, Any]) -> Adapter:
    """Return the adapter with each tensor boxed like its base weight, so that `nn.get_partition_spec` works on it.

    Args:
        base: the base parameters with their boxes, nested or by dotted path.
    """
    boxes = {leaf: box for leaf, box in paths.flatten(base).items() if isinstance(box, meta.Partitioned)}
    if not boxes:
        return adapter
    values = adapter.flat()
    for site in sites.sites_of(adapter):
        if site.leaf in boxes:
            box = boxes[site.leaf]
            for entry in site.entries:
                names = initial_values.propagate_axes(site.match, entry.form, tuple(box.names))
                values[entry.path] = box.replace(value=values[entry.path], names=names)
    return dataclasses.replace(adapter, params=paths.unflatten(values))


def replace_adapter_values(
    tree: Mapping[str, Any], name: str, values: Mapping[str, Any], recipe: Recipe | None = None
) -> Any:
    """Return a tree with other values in one adapter, and with the same boxes and mapping types.

    Args:
        tree: Linen variables, an adapter collection, or the tree of one adapter, as for `adapter_tree`.
        values: `{path: array}` for all parameters of the adapter.
        recipe: replaces the adapter's recipe, if given.
    """
    if CONFIG_NODE in tree:
        return replace_values(tree, values, recipe)
    inner = tree.get(name)
    if isinstance(inner, Mapping) and CONFIG_NODE in inner:
        return with_entry(tree, name, replace_values(inner, values, recipe))
    key = next(c for c in collection_names(tree) if isinstance(tree[c], Mapping) and name in tree[c])
    for collection in (key, integers_name(key)):
        if name in tree.get(collection, {}):
            inner = replace_values(tree[collection][name], values, recipe)
            tree = with_entry(tree, collection, with_entry(tree[collection], name, inner))
    return tree


def with_entry(tree: Mapping[str, Any], key: str, value: Any) -> Any:
    """Return a mapping of the same type with `tree[key]` set to `value`."""
    mapping_type: Any = type(tree)
    return mapping_type({**tree, key: value})


def replace_values(
    tree: Mapping[str, Any], values: Mapping[str, Any], recipe: Recipe | None = None, within: str = ""
) -> Any:
    """Return the tree of one adapter, with or without its recipe, with other values.

    Args:
        tree: the tree, or a subtree at the path `within`.
        values: `{path: array}` for all parameters of the adapter.
        recipe: replaces the adapter's recipe, if given.
        within: the path of `tree` in the adapter.
    """
    filled: dict[str, Any] = {}
    for key, leaf in tree.items():
        path = paths.join(within, str(key))
        if key == CONFIG_NODE:
            filled[key] = recipe or leaf
        elif isinstance(leaf, Mapping):
            filled[key] = replace_values(leaf, values, recipe, path)
        else:
            filled[key] = leaf.replace_boxed(values[path]) if isinstance(leaf, meta.AxisMetadata) else values[path]
    mapping_type: Any = type(tree)
    return mapping_type(filled)


# ---------------------------------------------------------------- finding and reading adapters


def adapter_collections(variables: Any) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return `{collection: {name: tree of one adapter}}` of Linen variables.

    Returns none for a tree without "params": in a parameter tree, "lora" may be the name of a module.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        return {}
    return adapter_trees(variables)


def with_integers(tree: Mapping[str, Any], integers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree of one adapter with the integer tensors that its own collection holds."""
    added = {
        key: with_integers(tree.get(key, {}), value) if isinstance(value, Mapping) else value
        for key, value in integers.items()
    }
    return {**tree, **added}


def adapter_trees(tree: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return `{collection: {name: tree of one adapter}}` of the collections in Linen variables, with their integers."""
    return {
        collection: {
            name: with_integers(inner, tree.get(integers_name(collection), {}).get(name, {}))
            for name, inner in dict(tree[collection]).items()
        }
        for collection in collection_names(tree)
    }


def adapter_names(tree: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapters with a configuration in Linen variables, or in one collection of them."""
    candidates = [tree, *(tree.get(name, {}) for name in COLLECTIONS)]
    return sorted(
        name
        for collection in candidates
        if isinstance(collection, Mapping)
        for name, inner in collection.items()
        if isinstance(inner, Mapping) and CONFIG_NODE in inner
    )


def collection_names(tree: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapter collections in Linen variables, without those of integer tensors."""
    return [name for name in COLLECTIONS if name in tree]


def without_adapters(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return Linen variables without the adapters' collections."""
    held = collection_names(tree)
    dropped = {*held, *map(integers_name, held)}
    return {name: value for name, value in tree.items() if name not in dropped}


def adapter_tree(tree: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the tree of one adapter, or None.

    Args:
        tree: Linen variables, an adapter collection, or the tree of one adapter, which is returned as it is.

    Raises `AttachError` if several collections have an adapter of this name.
    """
    if CONFIG_NODE in tree:
        return tree
    inner = tree.get(name)
    if isinstance(inner, Mapping) and CONFIG_NODE in inner:
        return inner
    matches = {c: tree[c] for c in collection_names(tree) if isinstance(tree[c], Mapping) and name in tree[c]}
    if len(matches) > 1:
        raise AttachError(
            f"several adapters are called {name!r} here, in {' and '.join(matches)}. Rename one of them, for example"
            " with adapter.named('other')"
        )
    for collection in matches:
        own = {collection, integers_name(collection)}
        return adapter_trees({key: value for key, value in tree.items() if key in own})[collection][name]
    return None


def is_moment(path: str) -> bool:
    """Return True if a leaf is part of an optimizer state, whose moments have the same names as the parameters."""
    return "opt_state" in path.split(".")


def has_config(tree: Mapping[str, Any]) -> bool:
    """Return True if the tree of one adapter has its recipe, as an object or as text."""
    return isinstance(tree.get(CONFIG_NODE), Recipe | str)


def read_adapter(tree: Mapping[str, Any], name: str) -> Adapter:
    """Return the adapter whose tree is given; `name` is for messages.

    Raises `AttachError` if the tree has no configuration, or if parts of the adapter are missing.
    """
    recipe = tree.get(CONFIG_NODE)
    if isinstance(recipe, str):  # from Flax's msgpack, restored without a target
        recipe = Recipe.from_text(recipe)
    if not isinstance(recipe, Recipe):
        raise AttachError(
            f"the adapter {name!r} has lost its configuration, as a restore without a target does. Pass config= to save"
            " (and keymap=, if it was adapted with one), or put the configuration back with extract:"
            f" variables | extract(variables, name={name!r}, config=config).named({name!r})"
        )
    adapter = Adapter(recipe.config, {k: v for k, v in tree.items() if k != CONFIG_NODE}, recipe.keymap)
    recipe.check_complete(len(adapter.sites), name)
    return adapter


def adapter_from_arrays(tree: Mapping[str, Any], name: str, config: Config | None, keymap: Any) -> Adapter:
    """Return the adapter called `name` from a tree that holds only arrays.

    Raises `AttachError` if `config` is None, or if the tree has no such adapter.
    """
    if config is None:
        raise AttachError(
            "this tree carries no adapter configuration (it has no adapter, as after merge, or to_pure_dict or a"
            " restore without a target dropped it). Save a merged adapter from the variables before the merge; else"
            " pass config=, and keymap= if the model was adapted with one"
        )
    collection = collection_name(config)
    values = _named_arrays({k: v for k, v in tree.items() if k != "params" or collection not in tree}, collection, name)
    if not values:
        # The tree may be that of one adapter, without a collection around it.
        leaves = paths.flatten({k: v for k, v in tree.items() if k != CONFIG_NODE})
        values = {path: leaf for path, leaf in leaves.items() if is_array(unbox_tree(leaf))}
        if not values or any(collection in path.split(".") for path in values):
            raise AttachError(f"there is no adapter {name!r} of type {config.peft_type} in this tree. Check name=")
    base_leaves = {path.rpartition(".")[0] for path in values} - {SHARED_NODE}
    resolved = (
        families.family_of_leaves(base_leaves) if keymap in (None, "auto") else families.resolve_keymap(keymap, {})
    )
    return Adapter(config, paths.unflatten(values), resolved)


def _named_arrays(tree: Mapping[str, Any], collection: str, name: str) -> dict[str, Any]:
    """Return `{path in the adapter: array}` of the arrays below a collection and a name, wherever these are."""
    values: dict[str, Any] = {}
    for path, leaf in paths.flatten(tree).items():
        parts = [p for p in path.split(".") if p != CONFIG_NODE]
        if not is_array(unbox_tree(leaf)) or is_moment(path):
            continue
        if parts[-1] == "value":  # Orbax restores an nnx.Variable without a target as {"value": array}
            parts.pop()
        heads = {(collection, name), (integers_name(collection), name)}
        at = next((i for i, pair in enumerate(itertools.pairwise(parts)) if pair in heads), None)
        if at is not None:
            values[paths.join(*parts[:at], *parts[at + 2 :])] = leaf
    return values


def _recipe_from_text(target: Recipe, state: Any) -> Recipe:
    if not isinstance(state, str):
        raise AttachError(
            f"cannot restore an adapter's configuration: expected text, found {type(state).__name__}."
            " Restore from a file that flax.serialization wrote"
        )
    return Recipe.from_text(state)


serialization.register_serialization_state(Recipe, Recipe.to_text, _recipe_from_text)
