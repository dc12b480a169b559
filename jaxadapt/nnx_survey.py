"""How an NNX model holds and uses its weights: who owns which leaf, what its axes mean, and what stands in the way."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadapt import layers, paths, quantized, trace
from jaxadapt.axes import Axes, Use
from jaxadapt.errors import AttachError
from jaxadapt.generic import line_for
from jaxadapt.keymap import KeyMap
from jaxadapt.liveness import live
from jaxadapt.weight import Weight

DROPOUT = "adapter_dropout"  # the attribute that holds an adapted layer's dropouts
_REWRITERS = (nnx.WeightNorm, nnx.SpectralNorm)
"""Modules that change the parameters inside them at every call, an adapter's among them."""
_NEVER_LINEAR = (nnx.Embed, nnx.Conv, nnx.ConvTranspose)


class AdapterParam(nnx.LoRAParam[Any]):
    """A trained adapter parameter: the filter for gradients, optimizers and persistence.

    >>> from flax import nnx
    >>> issubclass(AdapterParam, nnx.LoRAParam)
    True
    """


class AdaptedMeta(type(nnx.Module)):
    """The class of run-time subclasses that apply adapters; `base` is the layer's own class."""

    base: type[nnx.Module]


def base_class(module: nnx.Module) -> type[nnx.Module]:
    """The layer's own class, adapted or not."""
    cls = type(module)
    return cls.base if isinstance(cls, AdaptedMeta) else cls


def swap(module: nnx.Module, cls: type[nnx.Module]) -> None:
    # Plain assignment would go through nnx's attribute handling and change the graph definition.
    object.__setattr__(module, "__class__", cls)


def entry_points(base: type[nnx.Module]) -> dict[str, Callable[..., Any]]:
    """The functions through which a layer class may use its weight: its call and its own public methods.

    Of the classes Flax ships, whose kernel only the call reads, the call alone.
    """
    if any(base.__call__ is cls.__call__ for cls in _KNOWN):
        return {"__call__": base.__call__}
    own = [cls for cls in base.__mro__ if issubclass(cls, nnx.Module) and cls not in nnx.Module.__mro__]
    found = {name: f for cls in reversed(own) for name, f in vars(cls).items() if inspect.isfunction(f)}
    return {name: f for name, f in found.items() if name == "__call__" or not name.startswith("_")}


def compressed(module: nnx.Module) -> dict[str, Any]:
    """`{attribute: value}` of the layer's parameters that are quantised."""
    held = {attr: var.get_value() for attr, var in vars(module).items() if isinstance(var, nnx.Param)}
    return {attr: value for attr, value in held.items() if quantized.is_quantized(value)}


def view(module: nnx.Module, base: type[nnx.Module], values: Mapping[str, Any]) -> Any:
    """The layer as `base` alone, with other values for some of its parameters, and none of them quantised."""
    out = object.__new__(base)
    own = vars(out)
    own.update(vars(module))
    for leaf, value in {**compressed(module), **values}.items():
        value = quantized.dense(value)
        own[leaf] = own[leaf].copy(value)  # keeps the variable's type and metadata
    return out


# ---------------------------------------------------------------- layer classes Flax ships


@dataclasses.dataclass(frozen=True)
class Known:
    """What a layer class says of its kernel: its axes, its own shape (not stacked), and one call as a `Use`."""

    axes: Callable[[Any], Axes]
    shape: Callable[[Any], tuple[int, ...]]
    use: Callable[[Any, Any, Sequence[Any], Axes], Use]


def _general(m: Any) -> Axes:
    return layers.general_axes(len(m.in_features), len(m.out_features), len(m.batch_axis))


def _einsum_use(m: Any, x: Any, rest: Sequence[Any], axes: Axes) -> Use:
    equation = m.einsum_str
    if rest and rest[0] is not None and rest[0] != equation:
        said, adapted = layers.einsum_axes(rest[0]), layers.einsum_axes(equation)
        if set(said.inn) != set(adapted.inn) or set(said.batch) != set(adapted.batch):
            raise AttachError(f"an Einsum was adapted as {equation!r}, and is called as {rest[0]!r}")
        equation = rest[0]
    return layers.einsum_use(equation, x.ndim, axes)


_KNOWN: dict[type[nnx.Module], Known] = {
    nnx.Linear: Known(
        lambda m: layers.DENSE,
        lambda m: (m.in_features, m.out_features),
        lambda m, x, _, axes: layers.dense_use(x.ndim, axes),
    ),
    nnx.LinearGeneral: Known(
        _general,
        lambda m: (*m.batch_axis.values(), *m.in_features, *m.out_features),
        lambda m, x, _, axes: layers.general_use(x.ndim, axes.rank, m.axis, tuple(m.batch_axis), axes),
    ),
    nnx.Einsum: Known(
        lambda m: layers.einsum_axes(m.einsum_str),
        lambda m: tuple(m.kernel_shape),
        _einsum_use,
    ),
}


@dataclasses.dataclass(frozen=True)
class Said:
    """What a layer class says of one of its weights: axes, own shape (not stacked), kind and groups of a line."""

    axes: Axes
    shape: tuple[int, ...]
    kind: str = "linear"
    groups: int = 1


def said(module: nnx.Module, attr: str) -> Said | None:
    """What a class that Flax ships says of a weight; `AttachError` for an equation that no adapter fits."""
    call = base_class(module).__call__
    m: Any = module
    if attr == "kernel" and call is nnx.Conv.__call__ and m.mask is None:
        shape = tuple(m.kernel_shape)
        return Said(layers.conv_axes(len(shape)), shape, "conv", m.feature_group_count)
    if attr == "embedding" and call is nnx.Embed.__call__:
        return Said(layers.EMBEDDING, (m.num_embeddings, m.features), "embedding")
    by_class = known(module) if attr == "kernel" else None
    return None if by_class is None else Said(by_class.axes(module), by_class.shape(module))


def known(module: nnx.Module) -> Known | None:
    """How a layer uses its kernel, if its class says so; a subclass with a call of its own is traced instead."""
    call = base_class(module).__call__
    return next((known for cls, known in _KNOWN.items() if call is cls.__call__), None)


def how(module: nnx.Module) -> str:
    """How a layer's weight is followed, for `summary`: by its class, or by tracing its call."""
    base = base_class(module).__name__
    return f"{base}'s own call" if known(module) is not None else f"traced {base}"


# ---------------------------------------------------------------- the model's leaves

Owner = tuple[nnx.Module, str]


def natural(path: str) -> list[tuple[int, str]]:
    """Sorts "layers.2" before "layers.10"."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in path.split(".")]


def base_leaves(model: nnx.Module) -> dict[str, Owner]:
    """`{dotted path: (owner, attribute)}` of every base parameter held directly by a module, once each."""
    out: dict[str, Owner] = {}
    seen: set[int] = set()
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for attr, var in vars(node).items():
                if isinstance(var, nnx.Param) and not isinstance(var, AdapterParam) and id(var) not in seen:
                    seen.add(id(var))
                    out[paths.join(*map(str, path), attr)] = (node, attr)
    return dict(sorted(out.items(), key=lambda item: natural(item[0])))


def base_shapes(owners: Mapping[str, Owner]) -> dict[str, tuple[int, ...]]:
    """`{dotted path: shape}` of the base parameters; works on abstract models too."""
    return {leaf: tuple(vars(m)[attr].shape) for leaf, (m, attr) in owners.items()}


def base_values(owners: Mapping[str, Owner]) -> dict[str, Any]:
    """`{dotted path: array or spec}` of the base parameters."""
    return {leaf: vars(m)[attr].get_value() for leaf, (m, attr) in owners.items()}


def is_abstract(owners: Mapping[str, Owner]) -> bool:
    """Whether a model has shapes where its arrays will be (`nnx.eval_shape`)."""
    return any(isinstance(vars(m)[attr].get_value(), jax.ShapeDtypeStruct) for m, attr in owners.values())


def obstacles(model: nnx.Module, owners: Mapping[str, Owner], leaves: Sequence[str]) -> dict[str, str]:
    """`{leaf: problem}` of those of these leaves on which no adapter can be, whatever its method."""
    problems: dict[str, str] = {}
    holders: dict[int, list[str]] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for attr, var in vars(node).items():
                if isinstance(var, nnx.Param):
                    holders.setdefault(id(var), []).append(paths.join(*map(str, path), attr))
        if isinstance(node, _REWRITERS):
            inside = paths.join(*map(str, path), "")
            problems |= {
                leaf: f"{leaf}: {type(node).__name__} rewrites the parameters inside it at every call"
                for leaf in leaves
                if not inside or leaf.startswith(f"{inside}.")
            }
    for leaf in leaves:
        module, attr = owners[leaf]
        also = [path for path in holders.get(id(vars(module)[attr]), []) if path != leaf]
        if also:  # the adapter would be in one module only, a merged weight in all
            problems[leaf] = f"{leaf}: several modules hold this very weight, also as {', '.join(also)}"
        if attr == "kernel" and known(module) is not None:
            continue
        # An adapter's own dropout keeps random state too, and runs outside the layer's call.
        inside = [v for path, v in nnx.iter_graph(module) if DROPOUT not in path]
        # Random streams that the call does not draw from (MaxText's layers hold one) do no harm; Flax refuses a draw.
        state = [v for v in inside if isinstance(v, nnx.Variable) and not isinstance(v, nnx.Param | nnx.RngState)]
        if state:
            kinds = ", ".join(sorted({type(v).__name__ for v in state}))
            problems[leaf] = f"{leaf}: {base_class(module).__name__} keeps state besides its parameters ({kinds})"
    return problems


# ---------------------------------------------------------------- lines for leaves without one


@dataclasses.dataclass(frozen=True)
class Traced:
    """What one call showed of a custom layer's weight: its axes, and the shape that the layer itself sees."""

    axes: Axes
    shape: tuple[int, ...]


def _find_stack(
    leaf: str, shape: tuple[int, ...], plain: tuple[int, ...], stack_axes: Sequence[int] | None
) -> tuple[int, ...]:
    """Which axes of a leaf stack layers, seeing the shape its own layer gives it."""
    extra = len(shape) - len(plain)
    if extra == 0:
        return ()
    if stack_axes is not None and len(stack_axes) == extra:
        chosen = tuple(sorted(a % len(shape) for a in stack_axes))
        if tuple(size for i, size in enumerate(shape) if i not in chosen) == plain:
            return chosen
        raise AttachError(f"{leaf!r} has shape {shape}, which is not {plain} stacked on stack_axes={tuple(stack_axes)}")
    candidates = [i for i in range(len(shape)) if extra == 1 and shape[:i] + shape[i + 1 :] == plain]
    if len(candidates) == 1:
        return (candidates[0],)
    raise AttachError(
        f"{leaf!r} has shape {shape} where its layer alone has {plain}:"
        " say which axis stacks the layers, stack_axes=(0,)"
    )


def class_lines(
    owners: Mapping[str, Owner],
    keymap: KeyMap,
    stack_axes: Sequence[int] | None = None,
    traced: Mapping[str, Traced] | None = None,
) -> list[Weight]:
    """Lines for the leaves a table does not cover, from what their class or a trace says."""
    lines: list[Weight] = []
    for leaf, (module, attr) in owners.items():
        shape = tuple(vars(module)[attr].shape)
        if traced is not None and leaf in traced:
            found = traced[leaf]
            lines.append(line_for(leaf, shape, found.axes, _find_stack(leaf, shape, found.shape, stack_axes)))
            continue
        site = keymap.site(leaf)
        if site is not None and len(site.weight.left) == len(shape):
            continue
        try:
            found = said(module, attr)
        except AttachError:
            continue  # an equation no adapter fits; an error only if it is targeted
        if found is not None:
            stack = _find_stack(leaf, shape, found.shape, stack_axes)
            lines.append(line_for(leaf, shape, found.axes, stack, found.kind, found.groups))
    return lines


def custom(owners: Mapping[str, Owner], leaves: Iterable[str]) -> list[str]:
    """Those of these leaves whose class says nothing of their axes, so that only a trace can."""
    picked = [(leaf, *owners[leaf]) for leaf in leaves]
    return [
        leaf
        for leaf, m, attr in picked
        if attr != "bias" and len(vars(m)[attr].shape) >= 2 and not _speaks(m, attr)
    ]


def _speaks(module: nnx.Module, attr: str) -> bool:
    try:
        return said(module, attr) is not None
    except AttachError:
        return True  # of an equation that no adapter fits


def never_linear(owner: Owner) -> bool:
    """Whether the leaf's class is one of Flax's own that "all-linear" does not mean."""
    return base_class(owner[0]).__call__ in [cls.__call__ for cls in _NEVER_LINEAR]


# ---------------------------------------------------------------- abstract calls

Args = Sequence[Any]
Recorder = Callable[[str, str, type[nnx.Module], Callable[..., Any]], Callable[..., Any]]


def _instrumented(
    model: nnx.Module, leaves: Sequence[str], recorder: Recorder, args: Args
) -> tuple[Callable[[Mapping[str, Any]], list[Any]], dict[str, Any]]:
    """`(f, inputs)`: `f(inputs)` calls a copy of the model with the owners of `leaves` under `recorder`'s call.

    Inputs are every array of the model, under its leaf's path where it is one of `leaves`, and the arrays
    among `args`; other arguments stay what they are.
    """
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = [paths.join(*map(str, path)) for path, _ in flat]
    inputs: dict[str, Any] = {}
    for name, (_, var) in zip(names, flat, strict=True):
        inputs[name] = var.get_value() if isinstance(var, nnx.Variable) else var
    values, tree = jax.tree.flatten(tuple(args))
    moving = {f"~{i}": v for i, v in enumerate(values) if isinstance(v, jax.Array | jax.ShapeDtypeStruct)}

    def f(given: Mapping[str, Any]) -> list[Any]:
        filled = [
            (path, var.copy(given[name]) if isinstance(var, nnx.Variable) else given[name])
            for name, (path, var) in zip(names, flat, strict=True)
        ]
        copy: Any = nnx.merge(graphdef, nnx.from_flat_state(filled))
        for leaf, (module, attr) in base_leaves(copy).items():
            if leaf in leaves:
                base = base_class(module)
                body = {name: recorder(leaf, attr, base, f) for name, f in entry_points(base).items()}
                swap(module, type(base.__name__, (base,), body))
        out = copy(*tree.unflatten([given.get(f"~{i}", v) for i, v in enumerate(values)]))
        return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

    return f, inputs | moving


def traced_axes(
    model: nnx.Module, owners: Mapping[str, Owner], args: Args, wanted: Sequence[str], required: bool
) -> tuple[dict[str, Traced], set[str]]:
    """Axis roles of leaves held by custom layers, from one abstract call of the model.

    Also the leaves that were used, but not in one product. Raises `AttachError`, listing them, if there are
    any and all are `required`; else those that never were used are in neither result.
    """
    blocked = obstacles(model, owners, wanted)
    if blocked and required:
        raise AttachError("these layers cannot carry the adapter:\n" + paths.listing(blocked.values()))
    wanted = [leaf for leaf in wanted if leaf not in blocked]
    if not wanted:
        return {}, set()
    found: dict[str, Traced] = {}
    problems: dict[str, str] = {}

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            def call(weights: Mapping[str, Any], *args: Any) -> Any:
                return f(view(self, base, weights), *args, **kwargs)

            weight = vars(self)[attr].get_value()
            try:
                now = Traced(trace.roles(call, {attr: weight}, attr, *args), tuple(weight.shape))
                if found.setdefault(leaf, now) != now:
                    problems[leaf] = f"one call shows {found[leaf]}, another {now}"
            except AttachError as error:
                problems[leaf] = str(error)
            return f(view(self, base, {}), *args, **kwargs)

        return __call__

    run, inputs = _instrumented(model, wanted, recorder, args)
    jax.eval_shape(run, inputs)
    never = "its module's __call__ never ran with these inputs"
    unclear = {leaf: problems.get(leaf, never) for leaf in wanted if leaf in problems or leaf not in found}
    if unclear and required:
        listed = [f"{leaf}: {why}" for leaf, why in unclear.items()]
        raise AttachError("the axis roles of these weights could not be traced:\n" + paths.listing(listed))
    return {leaf: traced for leaf, traced in found.items() if leaf not in unclear}, set(problems)


def notes(model: nnx.Module, adapted: Mapping[str, trace.Hook], args: Args) -> dict[str, str]:
    """How the weight of each custom layer is followed, `{leaf: note}`, seeing one abstract call of the model."""
    found: dict[str, str] = {}
    owners = base_leaves(model)
    traced = custom(owners, adapted)

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            def call(weights: Mapping[str, Any], *args: Any) -> Any:
                return f(view(self, base, weights), *args, **kwargs)

            uses = trace.uses(call, {attr: vars(self)[attr].get_value()}, *args)[attr]
            found[leaf] = trace.note(base.__name__, uses, adapted[leaf])
            return f(view(self, base, {}), *args, **kwargs)

        return __call__

    run, inputs = _instrumented(model, traced, recorder, args)
    jax.eval_shape(run, inputs)
    never = {leaf: f"{base_class(owners[leaf][0]).__name__}, not called with these inputs" for leaf in traced}
    return never | found


def check_calls(model: nnx.Module, adapted: Mapping[str, trace.Hook], dropped: Sequence[str], args: Args) -> None:
    """Refuse what an adapter cannot follow, seeing one abstract call of the model.

    That is a weight read outside its own module's call, and dropout (`dropped`) on a weight that is used
    otherwise than in a product along its roles.
    """
    uneven: dict[str, str] = {}

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            weight = vars(self)[attr].get_value()
            alias = jnp.zeros(weight.shape, weight.dtype)  # what the module itself reads counts for nothing
            if leaf in dropped and known(self) is None:

                def call(weights: Mapping[str, Any], *args: Any) -> Any:
                    return f(view(self, base, weights), *args, **kwargs)

                stray = trace.strays(trace.uses(call, {attr: alias}, *args)[attr], adapted[leaf])
                if stray:
                    uneven[leaf] = ", ".join(stray)

            return f(view(self, base, {attr: alias}), *args, **kwargs)

        return __call__

    run, inputs = _instrumented(model, list(adapted), recorder, args)
    used = live(run, inputs)
    outside = [leaf for leaf in adapted if used[leaf]]
    if outside:
        raise AttachError(
            "these weights are read outside their own module's call, where an adapter cannot follow:\n"
            + paths.listing(outside)
            + "\nLeave them out with exclude_modules, or let the reader call the module"
        )
    if uneven:
        raise AttachError(
            "dropout was asked for where the weight is used in a way that only the effective weight can follow:\n"
            + paths.listing(f"{leaf}: {why}" for leaf, why in uneven.items())
            + "\nSet lora_dropout=0.0, or leave these out with exclude_modules"
        )
