"""Adapters on Linen modules: a plain wrapper with `init` and `apply` as ever.

The adapter lives in a collection of its own, `{"params": base, "lora": {name: tree}}`. For a call its
leaves are laid into `params` beside the weight they adapt, so that the model's own scan, vmap and remat
carry them along, and an interceptor computes with them where the weight's module is called.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import serialization
from flax.core import FrozenDict, meta
from flax.core.scope import in_filter

from jaxadapt import bind, layers, methods, paths, trace
from jaxadapt.adapter import CONFIG_NODE, Adapter, Recipe, collection_name
from jaxadapt.axes import Axes, Use
from jaxadapt.configs import Config
from jaxadapt.errors import AttachError
from jaxadapt.families import resolve
from jaxadapt.keymap import KeyMap, Weight, line_for
from jaxadapt.liveness import live
from jaxadapt.methods import Applied, Several

SEP = "~"  # in the name of a leaf laid into `params` for one call; never stored
_MARK = 1013  # a size no real axis has: whatever else a marker's shape shows was added by a transform
_OPAQUE = (nn.WeightNorm, nn.SpectralNorm)

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
        lambda m, x, _, axes: layers.general_use(x.ndim, axes.rank, _tuple(m.axis), _tuple(m.batch_dims), axes),
    ),
    nn.Einsum: (
        lambda m, rest: layers.einsum_axes(_einsum_str(m, rest)),
        lambda m, x, rest, axes: layers.einsum_use(_einsum_str(m, rest), x.ndim, axes),
    ),
}


def _known(module: nn.Module) -> tuple[_Roles, _ToUse] | None:
    """How a layer uses its kernel, if its class says so; a subclass with a call of its own is traced instead."""
    owner = next((c for c in type(module).__mro__ if "__call__" in vars(c)), None)
    return _KNOWN.get(owner) if owner is not None else None


# ---------------------------------------------------------------- one call of a module that owns adapted leaves


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "inputs" in kwargs:
        return (kwargs["inputs"], *args), {k: v for k, v in kwargs.items() if k != "inputs"}
    return args, kwargs


def _direct(params: Mapping[str, Any]) -> list[str]:
    """The names of the leaves a scope holds directly."""
    return [k for k, v in params.items() if not isinstance(v, Mapping)]


def _apply_alone(module: nn.Module, method: str, drop: Callable[[str], bool]) -> Callable[..., Any]:
    """`f(weights, *args, **kwargs)`: this module's method on its scope, with other values for some leaves.

    Returns the output and the collections the call changed, so that a cache or batch statistics kept by
    the module itself are written back by the caller.
    """
    scope = module.scope
    assert scope is not None
    variables = {c: dict(v) for c, v in scope.variables().items()}
    base = {k: v for k, v in variables.pop("params", {}).items() if not drop(k)}
    mutable = [c for c in variables if c != "params" and scope.is_mutable_collection(c)]
    rngs = {name: scope.make_rng(name) for name in scope.rngs if name != "params"}

    def call(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        alone = module.clone(parent=None, name=None)
        return alone.apply(
            {**variables, "params": {**base, **weights}}, *args, method=method, mutable=mutable, rngs=rngs, **kwargs
        )

    return call


@dataclasses.dataclass(frozen=True)
class _Interceptor:
    """Applies the overlaid adapters; `sites[i, name]` says what the arithmetic at leaf i needs."""

    sites: Mapping[tuple[str, str], tuple[methods.Method, Any, Axes]]

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup":
            return next_fun(*args, **kwargs)
        params = module.scope.variables().get("params", {})
        marked = [k for k in _direct(params) if SEP in k]
        if not marked:
            return next_fun(*args, **kwargs)
        hooks = self._hooks(module, params, marked)
        known = _known(module)
        if known is not None and context.method_name == "__call__":
            (x, *rest), kwargs = _split_call(args, kwargs)
            ((_, hook),) = hooks.items()
            use = known[1](module, x, rest or [kwargs.get("einsum_str")], hook.axes)
            x = hook.input(use, x)
            return hook.output(use, x, next_fun(x, *rest, **kwargs))
        call = _apply_alone(module, context.method_name, lambda k: SEP in k)
        weights = {leaf: meta.unbox(params[leaf]) for leaf in hooks}
        fixed = {"bias": next(iter(hooks.values())).bias(meta.unbox(params["bias"]))} if "bias" in params else {}
        y, changed = trace.rewrite(
            lambda w, *a: call({**fixed, **w}, *a, **kwargs), weights, hooks, *args
        )
        for collection, tree in changed.items():
            for key, value in tree.items():
                module.scope.put_variable(collection, key, value)
        return y

    def _hooks(self, module: Any, params: Mapping[str, Any], marked: Sequence[str]) -> dict[str, Applied | Several]:
        found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        for key in marked:
            leaf, site, name, tensor = key.split(SEP)
            found.setdefault(leaf, {}).setdefault((site, name), {})[tensor] = params[key]
        out: dict[str, Applied | Several] = {}
        for leaf, by_site in found.items():
            hooks: list[Applied] = []
            for at, tensors in by_site.items():
                method, static, axes = self.sites[at]
                drop = _dropout(method.dropout(static), module) if module.scope.has_rng("dropout") else None
                hooks.append(Applied(method, static, tensors, axes, drop))
            out[leaf] = hooks[0] if len(hooks) == 1 else Several(tuple(hooks))
        return out


def _dropout(rate: float, module: Any) -> Callable[[Any], Any] | None:
    if not rate:
        return None
    key = module.scope.make_rng("dropout")

    def drop(x: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)

    return drop


# ---------------------------------------------------------------- finding out how a model uses its weights


@dataclasses.dataclass
class _Found:
    """What one abstract `init` showed: a class's or a trace's roles by leaf, or why there are none."""

    roles: dict[str, Axes] = dataclasses.field(default_factory=dict[str, Axes])
    refused: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    opaque: list[str] = dataclasses.field(default_factory=list[str])
    tracing: bool = False  # inside a module being traced alone, whose parts are not to be noted again

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if self.tracing:
            return next_fun(*args, **kwargs)
        wraps = isinstance(module, _OPAQUE) or type(module).__name__.startswith("Map_variables")
        if wraps:
            self.opaque.append("nn.map_variables" if not isinstance(module, _OPAQUE) else f"nn.{type(module).__name__}")
        try:
            y = next_fun(*args, **kwargs)
        finally:
            if wraps:
                self.opaque.pop()
        if module.scope is None or context.method_name == "setup" or wraps:
            return y
        params = module.scope.variables().get("params", {})
        for name in _direct(params):
            leaf, value = ".".join((*module.scope.path, name)), meta.unbox(params[name])
            if SEP in name or leaf in self.roles or leaf in self.refused or value.ndim < 2:
                continue
            if self.opaque:
                self.refused[leaf] = f"its weight passes through {self.opaque[-1]}, which would change the adapter too"
            else:
                self._roles(module, context.method_name, leaf, name, value, args, kwargs)
            for extra in (0, 1):
                shape = (_MARK,) * (value.ndim + extra)
                mark = jax.random.wrap_key_data(jnp.zeros((*shape, 2), jnp.uint32), impl="threefry2x32")
                module.scope.put_variable("params", f"{name}{SEP}{extra}", mark)
        return y

    def _roles(self, module: Any, method: str, leaf: str, name: str, value: Any, args: Any, kwargs: Any) -> None:
        known = _known(module) if method == "__call__" else None
        if known is not None and name != "kernel":
            return
        self.tracing = True
        try:
            if known is not None:
                (_, *rest), named = _split_call(args, kwargs)
                self.roles[leaf] = known[0](module, rest or [named.get("einsum_str")])
            else:
                call = _apply_alone(module, method, lambda k: SEP in k)
                self.roles[leaf] = trace.roles(lambda w, *a: call(w, *a, **kwargs)[0], {name: value}, name, *args)
        except AttachError as error:
            self.refused[leaf] = str(error)
        finally:
            self.tracing = False


def _survey(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> tuple[_Found, dict[str, Any], dict[str, tuple[int, ...]]]:
    """How the model uses its weights, its base leaves' specs, and on which axes each leaf is stacked."""
    plain = jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))
    leaves = _flat(meta.unbox(plain).get("params", {}))
    found = _Found()

    def marked() -> Any:
        with nn.intercept_methods(found.intercept):
            return module.init(rngs, *args, **kwargs)

    try:
        shapes = _flat(meta.unbox(jax.eval_shape(marked)).get("params", {}))
    except TypeError as error:
        raise AttachError(
            "the model computes with its own variables (nn.map_variables?), so an adapter laid beside a weight would"
            f" be changed with it: {error}"
        ) from error
    stack: dict[str, tuple[int, ...]] = {}
    for leaf in leaves:
        marks = [shapes.get(f"{leaf}{SEP}{extra}") for extra in (0, 1)]
        if marks[0] is None or marks[1] is None:
            continue
        where = [tuple(i for i, n in enumerate(m.shape) if n != _MARK) for m in marks if m is not None]
        stack[leaf] = where[0]
        if where[0] != where[1]:
            found.refused[leaf] = "its layers are stacked on a negative axis; give nn.scan or nn.vmap a non-negative one"
    return found, leaves, stack


def _flat(params: Any) -> dict[str, Any]:
    return paths.flatten(params)


def _lines(
    found: _Found, leaves: Mapping[str, Any], stack: Mapping[str, tuple[int, ...]], keymap: KeyMap
) -> list[Weight]:
    lines: list[Weight] = []
    for leaf, spec in leaves.items():
        site = keymap.site(leaf)
        if site is not None and len(site.weight.left) == spec.ndim:
            if site.stack != stack.get(leaf, site.stack):
                found.refused[leaf] = f"the table stacks its layers on axes {site.stack}, the model on {stack[leaf]}"
        elif leaf in found.roles:
            lines.append(line_for(leaf, spec.shape, found.roles[leaf], stack[leaf]))
    return lines


def _fresh_key(rngs: Any, collection: str) -> Any:
    if isinstance(rngs, Mapping):
        if collection in rngs:
            return rngs[collection]
        rngs = rngs["params"]
    return jax.random.fold_in(rngs, zlib.crc32(collection.encode()))


# ---------------------------------------------------------------- the wrapper


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A Linen module with adapters: `init`, `apply` and `bind` as the module's own.

    Not itself an `nn.Module`: it is the outermost thing, and the module inside stays what it was.

    Args:
        module: the base module.
        adapters: `((name, config), …)`.
        active: the names applied by `apply`.
        keymap: a family's name, a `KeyMap`, or None to recognise it.
        dtype: of new adapter parameters; float32 by default.
    """

    module: nn.Module
    adapters: tuple[tuple[str, Config], ...]
    active: tuple[str, ...]
    keymap: KeyMap | str | None = None
    dtype: Any = None

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`{"params": base, …, "lora": {name: tree}}`: the base bit for bit what the module's own `init` gives."""
        found, leaves, stack = _survey(self.module, rngs, args, kwargs)
        keymap = resolve(self.keymap, {leaf: tuple(spec.shape) for leaf, spec in leaves.items()})
        variables = dict(self.module.init(rngs, *args, **kwargs))
        lines = _lines(found, leaves, stack, keymap)
        shapes = {leaf: tuple(spec.shape) for leaf, spec in leaves.items()}
        for name, config in self.adapters:
            table = keymap.with_lines(lines)
            config = bind.resolve(config, table, shapes)
            bounds = bind.select(config, table, shapes)
            refused = [f"{b.leaf}: {found.refused[b.leaf]}" for b in bounds if b.leaf in found.refused]
            if refused:
                raise AttachError("these weights cannot carry the adapter:\n" + paths.listing(refused))
            mine = {b.leaf for b in bounds}
            recipe = Recipe(config, keymap.with_lines(w for w in lines if w.leaf in mine))
            values = bind.fresh(config, bounds, _fresh_key(rngs, collection_name(config)), self.dtype)
            adapter = Adapter(config, paths.unflatten(values), recipe.keymap)
            for collection, tree in adapter.named(name).items():
                variables[collection] = {**variables.get(collection, {}), **tree}
        _check_reads(self, variables, args, kwargs, rngs)
        return variables

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The output and the variables."""
        variables = self.init(rngs, *args, **kwargs)
        return self.module.init_with_output(rngs, *args, **kwargs)[0], variables

    def apply(
        self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any
    ) -> Any:
        """The module's `apply` with the active adapters; `rngs`, `method`, `mutable` and the rest as there.

        Raises `AttachError` if the variables lack an active adapter, have lost its configuration, or
        carry another than the wrapper's.
        """
        inner, interceptor, collections = self._overlay(variables)
        with nn.intercept_methods(interceptor):
            out = self.module.apply(inner, *args, mutable=mutable, **kwargs)
        if mutable is False:
            return out
        y, changed = out
        return y, _without_overlay(changed, collections, mutable)

    def bind(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Bound:
        """The module bound to these variables, for interactive use."""
        inner, interceptor, _ = self._overlay(variables)
        return Bound(self.module.bind(inner, *args, **kwargs), interceptor)

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """The base module's own table; `jaxadapt.summary` shows the adapter's."""
        return self.module.tabulate(rngs, *args, **kwargs)

    def _overlay(self, variables: Mapping[str, Any]) -> tuple[dict[str, Any], _Interceptor, dict[str, Any]]:
        wanted = {name: config for name, config in self.adapters if name in self.active}
        names = {collection_name(config) for _, config in self.adapters}
        collections = {c: variables[c] for c in names if c in variables}
        inner = {c: v for c, v in variables.items() if c not in names}
        params = _flat(inner.get("params", {}))
        sites: dict[tuple[str, str], tuple[methods.Method, Any, Axes]] = {}
        for name, config in wanted.items():
            tree = collections.get(collection_name(config), {}).get(name)
            if tree is None:
                raise AttachError(
                    f"the variables hold no adapter {name!r} in {collection_name(config)!r}; make one with init, or load it"
                )
            adapter = read_collection(tree, name)
            if adapter.config != bind_config(config, adapter.config):
                raise AttachError(
                    f"the adapter {name!r} carries another configuration than this wrapper was made with; wrap the module"
                    " with the adapter's own: jaxadapt.adapt(module, jaxadapt.extract(variables).config)"
                )
            shapes = {leaf: {t: tuple(a.shape) for t, a in ts.items()} for leaf, ts in adapter.sites.items()}
            method = methods.of(adapter.config)
            for i, bound in enumerate(bind.recover(adapter.config, adapter.keymap, shapes)):
                if bound.leaf not in params:
                    raise AttachError(f"the adapter {name!r} adapts {bound.leaf!r}, which the base parameters lack")
                params[bound.leaf] = meta.unbox(params[bound.leaf])
                sites[str(i), name] = (method, bound.static, bound.axes)
                for tensor, value in adapter.sites[bound.leaf].items():
                    params[f"{bound.leaf}{SEP}{i}{SEP}{name}{SEP}{tensor}"] = value
        if params:
            inner["params"] = paths.unflatten(params)
        return inner, _Interceptor(sites), collections


def bind_config(mine: Config, theirs: Config) -> Config:
    """The wrapper's configuration as `init` would have resolved it ("all-linear", fan_in_fan_out)."""
    changes: dict[str, Any] = {"fan_in_fan_out": theirs.get("fan_in_fan_out")} if "fan_in_fan_out" in mine.to_dict() else {}
    if mine.get("target_modules") == "all-linear":
        changes["target_modules"] = theirs.get("target_modules")
    return mine.replace(**changes) if changes else mine


@dataclasses.dataclass(frozen=True)
class Bound:
    """A bound module whose calls apply the adapters."""

    module: Any
    interceptor: _Interceptor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(self.interceptor):
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if isinstance(value, nn.Module):
            return Bound(value, self.interceptor)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(self.interceptor):
                return value(*args, **kwargs)

        return call


def _without_overlay(changed: Any, collections: Mapping[str, Any], mutable: Any) -> Any:
    out = dict(changed)
    if "params" in out:
        kept = {path: leaf for path, leaf in _flat(out["params"]).items() if SEP not in path.rpartition(".")[2]}
        out["params"] = paths.unflatten(kept)
    out |= {c: tree for c, tree in collections.items() if in_filter(mutable, c)}
    return FrozenDict(out) if isinstance(changed, FrozenDict) else out


def _check_reads(wrapper: Adapted, variables: Mapping[str, Any], args: Any, kwargs: Any, rngs: Any) -> None:
    """Refuse weights that are read outside their own module's call: the adapter would miss that use."""
    inner, interceptor, _ = wrapper._overlay(variables)  # pyright: ignore[reportPrivateUsage]
    flat = _flat(inner["params"])
    adapted = sorted({path.partition(SEP)[0] for path in flat if SEP in path.rpartition(".")[2]})

    def intercept(next_fun: Any, a: Any, k: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup":
            return next_fun(*a, **k)
        params = module.scope.variables().get("params", {})
        leaves = {key.partition(SEP)[0] for key in _direct(params) if SEP in key}
        if not leaves:
            return next_fun(*a, **k)
        call = _apply_alone(module, context.method_name, lambda key: SEP in key)
        alias = {leaf: params[f"{leaf}{SEP}alias"] for leaf in leaves}
        return call(alias, *a, **k)[0]

    def run(weights: Mapping[str, Any]) -> Any:
        laid = {p: v for p, v in flat.items() if SEP not in p.rpartition(".")[2]}
        laid |= {f"{leaf}{SEP}alias": flat[leaf] for leaf in adapted} | dict(weights)
        all_rngs = dict(rngs) if isinstance(rngs, Mapping) else {"params": rngs, "dropout": rngs}
        with nn.intercept_methods(intercept):
            return wrapper.module.apply(
                {**inner, "params": paths.unflatten(laid)}, *args, mutable=True, rngs=all_rngs, **kwargs
            )[0]

    used = live(run, {leaf: jax.ShapeDtypeStruct(flat[leaf].shape, flat[leaf].dtype) for leaf in adapted})
    outside = [leaf for leaf, is_used in used.items() if is_used]
    if outside:
        raise AttachError(
            "these weights are read outside their own module's call, where an adapter cannot follow:\n"
            + paths.listing(outside)
            + "\nLeave them out with exclude_modules, or let the reader call the module"
        )


# ---------------------------------------------------------------- collections in and out


def read_collection(tree: Mapping[str, Any], name: str) -> Adapter:
    """The adapter under one name of a collection; `AttachError` if its configuration was lost on the way."""
    recipe = tree.get(CONFIG_NODE)
    if isinstance(recipe, str):  # flax's msgpack without a target
        recipe = Recipe.from_text(recipe)
    if not isinstance(recipe, Recipe):
        raise AttachError(
            f"the adapter {name!r} has lost its configuration (a restore without a target does that);"
            " pass config= (and keymap=, if it was adapted with one)"
        )
    return Adapter(recipe.config, {k: v for k, v in tree.items() if k != CONFIG_NODE}, recipe.keymap)


def _recipe_from_text(target: Recipe, state: Any) -> Recipe:
    if not isinstance(state, str):
        raise AttachError(f"an adapter's configuration was saved as text; found {type(state).__name__}")
    return Recipe.from_text(state)


serialization.register_serialization_state(Recipe, Recipe.to_text, _recipe_from_text)
