"""NNX models: their contents, listed in one walk with Flax's paths and order, and their layers, bound for a call.

`nnx.iter_graph` takes about eight times as long as `walk`, because it also lists every static attribute, and asks Flax
about each value instead of each type. `nnx.state` takes as long, and copies the tree. The types of an adapted model's
variables tell adapter and base parameters apart.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import errors, nnx
from jax.core import Tracer

from jaxadapt.adapters.adapter import SHARED_NODE
from jaxadapt.arrays import quantized, regions
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.base import is_collection
from jaxadapt.models import call

# ---------------------------------------------------------------- params


class AdapterParam(nnx.LoRAParam[Any]):
    """A trained adapter parameter: the filter for gradients, optimizers and persistence.

    >>> from flax import nnx
    >>> issubclass(AdapterParam, nnx.LoRAParam)
    True
    """

    @classmethod
    def named(cls, model: Any, *names: str) -> nnx.All:
        """Return a filter that matches only these adapters' parameters, for an optimizer or `nnx.DiffState`.

        An optimizer of all `AdapterParam`s changes inactive adapters too: weight decay and earlier momentum act without
        a gradient. (PEFT's optimizers skip inactive adapters.)

        Args:
            model: the adapted model, or its state. It is used to check the names.
            names: one or more adapter names.

        Raises `AttachError` if no name is given, or if the model has no adapter of a name.

        >>> import jaxadapt
        >>> model, config = nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0))), jaxadapt.LoraConfig(target_modules=["q"])
        >>> for name in ("fr", "de"):
        ...     model = jaxadapt.adapt(model, config, name=name, rngs=nnx.Rngs(1))
        >>> [path[2] for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam.named(model, "fr")))]
        ['fr', 'fr']
        """
        if not isinstance(model, nnx.Module | nnx.State):
            raise AttachError(
                f"AdapterParam.named: expected an NNX model or its state as the first argument, found"
                f" {type(model).__name__}. Call named(model, 'fr')"
            )
        variables = nnx.to_flat_state(model if isinstance(model, nnx.State) else nnx.state(model, cls))
        present = sorted({name for path, var in variables if isinstance(var, cls) for name in _adapter_names(path)})
        unknown = [name for name in names if name not in present]
        if unknown or not names:
            problem = f"there is no adapter {', '.join(map(repr, unknown))}" if unknown else "name at least one adapter"
            raise AttachError(f"{problem}; this model has {present}")
        return nnx.All(cls, _Named(frozenset(names)))


def _adapter_names(path: tuple[Any, ...]) -> list[Any]:
    """Return the possible adapter names in a parameter's path: every key after a collection's ("lora", "ia3", ...)."""
    return [name for collection, name in itertools.pairwise(path) if is_collection(collection)]


@dataclasses.dataclass(frozen=True)
class _Named:
    """A filter that matches parameters of adapters with these names."""

    names: frozenset[str]

    def __call__(self, path: tuple[Any, ...], _: Any) -> bool:
        return not self.names.isdisjoint(_adapter_names(path))


class FrozenParam(nnx.Param[Any]):
    """A tensor of an adapter that training does not change, such as an index. It is saved with the trained ones.

    `AdapterParam` does not match it, so it has neither a gradient nor a place in the optimizer's state.

    >>> issubclass(FrozenParam, AdapterParam)
    False
    """


class SharedParam(nnx.Param[Any]):
    """A tensor that belongs to a whole adapter, such as VeRA's projections: one variable that all its layers hold.

    A scan over layers must not slice it: `nnx.StateAxes({jaxadapt.models.SharedParam: None, nnx.Param: 0, ...: 0})`. A
    layer that gets a slice raises `AttachError` when it is called.

    >>> from flax import nnx
    >>> issubclass(SharedAdapterParam, AdapterParam), issubclass(SharedFrozenParam, AdapterParam)
    (True, False)
    """


class SharedAdapterParam(SharedParam, AdapterParam):
    """A shared tensor that is trained."""


class SharedFrozenParam(SharedParam, FrozenParam):
    """A shared tensor that training does not change."""


BaseParam: nnx.All = nnx.All(nnx.Param, nnx.Not(nnx.Any(AdapterParam, FrozenParam)))
"""The filter for base parameters, which stay frozen. (`nnx.Param` matches adapter and base parameters alike.)"""


class LayerNumber(nnx.Variable[Any]):
    """The index of each stacked layer, for adapters whose settings differ by layer.

    It is not a parameter, so no optimizer updates it. The scan over the layers must slice it on axis 0, even where it
    slices the parameters on another axis: `nnx.StateAxes({nnx.Param: 1, ...: 0})`. A layer that gets an unsliced number
    raises `AttachError` when it is called.

    >>> from flax import nnx
    >>> issubclass(LayerNumber, nnx.Param)
    False
    """


class RowParam(FrozenParam):
    """A tensor of the adapters of a batch's rows, beside a weight that they adapt; `jaxadapt.serving.route` sets it.

    A scan slices it as it slices the parameters.
    """


class SharedRowParam(SharedParam, RowParam):
    """A tensor that all rows and all layers have in common, such as VeRA's projections; see `SharedParam`."""


class CallData(nnx.Param[Any]):
    """Data of one call, such as the mask of the tokens that an aLoRA adapts, stored beside a site's tensors.

    It is an `nnx.Param`, so a scan slices it as it slices them.
    """


def held_adapters(module: nnx.Module) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return `{collection: {adapter: {leaf: {tensor: variable}}}}` of the adapters that are attributes of a module."""
    return {name: value for name, value in vars(module).items() if isinstance(value, dict) and is_collection(name)}


# ---------------------------------------------------------------- graph


Path = tuple[Any, ...]
"""Attribute names, keys and list indices, as in `nnx.to_flat_state`."""
Entry = tuple[Path, Any]
"""`(path, value)`."""

_Children = tuple[Iterable[Any], Any, bool]
"""`(keys, values by key, whether every value is marked as data)`: the children of one parent, without static ones."""
_VARIABLE, _ARRAY, _NODE, _CONTAINER, _OTHER = range(5)


def walk(root: Any) -> list[Entry]:
    """List the variables, arrays and graph nodes of a model.

    A variable or a graph node that several paths reach is listed once, at its first path. A graph node follows its
    contents. Attributes are in the order of their names, integers first. Containers (lists, dicts, tuples, None,
    classes registered with JAX) are entered and not listed.

    The variables and arrays have the paths of `nnx.state(root)`: static attributes are left out, and a value of another
    type is listed only if its attribute is marked as data.

    >>> [(path, type(x).__name__) for path, x in walk(nnx.List([nnx.Param(1.0), nnx.Dict(a=nnx.Param(2.0))]))]
    [((0,), 'Param'), ((1, 'a'), 'Param'), ((1,), 'Dict'), ((), 'List')]
    """
    visitor = _Visitor()
    visitor.append((), root, True)
    return visitor.entries


@dataclasses.dataclass(eq=False)
class _Visitor:
    """The entries so far, the shared objects seen, and Flax's answers about each type."""

    entries: list[Entry] = dataclasses.field(default_factory=list[Entry])
    seen: set[int] = dataclasses.field(default_factory=set[int])
    kinds: dict[type, int] = dataclasses.field(default_factory=dict[type, int])
    list_children: dict[type, Callable[[Any], _Children]] = dataclasses.field(default_factory=dict)

    def append(self, path: Path, value: Any, is_data: bool) -> None:
        """Append the entries of a value: of everything in it, and of itself."""
        cls = type(value)
        kind = self.kinds.get(cls)
        if kind is None:
            kind = self._classify(cls, value)
        if kind in (_VARIABLE, _NODE):
            if id(value) in self.seen:
                return
            self.seen.add(id(value))
        if kind in (_NODE, _CONTAINER):
            keys, values, marked = self.list_children[cls](value)
            for key in keys:
                child = values[key]
                if self.kinds.get(type(child)) != _VARIABLE:
                    self.append((*path, key), child, marked)
                elif id(child) not in self.seen:  # as `append` does: most entries are variables
                    self.seen.add(id(child))
                    self.entries.append(((*path, key), child))
            if kind == _CONTAINER:
                return
        if kind != _OTHER or is_data:
            self.entries.append((path, value))

    def _classify(self, cls: type, value: Any) -> int:
        """Return the kind of a value, and keep it for its type."""
        implementation: Any = nnx.graphlib.get_node_impl(value)
        if isinstance(value, nnx.Variable):
            kind = _VARIABLE
        elif implementation is not None:
            kind = _NODE if isinstance(implementation, nnx.graphlib.GraphNodeImpl) else _CONTAINER
            self.list_children[cls] = _children_function(cls, implementation)
        elif nnx.graphlib.is_graph_node(value):  # a mutable array, which may be shared as a variable may
            kind = _VARIABLE
        else:
            kind = _ARRAY if isinstance(value, jax.Array | np.ndarray) else _OTHER
        if not issubclass(cls, Tracer):  # a traced variable has the type of a traced array
            self.kinds[cls] = kind
        return kind


def _children_function(cls: Any, implementation: Any) -> Callable[[Any], _Children]:
    """Return the function that lists the children of a container or a graph node of this class."""
    known: dict[Any, Callable[[Any], _Children]] = {
        dict: lambda node: (sorted(node), node, False),
        list: lambda node: (range(len(node)), node, False),
        tuple: lambda node: (range(len(node)), node, False),
        type(None): lambda node: ((), node, False),
    }
    if cls in known:
        return known[cls]
    pytree: Any = nnx.Pytree
    plain = implementation.flatten is pytree._graph_node_flatten and not cls._pytree__has_int_keys  # as nnx.List has
    if plain and cls._pytree__is_pytree:
        return _list_attributes
    return lambda node: _list_flattened(implementation.flatten(node)[0])


def _list_attributes(node: Any) -> _Children:
    """List a node's data attributes, without building Flax's objects for the static ones."""
    attributes, marks = vars(node), node._pytree__nodes
    is_data = vars(marks).get("_mapping", marks)  # the dict inside, which answers five times as fast
    # "_pytree__state" has no contents.
    return sorted(name for name in attributes if is_data.get(name) and name != "_pytree__state"), attributes, True


def _list_flattened(children: Iterable[tuple[Any, Any]]) -> _Children:
    """List what a class's own flatten function returns; of unmarked values, those that Flax does not take as static."""
    values: dict[Any, Any] = {}
    for key, value in children:
        if isinstance(value, nnx.graphlib.DataElem):
            values[key] = value.value
        elif not isinstance(value, nnx.graphlib.StaticElem) and (
            nnx.graphlib.is_node(value) or nnx.graphlib.is_node_leaf(value)
        ):
            values[key] = value
    return values, values, True


def instance_test(cls: Any, but: Any = ()) -> Callable[[Any], bool]:
    """Return a test for instances of `cls`, except those of `but`, that asks Flax once for each type.

    `isinstance(x, nnx.Param)` runs Python code of Flax, which takes a microsecond for every attribute of a model.
    """
    answers: dict[type, bool] = {}

    def test(value: Any) -> bool:
        kind = type(value)
        if kind in answers:
            return answers[kind]
        answer = isinstance(value, cls) and not isinstance(value, but)
        # The type of a traced or a hijax value does not show the kind of variable that it is.
        if not issubclass(kind, Tracer) and (issubclass(kind, nnx.Variable) or not isinstance(value, nnx.Variable)):
            answers[kind] = answer
        return answer

    return test


def values_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{path: variable.get_value()}`."""
    values: dict[str, Any] = {}
    for path, var in variables.items():
        raw = var.get_raw_value()
        plain = _is_plain(type(var), type(raw)) and not var.has_metadata("on_get_value")
        values[path] = raw if plain else var.get_value()
    return values


def set_values(variables: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Call `variables[path].set_value(value)` for each of the values."""
    for path, value in values.items():
        var = variables[path]
        is_plain = _is_plain(type(var), type(var.get_raw_value()), type(value))
        if is_plain and not var.has_metadata("on_set_value"):
            var.set_raw_value(value)
        else:
            var.set_value(value)


@functools.cache
def _is_plain(own: type, content: type, new: type = np.ndarray) -> bool:
    """Return True if variables of this type and content give arrays as they are, and take those of the type `new`.

    Flax maps over a tree of one leaf and looks for mutable arrays, 3 to 7 microseconds for each variable.
    """
    unchanged = issubclass(own, nnx.Variable) and (own.get_value, own.set_value) == (
        nnx.Variable.get_value,
        nnx.Variable.set_value,
    )
    are_arrays = issubclass(content, jax.Array) and issubclass(new, jax.Array | np.ndarray)
    return unchanged and are_arrays and not issubclass(content, Tracer)


# ---------------------------------------------------------------- one model

Owner = tuple[nnx.Module, str]
_PLAIN = frozenset({bool, int, float, str, tuple, dict, type(None), types.FunctionType})
"""Types that most attributes of a layer have, and no variable."""


@functools.lru_cache(maxsize=1 << 14)  # loading adapters one after the other asks for the same paths
def natural_key(path: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts "layers.2" before "layers.10"."""
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in path.split("."))


@functools.lru_cache(maxsize=1 << 14)
def dotted(path: Path) -> str:
    """Return a path as a text with dots."""
    return paths.join(*map(str, path))


@dataclasses.dataclass(frozen=True)
class ModelWalk:
    """The contents of a model, listed once (see `graph.walk`).

    Valid for as long as the modules keep their attributes; `attach` and `delete` make `adapters` outdated.
    """

    entries: Sequence[Entry]

    @property
    def model(self) -> Any:
        """The model."""
        return self.entries[-1][1]

    @functools.cached_property
    def modules(self) -> list[tuple[str, nnx.Module]]:
        """`(dotted path, module)`, each module once."""
        is_module = instance_test(nnx.Module)
        return [(dotted(path), node) for path, node in self.entries if is_module(node)]

    @functools.cached_property
    def leaves(self) -> dict[str, Owner]:
        """`{dotted path: (owner, attribute)}` of the base parameters that are a module's attribute, each once."""
        first: dict[int, tuple[str, Owner]] = {}
        is_base = instance_test(nnx.Param, (AdapterParam, FrozenParam))
        for path, node in self.modules:
            for attr, var in vars(node).items():
                if type(var) not in _PLAIN and is_base(var):
                    first.setdefault(id(var), (f"{path}.{attr}" if path else attr, (node, attr)))
        return dict(sorted(first.values(), key=lambda item: natural_key(item[0])))

    @functools.cached_property
    def unowned(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}` of base parameters that are not attributes of a module: in a dict, or in `bridge.ToNNX`."""
        is_base = instance_test(nnx.Param, (AdapterParam, FrozenParam))
        owned = {id(vars(module)[attr]) for module, attr in self.leaves.values()}
        return {dotted(path): tuple(var.shape) for path, var in self.entries if is_base(var) and id(var) not in owned}

    @functools.cached_property
    def adapters(self) -> dict[str, dict[str, Any]]:
        """`{adapter name: {path: AdapterParam}}`."""
        return group_adapters(self.entries)

    @property
    def adapted(self) -> list[tuple[str, Any]]:
        """`(dotted path, layer)` of every adapted layer."""
        return [
            (path, node) for path, node in self.modules if isinstance(type(node), AdaptedMeta) and ACTIVE in vars(node)
        ]

    @property
    def active(self) -> list[str]:
        """The names of the active adapters, each once."""
        return list(dict.fromkeys(name for _, layer in self.adapted for name in getattr(layer, ACTIVE)))


Model = nnx.Module | ModelWalk
Tree = Model | nnx.State[Any, Any]
TREES = (nnx.Module, ModelWalk, nnx.State)


def walk_model(model: Any) -> ModelWalk:
    """List the contents of a model; return a walk unchanged."""
    return model if isinstance(model, ModelWalk) else ModelWalk(walk(model))


def group_adapters(variables: Iterable[tuple[Sequence[Any], Any]]) -> dict[str, dict[str, Any]]:
    """Return `{adapter name: {path: AdapterParam}}` of the adapter parameters among these variables and their paths."""
    adapters: dict[str, dict[str, Any]] = {}
    is_adapter, is_shared = instance_test((AdapterParam, FrozenParam)), instance_test(SharedParam)
    site: Any = None
    by_path, prefix = dict[str, Any](), ""
    for keys, var in variables:
        if is_adapter(var) and var.has_metadata("adapter"):
            if site != keys[:-1]:  # the tensors of one leaf follow each other
                site = keys[:-1]
                by_path = adapters.setdefault(str(site[-2]), {})
                prefix = dotted((*site[:-3], site[-1]))
            by_path[f"{SHARED_NODE if is_shared(var) else prefix}.{keys[-1]}"] = var
    return adapters


def adapter_variables(tree: Tree) -> dict[str, dict[str, Any]]:
    """Return `{adapter name: {path: AdapterParam}}` for a model or a state."""
    return group_adapters(nnx.to_flat_state(tree)) if isinstance(tree, nnx.State) else walk_model(tree).adapters


def base_values(owners: Mapping[str, Owner]) -> dict[str, Any]:
    """Return `{dotted path: array or spec}` of base parameters."""
    return values_of({leaf: vars(module)[attr] for leaf, (module, attr) in owners.items()})


def base_shardings(owners: Mapping[str, Owner], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{leaf: sharding}` for the base leaves: the sharding of the array or spec, else that of the metadata.

    `values` are those that `base_values` returns.
    """
    variables: dict[str, nnx.Variable[Any]] = {leaf: vars(module)[attr] for leaf, (module, attr) in owners.items()}
    shardings = {leaf: regions.sharding_of(value) for leaf, value in values.items()}
    for leaf, var in variables.items():
        if var.get_metadata("out_sharding", None) and regions.is_unplaced(values[leaf]):
            spec = nnx.get_partition_spec({"": var})[""]
            shardings[leaf] = regions.sharding_from_spec(spec.get_value(), var.get_metadata("mesh", None))
    return shardings


# ---------------------------------------------------------------- one layer


ACTIVE = "active_adapters"
"""The attribute of an adapted layer that holds the names of its active adapters."""
DROPOUT = "adapter_dropout"  # the attribute of an adapted layer that holds its dropout layers


class AdaptedMeta(type(nnx.Module)):
    """The metaclass of run-time subclasses that apply adapters; `base` is the layer's own class."""

    base: type[nnx.Module]


def set_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    """Change a module's class."""
    # A plain assignment would go through nnx's attribute handling and change the graph definition.
    object.__setattr__(module, "__class__", cls)


def entry_points(base: type[nnx.Module]) -> dict[str, Callable[..., Any]]:
    """Return `{name: method}` for the methods that may read a layer's weight.

    These are `__call__` and the public methods of the class; for Flax's own layers, only `__call__`.
    """
    if base.__call__ in call.KERNELS:
        return {"__call__": base.__call__}
    classes = [cls for cls in base.__mro__ if issubclass(cls, nnx.Module) and cls not in nnx.Module.__mro__]
    functions = {name: f for cls in reversed(classes) for name, f in vars(cls).items() if inspect.isfunction(f)}
    return {name: f for name, f in functions.items() if name == "__call__" or not name.startswith("_")}


def quantized_params(module: nnx.Module) -> dict[str, Any]:
    """Return `{attribute: value}` for the layer's quantized parameters."""
    values = {attr: var.get_value() for attr, var in vars(module).items() if isinstance(var, nnx.Param)}
    return {attr: value for attr, value in values.items() if quantized.is_quantized(value)}


def plain_view(module: nnx.Module, base: type[nnx.Module], values: Mapping[str, Any]) -> Any:
    """Return a shallow copy of a layer as an instance of `base`, with `values` replaced and all parameters dense."""
    view = object.__new__(base)
    attributes = vars(view)
    attributes.update(vars(module))
    for leaf, value in {**quantized_params(module), **values}.items():
        # A copy keeps the variable's type and metadata.
        attributes[leaf] = attributes[leaf].copy(quantized.to_dense(value))
    return view


def layer_state(module: nnx.Module) -> dict[str, Any]:
    """Return `{path: variable}` for the variables that a call may change: random streams, and all but parameters."""
    is_state = instance_test(nnx.Variable, (nnx.Param, LayerNumber))
    return {paths.join(*map(str, path)): x for path, x in walk(module) if is_state(x) and DROPOUT not in path}


def open_copy(model: nnx.Module) -> tuple[Callable[[Mapping[str, Any]], Any], dict[str, Any]]:
    """Return a function that copies a model with other values at some paths, and the values of all its variables.

    A variable belongs to the trace that creates it, so a model that is called in a trace is copied inside it. The copy
    holds the model's own variables at the other paths.
    """
    graphdef, state = nnx.split(model)
    flat = {paths.join(*map(str, path)): (path, var) for path, var in nnx.to_flat_state(state)}
    variables = {name: var for name, (_, var) in flat.items() if isinstance(var, nnx.Variable)}

    def copy(values: Mapping[str, Any]) -> Any:
        new = {**values, **{name: var.copy(values[name]) for name, var in variables.items() if name in values}}
        return nnx.merge(
            graphdef, nnx.from_flat_state([(path, new.get(name, var)) for name, (path, var) in flat.items()])
        )

    return copy, {name: var for name, (_, var) in flat.items()} | values_of(variables)


def changed_values(name: str, before: Mapping[str, Any], after: Mapping[str, Any], remedy: str = "") -> dict[str, Any]:
    """Return the values of the variables that a call of a layer changed, by path.

    Raises `AttachError` if the call added or removed variables; its text ends with `remedy`.
    """
    if odd := sorted(before.keys() ^ after.keys()):
        verb, advice = ("adds", "Create them in __init__") if odd[0] in after else ("removes", "Keep them")
        raise AttachError(
            f"{name} {verb} variables while it is called ({', '.join(odd)}), so an adapter cannot run its call."
            f" {advice}{remedy}"
        )
    return {path: x for path, x in after.items() if x is not before[path]}


def bind_layer(module: nnx.Module, base: type[nnx.Module], f: Callable[..., Any]) -> call.Layer:
    """Return one method of a layer, as its class `base` has it, as a layer that an adapter can run.

    Its `run` raises `AttachError` if the call adds variables to the layer, or changes a variable outside it.
    """
    params = {attr: var.get_value() for attr, var in vars(module).items() if isinstance(var, nnx.Param)}

    def run(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        view, state = plain_view(module, base, weights), values_of(layer_state(module))
        copy = open_copy(view)[0](state) if state else view
        try:
            y = f(copy, *args, **kwargs)
        except errors.TraceContextError as error:
            raise AttachError(
                f"{base.__name__}: the call changes a variable outside the layer. An adapted layer may change"
                " only its own variables, such as a random stream or a count. Store the object with the variable in the"
                " layer (self.rngs = rngs), or exclude the layer with exclude_modules"
            ) from error
        # A variable that the call removes stays in the layer, with its value.
        after = state | values_of(layer_state(copy)) if state else {}
        return y, changed_values(base.__name__, state, after, ", or exclude the layer with exclude_modules")

    def write_back(changed: Mapping[str, Any]) -> None:
        set_values(layer_state(module) if changed else {}, changed)

    return call.Layer(
        base.__name__, module, f, f is base.__call__, params, functools.partial(f, module), run, write_back
    )
