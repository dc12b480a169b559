"""How an NNX model holds and uses its weights: who owns which leaf, what its axes mean, and what stands in the way."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import Axes, Use
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.generic import entry_from_axes
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models import layers
from jaxadapt.models.nnx.params import AdapterParam, LayerNumber

DROPOUT = "adapter_dropout"  # the attribute that holds an adapted layer's dropouts
_REWRITERS = (nnx.WeightNorm, nnx.SpectralNorm)
"""Modules that change the parameters inside them at every call, an adapter's among them."""
_NEVER_LINEAR = (nnx.Embed, nnx.Conv, nnx.ConvTranspose)


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


def quantized_params(module: nnx.Module) -> dict[str, Any]:
    """`{attribute: value}` of the layer's parameters that are quantised."""
    held = {attr: var.get_value() for attr, var in vars(module).items() if isinstance(var, nnx.Param)}
    return {attr: value for attr, value in held.items() if quantized.is_quantized(value)}


def plain_view(module: nnx.Module, base: type[nnx.Module], values: Mapping[str, Any]) -> Any:
    """The layer as `base` alone, with other values for some of its parameters, and none of them quantised."""
    out = object.__new__(base)
    own = vars(out)
    own.update(vars(module))
    for leaf, value in {**quantized_params(module), **values}.items():
        value = quantized.to_dense(value)
        own[leaf] = own[leaf].copy(value)  # keeps the variable's type and metadata
    return out


State = dict[str, Any]


def layer_state(module: nnx.Module) -> State:
    """`{path: variable}` of what a layer may change when it is called: all that is no parameter, random streams too."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param)))
    held = {paths.join(*map(str, path)): var for path, var in flat if DROPOUT not in map(str, path)}
    return {path: v for path, v in held.items() if isinstance(v, nnx.Variable) and not isinstance(v, LayerNumber)}


def run_pure(
    module: nnx.Module,
    base: type[nnx.Module],
    f: Callable[..., Any],
    values: Mapping[str, Any],
    held: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """`f(module, *args, **kwargs)`, pure: with other values for some parameters, and these for the layer's state.

    Returns the output, and what of the state has changed. A variable belongs to the trace it is made in, so a layer
    with state is made anew here. Raises `AttachError` where the call adds variables to it.
    """
    inner = plain_view(module, base, values)
    if not held:
        return f(inner, *args, **kwargs), {}
    graph, whole = nnx.split(inner)
    flat = {paths.join(*map(str, path)): (path, var) for path, var in nnx.to_flat_state(whole)}
    put = [(path, var.copy(held[name]) if name in held else var) for name, (path, var) in flat.items()]
    made = nnx.merge(graph, nnx.from_flat_state(put))
    y = f(made, *args, **kwargs)
    new = layer_state(made)
    more = [path for path in new if path not in held]
    if more:
        raise AttachError(
            f"{base.__name__} adds variables while it is called ({', '.join(more)}), where an adapter cannot follow;"
            " make them in its __init__, or leave the layer out with exclude_modules"
        )
    return y, {path: x for path, var in new.items() if (x := var.get_value()) is not held[path]}


# ---------------------------------------------------------------- layer classes Flax ships


@dataclasses.dataclass(frozen=True)
class KernelUse:
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
        if set(said.in_axes) != set(adapted.in_axes) or set(said.batch_axes) != set(adapted.batch_axes):
            raise AttachError(f"an Einsum was adapted as {equation!r}, and is called as {rest[0]!r}")
        equation = rest[0]
    return layers.einsum_use(equation, x.ndim, axes)


_KNOWN: dict[type[nnx.Module], KernelUse] = {
    nnx.Linear: KernelUse(
        lambda m: layers.DENSE,
        lambda m: (m.in_features, m.out_features),
        lambda m, x, _, axes: layers.dense_use(x.ndim, axes),
    ),
    nnx.LinearGeneral: KernelUse(
        _general,
        lambda m: (*m.batch_axis.values(), *m.in_features, *m.out_features),
        lambda m, x, _, axes: layers.general_use(x.ndim, axes.rank, m.axis, tuple(m.batch_axis), axes),
    ),
    nnx.Einsum: KernelUse(
        lambda m: layers.einsum_axes(m.einsum_str),
        lambda m: tuple(m.kernel_shape),
        _einsum_use,
    ),
}


@dataclasses.dataclass(frozen=True)
class KernelRoles:
    """What a layer class says of one of its weights: axes, own shape (not stacked), kind and groups of a line."""

    axes: Axes
    shape: tuple[int, ...]
    kind: str = "linear"
    groups: int = 1


def kernel_roles(module: nnx.Module, attr: str) -> KernelRoles | None:
    """What a class that Flax ships says of a weight; `AttachError` for an equation that no adapter fits."""
    call = base_class(module).__call__
    m: Any = module
    if attr == "kernel" and call is nnx.Conv.__call__ and m.mask is None:
        shape = tuple(m.kernel_shape)
        return KernelRoles(layers.conv_axes(len(shape)), shape, "conv", m.feature_group_count)
    if attr == "embedding" and call is nnx.Embed.__call__:
        return KernelRoles(layers.EMBEDDING, (m.num_embeddings, m.features), "embedding")
    by_class = kernel_use(module) if attr == "kernel" else None
    return None if by_class is None else KernelRoles(by_class.axes(module), by_class.shape(module))


def kernel_use(module: nnx.Module) -> KernelUse | None:
    """How a layer uses its kernel, if its class says so; a subclass with a call of its own is traced instead."""
    call = base_class(module).__call__
    return next((known for cls, known in _KNOWN.items() if call is cls.__call__), None)


def describe_use(module: nnx.Module) -> str:
    """How a layer's weight is followed, for `summary`: by its class, or by tracing its call."""
    base = base_class(module).__name__
    return f"{base}'s own call" if kernel_use(module) is not None else f"traced {base}"


# ---------------------------------------------------------------- the model's leaves

Owner = tuple[nnx.Module, str]


def natural_key(path: str) -> list[tuple[int, str]]:
    """Sorts "layers.2" before "layers.10"."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in path.split(".")]


@dataclasses.dataclass(frozen=True)
class ModelWalk:
    """A model walked once: every module with its dotted path, and `{path: (owner, attribute)}` of base leaves."""

    modules: Sequence[tuple[str, nnx.Module]]
    leaves: Mapping[str, Owner]
    loose: Mapping[str, tuple[int, ...]]
    """`{path: shape}` of base parameters that no module holds itself: in a dict, or Linen's tree (`bridge.ToNNX`)."""


def walk_model(model: nnx.Module) -> ModelWalk:
    """Every module, and every base parameter held directly by one, once each."""
    modules: list[tuple[str, nnx.Module]] = []
    leaves: dict[str, Owner] = {}
    params: list[tuple[Sequence[Any], nnx.Param[Any]]] = []
    seen: set[int] = set()
    for keys, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and not isinstance(node, AdapterParam):
            params.append((keys, node))
        if isinstance(node, nnx.Module):
            path = paths.join(*map(str, keys))
            modules.append((path, node))
            for attr, var in vars(node).items():
                if isinstance(var, nnx.Param) and not isinstance(var, AdapterParam) and id(var) not in seen:
                    seen.add(id(var))
                    leaves[paths.join(path, attr)] = (node, attr)
    loose = {paths.join(*map(str, keys)): tuple(var.shape) for keys, var in params if id(var) not in seen}
    return ModelWalk(modules, dict(sorted(leaves.items(), key=lambda item: natural_key(item[0]))), loose)


def base_leaves(model: nnx.Module) -> Mapping[str, Owner]:
    """`{dotted path: (owner, attribute)}` of every base parameter held directly by a module, once each."""
    return walk_model(model).leaves


def base_shapes(owners: Mapping[str, Owner]) -> dict[str, tuple[int, ...]]:
    """`{dotted path: shape}` of the base parameters; works on abstract models too."""
    return {leaf: tuple(vars(m)[attr].shape) for leaf, (m, attr) in owners.items()}


def base_values(owners: Mapping[str, Owner]) -> dict[str, Any]:
    """`{dotted path: array or spec}` of the base parameters."""
    return {leaf: vars(m)[attr].get_value() for leaf, (m, attr) in owners.items()}


def is_abstract(owners: Mapping[str, Owner]) -> bool:
    """Whether a model has shapes where its arrays will be (`nnx.eval_shape`)."""
    return any(isinstance(vars(m)[attr].get_value(), jax.ShapeDtypeStruct) for m, attr in owners.values())


def obstacles(walked: ModelWalk, leaves: Sequence[str], saved: Collection[str] = ()) -> dict[str, str]:
    """`{leaf: problem}` of those of these leaves on which no adapter can be, whatever its method.

    `saved` are those of modules that are saved whole, which their state would have to be too.
    """
    problems: dict[str, str] = {}
    holders: dict[int, list[str]] = {}
    for path, node in walked.modules:
        for attr, var in vars(node).items():
            if isinstance(var, nnx.Param):
                holders.setdefault(id(var), []).append(paths.join(path, attr))
        if isinstance(node, _REWRITERS):
            problems |= {
                leaf: f"{leaf}: {type(node).__name__} rewrites the parameters inside it at every call"
                for leaf in leaves
                if not path or leaf.startswith(f"{path}.")
            }
    for leaf in leaves:
        module, attr = walked.leaves[leaf]
        also = [path for path in holders.get(id(vars(module)[attr]), []) if path != leaf]
        if also:  # the adapter would be in one module only, a merged weight in all
            what = f"{leaf}: several modules hold this very weight, also as {', '.join(also)}"
            problems[leaf] = f"{what}; share the module instead of the weight, or leave it out"
        kinds = (
            {type(v) for v in layer_state(module).values() if not isinstance(v, nnx.RngState)}
            if leaf in saved
            else set()
        )
        if kinds:
            listed = ", ".join(sorted(kind.__name__ for kind in kinds))
            name = base_class(module).__name__
            problems[leaf] = f"{leaf}: {name} keeps state besides its parameters ({listed}); leave it out"
    return problems


# ---------------------------------------------------------------- lines for leaves without one


@dataclasses.dataclass(frozen=True)
class TracedAxes:
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


def class_entries(
    owners: Mapping[str, Owner],
    keymap: KeyMap,
    stack_axes: Sequence[int] | None = None,
    traced: Mapping[str, TracedAxes] | None = None,
) -> list[Weight]:
    """Lines for the leaves a table does not cover, from what their class or a trace says."""
    lines: list[Weight] = []
    for leaf, (module, attr) in owners.items():
        shape = tuple(vars(module)[attr].shape)
        if traced is not None and leaf in traced:
            found = traced[leaf]
            lines.append(entry_from_axes(leaf, shape, found.axes, _find_stack(leaf, shape, found.shape, stack_axes)))
            continue
        site = keymap.match(leaf)
        if site is not None and len(site.weight.left) == len(shape):
            continue
        try:
            found = kernel_roles(module, attr)
        except AttachError:
            continue  # an equation no adapter fits; an error only if it is targeted
        if found is not None:
            stack = _find_stack(leaf, shape, found.shape, stack_axes)
            lines.append(entry_from_axes(leaf, shape, found.axes, stack, found.kind, found.groups))
    return lines


def custom_leaves(owners: Mapping[str, Owner], leaves: Iterable[str]) -> list[str]:
    """Those of these leaves whose class says nothing of their axes, so that only a trace can."""
    picked = [(leaf, *owners[leaf]) for leaf in leaves]
    return [
        leaf for leaf, m, attr in picked if attr != "bias" and len(vars(m)[attr].shape) >= 2 and not _speaks(m, attr)
    ]


def _speaks(module: nnx.Module, attr: str) -> bool:
    try:
        return kernel_roles(module, attr) is not None
    except AttachError:
        return True  # of an equation that no adapter fits


def never_linear(owner: Owner) -> bool:
    """Whether the leaf's class is one of Flax's own that "all-linear" does not mean."""
    return base_class(owner[0]).__call__ in [cls.__call__ for cls in _NEVER_LINEAR]
