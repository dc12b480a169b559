"""How a Linen model uses its weights, found without running it: roles, stacked axes, obstacles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze
from flax.core.scope import Scope, subtract_filters

from jaxadapt import layers, paths, trace
from jaxadapt.axes import Axes, Use
from jaxadapt.errors import AttachError
from jaxadapt.keymap import GENERIC, KeyMap, Weight, line_for
from jaxadapt.liveness import live

SEP = "~"  # in the name of a leaf laid into `params` for one call; never stored
_MARK = 10_007  # no real layer count: what else a marker's shape shows, a transform added

# ---------------------------------------------------------------- layer classes Flax ships


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _einsum_str(m: Any, rest: Sequence[Any]) -> str:
    return rest[0] if rest and rest[0] is not None else m.einsum_str


def _general_axes(m: Any, _: Sequence[Any]) -> Axes:
    return layers.general_axes(len(_tuple(m.axis)), len(_tuple(m.features)), len(_tuple(m.batch_dims)))


_Roles = Callable[[Any, Sequence[Any]], Axes]
_ToUse = Callable[[Any, Any, Sequence[Any], Axes], Use]
_KNOWN: dict[type[nn.Module], tuple[_Roles, _ToUse]] = {
    nn.Dense: (lambda m, _: layers.DENSE, lambda m, x, _, axes: layers.dense_use(x.ndim, axes)),
    nn.DenseGeneral: (
        _general_axes,
        lambda m, x, _, axes: layers.general_use(
            x.ndim, axes.rank, _tuple(m.axis), _tuple(m.batch_dims), axes
        ),
    ),
    nn.Einsum: (
        lambda m, rest: layers.einsum_axes(_einsum_str(m, rest)),
        lambda m, x, rest, axes: layers.einsum_use(_einsum_str(m, rest), x.ndim, axes),
    ),
}


def known(module: nn.Module, method: str) -> tuple[_Roles, _ToUse] | None:
    """How a layer uses its kernel, if its class says so; a subclass with its own `__call__` is traced."""
    if method != "__call__":
        return None
    owner = next((c for c in type(module).__mro__ if "__call__" in vars(c)), None)
    return _KNOWN.get(owner) if owner is not None else None


# ---------------------------------------------------------------- calls, as an interceptor sees them


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The input of a known layer's call, and its other arguments (an einsum's equation)."""
    if "inputs" in kwargs:
        return kwargs["inputs"], [*args] or [kwargs.get("einsum_str")]
    return args[0], [*args[1:]] or [kwargs.get("einsum_str")]


def with_input(
    x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another input."""
    return (args, {**kwargs, "inputs": x}) if "inputs" in kwargs else ((x, *args[1:]), kwargs)


def owns(context: Any) -> bool:
    """Whether this is a method of the module's class, called on a bound module.

    Not `setup`, and not a function that `nn.scan`, `nn.cond` … run on the module's scope: what such a
    function calls is intercepted in turn.
    """
    name, module = context.method_name, context.module
    mine = any(name in vars(c) for c in type(module).__mro__)
    return mine and name != "setup" and module.scope is not None


def refuse_mapped(context: Any, adapted: Mapping[tuple[str, ...], Iterable[str]]) -> None:
    """Raise if the call shows modules with adapted leaves other variables than the stored ones."""
    module = context.module
    if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
        inner = module.layer_instance.scope
        within = inner.path if inner is not None else None
        hit = [path for path in adapted if within is not None and path[: len(within)] == within]
    else:
        hit = [module.scope.path] if mapped(module.scope) and module.scope.path in adapted else []
    leaves = [".".join((*path, leaf)) for path in hit for leaf in adapted[path]]
    if leaves:
        raise AttachError(f"{', '.join(leaves)}: {MAPPED}; leave the layer out with exclude_modules")


MAPPED = (
    "its weight passes through nn.map_variables (as nn.WeightNorm and nn.SpectralNorm do),"
    " which would change the adapter too"
)


def mapped(scope: Scope) -> bool:
    """Whether a scope shows other variables than the stored ones; flax notes transforms in `debug_path`."""
    return any("map_variables(" in part for part in scope.debug_path)


def direct(module: nn.Module) -> dict[str, Any]:
    """The leaves of "params" that a module's scope holds directly."""
    assert module.scope is not None
    params = module.scope.variables().get("params", {})
    return {k: v for k, v in params.items() if not isinstance(v, Mapping)}


def alone(module: nn.Module, method: str) -> Callable[..., Any]:
    """`f(weights, *args, **kwargs)`: this module's method on its scope, with these values for some leaves.

    Returns the output and the collections it may have changed (never "params"), so that a cache or batch
    statistics kept by the module itself can be written back. Draws the very random numbers the plain call
    would; leaves laid beside the weights are not there.
    """
    scope = module.scope
    assert scope is not None
    mutable = subtract_filters(scope.mutable, "params")

    def call(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        variables: dict[str, Any] = unfreeze(dict(scope.variables()))
        own = {k: v for k, v in variables.get("params", {}).items() if SEP not in k}
        variables["params"] = {**own, **weights}
        # Made inside, because a scope belongs to the trace it is made in.
        mine = Scope(variables, scope.rngs, scope.name, mutable, path=scope.path, flags=scope.flags)
        mine.rng_counters = scope.rng_counters
        y = getattr(module.copy(parent=mine), method)(*args, **kwargs)
        return y, {k: v for k, v in mine.mutable_variables().items() if k != "params"}

    return call


def write_back(scope: Scope, changed: Mapping[str, Any]) -> None:
    """What `alone` returned, into the real scope; inner mappings in place, as other scopes hold them."""

    def update(old: dict[str, Any], new: Mapping[str, Any]) -> None:
        for key, value in new.items():
            inside = old.get(key)
            if isinstance(value, Mapping) and isinstance(inside, dict):
                update(inside, value)
            else:
                old[key] = unfreeze(dict(value)) if isinstance(value, Mapping) else value

    for collection, tree in changed.items():
        for key, value in tree.items():
            inside = scope.get_variable(collection, key)
            if isinstance(value, Mapping) and isinstance(inside, dict):
                update(inside, value)
            else:
                scope.put_variable(
                    collection, key, unfreeze(dict(value)) if isinstance(value, Mapping) else value
                )


# ---------------------------------------------------------------- one abstract init


@dataclasses.dataclass
class Survey:
    """What one abstract `init` showed.

    Args:
        shapes: of every base leaf.
        roles: a known class's or a trace's, by leaf.
        stack: the axes on which each leaf (seen in a call) is stacked.
        vectors: leaves that have fewer than two axes inside their own module.
        unknown: why there are no roles for a leaf; a table may supply them.
        refused: why no adapter can be exact at a leaf, table or not.
        collections: what `init` makes besides "params".
    """

    shapes: dict[str, tuple[int, ...]]
    collections: frozenset[str]
    roles: dict[str, Axes] = dataclasses.field(default_factory=dict[str, Axes])
    stack: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    vectors: set[str] = dataclasses.field(default_factory=set[str])
    unknown: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    refused: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def lines(self, keymap: KeyMap) -> list[Weight]:
        """The lines that the table lacks or, if generic, only guesses; checks the others' stacks."""
        guesses = keymap.name == GENERIC.name
        out: list[Weight] = []
        for leaf, shape in self.shapes.items():
            site = keymap.site(leaf)
            fits = site is not None and len(site.weight.left) == len(shape)
            stack = self.stack.get(leaf)
            if site is not None and fits and not guesses:
                if stack is not None and site.stack != stack:
                    self.refused[leaf] = (
                        f"the table stacks its layers on axes {site.stack}, the model on {stack}"
                    )
            elif leaf in self.roles and leaf not in self.unknown and stack is not None:
                if site is None or not fits or (site.axes, site.stack) != (self.roles[leaf], stack):
                    out.append(line_for(leaf, shape, self.roles[leaf], stack))
            elif fits and leaf in self.vectors:
                axes = " ".join(f"a{i}" for i in range(len(shape)))
                out.append(Weight(leaf, leaf, f"{axes} -> {axes}", kind="vector"))
        return out

    def problem(self, leaf: str, keymap: KeyMap) -> str | None:
        """Why this leaf cannot be adapted, if so."""
        return self.refused.get(leaf) or (self.unknown.get(leaf) if keymap.name == GENERIC.name else None)


@dataclasses.dataclass
class _Marking:
    """The interceptor of the survey: notes roles, and lays markers that the model's transforms stack."""

    survey: Survey
    tracing: bool = False  # inside a module being traced alone, whose parts are not to be noted again

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        module = context.module
        if self.tracing or not owns(context):
            return y
        for name, value in direct(module).items():
            leaf, value = ".".join((*module.scope.path, name)), meta.unbox(value)
            if SEP in name or leaf not in self.survey.shapes:
                continue
            if mapped(module.scope):
                self.survey.refused[leaf] = MAPPED
                continue
            if value.ndim < 2:
                self.survey.vectors.add(leaf)
            elif leaf not in self.survey.unknown:
                self._roles(module, context.method_name, leaf, name, value, args, kwargs)
            if not module.scope.has_variable("params", _marker(name, 0)):
                for extra in (0, 1):
                    shape = tuple(_MARK + i for i in range(value.ndim + extra))
                    module.scope.put_variable("params", _marker(name, extra), jnp.zeros(shape, jnp.bool))
        return y

    def _roles(
        self, module: Any, method: str, leaf: str, name: str, value: Any, args: Any, kwargs: Any
    ) -> None:
        roles_of = known(module, method)
        if roles_of is not None and name != "kernel":
            return
        self.tracing = True
        try:
            if roles_of is not None:
                axes = roles_of[0](module, call_input(args, kwargs)[1])
            else:
                call, weights = alone(module, method), {name: value}
                if not trace.uses(lambda w, *a: call(w, *a, **kwargs)[0], weights, *args)[name]:
                    return  # a method that does something else; another one tells
                axes = trace.roles(lambda w, *a: call(w, *a, **kwargs)[0], weights, name, *args)
        except AttachError as error:
            self.survey.unknown[leaf] = str(error)
            return
        finally:
            self.tracing = False
        before = self.survey.roles.setdefault(leaf, axes)
        if axes not in (before, dataclasses.replace(before, inn=before.out, out=before.inn)):
            self.survey.unknown[leaf] = f"its calls use it in several ways: {before}, and {axes}"


def _marker(name: str, extra: int) -> str:
    return f"{name}{SEP}{extra}"


def survey(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> Survey:
    """Everything an adapter has to know about a model, from `jax.eval_shape` of its `init`."""
    plain = dict(meta.unbox(jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))))
    base = paths.flatten(plain.pop("params", {}))
    found = Survey({leaf: tuple(spec.shape) for leaf, spec in base.items()}, frozenset(plain))

    def marked() -> Any:
        with nn.intercept_methods(_Marking(found)):
            return module.init(rngs, *args, **kwargs)

    shapes = paths.flatten(meta.unbox(jax.eval_shape(marked)).get("params", {}))
    for leaf in found.shapes:
        marks = [shapes[m].shape for extra in (0, 1) if (m := _marker(leaf, extra)) in shapes]
        if len(marks) != 2:
            continue
        added = [tuple(i for i, n in enumerate(shape) if n < _MARK) for shape in marks]
        found.stack[leaf] = added[0]
        if added[0] != added[1]:
            found.refused[leaf] = (
                "its layers are stacked on a negative axis; give nn.scan or nn.vmap a non-negative one"
            )
    return found


# ---------------------------------------------------------------- reads that no adapter can follow


def check_reads(
    run: Callable[..., Any], adapted: Mapping[tuple[str, ...], Sequence[str]], params: Any
) -> None:
    """Refuse weights that are read outside their own module's call: the adapter would miss that use.

    Args:
        run: `run(params, interceptor)` calls the model and returns its output.
        adapted: leaf names by scope path.
        params: the base parameters.

    Inside its module's call each adapted weight is replaced by a copy; whatever still reaches the output
    from the weight itself was read elsewhere.
    """
    names = {(*path, leaf): ".".join((*path, leaf)) for path, leaves in adapted.items() for leaf in leaves}
    values = {name: _at(params, keys) for keys, name in names.items()}
    copies = {(*keys[:-1], keys[-1] + SEP): values[name] for keys, name in names.items()}

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not owns(context):
            return next_fun(*args, **kwargs)
        refuse_mapped(context, adapted)
        here = adapted.get(module.scope.path, ())
        leaves = [leaf for leaf in here if module.scope.has_variable("params", leaf + SEP)]
        if not leaves:
            return next_fun(*args, **kwargs)
        call = alone(module, context.method_name)
        copied = {leaf: module.scope.get_variable("params", leaf + SEP) for leaf in leaves}
        y, changed = call(copied, *args, **kwargs)
        write_back(module.scope, changed)
        return y

    def output(weights: Mapping[str, Any]) -> Any:
        laid = overlaid(params, {**copies, **{keys: weights[name] for keys, name in names.items()}})
        return run(laid, intercept)

    outside = [leaf for leaf, used in live(output, values).items() if used]
    if outside:
        raise AttachError(
            "these weights are read outside their own module's call, where an adapter cannot follow:\n"
            + paths.listing(outside)
            + "\nLeave them out with exclude_modules, or let the reader call the module"
        )


def _at(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def overlaid(tree: Mapping[str, Any], extra: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested mappings with further (or other) leaves at these keys; what is not on the way is shared."""
    inside: dict[str, dict[tuple[str, ...], Any]] = {}
    out = dict(tree)
    for (first, *rest), value in extra.items():
        if rest:
            inside.setdefault(first, {})[tuple(rest)] = value
        else:
            out[first] = value
    return {**out, **{key: overlaid(out.get(key, {}), below) for key, below in inside.items()}}
