"""Adapters on NNX models, in place: a layer's class is swapped for a run-time subclass, and the adapter's
variables hang on the layer. Base paths, sharing and values stay as they are; `detach` undoes it.

    layer.kernel                       as before
    layer.lora["default"]["kernel"]    {"lora_A": AdapterParam, "lora_B": AdapterParam}
    layer.active_adapters              ("default",)
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxadapt import bind, layers, methods, paths, trace
from jaxadapt.adapter import Adapter, Recipe, collection_name
from jaxadapt.axes import Axes, Use
from jaxadapt.errors import AttachError
from jaxadapt.keymap import KeyMap, Weight, line_for
from jaxadapt.liveness import live
from jaxadapt.methods import Applied, Several

ACTIVE = "active_adapters"
_DROPOUT = "adapter_dropout"


class AdapterParam(nnx.LoRAParam):
    """A trained adapter parameter: the filter for gradients, optimizers and persistence.

    >>> from flax import nnx
    >>> issubclass(AdapterParam, nnx.LoRAParam)
    True
    """


BaseParam = nnx.All(nnx.Param, nnx.Not(AdapterParam))
"""The filter for the frozen rest. (`nnx.Param` alone catches adapters too, and would train the base.)"""


@dataclasses.dataclass(frozen=True, eq=False)
class Attached:
    """What an `AdapterParam` carries as metadata: its recipe, and what its site's arithmetic needs."""

    recipe: Recipe
    axes: Axes
    static: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.recipe, self.axes, self.static))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Attached)
            and self.recipe == other.recipe
            and self.axes == other.axes
            and self.static == other.static
        )


# ---------------------------------------------------------------- the run-time subclass


class _AdaptedMeta(type(nnx.Module)):
    """The class of adapted classes; pickles one as the recipe to make it again."""

    base: type[nnx.Module]


@functools.cache
def adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of a layer class whose call applies the active adapters."""

    def __call__(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        return _call(self, base, args, kwargs)

    body = {"__call__": __call__, "base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return _AdaptedMeta(f"Adapted{base.__name__}", (base,), body)


copyreg.pickle(_AdaptedMeta, lambda cls: (adapted_class, (cls.base,)))  # pyright: ignore[reportArgumentType]


def _base_class(module: nnx.Module) -> type[nnx.Module]:
    cls = type(module)
    return cls.base if isinstance(cls, _AdaptedMeta) else cls


def _swap(module: nnx.Module, cls: type[nnx.Module]) -> None:
    # Plain assignment would go through nnx's attribute handling and change the graph definition.
    object.__setattr__(module, "__class__", cls)


# ---------------------------------------------------------------- layer classes Flax ships


@dataclasses.dataclass(frozen=True)
class _Known:
    axes: Callable[[Any], Axes]
    shape: Callable[[Any], tuple[int, ...]]
    use: Callable[[Any, Any, Sequence[Any], Axes], Use]


def _general(m: Any) -> Axes:
    return layers.general_axes(len(m.in_features), len(m.out_features), len(m.batch_axis))


def _einsum_str(m: Any, args: Sequence[Any]) -> str:
    return args[0] if args and args[0] is not None else m.einsum_str


_KNOWN: dict[type[nnx.Module], _Known] = {
    nnx.Linear: _Known(
        lambda m: layers.DENSE,
        lambda m: (m.in_features, m.out_features),
        lambda m, x, _, axes: layers.dense_use(x.ndim, axes),
    ),
    nnx.LinearGeneral: _Known(
        _general,
        lambda m: (*m.batch_axis.values(), *m.in_features, *m.out_features),
        lambda m, x, _, axes: layers.general_use(x.ndim, axes.rank, m.axis, tuple(m.batch_axis), axes),
    ),
    nnx.Einsum: _Known(
        lambda m: layers.einsum_axes(m.einsum_str),
        lambda m: tuple(m.kernel_shape),
        lambda m, x, args, axes: layers.einsum_use(_einsum_str(m, args), x.ndim, axes),
    ),
}


def _known(module: nnx.Module) -> _Known | None:
    """How a layer uses its kernel, if its class says so; a subclass with a call of its own is traced instead."""
    call = _base_class(module).__call__
    return next((known for cls, known in _KNOWN.items() if call is cls.__call__), None)


def how(module: nnx.Module) -> str:
    """How a layer's weight is followed, for `summary`: by its class, or by tracing its call."""
    base = _base_class(module).__name__
    return f"{base}'s own call" if _known(module) is not None else f"traced {base}"


# ---------------------------------------------------------------- calling


def _hooks(module: nnx.Module) -> dict[str, Applied | Several]:
    """`{leaf: hook}` of the active adapters of one layer."""
    found: dict[str, list[Applied]] = {}
    own = vars(module)
    for name in own.get(ACTIVE, ()):
        for method in methods.METHODS.values():
            held = own.get(method.peft_type.lower())
            if held is None or name not in held:
                continue
            for leaf, tensors in held[name].items():
                params = {t: var.get_value() for t, var in tensors.items()}
                attached = next(iter(tensors.values())).get_metadata()["adapter"]
                drop = own[_DROPOUT][name] if _DROPOUT in own and name in own[_DROPOUT] else None
                drop = None if drop is None or drop.deterministic else drop
                hook = Applied(method, attached.static, params, attached.axes, drop)
                found.setdefault(leaf, []).append(hook)
    return {leaf: hooks[0] if len(hooks) == 1 else Several(tuple(hooks)) for leaf, hooks in found.items()}


def _view(module: nnx.Module, base: type[nnx.Module], values: Mapping[str, Any]) -> Any:
    """The layer as it was before, with other values for some of its parameters."""
    view = object.__new__(base)
    vars(view).update(vars(module))
    for leaf, value in values.items():
        vars(view)[leaf] = nnx.Param(value)
    return view


def _call(module: Any, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hooks = _hooks(module)
    if not hooks:
        return base.__call__(module, *args, **kwargs)
    known = _known(module)
    if known is not None:
        if "inputs" in kwargs:
            args, kwargs = (kwargs["inputs"], *args), {k: v for k, v in kwargs.items() if k != "inputs"}
        x, *rest = args
        ((_, hook),) = hooks.items()
        use = known.use(module, x, rest or [kwargs.get("einsum_str")], hook.axes)
        x = hook.input(use, x)
        return hook.output(use, x, base.__call__(module, x, *rest, **kwargs))
    bias = vars(module).get("bias")
    changed = {"bias": next(iter(hooks.values())).bias(bias.get_value())} if isinstance(bias, nnx.Param) else {}

    def call(weights: Mapping[str, Any], *args: Any) -> Any:
        return base.__call__(_view(module, base, {**changed, **weights}), *args, **kwargs)

    weights = {leaf: vars(module)[leaf].get_value() for leaf in hooks}
    return trace.rewrite(call, weights, hooks, *args)


# ---------------------------------------------------------------- the model's leaves


def base_leaves(model: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """`{dotted path: (owner, attribute)}` of every base parameter held directly by a module, once each."""
    out: dict[str, tuple[nnx.Module, str]] = {}
    seen: set[int] = set()
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for attr, var in vars(node).items():
                if isinstance(var, nnx.Param) and not isinstance(var, AdapterParam) and id(var) not in seen:
                    seen.add(id(var))
                    out[paths.join(*map(str, path), attr)] = (node, attr)
    return dict(sorted(out.items(), key=lambda item: _natural(item[0])))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in path.split(".")]


def base_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """`{dotted path: shape}` of the base parameters; works on abstract models too."""
    return {leaf: tuple(vars(m)[attr].shape) for leaf, (m, attr) in base_leaves(model).items()}


def _find_stack(
    leaf: str, shape: tuple[int, ...], plain: tuple[int, ...], stack_axes: Sequence[int] | None
) -> tuple[int, ...]:
    """Which axes of a kernel stack layers, seeing the shape its own class gives it."""
    extra = len(shape) - len(plain)
    if extra == 0:
        return ()
    if stack_axes is not None and len(stack_axes) == extra:
        return tuple(sorted(a % len(shape) for a in stack_axes))
    candidates = [i for i in range(len(shape)) if extra == 1 and shape[:i] + shape[i + 1 :] == plain]
    if len(candidates) == 1:
        return (candidates[0],)
    raise AttachError(
        f"{leaf!r} has shape {shape} where its layer alone has {plain}: say which axis stacks the layers, stack_axes=(0,)"
    )


def class_lines(
    model: nnx.Module, keymap: KeyMap, stack_axes: Sequence[int] | None = None, traced: Mapping[str, Axes] | None = None
) -> list[Weight]:
    """Lines for the leaves a table does not cover, from what their class or a trace says."""
    lines: list[Weight] = []
    for leaf, (module, attr) in base_leaves(model).items():
        shape = tuple(vars(module)[attr].shape)
        site = keymap.site(leaf)
        if site is not None and len(site.weight.left) == len(shape):
            continue
        known = _known(module) if attr == "kernel" else None
        if known is not None:
            axes = known.axes(module)
            lines.append(line_for(leaf, shape, axes, _find_stack(leaf, shape, known.shape(module), stack_axes)))
        elif traced and leaf in traced:
            axes = traced[leaf]
            extra = len(shape) - axes.rank
            stack = tuple(sorted(stack_axes)) if stack_axes is not None else tuple(range(extra))
            lines.append(line_for(leaf, shape, axes, stack))
    return lines


def traced_axes(model: nnx.Module, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, Axes]:
    """Axis roles of leaves held by custom layers, from one abstract call of the model."""
    found: dict[str, Axes] = {}
    problems: list[str] = []
    graphdef, state = nnx.split(model)

    def recorder(leaf: str, attr: str, base: Any) -> type[nnx.Module]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            def call(weights: Mapping[str, Any], *args: Any) -> Any:
                return base.__call__(_view(self, base, weights), *args, **kwargs)

            try:
                found[leaf] = trace.roles(call, {attr: vars(self)[attr].get_value()}, attr, *args)
            except AttachError as error:
                problems.append(f"{leaf}: {error}")
            return base.__call__(self, *args, **kwargs)

        return type(f"Recorded{base.__name__}", (base,), {"__call__": __call__})

    def run(state: Any, args: Sequence[Any]) -> None:
        copy = nnx.merge(graphdef, state)
        for leaf, (module, attr) in base_leaves(copy).items():
            if leaf in wanted:
                _swap(module, recorder(leaf, attr, _base_class(module)))
        copy(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    jax.eval_shape(run, state, tuple(args))
    missing = [leaf for leaf in wanted if leaf not in found and not any(p.startswith(f"{leaf}:") for p in problems)]
    problems += [f"{leaf}: its module's __call__ never ran with these inputs" for leaf in missing]
    if problems:
        raise AttachError("the axis roles of these weights could not be traced:\n" + paths.listing(problems))
    return found


def check_reads(model: nnx.Module, bounds: Sequence[bind.Bound], args: Sequence[Any]) -> None:
    """Refuse weights that are read outside their own module's call, where an adapter cannot follow."""
    graphdef, state = nnx.split(model)
    adapted = {b.leaf for b in bounds}

    def shielded(attr: str, base: Any, alias: Any) -> type[nnx.Module]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return base.__call__(_view(self, base, {attr: alias}), *args, **kwargs)

        return type(f"Shielded{base.__name__}", (base,), {"__call__": __call__})

    def run(weights: Mapping[str, Any]) -> Any:
        copy: Any = nnx.merge(graphdef, state)
        for leaf, (module, attr) in base_leaves(copy).items():
            if leaf in adapted:
                alias = jax.numpy.zeros(weights[leaf].shape, weights[leaf].dtype)
                vars(module)[attr] = nnx.Param(weights[leaf])
                _swap(module, shielded(attr, _base_class(module), alias))
        return [x for x in jax.tree.leaves(copy(*args)) if isinstance(x, jax.Array)]

    specs = {b.leaf: vars(m)[a] for b in bounds for m, a in [base_leaves(model)[b.leaf]]}
    used = live(run, {leaf: jax.ShapeDtypeStruct(v.shape, v.dtype) for leaf, v in specs.items()})
    outside = [leaf for leaf, is_used in used.items() if is_used]
    if outside:
        raise AttachError(
            "these weights are read outside their own module's call, where an adapter cannot follow:\n"
            + paths.listing(outside)
            + "\nLeave them out with exclude_modules, or let the reader call the module"
        )


# ---------------------------------------------------------------- attaching and detaching


def attach(
    model: nnx.Module,
    recipe: Recipe,
    bounds: Sequence[bind.Bound],
    name: str,
    values: Mapping[str, Any],
    rngs: nnx.Rngs | None = None,
) -> None:
    """Hang an adapter's values (`{path: array or spec}`) on a model's layers, and make it active alone."""
    owners = base_leaves(model)
    collection = collection_name(recipe.config)
    _check(bounds, owners, collection)
    method = methods.of(recipe.config)
    for bound in bounds:
        module, attr = owners[bound.leaf]
        attached = Attached(recipe, bound.axes, bound.static)
        tensors = {t.name: AdapterParam(values[f"{bound.leaf}.{t.name}"], adapter=attached) for t in bound.tensors}
        held = _child(module, collection)
        if name not in held:
            held[name] = nnx.Dict()
        held[name][attr] = nnx.Dict(tensors)
        rate = method.dropout(bound.static)
        if rate:
            _child(module, _DROPOUT)[name] = _dropout(rate, rngs, bound)
        if not isinstance(type(module), _AdaptedMeta):
            _swap(module, adapted_class(type(module)))
            setattr(module, ACTIVE, ())
    activate(model, (name,))


def _child(module: Any, attr: str) -> Any:
    if attr not in vars(module):
        setattr(module, attr, nnx.Dict())
    return vars(module)[attr]


def _check(
    bounds: Sequence[bind.Bound], owners: Mapping[str, tuple[nnx.Module, str]], collection: str
) -> None:
    problems: list[str] = []
    for bound in bounds:
        module, attr = owners[bound.leaf]
        known = _known(module)
        if known is not None and attr == "kernel":
            axes, mine = known.axes(module), bound.axes
            # A table may order axes otherwise, or know that an output axis is a fused one; never which is an input.
            if set(axes.inn) != set(mine.inn):
                problems.append(f"{bound.leaf}: the table {mine} contradicts the layer's own {axes}")
        elif any(isinstance(v, nnx.Variable) and not isinstance(v, nnx.Param) for v in vars(module).values()):
            problems.append(f"{bound.leaf}: {_base_class(module).__name__} keeps state besides its parameters")
        if collection in vars(module) and not isinstance(type(module), _AdaptedMeta):
            problems.append(f"{bound.leaf}: its module has an attribute {collection!r} of its own")
    if problems:
        raise AttachError("these layers cannot carry the adapter:\n" + paths.listing(problems))


def _dropout(rate: float, rngs: nnx.Rngs | None, bound: bind.Bound) -> nnx.Dropout:
    if rngs is None:
        return nnx.Dropout(rate, deterministic=True)
    stack = bound.site.stack
    if not stack:
        return nnx.Dropout(rate, rngs=rngs)
    if stack != (0,):
        raise AttachError(
            f"{bound.leaf!r} stacks its layers on axis {stack}; lora_dropout needs axis 0, where random states stack"
        )
    count = bound.entries[0].shape[0]
    return nnx.vmap(lambda r: nnx.Dropout(rate, rngs=r))(rngs.fork(split=count))


def adapted(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """`(path, layer)` of every adapted layer."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and isinstance(type(node), _AdaptedMeta):
            yield paths.join(*map(str, path)), node


def names(model: nnx.Module) -> tuple[str, ...]:
    """The names of the adapters a model carries."""
    found: dict[str, None] = {}
    for _, layer in adapted(model):
        for method in methods.METHODS.values():
            found |= dict.fromkeys(vars(layer).get(method.peft_type.lower(), ()))
    return tuple(found)


def activate(model: nnx.Module, chosen: Sequence[str]) -> None:
    """Make exactly these adapters active, wherever they sit."""
    present = names(model)
    unknown = [n for n in chosen if n not in present]
    if unknown:
        raise AttachError(f"no adapter is called {', '.join(map(repr, unknown))}; this model has {list(present)}")
    for _, layer in adapted(model):
        setattr(layer, ACTIVE, tuple(chosen))


def active(model: nnx.Module) -> tuple[str, ...]:
    """The names of the active adapters."""
    found: dict[str, None] = {}
    for _, layer in adapted(model):
        found |= dict.fromkeys(getattr(layer, ACTIVE))
    return tuple(found)


def delete(model: nnx.Module, name: str) -> None:
    """Remove one adapter; a layer that carries no other gets its own class back."""
    activate(model, [n for n in active(model) if n != name])
    for _, layer in list(adapted(model)):
        own = vars(layer)
        for attr in [m.peft_type.lower() for m in methods.METHODS.values()] + [_DROPOUT]:
            if attr in own and name in own[attr]:
                del own[attr][name]
                if not own[attr]:
                    delattr(layer, attr)
        if not any(m.peft_type.lower() in vars(layer) for m in methods.METHODS.values()):
            delattr(layer, ACTIVE)
            _swap(layer, _base_class(layer))


# ---------------------------------------------------------------- values out and in


def variables(tree: nnx.Module | nnx.State) -> dict[str, dict[str, Any]]:
    """`{adapter name: {path: AdapterParam}}` of a model or a state."""
    state = tree if isinstance(tree, nnx.State) else nnx.state(tree, AdapterParam)
    out: dict[str, dict[str, Any]] = {}
    for path, var in nnx.to_flat_state(state):
        if isinstance(var, AdapterParam) and "adapter" in var.get_metadata():
            *module, _, name, leaf, tensor = map(str, path)
            out.setdefault(name, {})[paths.join(*module, leaf, tensor)] = var
    return out


def extract(tree: nnx.Module | nnx.State, name: str) -> Adapter:
    """The adapter called `name`, as a value."""
    found = variables(tree)
    if name not in found:
        raise AttachError(f"there is no adapter {name!r} here; found {sorted(found) or 'none'}")
    recipes = {var.get_metadata()["adapter"].recipe for var in found[name].values()}
    if len(recipes) > 1:
        raise AttachError(f"the adapter {name!r} carries {len(recipes)} different configurations; attach it anew")
    recipe = recipes.pop()
    values = {path: found[name][path].get_value() for path in sorted(found[name], key=_natural)}
    return Adapter(recipe.config, paths.unflatten(values), recipe.keymap)


def inject(adapter: Adapter, tree: nnx.Module | nnx.State, name: str) -> None:
    """Set the values of an attached adapter; structure, shapes and configuration must agree."""
    present = variables(tree).get(name)
    if present is None:
        raise AttachError(f"there is no adapter {name!r} to inject into; adapt the model first, or use load")
    new = adapter.flat()
    problems = [f"{p}: missing" for p in present if p not in new] + [f"{p}: unexpected" for p in new if p not in present]
    problems += [
        f"{p}: expected {tuple(present[p].shape)}, found {tuple(v.shape)}"
        for p, v in new.items()
        if p in present and tuple(v.shape) != tuple(present[p].shape)
    ]
    recipe = next(iter(present.values())).get_metadata()["adapter"].recipe
    if recipe.config != adapter.config:
        problems.append("the configuration differs from the attached one's")
    if problems:
        raise AttachError(f"the adapter does not fit {name!r}:\n" + paths.listing(problems))
    for path, value in new.items():
        present[path].set_value(value)
