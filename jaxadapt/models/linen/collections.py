"""Linen's trees: boxes opened and put on, collections of adapters in and out. No module is called here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import serialization
from flax.core import meta as meta  # re-exported: boxes are opened elsewhere too
from flax.linen import spmd

from jaxadapt import methods
from jaxadapt.adapters import sharding, sites
from jaxadapt.adapters.adapter import CONFIG_NODE, Adapter, Recipe, collection_name, is_array
from jaxadapt.arrays import placement as placement_module
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps import families


def unbox_tree(tree: Any) -> Any:
    """A tree with its boxes (`nn.Partitioned` …) opened, the values as they are."""

    def value(x: Any) -> Any:  # unbox() of a Partitioned would move it to where it is said to belong
        return x.value if isinstance(x, meta.Partitioned) else x.unbox() if isinstance(x, meta.AxisMetadata) else x

    return value(tree) if is_array(tree) else jax.tree.map(value, tree, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def base_shardings(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The sharding of every base leaf: what its array or spec has, else what its box says it will have."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        value = unbox_tree(leaf)
        out[path] = placement_module.sharding_of(value)
        if placement_module.is_unplaced(value) and isinstance(leaf, meta.Partitioned):
            spec: Any = leaf.get_partition_spec()
            if isinstance(leaf, nn.LogicallyPartitioned):
                spec = spmd.logical_to_mesh_axes(tuple(spec), leaf.rules)
            out[path] = placement_module.sharding_from_spec(tuple(spec), leaf.mesh)
    return out


def boxed(adapter: Adapter, base: Mapping[str, Any]) -> Adapter:
    """The adapter with each tensor in a box as its base weight is, so that `nn.get_partition_spec` tells.

    Args:
        base: the base parameters in their boxes, nested or by dotted path.
    """
    boxes = {leaf: box for leaf, box in paths.flatten(base).items() if isinstance(box, meta.Partitioned)}
    if not boxes:
        return adapter
    values = adapter.flat()
    for bound in sites.sites_of(adapter):
        if bound.leaf in boxes:
            box = boxes[bound.leaf]
            for e in bound.entries:
                names = sharding.propagate_axes(bound.match, e.form, tuple(box.names))
                values[e.path] = box.replace(value=values[e.path], names=names)
    return dataclasses.replace(adapter, params=paths.unflatten(values))


def with_values(tree: Mapping[str, Any], name: str, values: Mapping[str, Any], recipe: Recipe | None = None) -> Any:
    """Put other values into an adapter that is attached, and keep the structure of everything: boxes, frozen dicts.

    Args:
        tree: what `adapter_tree` takes: Linen variables, a collection, or the tree of one adapter.
        values: `{path: array}` of all its parameters.
        recipe: to be there instead of the recipe that is there.
    """
    if CONFIG_NODE in tree:
        return refilled(tree, values, recipe)
    inner = tree.get(name)
    if isinstance(inner, Mapping) and CONFIG_NODE in inner:
        return with_entry(tree, name, refilled(inner, values, recipe))
    at = next(c for c in collection_names(tree) if isinstance(tree[c], Mapping) and name in tree[c])
    return with_entry(tree, at, with_entry(tree[at], name, refilled(tree[at][name], values, recipe)))


def with_entry(tree: Mapping[str, Any], key: str, value: Any) -> Any:
    """A mapping of the same type with one more (or another) entry."""
    made: Any = type(tree)
    return made({**tree, key: value})


def refilled(tree: Mapping[str, Any], values: Mapping[str, Any], recipe: Recipe | None = None, within: str = "") -> Any:
    """The tree of one adapter, or of its parameters alone, with other values."""
    out: dict[str, Any] = {}
    for key, leaf in tree.items():
        path = paths.join(within, str(key))
        if key == CONFIG_NODE:
            out[key] = recipe or leaf
        elif isinstance(leaf, Mapping):
            out[key] = refilled(leaf, values, recipe, path)
        else:
            out[key] = leaf.replace_boxed(values[path]) if isinstance(leaf, meta.AxisMetadata) else values[path]
    made: Any = type(tree)
    return made(out)


# ---------------------------------------------------------------- collections in and out


def adapter_collections(variables: Any) -> dict[str, Mapping[str, Any]]:
    """The adapter collections among Linen variables. (A parameter tree may hold a module called "lora".)"""
    if not isinstance(variables, Mapping) or "params" not in variables:
        return {}
    return {name: variables[name] for name in collection_names(variables)}


def adapter_names(tree: Mapping[str, Any]) -> list[str]:
    """The names of the adapters that Linen variables, or a collection of theirs, hold with a configuration."""
    holders = [tree, *(tree.get(name, {}) for name in methods.COLLECTIONS)]
    return sorted(
        name
        for held in holders
        if isinstance(held, Mapping)
        for name, inner in held.items()
        if isinstance(inner, Mapping) and CONFIG_NODE in inner
    )


def collection_names(tree: Mapping[str, Any]) -> list[str]:
    """The names of the adapter collections among Linen variables."""
    return [name for name in methods.COLLECTIONS if name in tree]


def adapter_tree(tree: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The tree of one adapter inside Linen variables, a collection, or itself."""
    if CONFIG_NODE in tree:
        return tree
    inner = tree.get(name)
    if isinstance(inner, Mapping) and CONFIG_NODE in inner:
        return inner
    held = {c: tree[c] for c in collection_names(tree) if isinstance(tree[c], Mapping) and name in tree[c]}
    if len(held) > 1:
        raise AttachError(
            f"several adapters are called {name!r} here, in {' and '.join(held)}; give one of them a name of its own,"
            " as adapter.named('other') does"
        )
    return next((collection[name] for collection in held.values()), None)


def is_moment(path: str) -> bool:
    """Whether a leaf is an optimizer's, whose moments lie in trees of the same names, and no weight."""
    return "opt_state" in path.split(".")


def has_config(tree: Mapping[str, Any]) -> bool:
    """Whether the tree of one adapter still says what it is."""
    return isinstance(tree.get(CONFIG_NODE), Recipe | str)


def read_collection(tree: Mapping[str, Any], name: str) -> Adapter:
    """The adapter under one name of a collection; `AttachError` if its configuration was lost on the way."""
    recipe = tree.get(CONFIG_NODE)
    if isinstance(recipe, str):  # flax's msgpack without a target
        recipe = Recipe.from_text(recipe)
    if not isinstance(recipe, Recipe):
        raise AttachError(
            f"the adapter {name!r} has lost its configuration (a restore without a target does that); with config="
            " (and keymap=, if it was adapted with one) save takes it all the same, and extract gives it whole again:"
            f" variables | extract(variables, {name!r}, config=config).named({name!r})"
        )
    adapter = Adapter(recipe.config, {k: v for k, v in tree.items() if k != CONFIG_NODE}, recipe.keymap)
    recipe.check_complete(len(adapter.sites), name)
    return adapter


def adapter_from_arrays(tree: Mapping[str, Any], name: str, config: Config | None, keymap: Any) -> Adapter:
    """An adapter from a tree that kept its arrays and lost everything else."""
    if config is None:
        raise AttachError(
            "this tree carries no adapter configuration (it was never made here, or to_pure_dict or a restore without a"
            " target lost it); pass config=, and keymap= if the model was adapted with one"
        )
    collection = collection_name(config)
    values: dict[str, Any] = {}
    without_base = {k: v for k, v in tree.items() if k != "params"} if collection in tree else tree
    for path, leaf in paths.flatten(without_base).items():
        parts = [p for p in path.split(".") if p != CONFIG_NODE]
        if not is_array(unbox_tree(leaf)) or is_moment(path):
            continue
        if parts[-1] == "value":  # of an nnx.Variable, as Orbax restores a state without a target
            parts.pop()
        for i in range(len(parts) - 1):
            if parts[i] == collection and parts[i + 1] == name:
                values[paths.join(*parts[:i], *parts[i + 2 :])] = leaf
                break
    if not values:
        left = paths.flatten({k: v for k, v in tree.items() if k != CONFIG_NODE})
        values = {
            path: leaf for path, leaf in left.items() if is_array(unbox_tree(leaf))
        }  # the bare tree of one adapter
        if not values or any(collection in p.split(".") for p in values):
            raise AttachError(f"there is no adapter {name!r} of type {config.peft_type} in this tree; check name=")
    bases = {path.rpartition(".")[0] for path in values}
    table = families.family_of_leaves(bases) if keymap in (None, "auto") else families.resolve_keymap(keymap, {})
    return Adapter(config, paths.unflatten(values), table)


def _recipe_from_text(target: Recipe, state: Any) -> Recipe:
    if not isinstance(state, str):
        raise AttachError(f"an adapter's configuration was saved as text; found {type(state).__name__}")
    return Recipe.from_text(state)


serialization.register_serialization_state(Recipe, Recipe.to_text, _recipe_from_text)
