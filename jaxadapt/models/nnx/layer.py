"""NNX layers: what their classes say about their weights, and their calls.

The call of an adapted layer is its own function, with active adapters applied and quantised weights made dense.

The tensors of a prompt method are attributes of the model itself, whose call adds the virtual tokens:

    model.prefix_tuning["default"]["~shared"]    {"prompt_embeddings": SharedAdapterParam}
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax import errors, nnx

from jaxadapt.adapters.adapter import SHARED_NODE, Recipe, Site
from jaxadapt.arrays import quantized
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import contradiction_message
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import KeyMap, entry_from_axes
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods.applied import AppliedMethod, AppliedMethods, apply_rows, together
from jaxadapt.methods.base import Drop, Method
from jaxadapt.models import call, prompts
from jaxadapt.models.attention_calls import Findable, input_embedding, is_findable
from jaxadapt.models.nnx import graph

# ---------------------------------------------------------------- one layer


DROPOUT = "adapter_dropout"  # the attribute of an adapted layer that holds its dropout layers


class AdaptedMeta(type(nnx.Module)):
    """The metaclass of run-time subclasses that apply adapters; `base` is the layer's own class."""

    base: type[nnx.Module]


def base_class(module: nnx.Module) -> type[nnx.Module]:
    """Return a layer's own class, whether the layer is adapted or not."""
    cls = type(module)
    return cls.base if isinstance(cls, AdaptedMeta) else cls


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
    """Return `{attribute: value}` for the layer's quantised parameters."""
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
    is_state = graph.instance_test(nnx.Variable, (nnx.Param, graph.LayerNumber))
    variables = [(path, var) for path, var, _ in graph.walk(module) if is_state(var)]
    return {paths.join(*map(str, path)): var for path, var in variables if DROPOUT not in path}


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
        filled = [(path, new.get(name, var)) for name, (path, var) in flat.items()]
        return nnx.merge(graphdef, nnx.from_flat_state(filled))

    return copy, {name: var for name, (_, var) in flat.items()} | graph.values_of(variables)


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
        view, state = plain_view(module, base, weights), graph.values_of(layer_state(module))
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
        after = state | graph.values_of(layer_state(copy)) if state else {}
        return y, changed_values(base.__name__, state, after, ", or exclude the layer with exclude_modules")

    def write_back(changed: Mapping[str, Any]) -> None:
        variables = layer_state(module) if changed else {}
        for path, value in changed.items():
            variables[path].set_value(value)

    return call.Layer(
        base.__name__, module, f, f is base.__call__, params, functools.partial(f, module), run, write_back
    )


# ---------------------------------------------------------------- Flax's own layer classes


_NEVER_LINEAR = (nnx.Embed, nnx.Conv, nnx.ConvTranspose)
_SHAPES: dict[Any, Callable[[Any], Sequence[int]]] = {
    nnx.Linear.__call__: lambda m: (m.in_features, m.out_features),
    nnx.LinearGeneral.__call__: lambda m: (*m.batch_axis.values(), *m.in_features, *m.out_features),
    nnx.Embed.__call__: lambda m: (m.num_embeddings, m.features),
    nnx.Einsum.__call__: lambda m: m.kernel_shape,
    nnx.Conv.__call__: lambda m: m.kernel_shape,
}
"""The shapes without stacked layers of the weights whose roles `call.roles_of` knows."""


def kernel_roles(module: nnx.Module, attr: str) -> call.Roles | None:
    """Return the roles of a weight if its layer class is one of Flax's own, else None.

    Raises `AttachError` for an einsum equation that no adapter can follow.
    """
    return call.roles_of(module, base_class(module).__call__, attr)


def list_contradictions(adapter_sites: Sequence[Site], owners: Mapping[str, graph.Owner]) -> list[str]:
    """Return a message for each site whose keymap entry and layer class disagree about the input axes."""
    problems: list[str] = []
    for site in adapter_sites:
        try:
            roles = (
                None
                if site.effects.weight == "replaces" and site.effects.form == "weight"
                else kernel_roles(*owners[site.leaf])
            )
        except AttachError as error:
            problems.append(f"{site.leaf}: {error}")
            continue
        # A keymap may order axes differently or split a fused output axis, but the input axes must agree.
        if roles is not None and set(roles.axes.in_axes) != set(site.axes.in_axes):
            problems.append(f"{site.leaf}: {contradiction_message(site.axes, roles.axes)}")
    return problems


def describe_use(module: nnx.Module) -> str:
    """Describe for `summary` how the use of a layer's weight is found: from its class, or by tracing its call."""
    base = base_class(module)
    return f"{base.__name__}'s own call" if base.__call__ in call.KERNELS else f"traced {base.__name__}"


# ---------------------------------------------------------------- entries for leaves without one


@dataclasses.dataclass(frozen=True)
class TracedAxes:
    """The traced axes of a custom layer's weight, and the shape that the layer's call sees."""

    axes: Axes
    shape: tuple[int, ...]


def _find_stack(
    leaf: str, shape: tuple[int, ...], layer_shape: tuple[int, ...], stack_axes: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the axes of a leaf that stack layers, given the unstacked shape of one layer.

    Raises `AttachError` if the shapes do not determine the axes, or contradict `stack_axes`.
    """
    extra = len(shape) - len(layer_shape)
    if extra == 0:
        return ()
    if stack_axes is not None and len(stack_axes) == extra:
        chosen = tuple(sorted(a % len(shape) for a in stack_axes))
        if tuple(size for i, size in enumerate(shape) if i not in chosen) == layer_shape:
            return chosen
        raise AttachError(
            f"{leaf!r} has shape {shape}, which is not {layer_shape} stacked on stack_axes={tuple(stack_axes)}"
        )
    candidates = [i for i in range(len(shape)) if extra == 1 and shape[:i] + shape[i + 1 :] == layer_shape]
    if len(candidates) == 1:
        return (candidates[0],)
    raise AttachError(
        f"{leaf!r} has shape {shape}, and one layer has {layer_shape}, so the axis that stacks the layers is unclear."
        " Pass it, for example stack_axes=(0,)"
    )


def class_entries(
    owners: Mapping[str, graph.Owner],
    shapes: Mapping[str, tuple[int, ...]],
    keymap: KeyMap,
    stack_axes: Sequence[int] | None = None,
    traced: Mapping[str, TracedAxes] | None = None,
) -> list[Weight]:
    """Return keymap entries for the leaves that a keymap does not cover, from their layer's class or a trace."""
    entries: list[Weight] = []
    for leaf, (module, attr) in owners.items():
        shape = shapes[leaf]
        if traced is not None and leaf in traced:
            stack = _find_stack(leaf, shape, traced[leaf].shape, stack_axes)
            entries.append(entry_from_axes(leaf, shape, traced[leaf].axes, stack))
            continue
        match = None if attr == "bias" else keymap.match(leaf)
        if attr == "bias" or (match is not None and len(match.weight.left) == len(shape)):
            continue
        try:
            roles = kernel_roles(module, attr)
        except AttachError:
            continue  # `attach` raises it again if the leaf is targeted
        if roles is not None:
            stack = _find_stack(leaf, shape, tuple(_SHAPES[base_class(module).__call__](module)), stack_axes)
            entries.append(entry_from_axes(leaf, shape, roles.axes, stack, roles.kind, roles.groups))
    return entries


def custom_leaves(owners: Mapping[str, graph.Owner], leaves: Iterable[str]) -> list[str]:
    """Return the matrices among these leaves whose axis roles only a trace can show."""
    owned = [(leaf, *owners[leaf]) for leaf in leaves]
    matrices = [(leaf, m, attr) for leaf, m, attr in owned if attr != "bias" and len(vars(m)[attr].shape) >= 2]
    # The roles of a kernel are known from its class, even those that no adapter can follow.
    return [
        leaf
        for leaf, module, attr in matrices
        if (attr != "kernel" or base_class(module).__call__ not in call.KERNELS) and kernel_roles(module, attr) is None
    ]


def is_never_linear(owner: graph.Owner) -> bool:
    """Return True if the leaf's layer is one of Flax's own that "all-linear" does not select."""
    return base_class(owner[0]).__call__ in [cls.__call__ for cls in _NEVER_LINEAR]


# ---------------------------------------------------------------- prompts


def mark_attention(model: nnx.Module) -> None:
    """Let a trace find the calls of the attention layers."""
    for _, node in graph.walk_model(model).modules:
        if isinstance(node, nnx.MultiHeadAttention) and not is_findable(node.attention_fn):
            node.attention_fn = Findable(node.attention_fn)


def active_prompt(module: nnx.Module, names: Sequence[str]) -> prompts.Prompt | None:
    """Return the active adapter of a prompt method among `names`; None if there is none.

    Raises `AttachError` if there are several.
    """
    found: dict[str, prompts.Prompt] = {}
    for name, adapters in itertools.product(names, graph.held_adapters(module).values()):
        if tensors := adapters.get(name, {}).get(SHARED_NODE):
            values = {t: var.get_value() for t, var in tensors.items()}
            data = {t: x for t, x in values.items() if isinstance(tensors[t], graph.CallData)}
            params = {t: x for t, x in values.items() if t not in data}
            recipe = next(var.get_metadata()["adapter"].recipe for t, var in tensors.items() if t in params)
            found[name] = prompts.Prompt(recipe, params, data)
    return prompts.only_one(found)


def embed_tokens(module: nnx.Module, prompt: prompts.Prompt, tokens: Any) -> Any:
    """Return the embeddings of tokens, by the model's own layer."""
    owners = graph.walk_model(module).leaves
    leaf = input_embedding(prompt.recipe.keymap, owners)
    layer = None if leaf is None else owners[leaf][0]
    if not isinstance(layer, nnx.Embed):
        raise AttachError(
            f"{prompt.method.peft_type}: the nnx.Embed that embeds the tokens is unclear"
            f" ({'none or several are candidates' if leaf is None else f'{leaf} is of another class'}). Pass embeddings"
            " to the call in place of tokens"
        )
    return layer(tokens)


def call_with_keys(
    module: nnx.Module,
    prompt: prompts.Prompt,
    base: type[nnx.Module],
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return `call(module, args, kwargs)` with keys and values of an adapter in every attention layer.

    Raises `AttachError` if the call adds variables to the model.
    """
    # The model's transforms (nnx.scan, nnx.remat) write to all variables, so they must belong to the current trace.
    open_model, inputs = open_copy(plain_view(module, base, {}))

    def run(inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        copy = open_model(inputs)
        mark_attention(copy)
        y = call(copy, args, kwargs)
        return y, changed_values(base.__name__, inputs, open_copy(copy)[1])

    def base_parameters() -> dict[str, Any]:
        return graph.base_values(graph.walk_model(module).leaves)

    y, changed = prompts.call_with_keys(run, prompt, base.__call__, args, kwargs, inputs, base_parameters)
    variables = {paths.join(*map(str, path)): var for path, var in nnx.to_flat_state(nnx.state(module))}
    for path, value in changed.items():
        variables[path].set_value(value)
    return y


# ---------------------------------------------------------------- the call of a layer


ACTIVE = "active_adapters"
ROWS = "adapter_rows"
"""The attribute of a layer with a bank: `{leaf: {number of the site: {tensor: RowParam}}}`, empty without a route."""


@dataclasses.dataclass(frozen=True)
class Attached:
    """The metadata of an `AdapterParam`: its adapter's recipe, and the method, axes and hyperparameters of its site."""

    recipe: Recipe
    method: Method = dataclasses.field(repr=False)
    axes: Axes = dataclasses.field(repr=False)
    hparams: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.recipe, self.method, self.axes, self.hparams))

    def __hash__(self) -> int:
        return self._hash


def attached_to(tensors: Mapping[str, nnx.Variable[Any]]) -> Attached:
    """Return the metadata of one adapter at one leaf.

    Only its own tensors carry this metadata. Shared tensors carry their adapter's, and `LayerNumber`s carry none.
    """
    param = next(
        var for var in tensors.values()
        if isinstance(var, graph.AdapterParam | graph.FrozenParam) and not isinstance(var, graph.SharedParam)
    )  # fmt: skip
    attached: Attached = param.get_metadata()["adapter"]
    return attached


# ---------------------------------------------------------------- the run-time subclass


@functools.cache
def adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """Return the subclass of a layer class whose entry points (see `entry_points`) apply the active adapters."""

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            return _call_adapted(self, base, f, args, kwargs)

        return method

    body: dict[str, Any] = {name: wrap(f) for name, f in entry_points(base).items()}
    body |= {"base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    subclass: Any = AdaptedMeta(f"Adapted{base.__name__}", (base,), body)
    return subclass


copyreg.pickle(AdaptedMeta, lambda cls: (adapted_class, (cls.base,)))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- calling


def adapters_on(layer: nnx.Module, names: Iterable[str]) -> Iterator[tuple[str, str, Mapping[str, nnx.Variable[Any]]]]:
    """Yield (adapter, leaf, tensors) for these adapters of one layer's weights."""
    for name, adapters in itertools.product(names, graph.held_adapters(layer).values()):
        for leaf, tensors in adapters.get(name, {}).items():
            if leaf != SHARED_NODE:  # a prompt's tensors: see `prompt`
                yield name, leaf, tensors


def _active_hooks(module: nnx.Module) -> dict[str, AppliedMethod | AppliedMethods]:
    """Return `{leaf: hook}` for the active adapters of one layer."""
    hooks: dict[str, list[AppliedMethod]] = {}
    attributes = vars(module)
    for name, leaf, tensors in adapters_on(module, attributes.get(ACTIVE, ())):
        params = {tensor: _value_of(tensor, var) for tensor, var in tensors.items()}
        hooks.setdefault(leaf, []).append(
            AppliedMethod.in_call(attached_to(tensors), params, _active_dropout(module, name))
        )
    for leaf, sites in attributes.get(ROWS, {}).items():
        if not sites:
            raise AttachError(call.NO_ROUTE)
        hooks.setdefault(leaf, []).extend(map(_row_hook, sites.values()))
    return {leaf: together(each) for leaf, each in hooks.items()}


def _active_dropout(module: nnx.Module, name: str) -> Drop | None:
    """Return the dropout of an adapter; None if it has none, or if the layer is in evaluation mode."""
    dropouts = vars(module).get(DROPOUT, ())
    if name not in dropouts or (dropout := dropouts[name]).deterministic:
        return None
    if dropout.rngs is None:
        raise AttachError(
            f"the adapter {name!r} has dropout but no random stream, because it was loaded without rngs."
            " Load it with load(…, rngs=nnx.Rngs(seed)) to train it, or call model.eval() to use it"
        )
    return Drop(dropout.rate, dropout.rngs)


def _row_hook(tensors: Mapping[str, nnx.Variable[Any]]) -> AppliedMethod:
    """Return the method of a bank's site with the tensors of a batch's rows."""
    shared = {name: _value_of(name, var) for name, var in tensors.items() if isinstance(var, graph.SharedParam)}
    own = {name: var for name, var in tensors.items() if name not in shared}
    site: call.RowSite = next(iter(own.values())).get_metadata()["row_site"]
    return apply_rows(site, site.how, {name: _value_of(name, var) for name, var in own.items()}, shared)


def _value_of(tensor: str, variable: nnx.Variable[Any]) -> Any:
    """Return a variable's value; raise `AttachError` for a slice of a shared tensor."""
    value = variable.get_value()
    if isinstance(variable, graph.SharedParam) and value.shape != (shape := variable.get_metadata()["whole"]):
        raise AttachError(
            f"cannot run a layer: {tensor} belongs to the whole adapter and has shape {list(shape)}, but this layer got"
            f" {list(value.shape)}. Make the model's nnx.scan or nnx.vmap leave variables of type"
            " jaxadapt.models.SharedParam whole: nnx.StateAxes({jaxadapt.models.SharedParam: None, nnx.Param: 0,"
            " ...: 0})"
        )
    return value


def _call_adapted(module: Any, base: Any, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with its active adapters applied and its quantised weights made dense."""
    if f is base.__call__ and (virtual := active_prompt(module, vars(module).get(ACTIVE, ()))) is not None:
        if (hooked := prompts.hooked_call(module, virtual)) is not None:
            name, first = hooked
            return getattr(base, name)(plain_view(module, base, {}), *first, *args, **kwargs)
        if virtual.method.adds != "embeddings":
            run: Any = functools.partial(_call_layer, base, f)
            return call_with_keys(module, virtual, base, run, args, kwargs)
        args, kwargs = prompts.with_embeddings(
            virtual, base.__call__, args, kwargs, functools.partial(embed_tokens, module, virtual)
        )
    return _call_layer(base, f, module, args, kwargs)


def _call_layer(base: Any, f: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with the adapters of its own weights."""
    return call.apply(bind_layer(module, base, f), _active_hooks(module), args, kwargs)
