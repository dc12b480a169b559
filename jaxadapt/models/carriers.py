"""Carriers: `carrier` recognizes the kind of a tree, once for each call, and a carrier has the kind's operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from jaxadapt.adapters.adapter import CONFIG_NODE, SHARED_NODE, Adapter, Recipe, Site, collection_name
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models import graph, nnx_adapters, planning, pytree, trees
from jaxadapt.models.foreign import tree as foreign_tree
from jaxadapt.models.linen_wrapper import PER_CALL, Adapted

DEFAULT = "default"
Describe = Callable[[str, Adapter], Mapping[str, Any]]
"""A function from the name and the value of an adapter to `{path: new value}`."""


class Carrier:
    """A tree of base parameters, adapters or both. This class holds any pytree, without adapters.

    Operations of NNX objects change them in place and return them; those of other trees return new trees. An operation
    that the kind lacks raises `AttachError`.
    """

    remedy = ""
    """The end of the errors for this kind: another value to pass."""
    foreign: foreign_tree.ForeignTree | None = None
    """The LoRA leaves of another library, if the tree has them."""
    given: foreign_tree.LoraTree = foreign_tree.LoraTree(None)
    """The options of the `LoraTree` that wraps the tree, if one does."""
    has_base = False
    """True if the tree may hold base parameters beside adapters: a model, or variables."""
    in_place = False
    """True for NNX models, which operations change."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def unsupported(self, expected: str) -> AttachError:
        """Return the error for an operation that this kind lacks."""
        return AttachError(f"expected {expected}, found {type(self.tree).__name__}{self.remedy}")

    def base(self) -> planning.BaseParams:
        """Return the base parameters, to plan an adapter for."""
        raise self.unsupported("base parameters as nested mappings, Linen variables or an NNX model")

    @property
    def params(self) -> Any:
        """The base parameters in the tree."""
        return self.tree

    def to_change(self, in_place: bool, donate: bool) -> Any:
        """Return the tree whose base an operation may change: of an NNX model a copy, unless its memory is given up."""
        if in_place:
            raise AttachError(
                f"in_place=True: expected an NNX model, found {type(self.tree).__name__}, for which a new tree is"
                " returned. donate=True reuses the memory of its weights"
            )
        return self.tree

    @functools.cached_property
    def walked(self) -> graph.ModelWalk | None:
        """The modules and parameters of an NNX model, from one traversal; None for trees without modules."""
        return None

    def leaves(self, wanted: Collection[str] | None = None) -> dict[str, Any]:
        """Return `{path: array}` of the base parameters, or of the `wanted` ones, without boxes."""
        pairs = jax.tree_util.tree_leaves_with_path(self.params, is_leaf=trees.is_box)
        leaves = {pytree.dotted_path(keys): leaf for keys, leaf in pairs}
        return {path: trees.unbox(leaves[path]) for path in (leaves if wanted is None else wanted)}

    def replace(self, new: Mapping[str, Any], *, boxes: bool = True) -> Any:
        """Replace the base parameters at some paths, in their boxes or with them."""

        def put(keys: Any, leaf: Any) -> Any:
            path = pytree.dotted_path(keys)
            return leaf if path not in new else trees.rebox(leaf, new[path]) if boxes else new[path]

        params = self.params
        filled = jax.tree_util.tree_map_with_path(put, params, is_leaf=trees.is_box)
        return filled if params is self.tree else trees.with_value(self.tree, filled, "params")

    def abstract(self) -> Any:
        """Return a copy of the tree with shapes instead of arrays."""
        return jax.eval_shape(lambda: self.tree)

    def statistics(self) -> list[str]:
        """Return the paths of statistics of batch normalization."""
        return []

    def names(self) -> list[str]:
        """Return the names of the adapters."""
        return []

    def active(self) -> list[str]:
        """Return the names of the adapters that a call applies."""
        return self.names()

    def attached(self, name: str) -> Adapter | None:
        """Return the adapter called `name` with its configuration; None if there is none."""
        return self.extract(name) if name in self.names() else None

    def adapt(
        self, config: Config, name: str, keymap: KeyMap | str | None, dtype: Any, options: Mapping[str, Any]
    ) -> Any:
        """Attach a new adapter; `options` are the arguments of `jaxadapt.adapt` that only some kinds have."""
        raise self.unsupported("an NNX model, a Linen module, adapted or not, or a pytree that is called")

    def extract(self, name: str, keymap: Any = None) -> Adapter:
        """Return the adapter called `name`, as `jaxadapt.extract` does; `self.given` may have its configuration."""
        raise self.unsupported("an NNX model or state, Linen variables or an Adapter")

    def inject(self, adapter: Adapter, name: str) -> Any:
        """Write an adapter's values into the attached adapter of that name."""
        present = self.extract(name)
        check_fit(adapter, present.config, present.flat(), name)
        values = paths.flatten(trees.replace_values(present.params, adapter.flat()))  # in the boxes of the present ones
        return self.map_adapters(lambda *_: values, [name])

    def attach(
        self, adapter: Adapter, sites: Sequence[Site], name: str, present: Adapter | None, rngs: Any, new: Any
    ) -> Any:
        """Change the base at `new`, `{path: array}`, and attach an adapter instead of the `present` one."""
        raise self.unsupported("an NNX model or Linen variables")

    def delete(self, name: str) -> Any:
        """Remove one adapter."""
        raise self.unsupported("an adapted NNX model, an adapted Linen module or Linen variables")

    def detach(self) -> Any:
        """Remove all adapters."""
        raise self.unsupported("an adapted NNX model, an adapted Linen module or Linen variables")

    def activate(self, names: Sequence[str]) -> Any:
        """Activate these adapters only."""
        raise self.unsupported("an adapted NNX model or an adapted Linen module")

    def adapters(self) -> list[tuple[str, Adapter]]:
        """Return `(name, adapter)` of all adapters with their configurations."""
        return [(name, self.extract(name)) for name in self.names()]

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        """Return the tree with the values that `f` returns in place of its adapters' leaves."""
        raise self.unsupported("an NNX model or state, Linen variables or an Adapter")

    def pytree(self) -> Any:
        """Return the tree as a pytree: the state of an NNX object."""
        return self.tree

    def fill(self, new: Any) -> Any:
        """Return the tree with the leaves of `new`, a pytree like `pytree()`."""
        return new

    def rest(self) -> Any:
        """Return the state that training changes besides adapters, such as random streams and batch statistics."""
        return {}

    def with_rest(self, rest: Any) -> Any:
        """Return the tree with another `rest`."""
        return self.tree


def check_fit(adapter: Adapter, config: Config, present: Mapping[str, Any], name: str) -> None:
    """Raise `AttachError`, listing all problems, unless an adapter fits the one to replace: its `{path: array}`."""
    problems = list(map(str, paths.compare(paths.shapes_of(present), paths.shapes_of(adapter.flat()))))
    if config != adapter.config:
        problems.append(f"another configuration: {config.differences(adapter.config, 'given')}")
    raise_listed(AttachError, f"cannot inject: the adapter does not fit {name!r}:", problems)


def check_names(names: Sequence[str], present: Sequence[str]) -> None:
    """Raise `AttachError` unless there are adapters of all these names."""
    if unknown := [name for name in names if name not in present]:
        raise AttachError(f"there is no adapter {', '.join(map(repr, unknown))}; this model has {list(present)}")


def check_free(name: str, present: Sequence[str]) -> None:
    """Raise `AttachError` if an adapter is called `name` already."""
    if name in present:
        raise AttachError(
            f"cannot attach the adapter {name!r}: the name is taken; pass another name=, or delete that adapter first"
        )


def refuse(options: Mapping[str, Any], why: str) -> None:
    """Raise `AttachError` for options that were given and do not apply."""
    if given := [option for option, value in options.items() if value is not None]:
        raise AttachError(f"{', '.join(given)}: {why}")


# ---------------------------------------------------------------- NNX


# Excluded from a model's state: parameters (the base does not change, and adapters are saved separately), variables
# that follow from an adapter's configuration, and variables that exist only during one call.
_NOT_REST = (nnx.Param, graph.LayerNumber, nnx.Intermediate, nnx.Cache, nnx.Perturbation)


class Object(Carrier):
    """An NNX object, such as an optimizer or random streams."""

    def pytree(self) -> Any:
        """Return the object's state."""
        return nnx.state(self.tree)

    def fill(self, new: Any) -> Any:
        """Write a state into the object, and return it."""
        nnx.update(self.tree, new)
        return self.tree


class _Variables(Carrier):
    """The operations that models and states share: their adapters are `AdapterParam`s."""

    @functools.cached_property
    def _adapters(self) -> dict[str, dict[str, Any]]:
        """The adapters as `graph.adapter_variables` lists them; `attach` and `delete` make the list outdated."""
        return graph.adapter_variables(self.walked or self.tree)

    def names(self) -> list[str]:
        return list(self._adapters)

    def extract(self, name: str, keymap: Any = None) -> Adapter:
        if not self.names() and (unknown := foreign_tree.describe_unknown(self.tree)):
            raise AttachError(f"cannot extract {name!r}: the model has no adapter{unknown}")
        if (variables := self._adapters.get(name)) is None:
            merged = (
                ". If merge merged it, it is in the weights: save it from the model before the merge, or write the"
                " merged weights with jaxadapt.export.export_base"
            )
            found = sorted(self._adapters)
            raise AttachError(f"there is no adapter {name!r} here; found {found or 'none'}{'' if found else merged}")
        values = graph.values_of(variables)
        carried = {id(recipe := var.get_metadata("adapter").recipe): recipe for var in variables.values()}
        recipe, *others = set(carried.values())  # comparing takes longer than finding that nearly all are one object
        if others:
            raise AttachError(
                f"cannot extract the adapter {name!r}: its parameters have {1 + len(others)} different configurations."
                " Delete it and attach it again"
            )
        leaves = {path.rpartition(".")[0] for path in values}
        if leaves != {SHARED_NODE}:  # the trained parameters of a method whose sites have none
            recipe.check_complete(len(leaves - {SHARED_NODE}), name)
        return Adapter.of_leaves(recipe.config, values, recipe.keymap)

    def inject(self, adapter: Adapter, name: str) -> Any:
        variables = self._adapters.get(name)
        if variables is None:
            raise AttachError(f"there is no adapter {name!r} to inject into. Adapt the model first, or use load")
        attached = next(iter(variables.values())).get_metadata("adapter")
        check_fit(adapter, attached.recipe.config, graph.values_of(variables), name)
        graph.set_values(variables, adapter.flat())
        return self.tree

    def rest(self) -> Any:
        return nnx.filter_state(self.pytree(), nnx.Not(nnx.Any(*_NOT_REST)))


class State(_Variables):
    """An `nnx.State` of a model."""

    remedy = "; pass the model"

    @property
    def params(self) -> Any:
        return self.tree.get("params", self.tree)

    def base(self) -> planning.BaseParams:
        return planning.read_params(nnx.to_pure_dict(self.params), self.tree)

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        """Replace the variables; each must be an adapter's."""
        variables = self._adapters
        if not variables:
            raise AttachError("the model has no adapter; call jaxadapt.adapt first")
        values = {name: f(name, self.extract(name)) for name in variables}
        new = {id(var): values[name][path] for name, by_path in variables.items() for path, var in by_path.items()}
        trees.refuse_others(self.tree, new)
        return jax.tree.map(lambda var: new[id(var)], self.tree, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def with_rest(self, rest: Any) -> Any:
        nnx.replace_by_pure_dict(self.tree, nnx.to_pure_dict(rest))
        return self.tree


class Model(_Variables, Object):
    """An NNX module; operations change it in place."""

    has_base = in_place = True

    def to_change(self, in_place: bool, donate: bool) -> Any:
        return self.tree if in_place or donate else nnx.clone(self.tree)  # which shares the arrays

    @functools.cached_property
    def walked(self) -> Any:
        return graph.walk_model(self.tree)

    def base(self) -> planning.BaseParams:
        return planning.BaseParams(self.walked.leaves, self.tree, self.walked)

    def leaves(self, wanted: Collection[str] | None = None) -> dict[str, Any]:
        owners = self.walked.leaves
        return graph.base_values(owners if wanted is None else {path: owners[path] for path in wanted})

    def abstract(self) -> Any:
        rebuild, state = self.split()
        return rebuild(jax.eval_shape(lambda: state))

    def split(self) -> tuple[Callable[[Any], Any], Any]:
        """Return the function that builds the model from its state, and the state."""
        graphdef, state = nnx.split(self.tree)
        return functools.partial(nnx.merge, graphdef), state

    def statistics(self) -> list[str]:
        return [path for path, var in graph.layer_state(self.tree).items() if isinstance(var, nnx.BatchStat)]

    def replace(self, new: Mapping[str, Any], *, boxes: bool = True) -> Any:
        others = graph.layer_state(self.tree) if new else {}
        for path, value in new.items():
            if path not in self.walked.leaves:
                others[path].set_value(value)
                continue
            module, attr = self.walked.leaves[path]
            vars(module)[attr].set_value(value)
            nnx_adapters.uninstall_adapters(module)  # removes the dequantization of a quantized weight
        return self.tree

    def active(self) -> list[str]:
        return self.walked.active

    def adapt(
        self, config: Config, name: str, keymap: KeyMap | str | None, dtype: Any, options: Mapping[str, Any]
    ) -> Any:
        refuse(
            {"deterministic": options["deterministic"]},
            "for Linen modules only; call model.train() or model.eval() of an NNX model",
        )
        refuse({"key": options["key"]}, "for models that are pytrees only; pass rngs=nnx.Rngs(seed)")
        base, rngs = self.base(), options["rngs"]
        check_free(name, self.names())
        recipe, sites = planning.plan_adapter(base, config, keymap, options["stack_axes"], options["example"])
        key = None if rngs is None else nnx_adapters.draw_params_key(rngs)
        values = base.new_values(recipe, sites, key, dtype, "random keys: pass rngs=nnx.Rngs(seed)")
        nnx_adapters.attach(self.tree, recipe, sites, name, values, rngs, base.walked)
        return self.tree

    def attach(
        self, adapter: Adapter, sites: Sequence[Site], name: str, present: Adapter | None, rngs: Any, new: Any
    ) -> Any:
        values, changes = adapter.flat(), rngs is not None or bool(new)
        if (
            present is not None
            and not changes
            and is_same(present, adapter)
            and present.leaf_shapes == adapter.leaf_shapes
        ):
            graph.set_values(self._adapters[name], values)
            return self.tree if self.active() == [name] else self.activate((name,))

        def put(model: Any, walk: graph.ModelWalk, rngs: Any) -> None:
            if present is not None:
                nnx_adapters.delete(walk, name)
            nnx_adapters.attach(model, adapter.recipe, sites, name, values, rngs, walk)

        if present is not None or changes:
            # Attach to an abstract copy first, so that a failure leaves the model's present adapter in place.
            copy = self.abstract()
            put(copy, graph.walk_model(copy), None if rngs is None else nnx.clone(rngs))
        put(self.replace(new), self.walked, rngs)
        return self.tree

    def delete(self, name: str) -> Any:
        check_names([name], self.names())
        nnx_adapters.delete(self.walked, name)
        return self.tree

    def detach(self) -> Any:
        nnx_adapters.delete(self.walked, *self.names())
        return self.tree

    def activate(self, names: Sequence[str]) -> Any:
        check_names(names, self.names())
        nnx_adapters.activate(self.walked, tuple(names))
        return self.tree

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        trained = State(nnx.state(self.tree, graph.AdapterParam))
        return trained.map_adapters(lambda name, _: f(name, self.extract(name)), names)  # all its tensors

    def with_rest(self, rest: Any) -> Any:
        return self.fill(rest)


def is_same(present: Adapter, adapter: Adapter) -> bool:
    """Return True if two adapters have one configuration, and would be saved with the same origin."""
    return present.config == adapter.config and Recipe(present.config).origin == Recipe(adapter.config).origin


# ---------------------------------------------------------------- Linen, and other trees


class Module(Carrier):
    """A Linen module, which holds no parameters."""

    remedy = ", which holds no parameters; pass the variables, {'params': …}"

    def leaves(self, wanted: Collection[str] | None = None) -> dict[str, Any]:
        return self.base().leaves

    def adapt(
        self, config: Config, name: str, keymap: KeyMap | str | None, dtype: Any, options: Mapping[str, Any]
    ) -> Any:
        nnx_only = {option: value for option, value in options.items() if option != "deterministic"}
        refuse(nnx_only, "for NNX models only; pass keys and inputs to the wrapper's init")
        return self._wrap(config, name, {"keymap": keymap, "dtype": dtype, "deterministic": options["deterministic"]})

    def _wrap(self, config: Config, name: str, shared: Mapping[str, Any]) -> Adapted:
        return Adapted(self.tree, ((name, config),), (name,), **shared)


class _Wrapped(Carrier):
    """A model in a wrapper, which holds the adapters or their configurations; operations return another wrapper."""

    @functools.cached_property
    def _wrapper(self) -> Any:
        return self.tree

    def names(self) -> list[str]:
        return list(dict(self._wrapper.adapters))

    def active(self) -> list[str]:
        return list(self._wrapper.active)

    def delete(self, name: str) -> Any:
        check_names([name], self.names())
        kept = {each: adapter for each, adapter in dict(self._wrapper.adapters).items() if each != name}
        active = tuple(each for each in self.active() if each != name)
        are_pairs = isinstance(self._wrapper.adapters, tuple)
        return self._wrapper.clone(adapters=tuple(kept.items()) if are_pairs else kept, active=active)

    def activate(self, names: Sequence[str]) -> Any:
        check_names(names, self.names())
        return self._wrapper.clone(active=tuple(names))


class Wrapper(_Wrapped, Module):
    """An adapted Linen module."""

    def _wrap(self, config: Config, name: str, shared: Mapping[str, Any]) -> Adapted:
        check_free(name, self.names())
        return self.tree.with_adapter(name, config, shared)

    def detach(self) -> Any:
        return self.tree.module


class Params(Carrier):
    """Nested mappings: base parameters, or the collections of an adapter without a base."""

    remedy = "; for bare parameters use jaxadapt.init, from_peft(read(path), params), or models.Function(fn, params)"

    def base(self) -> planning.BaseParams:
        return planning.read_params(self.params, self.tree)

    def names(self) -> list[str]:
        return sorted(
            keys[-1] for keys, inner in trees.find_adapters(self.tree).items() if keys and CONFIG_NODE in inner
        )

    def extract(self, name: str, keymap: Any = None) -> Adapter:
        return trees.extract_adapter(self.tree, name, self.given.config, keymap, self.names())

    def inject(self, adapter: Adapter, name: str) -> Any:
        present = self.extract(name)
        check_fit(adapter, present.config, present.flat(), name)
        return trees.replace_adapter_values(self.tree, name, adapter.flat())

    def delete(self, name: str) -> Any:
        return trees.without_adapter(self.tree, name, collection_name(self.extract(name).config))

    def detach(self) -> Any:
        return trees.without_adapters(self.tree)

    def adapters(self) -> list[tuple[str, Adapter]]:
        found = trees.find_adapters(self.tree).items()
        return [(keys[1], trees.read_adapter(tree, keys[1])) for keys, tree in found if len(keys) == 2]

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        """Replace the leaves of the adapters called `names` (None: of all)."""
        return trees.map_adapters(self.tree, f, names)

    def rest(self) -> Any:
        kept = trees.without_adapters(self.tree) if trees.collection_names(self.tree) or self.has_base else {}
        return {k: v for k, v in kept.items() if k not in {"params", *PER_CALL}}

    def with_rest(self, rest: Any) -> Any:
        return trees.like(self.tree, {**self.tree, **rest})


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
        found = (tree for each, tree in trees.variable_adapters(self.tree) if each == name)
        return next((trees.read_adapter(tree, name) for tree in found), None)

    def attach(
        self, adapter: Adapter, sites: Sequence[Site], name: str, present: Adapter | None, rngs: Any, new: Any
    ) -> Any:
        changed = Variables(self.replace(new) if new else self.tree)
        values = adapter.flat()
        if (
            present is not None
            and present.config == adapter.config
            and paths.shapes_of(present.flat()) == paths.shapes_of(values)
        ):
            recipe = None if is_same(present, adapter) else adapter.recipe
            return trees.replace_adapter_values(changed.tree, name, values, recipe)
        variables: Any = changed.tree if present is None else changed.delete(name)
        for collection, tree in trees.box_like_base(adapter, changed.params).named(name).items():
            variables = trees.with_value(variables, tree[name], collection, name)
        return variables


class Tree(_Wrapped):
    """A model that is a pytree and is called, with or without adapters."""

    has_base = True

    @functools.cached_property
    def _wrapper(self) -> pytree.AdaptedTree:
        return self.tree if isinstance(self.tree, pytree.AdaptedTree) else pytree.AdaptedTree(self.tree)

    @property
    def params(self) -> Any:
        return self._wrapper.base

    def base(self) -> planning.BaseParams:
        return pytree.TreeParams(self.leaves(), self._wrapper)

    def leaves(self, wanted: Collection[str] | None = None) -> dict[str, Any]:
        return pytree.leaves(self.params, wanted)

    def replace(self, new: Mapping[str, Any], *, boxes: bool = True) -> Any:
        filled = pytree.fill(self.params, new)
        return self._wrapper.clone(base=filled) if self._wrapper is self.tree else filled

    def adapt(
        self, config: Config, name: str, keymap: KeyMap | str | None, dtype: Any, options: Mapping[str, Any]
    ) -> Any:
        refuse({"rngs": options["rngs"]}, "for NNX models only; pass key=jax.random.key(seed)")
        check_free(name, self.names())
        return pytree.adapt(self._wrapper, name, config, keymap, dtype, options)

    def extract(self, name: str, keymap: Any = None) -> Adapter:
        check_names([name], self.names())
        return self._wrapper.adapters[name]

    def attach(
        self, adapter: Adapter, sites: Sequence[Site], name: str, present: Adapter | None, rngs: Any, new: Any
    ) -> Any:
        refuse({"rngs": rngs}, "for NNX models only; call model.clone(dropout_key=key) in training")
        return self._wrapper.clone(base=pytree.fill(self.params, new), active=()).attach(name, adapter)

    def detach(self) -> Any:
        return self.params

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        adapters = {name: self.extract(name) for name in (self.names() if names is None else names)}
        return self._wrapper.with_adapters(
            {name: Adapter.of_leaves(x.config, f(name, x), x.keymap) for name, x in adapters.items()}
        )


class Value(Carrier):
    """An `Adapter`."""

    def names(self) -> list[str]:
        return [DEFAULT]

    def extract(self, name: str, keymap: Any = None) -> Adapter:
        return self.tree

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        params = trees.replace_values(self.tree.params, f(DEFAULT, self.tree), boxes=False)
        return Adapter(self.tree.config, params, self.tree.keymap)


class Foreign(Carrier):
    """A tree with LoRA leaves of another library, and the carrier of the same tree for all else that it holds."""

    def __init__(self, found: foreign_tree.ForeignTree, whole: Carrier) -> None:
        super().__init__(found.given.tree)
        self.found: foreign_tree.ForeignTree = found
        self.foreign: foreign_tree.ForeignTree | None = found
        self.given: foreign_tree.LoraTree = found.given
        self.whole = whole

    def extract(self, name: str, keymap: Any = None) -> Adapter:
        return foreign_tree.extract_adapter(self.found, keymap)

    def inject(self, adapter: Adapter, name: str) -> Any:
        return foreign_tree.inject_adapter(self.found, adapter)

    def rest(self) -> Any:
        return self.whole.rest()

    def with_rest(self, rest: Any) -> Any:
        return self.whole.with_rest(rest)


# ---------------------------------------------------------------- recognition


_KINDS: tuple[tuple[type[Any], type[Carrier]], ...] = (  # the first that fits: an nnx.Dict is a Mapping too
    (nnx.Module, Model),
    (nnx.State, State),
    (nnx.Pytree, Object),
    (Adapter, Value),
    (Adapted, Wrapper),
    (nn.Module, Module),
    (Mapping, Params),
)


def carrier(tree: Any) -> Carrier:
    """Return the carrier of a tree, for its base parameters and the adapters of jaxadapt."""
    kind = next((kind for cls, kind in _KINDS if isinstance(tree, cls)), None)
    kind = kind or (Tree if pytree.is_model(tree) else Carrier)
    return Variables(tree) if kind is Params and isinstance(tree.get("params"), Mapping) else kind(tree)


_APPLIES = {"config": "applies to a tree that is read, not to one that is filled"} | dict.fromkeys(
    ("stack_axes", "example"), "applies to a model that load or from_peft fills"
)


def lora_carrier(tree: Any, *, takes: Collection[str] = ("config",)) -> Carrier:
    """Return the carrier of a tree, for its adapters: those of jaxadapt, else the LoRA leaves of another library.

    `takes`: the options of a `LoraTree` in `_APPLIES` that the operation uses. Raises `KeyMapError` if a known layout
    matches only some of the LoRA leaves, and `AttachError` for options that the operation or the tree does not need.
    """
    given = tree if isinstance(tree, foreign_tree.LoraTree) else None
    for option, why in () if given is None else _APPLIES.items():
        refuse({option: None if option in takes else vars(given)[option]}, why)
    own = carrier(tree if given is None else given.tree)
    found = None if own.names() else foreign_tree.find_lora(given or foreign_tree.LoraTree(tree), own.walked)
    if found is not None:
        return Foreign(found, own)
    if given is None:
        return own
    own.given = given
    near = "" if own.names() else foreign_tree.describe_unknown(given.tree)
    why = f"applies only to trees of other libraries; jaxadapt's adapters store their own{near}"
    refuse({"lora_alpha": given.lora_alpha}, why)
    refuse({"slot": given.slot}, f"expected a tree whose arrays hold several adapters, found no LoRA parameters{near}")
    return own


def base_params(tree: Any) -> planning.BaseParams:
    """Return the base parameters of an NNX model, or of nested mappings. Raises `AttachError` for variables."""
    held = carrier(tree)
    if isinstance(held, Variables):
        raise AttachError("expected base parameters, found variables; pass variables['params']")
    return held.base()
