"""Carriers of NNX: objects, models and states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.adapters.site import Site
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models import planning
from jaxadapt.models.carriers.base import Carrier, Describe, check_fit, check_free, check_name, refuse
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.nnx import attach, graph, survey
from jaxadapt.models.nnx.graph import LayerNumber
from jaxadapt.models.planning import BaseParams, ModelParams, read_params

# Excluded from a model's state: parameters (the base does not change, and adapters are saved separately), variables
# that follow from an adapter's configuration, and variables that exist only during one call.
_NOT_REST = (nnx.Param, LayerNumber, nnx.Intermediate, nnx.Cache, nnx.Perturbation)


def is_object(tree: Any) -> bool:
    """Return True if a tree is an NNX object (an optimizer, random streams, a model), which is filled in place."""
    return isinstance(tree, nnx.Pytree)


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
    def _contents(self) -> Any:
        """The state, or the walk over the model."""
        return self.tree

    def names(self) -> list[str]:
        return list(graph.adapter_variables(self._contents))

    def extract(self, name: str, config: Config | None = None, keymap: Any = None) -> Adapter:
        if not self.has_adapters() and (unknown := foreign.describe_unknown(self.tree)):
            raise AttachError(f"cannot extract {name!r}: the model has no adapter{unknown}")
        return attach.extract(self._contents, name)

    def inject(self, adapter: Adapter, name: str) -> Any:
        variables = graph.adapter_variables(self._contents).get(name)
        if variables is None:
            raise AttachError(f"there is no adapter {name!r} to inject into. Adapt the model first, or use load")
        recipe = next(iter(variables.values())).get_metadata("adapter").recipe
        check_fit(adapter, recipe.config, graph.values_of(variables), name)
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

    def base(self) -> BaseParams:
        return read_params(nnx.to_pure_dict(self.params), self.tree)

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        """Replace the variables; each must be an adapter's."""
        variables = graph.adapter_variables(self.tree)
        if not variables:
            raise AttachError("the model has no adapter; call jaxadapt.adapt first")
        new: dict[int, Any] = {}
        for name, by_path in variables.items():
            values = f(name, attach.extract(self.tree, name))
            new |= {id(var): values[path] for path, var in by_path.items()}
        flat = nnx.to_flat_state(self.tree)
        others = [f"{paths.join(*map(str, path))}: {type(var).__name__}" for path, var in flat if id(var) not in new]
        raise_listed(
            AttachError,
            "expected a state with only the trained variables, nnx.state(model, jaxadapt.AdapterParam); this one"
            " also contains:",
            others,
        )
        return jax.tree.map(lambda var: new[id(var)], self.tree, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def with_rest(self, rest: Any) -> Any:
        nnx.replace_by_pure_dict(self.tree, nnx.to_pure_dict(rest))
        return self.tree


class Model(_Variables, Object):
    """An NNX module; operations change it in place."""

    has_base = in_place = True

    def to_change(self, in_place: bool, donate: bool) -> Any:
        return self.tree if in_place or donate else nnx.clone(self.tree)  # which shares the arrays

    def walk(self) -> graph.ModelWalk:
        return self._contents

    @functools.cached_property
    def _contents(self) -> Any:
        return graph.walk_model(self.tree)

    def _walk_again(self) -> None:
        """Forget the walk, after modules got or lost attributes."""
        vars(self).pop("_contents", None)

    def base(self) -> ModelParams:
        return ModelParams(self._contents.leaves, self.tree, self._contents)

    def leaves(self) -> dict[str, Any]:
        return graph.base_values(self._contents.leaves)

    def some_leaves(self, wanted: Collection[str]) -> dict[str, Any]:
        modules = dict(self._contents.modules)  # without the order of all leaves, which takes longer than the rest
        owners: dict[str, graph.Owner] = {}
        for path in wanted:
            prefix, _, attr = path.rpartition(".")
            module = modules.get(prefix)
            if module is None or not isinstance(vars(module).get(attr), nnx.Param):
                return super().some_leaves(wanted)  # a shared module has other paths too
            owners[path] = module, attr
        return graph.base_values(owners)

    def abstract(self) -> Any:
        rebuild, state = self.split()
        return rebuild(jax.eval_shape(lambda: state))

    def split(self) -> tuple[Callable[[Any], Any], Any]:
        """Return the function that builds the model from its state, and the state."""
        graphdef, state = nnx.split(self.tree)
        return functools.partial(nnx.merge, graphdef), state

    def statistics(self) -> list[str]:
        return [path for path, var in survey.layer_state(self.tree).items() if isinstance(var, nnx.BatchStat)]

    def replace(self, new: Mapping[str, Any], *, boxes: bool = True) -> Any:
        owners, others = self._contents.leaves, survey.layer_state(self.tree) if new else {}
        for path, value in new.items():
            if path not in owners:
                others[path].set_value(value)
                continue
            module, attr = owners[path]
            vars(module)[attr].set_value(value)
            attach.uninstall_adapters(module)  # removes the dequantisation of a quantised weight
        return self.tree

    def active(self) -> list[str]:
        return list(attach.active_names(self._contents))

    def adapt(
        self, config: Config, name: str, keymap: KeyMap | str | None, dtype: Any, options: Mapping[str, Any]
    ) -> Any:
        refuse(
            {"deterministic": options["deterministic"]},
            "for Linen modules only; call model.train() or model.eval() of an NNX model",
        )
        base, rngs = self.base(), options["rngs"]
        check_free(name, self.names())
        recipe, sites = planning.plan_adapter(base, config, keymap, options["stack_axes"], options["example"])
        abstract = rngs is None and any(isinstance(x, jax.ShapeDtypeStruct) for x in base.leaves.values())
        if rngs is None and not abstract:
            raise AttachError("cannot draw the adapter's initial values without random keys: pass rngs=nnx.Rngs(seed)")
        if rngs is not None:
            attach.require_stream(rngs, "params")
        key = None if rngs is None else attach.draw_params_key(rngs)
        values = initial_values.init_values(recipe.config, sites, key, dtype, abstract, base.leaves, base.shardings)
        attach.attach(self.tree, recipe, sites, name, values, rngs, base.walked)
        self._walk_again()
        return self.tree

    def attach(
        self, adapter: Adapter, sites: Sequence[Site], name: str, present: Adapter | None, rngs: Any, new: Any
    ) -> Any:
        values = adapter.flat()
        if present is not None and rngs is None and not new and is_same(present, adapter):
            old = present.flat()
            if old.keys() == values.keys() and all(old[path].shape == x.shape for path, x in values.items()):
                graph.set_values(graph.adapter_variables(self._contents)[name], values)
                attach.activate(self._contents, (name,))
                return self.tree
        if present is not None or rngs is not None or new:
            # Attach to an abstract copy first, so that a failure leaves the model's present adapter in place.
            copy = self.abstract()
            if present is not None:
                attach.delete(copy, name)
            attach.attach(copy, adapter.recipe, sites, name, values, None if rngs is None else nnx.clone(rngs))
        self.replace(new)
        if present is not None:
            attach.delete(self._contents, name)
        attach.attach(self.tree, adapter.recipe, sites, name, values, rngs, self._contents)
        self._walk_again()
        return self.tree

    def delete(self, name: str) -> Any:
        check_name(name, self.names())
        attach.delete(self._contents, name)
        self._walk_again()
        return self.tree

    def detach(self) -> Any:
        attach.delete(self._contents, *self.names())
        self._walk_again()
        return self.tree

    def activate(self, names: Sequence[str]) -> Any:
        attach.activate(self._contents, names)
        return self.tree

    def map_adapters(self, f: Describe, names: Sequence[str] | None = None) -> Any:
        trained = State(nnx.state(self.tree, graph.AdapterParam))
        return trained.map_adapters(lambda name, _: f(name, attach.extract(self.tree, name)), names)  # all its tensors

    def with_rest(self, rest: Any) -> Any:
        return self.fill(rest)


def is_same(present: Adapter, adapter: Adapter) -> bool:
    """Return True if two adapters have one configuration, and would be saved with the same origin."""
    return present.config == adapter.config and Recipe(present.config).origin == Recipe(adapter.config).origin
