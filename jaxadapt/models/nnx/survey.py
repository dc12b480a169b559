"""Survey of an NNX model: its base leaves and their owners, the roles of their axes, and obstacles to adapters.

Abstract calls of the model show how its layers use their weights, and which uses no adapter can follow.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx

from jaxadapt.adapters.adapter import Site
from jaxadapt.arrays import quantized
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import contradiction_message, transposed_axes
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.generic import entry_from_axes
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models import call, tracing
from jaxadapt.models.nnx import graph

# ---------------------------------------------------------------- survey


DROPOUT = "adapter_dropout"  # the attribute of an adapted layer that holds its dropout layers
_REWRITERS = (nnx.WeightNorm, nnx.SpectralNorm)
"""Modules that change the parameters inside them, adapters included, at every call."""
_NEVER_LINEAR = (nnx.Embed, nnx.Conv, nnx.ConvTranspose)


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
    if call.kernel_of(base.__call__) is not None:
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
        value = quantized.to_dense(value)
        attributes[leaf] = attributes[leaf].copy(value)  # keeps the variable's type and metadata
    return view


State = dict[str, Any]


def layer_state(module: nnx.Module) -> State:
    """Return `{path: variable}` for the variables that a call may change: random streams, and all but parameters."""
    is_state = graph.instance_test(nnx.Variable, (nnx.Param, graph.LayerNumber))
    variables = [(path, var) for path, var, _ in graph.walk(module) if is_state(var)]
    return {paths.join(*map(str, path)): var for path, var in variables if DROPOUT not in path}


def _run_pure(
    module: nnx.Module,
    base: type[nnx.Module],
    f: Callable[..., Any],
    values: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Run `f(module, *args, **kwargs)` without changing the module.

    A variable belongs to the trace that creates it, so a layer with state is copied inside the current trace.

    Args:
        values: `{attribute: array}` of the parameters to replace.

    Returns the output and the changed state, `{path: value}`. Raises `AttachError` if the call adds variables to the
    layer.
    """
    view = plain_view(module, base, values)
    state = {path: var.get_value() for path, var in layer_state(module).items()}
    if not state:
        return f(view, *args, **kwargs), {}
    graphdef, variables = nnx.split(view)
    flat = {paths.join(*map(str, path)): (path, var) for path, var in nnx.to_flat_state(variables)}
    filled = [(path, var.copy(state[name]) if name in state else var) for name, (path, var) in flat.items()]
    copy = nnx.merge(graphdef, nnx.from_flat_state(filled))
    y = f(copy, *args, **kwargs)
    new_state = layer_state(copy)
    added = [path for path in new_state if path not in state]
    if added:
        raise AttachError(
            f"{base.__name__} adds variables while it is called ({', '.join(added)}), so an adapter cannot run its"
            " call. Create them in __init__, or exclude the layer with exclude_modules"
        )
    return y, {path: x for path, var in new_state.items() if (x := var.get_value()) is not state[path]}


def bind_layer(module: nnx.Module, base: type[nnx.Module], f: Callable[..., Any]) -> call.Layer:
    """Return one method of a layer, as its class `base` has it, as a layer that an adapter can run."""
    params = {attr: var.get_value() for attr, var in vars(module).items() if isinstance(var, nnx.Param)}

    def run(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return _run_pure(module, base, f, weights, args, kwargs)
        except errors.TraceContextError as error:
            raise AttachError(
                f"{base.__name__}: the call changes a variable outside the layer. An adapted layer may change"
                " only its own variables, such as a random stream or a count. Store the object with the variable in the"
                " layer (self.rngs = rngs), or exclude the layer with exclude_modules"
            ) from error

    def write_back(changed: Mapping[str, Any]) -> None:
        variables = layer_state(module) if changed else {}
        for path, value in changed.items():
            variables[path].set_value(value)

    plain = functools.partial(f, module)
    return call.Layer(base.__name__, module, f, f is base.__call__, params, plain, run, write_back)


# ---------------------------------------------------------------- Flax's own layer classes


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
        module, attr = owners[site.leaf]
        try:
            roles = (
                None
                if site.effects.weight == "replaces" and site.effects.form == "weight"
                else kernel_roles(module, attr)
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
    base = base_class(module).__name__
    return f"{base}'s own call" if call.kernel_of(base_class(module).__call__) is not None else f"traced {base}"


# ---------------------------------------------------------------- the model's leaves


def find_obstacles(walk: graph.ModelWalk, leaves: Sequence[str], saved: Collection[str] = ()) -> dict[str, str]:
    """Return `{leaf: reason}` for the given leaves that cannot carry an adapter of any method.

    Args:
        saved: the leaves that `modules_to_save` copies. Their modules must not keep state besides parameters.
    """
    problems: dict[str, str] = {}
    for path, node in walk.modules:
        inside = leaves if isinstance(node, _REWRITERS) else ()
        rewritten = [leaf for leaf in inside if not path or leaf.startswith(f"{path}.")]
        name = type(node).__name__
        problems |= {x: f"{x}: {name} rewrites the parameters inside it at every call" for x in rewritten}
    holders = _list_holders(walk, leaves)
    for leaf in leaves:
        module, attr = walk.leaves[leaf]
        other_paths = [path for path in holders[id(vars(module)[attr])] if path != leaf]
        if other_paths:  # an adapter would apply in one of the modules, but a merged weight in all of them
            problem = f"{leaf}: several modules hold this weight, also as {', '.join(other_paths)}"
            problems[leaf] = f"{problem}; share the module instead of the weight, or leave it out"
        state = layer_state(module).values() if leaf in saved else ()
        state_types = {type(v).__name__ for v in state if not isinstance(v, nnx.RngState)}
        if state_types:
            name, listed = base_class(module).__name__, ", ".join(sorted(state_types))
            problems[leaf] = f"{leaf}: {name} keeps state besides its parameters ({listed}); leave it out"
    return problems


def _list_holders(walk: graph.ModelWalk, leaves: Sequence[str]) -> dict[int, list[str]]:
    """Return `{id of a leaf's parameter: every path of an attribute that holds it}`."""
    owners = [walk.leaves[leaf] for leaf in leaves]
    holders: dict[int, list[str]] = {id(vars(module)[attr]): [] for module, attr in owners}
    for path, node in walk.modules:
        for attr, var in vars(node).items():
            if id(var) in holders:
                holders[id(var)].append(paths.join(path, attr))
    return holders


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
    traced = [x for x in matrices if x[2] != "kernel" or base_class(x[1]).__call__ not in call.KERNELS]
    return [leaf for leaf, module, attr in traced if kernel_roles(module, attr) is None]


def is_never_linear(owner: graph.Owner) -> bool:
    """Return True if the leaf's layer is one of Flax's own that "all-linear" does not select."""
    return base_class(owner[0]).__call__ in [cls.__call__ for cls in _NEVER_LINEAR]


# ---------------------------------------------------------------- abstract call


Observe = Callable[[str, str, call.Layer, call.Args, Mapping[str, Any]], Mapping[str, Any]]
"""`observe(leaf, attribute, layer, args, kwargs)` sees a call of a leaf's layer, and returns parameters to replace."""


def instrument(
    model: nnx.Module, leaves: Sequence[str], observe: Observe, args: call.Args
) -> tuple[Callable[[Mapping[str, Any]], list[Any]], dict[str, Any]]:
    """Return `(f, inputs)`, where `f(inputs)` calls a copy of the model and lets `observe` see calls of its layers.

    Args:
        leaves: the leaves whose layers are observed.

    `inputs` holds every array of the model by its path, and the arrays among `args`. The other arguments are constants.
    """
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = [paths.join(*map(str, path)) for path, _ in flat]
    inputs: dict[str, Any] = {}
    for name, (_, var) in zip(names, flat, strict=True):
        inputs[name] = var.get_value() if isinstance(var, nnx.Variable) else var
    values, tree = jax.tree.flatten(tuple(args))
    arrays = {f"~{i}": v for i, v in enumerate(values) if isinstance(v, jax.Array | jax.ShapeDtypeStruct)}

    def f(inputs: Mapping[str, Any]) -> list[Any]:
        filled = [
            (path, var.copy(inputs[name]) if isinstance(var, nnx.Variable) else inputs[name])
            for name, (path, var) in zip(names, flat, strict=True)
        ]
        copy: Any = nnx.merge(graphdef, nnx.from_flat_state(filled))
        for leaf, (module, attr) in graph.walk_model(copy).leaves.items():
            if leaf in leaves:
                base = base_class(module)
                body = {name: _observed(leaf, attr, base, f, observe) for name, f in entry_points(base).items()}
                set_class(module, type(base.__name__, (base,), body))
        outputs = copy(*tree.unflatten([inputs.get(f"~{i}", v) for i, v in enumerate(values)]))
        return [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]

    return f, inputs | arrays


def _observed(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any], observe: Observe) -> Any:
    """Return the method that runs in place of a layer's own."""

    def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        values = observe(leaf, attr, bind_layer(self, base, f), args, kwargs)
        return f(plain_view(self, base, values), *args, **kwargs)

    return method


def trace_axes(
    model: nnx.Module, walk: graph.ModelWalk, args: call.Args, leaves: Sequence[str], required: bool
) -> tuple[dict[str, TracedAxes], set[str]]:
    """Trace the axis roles of custom layers' leaves in one abstract call of the model.

    Returns `{leaf: traced axes}`, and the leaves that are used but have no single set of roles. Leaves that the call
    does not use are in neither.

    Raises `AttachError` if `required` and the roles of any leaf are not found, listing all such leaves.
    """
    blocked = find_obstacles(walk, leaves)
    if blocked and required:
        raise AttachError("these layers cannot carry the adapter:\n" + paths.bullets(blocked.values()))
    leaves = [leaf for leaf in leaves if leaf not in blocked]
    if not leaves:
        return {}, set()
    traced: dict[str, TracedAxes] = {}
    problems: dict[str, str] = {}

    def observe(
        leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        weight = layer.params[attr]
        try:
            axes = call.infer_axes(functools.partial(layer.output, **kwargs), {attr: weight}, attr, *args)
            seen = TracedAxes(axes, tuple(weight.shape))
            if traced.setdefault(leaf, seen) != seen:
                problems[leaf] = f"one call shows {traced[leaf]}, another {seen}"
        except AttachError as error:
            problems[leaf] = str(error)
        return {}

    run, inputs = instrument(model, leaves, observe, args)
    jax.eval_shape(run, inputs)
    not_called = "its module's __call__ never ran with these inputs"
    unclear = {leaf: problems.get(leaf, not_called) for leaf in leaves if leaf in problems or leaf not in traced}
    if unclear and required:
        listed = [f"{leaf}: {reason}" for leaf, reason in unclear.items()]
        raise AttachError("the axis roles of these weights could not be traced:\n" + paths.bullets(listed))
    return {leaf: axes for leaf, axes in traced.items() if leaf not in unclear}, set(problems)


def record_uses(model: nnx.Module, adapted: Mapping[str, tracing.Hook], args: call.Args) -> dict[str, str]:
    """Return `{leaf: note}` on how the adapter follows each custom layer's weight in one abstract call of the model."""
    notes: dict[str, str] = {}
    owners = graph.walk_model(model).leaves
    leaves = custom_leaves(owners, adapted)

    def observe(
        leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        notes[leaf] = call.describe(layer.name, layer, {attr: adapted[leaf]}, args, kwargs)[attr]
        return {}

    run, inputs = instrument(model, leaves, observe, args)
    jax.eval_shape(run, inputs)
    names = {leaf: base_class(owners[leaf][0]).__name__ for leaf in leaves}
    not_called = {leaf: f"{name}, not called with these inputs" for leaf, name in names.items()}
    return not_called | notes


def check_calls(
    model: nnx.Module,
    adapted: Mapping[str, tracing.Hook],
    dropped: Sequence[str],
    forward: Sequence[str],
    args: call.Args,
) -> None:
    """Raise `AttachError` for uses that an adapter cannot follow in one abstract call of the model.

    These are a weight read outside its own module's call, dropout on a weight whose use is not a product along its
    axis roles, and a keymap entry that swaps a layer's inputs and outputs.

    Args:
        dropped: the leaves whose adapter has dropout.
        forward: the leaves whose axis roles are checked against their layer's products.
    """
    stray_uses: dict[str, str] = {}
    products: dict[str, list[tracing.Contraction]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def observe(
        leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        weight = layer.params[attr]
        # The module reads a copy, so only reads outside its call keep the weight itself live.
        alias = jnp.zeros(weight.shape, weight.dtype)
        if layer.kernel is None:
            uses = tracing.uses(functools.partial(layer.output, **kwargs), {attr: alias}, *args)[attr]
            shapes[leaf] = weight.shape
            products.setdefault(leaf, []).extend(use for use in uses if isinstance(use, tracing.Contraction))
            unfollowed = call.unfollowed_uses(uses, adapted[leaf])
            if leaf in dropped and unfollowed:
                stray_uses[leaf] = ", ".join(unfollowed)
        return {attr: alias}

    run, inputs = instrument(model, list(adapted), observe, args)
    live = call.live_weights(run, inputs)
    contradictions = [
        f"{leaf}: {contradiction_message(axes, layer_axes)}"
        for leaf in forward
        if leaf in products
        and (layer_axes := transposed_axes(axes := adapted[leaf].axes, products[leaf], shapes[leaf])) is not None
    ]
    raise_listed(AttachError, "these layers cannot carry the adapter:", contradictions)
    call.refuse_reads_outside(leaf for leaf in adapted if live[leaf])
    raise_listed(
        AttachError,
        "dropout cannot be applied, because these layers use their weight outside a supported product, where only"
        " an effective weight can replace it:",
        (f"{leaf}: {reason}" for leaf, reason in stray_uses.items()),
        "\nSet the dropout of the configuration to 0.0, or exclude them with exclude_modules",
    )
