"""Carriers of trees without NNX: Linen modules and variables, base parameters, adapters, other libraries' trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.core import Tracer

from jaxadapt.adapters.adapter import CONFIG_NODE, Adapter, PeftTensors, collection_name, integers_name
from jaxadapt.adapters.site import Site, make_file_plan
from jaxadapt.adapters.sites import sites_of
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.registry import COLLECTIONS
from jaxadapt.models.carriers.base import DEFAULT, Carrier, Describe, check_fit, check_free, check_name, refuse
from jaxadapt.models.carriers.nnx_kinds import is_same
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.linen import collections
from jaxadapt.models.linen.wrapper import Adapted
from jaxadapt.models.planning import BaseParams, read_params

_NOT_REST = {"params", "intermediates", "cache", "perturbations"}


class Module(Carrier):
    """A Linen module, which holds no parameters."""

    remedy = ", which holds no parameters; pass the variables, {'params': …}"

    def leaves(self) -> dict[str, Any]:
        return self.base().leaves

    def adapt(
        self, config: Config, name: str, keymap: KeyMap | str | None, dtype: Any, options: Mapping[str, Any]
    ) -> Any:
        given = {option: value for option, value in options.items() if option != "deterministic"}
        refuse(given, "for NNX models only; pass keys and inputs to the wrapper's init")
        return self._wrap(config, name, {"keymap": keymap, "dtype": dtype, "deterministic": options["deterministic"]})

    def _wrap(self, config: Config, name: str, shared: Mapping[str, Any]) -> Adapted:
        return Adapted(self.tree, ((name, config),), (name,), **shared)


class Wrapper(Module):
    """An adapted Linen module."""

    def names(self) -> list[str]:
        return [name for name, _ in self.tree.adapters]

    def active(self) -> list[str]:
        return list(self.tree.active)

    def _wrap(self, config: Config, name: str, shared: Mapping[str, Any]) -> Adapted:
        check_free(name, self.names())
        for argument, value in shared.items():
            present = getattr(self.tree, argument)
            if value is not None and value != present:
                raise AttachError(
                    f"cannot use {argument}={value!r}: all adapters of a wrapper share this argument, and this wrapper"
                    f" has {present!r}; leave it out"
                )
        return dataclasses.replace(self.tree, adapters=(*self.tree.adapters, (name, config)), active=(name,))

    def delete(self, name: str) -> Any:
        check_name(name, self.names())
        kept = tuple(pair for pair in self.tree.adapters if pair[0] != name)
        return dataclasses.replace(self.tree, adapters=kept, active=tuple(n for n in self.tree.active if n != name))

    def detach(self) -> Any:
        return self.tree.module

    def activate(self, names: Sequence[str]) -> Any:
        present = self.names()
        unknown = [name for name in names if name not in present]
        if unknown:
            raise AttachError(f"no adapter is called {', '.join(map(repr, unknown))}; this model has {present}")
        return dataclasses.replace(self.tree, active=tuple(names))


class Params(Carrier):
    """Nested mappings: base parameters, or the collections of an adapter without a base."""

    remedy = "; for bare parameters use jaxadapt.init, or from_peft(read(path), params)"

    def base(self) -> BaseParams:
        return read_params(self.params, self.tree)

    def names(self) -> list[str]:
        return collections.adapter_names(self.tree)

    def extract(self, name: str, config: Config | None = None, keymap: Any = None) -> Adapter:
        present = collections.adapter_tree(self.tree, name)
        if present is not None and (config is None or (keymap is None and collections.has_config(present))):
            adapter = collections.read_adapter(present, name)
            return adapter if config is None else dataclasses.replace(adapter, config=config)
        names = self.names()
        if present is None and names:
            raise AttachError(f"cannot extract {name!r}: no adapter has that name; found {names}")
        return collections.adapter_from_arrays(self.tree, name, config, keymap)

    def inject(self, adapter: Adapter, name: str) -> Any:
        present = self.extract(name)
        check_fit(adapter, present.config, present.flat(), name)
        return collections.replace_adapter_values(self.tree, name, adapter.flat())

    def delete(self, name: str) -> Any:
        collection = collection_name(self.extract(name).config)
        out = dict(self.tree)
        for each in (collection, integers_name(collection)):
            kept = {k: v for k, v in out.pop(each, {}).items() if k != name}
            out |= {each: kept} if kept else {}
        return out

    def detach(self) -> Any:
        return collections.without_adapters(self.tree)

    def adapters(self) -> list[tuple[str, Adapter]]:
        return [
            (name, collections.read_adapter(inner, name))
            for collection in collections.adapter_trees(self.tree).values()
            for name, inner in collection.items()
        ]

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        """Replace the leaves of the adapters called `names` (None: of all)."""

        def walk(tree: Mapping[str, Any], integers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            new, new_integers = dict(tree), dict(integers)
            for name, value in tree.items():
                if not isinstance(value, Mapping):
                    continue
                if CONFIG_NODE in value and (names is None or name in names):
                    own = integers.get(name, {})
                    values = f(name, collections.read_adapter(collections.with_integers(value, own), name))
                    floats = {k: v for k, v in value.items() if k != CONFIG_NODE}
                    new[name] = {**_pick(values, floats), CONFIG_NODE: value[CONFIG_NODE]}
                    new_integers |= {name: _pick(values, own)} if own else {}
                elif name in COLLECTIONS:
                    key = integers_name(name)
                    new[name], changed = walk(value, tree.get(key, {}))
                    new |= {key: changed} if changed else {}
            return new, new_integers

        return walk(self.tree, {})[0]

    def rest(self) -> Any:
        if not (collections.collection_names(self.tree) or self.has_base):
            return {}
        return {k: v for k, v in collections.without_adapters(self.tree).items() if k not in _NOT_REST}

    def with_rest(self, rest: Any) -> Any:
        mapping_type: Any = type(self.tree)
        return mapping_type({**self.tree, **rest})


class Variables(Params):
    """Linen variables, `{"params": base, …}`."""

    remedy = ""
    has_base = True

    @property
    def params(self) -> Any:
        """The base parameters."""
        return self.tree["params"]

    def statistics(self) -> list[str]:
        return [f"batch_stats.{path}" for path in paths.flatten(self.tree.get("batch_stats", {}))]

    def attached(self, name: str) -> Adapter | None:
        for collection in collections.adapter_collections(self.tree).values():
            if name in collection:
                return collections.read_adapter(collection[name], name)
        return None

    def attach(
        self, adapter: Adapter, sites: Sequence[Site], name: str, present: Adapter | None, rngs: Any, new: Any
    ) -> Any:
        changed = Variables(self.replace(new) if new else self.tree)
        if present is not None and present.config == adapter.config and present.shapes == adapter.shapes:
            recipe = None if is_same(present, adapter) else adapter.recipe
            return collections.replace_adapter_values(changed.tree, name, adapter.flat(), recipe)
        variables: Any = changed.tree if present is None else changed.delete(name)
        named = collections.box_like_base(adapter, changed.params).named(name)
        for collection, tree in named.items():
            others: Any = variables.get(collection, {})
            variables = collections.with_entry(variables, collection, collections.with_entry(others, name, tree[name]))
        return variables


class Value(Carrier):
    """An `Adapter`."""

    def names(self) -> list[str]:
        return [DEFAULT]

    def extract(self, name: str, config: Config | None = None, keymap: Any = None) -> Adapter:
        return self.tree

    def inject(self, adapter: Adapter, name: str) -> Any:
        check_fit(adapter, self.tree.config, self.tree.flat(), name)
        return dataclasses.replace(self.tree, params=collections.replace_values(self.tree.params, adapter.flat()))

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        return dataclasses.replace(self.tree, params=paths.unflatten(f(DEFAULT, self.tree)))


class Foreign(Carrier):
    """A tree with LoRA leaves of another library, and the carrier of the same tree for all else that it holds."""

    def __init__(self, found: foreign.ForeignTree, whole: Carrier) -> None:
        super().__init__(found.given.tree)
        self.foreign = self.found = found
        self.whole = whole

    def extract(self, name: str, config: Config | None = None, keymap: Any = None) -> Adapter:
        return foreign.extract_adapter(self.found, config, keymap)

    def inject(self, adapter: Adapter, name: str) -> Any:
        leaves, dialect = adapter.flat(), self.found.dialect
        host = not any(isinstance(leaf, Tracer) for leaf in leaves.values())
        tensors = make_file_plan(sites_of(adapter)).encode(leaves, host=host)
        same = all(adapter.keymap.match(leaf) for leaf in dialect.claim(self.found.leaves))
        tensors = PeftTensors(adapter.config, tensors, "this adapter")
        return foreign.fill_tree(self.found, tensors, adapter.keymap if same else None)

    def rest(self) -> Any:
        return self.whole.rest()

    def with_rest(self, rest: Any) -> Any:
        return self.whole.with_rest(rest)


def _pick(values: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values at the paths of a tree, as a tree."""
    return paths.unflatten({path: values[path] for path in paths.flatten(tree)})
