"""The variables of one call of a Linen model, with adapter tensors added to `params` beside the weights they adapt.

The adapters of the rows of a batch are added in the same way, for one call.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict, meta
from flax.core.scope import in_filter

from jaxadapt.adapters.adapter import CONFIG_NODE, Adapter, Recipe, Site, collection_name, integers_name, map_stack
from jaxadapt.adapters.sites import sites_from_shapes
from jaxadapt.arrays import quantized
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.prompts import PromptLearningConfig
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.methods.applied import Applicable, refuse_rivals
from jaxadapt.methods.base import Method
from jaxadapt.methods.registry import get_method
from jaxadapt.models.call import NO_ROUTE, RowLayout, Rows
from jaxadapt.models.linen import collections
from jaxadapt.models.linen.collections import Keys
from jaxadapt.models.linen.interceptor import SEP, Interceptor, LeafAdapter
from jaxadapt.models.prompts import Prompt, only_one

# ---------------------------------------------------------------- overlay


@dataclasses.dataclass(frozen=True)
class Overlay:
    """The variables of a call, separated into base and adapters, and the leaves that the call adds to `params`.

    Args:
        base: the variables without the adapters' collections.
        adapters: the adapters' collections.
        leaves: `{keys: value}` added to the base parameters, or replacing some of them, during the call.
        interceptor: applies the active adapters.
        with_dropout: the names of the active adapters that have dropout.
        active: the active adapters.
        prompt: the active adapter with virtual tokens, if any.
    """

    base: Mapping[str, Any]
    adapters: Mapping[str, Any]
    leaves: Mapping[Keys, Any]
    interceptor: Interceptor
    with_dropout: Sequence[str]
    active: Mapping[str, Adapter]
    prompt: Prompt | None = None

    def module_variables(self) -> dict[str, Any]:
        """Return the variables with which the module is called."""
        if not self.leaves:
            return dict(self.base)
        return {**self.base, "params": collections.overlay(self.base["params"], self.leaves)}

    def restore(self, changed: Mapping[str, Any], mutable: Any) -> Any:
        """Return the collections that a call returned, without the added leaves and with the adapters' collections."""
        out = dict(changed)
        if "params" in out and self.leaves:
            replaced = {
                keys: collections.lookup(self.base["params"], keys) for keys in self.leaves if SEP not in keys[-1]
            }
            out["params"] = collections.overlay(_without_added(out["params"]), replaced)
        out |= {c: tree for c, tree in self.adapters.items() if in_filter(mutable, c)}
        return FrozenDict(out) if isinstance(changed, FrozenDict) else out


def build_overlay(
    variables: Mapping[str, Any],
    configs: Mapping[str, Config],
    active: Sequence[str],
    data: Mapping[str, Mapping[str, Any]],
    has_stream: bool,
) -> Overlay:
    """Build the overlay of one call.

    Args:
        variables: the variables as the caller has them.
        configs: `{name: configuration}` of the wrapper's adapters.
        active: the names of the adapters to apply, in this order.
        data: `{adapter: {name: array}}` of this call.
        has_stream: True if the call has a random stream for dropout.

    Raises `AttachError` for an active adapter that the variables lack, or that does not fit the base or its
    configuration.
    """
    adapters = _adapter_collections(variables, configs)
    base = {c: tree for c, tree in variables.items() if c not in adapters}
    params = base.get("params", {})
    keys_by_leaf = key_paths(params) if active else {}
    added = _Added({}, {})
    replacing: dict[str, dict[str, Method]] = {}
    with_dropout: dict[str, None] = {}
    prompts: dict[str, Prompt] = {}
    read = {name: _read_adapter(adapters, name, configs[name], keys_by_leaf) for name in active}
    for order, (name, adapter) in enumerate(read.items()):
        values, of_call = adapter.sites, data.get(name, {})
        if get_method(adapter.config).scope == "model":
            prompts[name] = Prompt(adapter.recipe, adapter.shared, of_call)
        shapes = tuple((leaf, tuple(tensors.items())) for leaf, tensors in adapter.shapes.items())
        for site in _cached_sites(adapter.recipe, shapes):
            keys = keys_by_leaf[site.leaf]
            if site.method.copies and site.effects.form == "weight":
                replacing.setdefault(site.leaf, {})[name] = site.method
                old = quantized.to_dense(
                    added.leaves[keys] if keys in added.leaves else collections.lookup(params, keys)
                )
                new = map_stack(site, lambda a, w: a.weight(w), values[site.leaf], meta.unbox(old))
                added.leaves[keys] = meta.replace_boxed(old, new)
                continue
            if site.method.dropout(site.hparams):
                with_dropout[name] = None
            number = order, has_stream and name in with_dropout
            tensors = {**values[site.leaf], **_repeat_data(site, of_call, collections.lookup(params, keys))}
            added.append(keys, site, site.match.stack, number, tensors, {} if site.method.copies else adapter.shared)
    refuse_rivals(replacing)
    interceptor = Interceptor(added.sites, _quantized_modules(params), has_stream)
    return Overlay(base, adapters, added.leaves, interceptor, list(with_dropout), read, only_one(prompts))


@dataclasses.dataclass(frozen=True)
class _Added:
    """The leaves that a call adds to `params`, and the adapters that read them."""

    leaves: dict[Keys, Any]
    sites: dict[Keys, dict[str, list[LeafAdapter]]]

    def append(
        self,
        keys: Keys,
        site: Applicable,
        stack: Sequence[int],
        number: Any,
        tensors: Mapping[str, Any],
        shared: Mapping[str, Any],
    ) -> None:
        """Add the tensors of a site beside the leaf at `keys`.

        Args:
            stack: the axes of the leaf that stack layers.
            number: distinguishes the sites of one leaf.
            tensors: the tensors with these axes.
            shared: the tensors that all layers have in common. The model's scan would slice them in `params`.
        """
        *path, leaf = keys
        # The hyperparameters are part of the added names, so that a jit inside the model (nn.jit) traces anew when they
        # change.
        text = repr((number, site.method.peft_type, site.hparams, site.axes, site.axes.torch))
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]

        def add(arrays: Mapping[str, Any]) -> dict[str, str]:
            names = {tensor: f"{leaf}{SEP}{tensor.removeprefix(SEP)}{SEP}{digest}" for tensor in arrays}
            self.leaves.update({(*path, names[tensor]): x for tensor, x in arrays.items()})
            return names

        whole, beside = (shared, {}) if stack else ({}, shared)
        adapter = LeafAdapter(site, add(tensors), add(beside), whole)
        self.sites.setdefault(tuple(path), {}).setdefault(leaf, []).append(adapter)


def _read_adapter(adapters: Mapping[str, Any], name: str, config: Config, keys_by_leaf: Mapping[str, Keys]) -> Adapter:
    """Return an active adapter; raise `AttachError` unless it has the wrapper's configuration and fits the base."""
    collection = collection_name(config)
    tree = collections.find_adapters(adapters).get((collection, name))
    if tree is None:
        raise AttachError(
            f"the variables hold no adapter {name!r} in {collection!r}. Create it with init, or load it with load"
        )
    # meta.unbox applies the sharding constraints of the boxes, as it does for the base.
    adapter = collections.read_adapter(meta.unbox(tree), name)
    if adapter.config != _resolve_like(config, adapter.config):
        argument = "" if name == "default" else f", name={name!r}"
        raise AttachError(
            f"the adapter {name!r} in the variables has another configuration than in this wrapper. Wrap the module"
            f" with the adapter's: jaxadapt.adapt(module, jaxadapt.extract(variables{argument}).config{argument})"
        )
    missing = [leaf for leaf in adapter.sites if leaf not in keys_by_leaf]
    raise_listed(AttachError, f"the adapter {name!r} adapts weights that the base parameters lack:", missing)
    return adapter


def _resolve_like(config: Config, resolved: Config) -> Config:
    """Return a wrapper's configuration with the fields that `init` resolves taken from an adapter's configuration.

    These are unset targets, "all-linear" and `fan_in_fan_out`.
    """
    changes: dict[str, Any] = {}
    config = matching.with_task_heads(config)
    for name in {name for defaults in FACTS[config.peft_type].default_targets.values() for name in defaults}:
        if config.get(name) is None and name in config.to_dict():
            changes[name] = resolved.get(name)
    if isinstance(config, PromptLearningConfig):
        changes |= {name: resolved.get(name) for name, value in config.to_dict().items() if value is None}
    if config.get("fan_in_fan_out") is not None:
        changes["fan_in_fan_out"] = resolved.get("fan_in_fan_out")
    if str(config.get("target_modules")).lower() == matching.ALL_LINEAR:
        config = config.with_targets(resolved.get("target_modules"))
    return config.replace(**changes) if changes else config


_Shapes = tuple[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], ...]


@functools.lru_cache(maxsize=64)
def _cached_sites(recipe: Recipe, shapes: _Shapes) -> tuple[Site, ...]:
    """Return the sites of an adapter. They are cached, because outside jit every call needs them."""
    return sites_from_shapes(recipe.config, recipe.keymap, {leaf: dict(tensors) for leaf, tensors in shapes})


def _repeat_data(site: Site, of_call: Mapping[str, Any], w: Any) -> dict[str, Any]:
    """Return the layer numbers of a site and the data of a call, stacked as the leaf `w` is."""
    stack = site.match.stack
    numbers = {key: _move_to_stack(x, stack) for key, x in site.data.items()}
    shape = collections.unbox_tree(w).shape if of_call else ()
    return numbers | {key: repeat_on_stack(x, stack, shape) for key, x in of_call.items()}


def _move_to_stack(numbers: Any, stack: Sequence[int]) -> Any:
    """Reshape layer numbers so that their axes are the weight's stacked axes, which a scan slices."""
    shape = [1] * (max(stack) + 1)
    for axis, size in zip(stack, numbers.shape, strict=True):
        shape[axis] = size
    return jnp.asarray(numbers.reshape(shape))


def repeat_on_stack(x: Any, stack: Sequence[int], shape: Sequence[int]) -> Any:
    """Repeat an array for each layer that a weight of this shape stacks on these axes."""
    for axis in stack:
        x = jnp.repeat(jnp.expand_dims(x, axis), shape[axis], axis)
    return x


def _without_added(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter tree without the leaves that a call added."""
    kept = {k: v for k, v in tree.items() if isinstance(v, Mapping) or SEP not in k}
    return {k: _without_added(v) if isinstance(v, Mapping) else v for k, v in kept.items()}


def _adapter_collections(variables: Mapping[str, Any], configs: Mapping[str, Config]) -> dict[str, Any]:
    """Return the collections of the wrapper's adapters, and of all others that have a configuration."""
    names = {collection_name(config) for config in configs.values()}
    found = collections.find_adapters(variables).items()
    names |= {keys[0] for keys, inner in found if keys[1:] and CONFIG_NODE in inner}
    names |= set(map(integers_name, names))
    return {c: variables[c] for c in variables if c in names}


def key_paths(tree: Any, prefix: Keys = ()) -> dict[str, Keys]:
    """Return `{dotted path: keys}` for the leaves of a tree whose keys may contain dots."""
    out: dict[str, Keys] = {}
    for key, value in tree.items():
        keys = (*prefix, key)
        out |= key_paths(value, keys) if isinstance(value, Mapping) else {".".join(keys): keys}
    return out


def _quantized_modules(tree: Any, path: Keys = ()) -> frozenset[Keys]:
    """Return the paths of the modules that hold quantised weights."""
    below = [_quantized_modules(v, (*path, k)) for k, v in tree.items() if isinstance(v, Mapping)]
    here = any(quantized.is_quantized(v) for v in tree.values())
    return frozenset({path} if here else ()).union(*below)


# ---------------------------------------------------------------- rows


def add_rows(overlay: Overlay, layout: RowLayout, rows: Rows | None) -> Overlay:
    """Add a batch's rows to the overlay of a call; raise `AttachError` without them, or if they do not fit the base."""
    if rows is None:
        raise AttachError(NO_ROUTE)
    rows.check_layout(layout)
    keys_by_leaf = key_paths(overlay.base.get("params", {}))
    if missing := [site.leaf for site in layout.sites if site.leaf not in keys_by_leaf]:
        raise AttachError("the bank is for another base; the parameters lack these weights:\n" + paths.bullets(missing))
    sites = {path: {leaf: list(each) for leaf, each in of.items()} for path, of in overlay.interceptor.sites.items()}
    added = _Added(dict(overlay.leaves), sites)
    for number, (site, arrays) in enumerate(zip(rows.sites, rows.arrays, strict=True)):
        added.append(keys_by_leaf[site.leaf], site, site.stack, ("rows", number), arrays, rows.shared_of(site))
    interceptor = dataclasses.replace(overlay.interceptor, sites=added.sites)
    return dataclasses.replace(overlay, leaves=added.leaves, interceptor=interceptor)
