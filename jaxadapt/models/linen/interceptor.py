"""Interception of method calls inside a Linen model, to apply adapters and dequantise weights.

The roles of a weight's axes, and its use, in the layer classes of Flax: these need no trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta, unfreeze
from flax.core.scope import Scope, subtract_filters

from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import Axes, Use, contradiction_message
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.weight import Kind
from jaxadapt.methods.applied import AppliedMethod, AppliedMethods, check_biases
from jaxadapt.methods.base import Drop, Method
from jaxadapt.methods.rows import Implementation, apply_rows, split_rows
from jaxadapt.models import layers
from jaxadapt.models.tracing import rewrite
from jaxadapt.models.tracing.uses import describe_uses

# ---------------------------------------------------------------- known layers


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _einsum_str(m: Any, rest: Sequence[Any]) -> str:
    return rest[0] if rest and rest[0] is not None else m.einsum_str


def _general_axes(m: Any, _: Sequence[Any]) -> Axes:
    return layers.general_axes(len(_tuple(m.axis)), len(_tuple(m.features)), len(_tuple(m.batch_dims)))


Roles = Callable[[Any, Sequence[Any]], Axes]


ToUse = Callable[[Any, Any, Sequence[Any], Axes], Use]


_KNOWN: dict[type[nn.Module], tuple[Roles, ToUse]] = {
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


def known_use(module: nn.Module, method: str) -> tuple[Roles, ToUse] | None:
    """Return the kernel's roles and use if the method is one of Flax's own `__call__`s, else None: it is traced."""
    if method != "__call__":
        return None
    owner = next((c for c in type(module).__mro__ if "__call__" in vars(c)), None)
    return _KNOWN.get(owner) if owner is not None else None


def known_roles(module: nn.Module, method: str, leaf: str) -> tuple[Axes, Kind, int] | None:
    """Return axes, kind and groups of the weight of Flax's own Conv or Embed, else None."""
    owner = next((c for c in type(module).__mro__ if method in vars(c)), None)
    m: Any = module
    if owner in (nn.Conv, nn.Conv.__mro__[1]) and isinstance(m, nn.Conv) and leaf == "kernel" and m.mask is None:
        window = (m.kernel_size,) if isinstance(m.kernel_size, int) else tuple(m.kernel_size)
        return layers.conv_axes(len(window) + 2), "conv", m.feature_group_count
    if owner is nn.Embed and leaf == "embedding":
        return layers.EMBEDDING, "embedding", 1
    return None


# ---------------------------------------------------------------- interceptor


SEP = "~"  # marks the names of leaves that are added to `params` for one call and never stored
DROPOUT = "dropout"  # the random stream that `flax.linen.Dropout` uses


# ---------------------------------------------------------------- intercepted calls


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the input of a call of one of Flax's layers, and its other arguments (an einsum's equation)."""
    if "inputs" in kwargs:
        return kwargs["inputs"], [*args] or [kwargs.get("einsum_str")]
    return args[0], [*args[1:]] or [kwargs.get("einsum_str")]


def with_input(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with its input replaced."""
    return (args, {**kwargs, "inputs": x}) if "inputs" in kwargs else ((x, *args[1:]), kwargs)


def is_own_method(context: Any) -> bool:
    """Return True if the call is of a method of a bound module's class, other than `setup`.

    A function that `nn.scan`, `nn.cond` … runs on the module's scope is not a method; the calls in it are intercepted.
    """
    name, module = context.method_name, context.module
    is_method = any(name in vars(c) for c in type(module).__mro__)
    return is_method and name != "setup" and module.scope is not None


def refuse_mapped(context: Any, adapted: Mapping[tuple[str, ...], Iterable[str]]) -> None:
    """Raise `AttachError` if a module with adapted leaves is called with transformed variables (`nn.map_variables`)."""
    module = context.module
    if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
        inner = module.layer_instance.scope
        prefix = inner.path if inner is not None else None
        mapped = [path for path in adapted if prefix is not None and path[: len(prefix)] == prefix]
    else:
        mapped = [module.scope.path] if is_mapped(module.scope) and module.scope.path in adapted else []
    leaves = [".".join((*path, leaf)) for path in mapped for leaf in adapted[path]]
    if leaves:
        raise AttachError(f"{', '.join(leaves)}: {MAPPED}. Exclude the layer with exclude_modules")


MAPPED = (
    "its weight passes through nn.map_variables (which nn.WeightNorm and nn.SpectralNorm also use),"
    " which would change the adapter too"
)


def is_mapped(scope: Scope) -> bool:
    """Return True if a scope's variables pass through `nn.map_variables`, which Flax records in `debug_path`."""
    return any("map_variables(" in part for part in scope.debug_path)


def direct_params(module: nn.Module) -> dict[str, Any]:
    """Return `{name: value}` for the parameters that a module's own scope holds."""
    assert module.scope is not None
    params = module.scope.variables().get("params", {})
    return {k: v for k, v in params.items() if not isinstance(v, Mapping)}


def quantized_params(module: nn.Module) -> dict[str, Any]:
    """Return `{name: value}` for the quantised parameters that a module's own scope holds."""
    return {k: meta.unbox(v) for k, v in direct_params(module).items() if quantized.is_quantized(v)}


def isolate_method(module: nn.Module, method: str) -> Callable[..., Any]:
    """Return `f(weights, *args, **kwargs)`, which runs a module's method on a copy of its scope.

    `weights` replaces some parameters of the module's scope. `f` returns the output and the mutable collections other
    than "params", such as a cache or batch statistics, for `write_back`. It draws the same random numbers as the plain
    call. The scope's copy has no leaves marked with `SEP`.
    """
    scope = module.scope
    assert scope is not None
    mutable = subtract_filters(scope.mutable, "params")

    def call(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        variables: dict[str, Any] = unfreeze(dict(scope.variables()))
        stored = {k: v for k, v in variables.get("params", {}).items() if SEP not in k}
        variables["params"] = {**stored, **weights}
        # A scope belongs to the trace that creates it, so it is created here and not outside `call`.
        copy = Scope(variables, scope.rngs, scope.name, mutable, path=scope.path, flags=scope.flags)
        copy.rng_counters = scope.rng_counters
        y = getattr(module.copy(parent=copy), method)(*args, **kwargs)
        captured = copy.get_variable("intermediates", method)
        # The outer call captures this output too (capture_intermediates), so it is removed here.
        if isinstance(captured, tuple) and captured and captured[-1] is y:
            copy.put_variable("intermediates", method, captured[:-1])
        return y, {k: v for k, v in copy.mutable_variables().items() if k != "params"}

    return call


def write_back(scope: Scope, changed: Mapping[str, Any]) -> None:
    """Write the collections that `isolate_method` returned into the real scope.

    Inner mappings are changed in place, because the scopes of submodules hold the same objects.
    """

    def update(old: dict[str, Any], new: Mapping[str, Any]) -> None:
        for key, value in new.items():
            inner = old.get(key)
            if isinstance(value, Mapping) and isinstance(inner, dict):
                update(inner, value)
            else:
                old[key] = unfreeze(dict(value)) if isinstance(value, Mapping) else value

    for collection, tree in changed.items():
        for key, value in tree.items():
            inner = scope.get_variable(collection, key)
            if isinstance(value, Mapping) and isinstance(inner, dict):
                update(inner, value)
            else:
                scope.put_variable(collection, key, unfreeze(dict(value)) if isinstance(value, Mapping) else value)


# ---------------------------------------------------------------- one call of a module with adapted leaves


@dataclasses.dataclass(frozen=True)
class LeafAdapter:
    """One adapter at one leaf.

    Attributes:
        keys: the names in `params` of its tensors during the call.
        whole: shared tensors that are not in `params`, because the model's scan would slice them there.
        rows: how each row takes its own adapter, if the tensors are of several; None for one adapter.
        shared: the names in `params` of tensors that all rows have in common.
    """

    method: Method
    hparams: Any
    axes: Axes
    keys: Mapping[str, str]
    whole: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    rows: Implementation | None = None
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    @property
    def rate(self) -> float:
        """The dropout rate."""
        return self.method.dropout(self.hparams)

    def make_hook(self, scope: Any, drop: Drop | None) -> AppliedMethod:
        """Return the method with the tensors that `scope` holds."""
        tensors = {tensor: scope.get_variable("params", key) for tensor, key in self.keys.items()}
        if self.whole and any("jit(" in part for part in scope.debug_path):
            raise AttachError(
                f"{'.'.join(scope.path)}: cannot pass {', '.join(self.whole)}, which belong to the whole adapter, into"
                " nn.jit around or inside a scan over layers: its compiled function would keep the first values. Remove"
                " that nn.jit, and compile the whole call with jax.jit"
            )
        if self.rows is not None:
            shared = {tensor: scope.get_variable("params", key) for tensor, key in self.shared.items()}
            return apply_rows(self.rows, self.method, self.hparams, tensors, self.axes, {**shared, **self.whole})
        return AppliedMethod.in_call(self.method, self.hparams, {**tensors, **self.whole}, self.axes, drop)


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """Applies adapters, and dequantises weights, in the calls of a model's modules.

    Args:
        sites: `{scope path: {leaf: one LeafAdapter per adapter}}`.
        quantized_scopes: the scope paths of modules with quantised parameters.
        dropout: True if the call has a random stream "dropout". Each site with a dropout rate then draws from it.
        running: the scope paths of modules whose plain call is in progress and is not intercepted again.
    """

    sites: Mapping[tuple[str, ...], Mapping[str, Sequence[LeafAdapter]]]
    quantized_scopes: frozenset[tuple[str, ...]] = frozenset()
    dropout: bool = False
    running: list[tuple[str, ...]] = dataclasses.field(default_factory=list[tuple[str, ...]])

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if not is_own_method(context) or module.scope.path in self.running:
            return next_fun(*args, **kwargs)
        refuse_mapped(context, self.sites)
        hooks, known = self._active_hooks(module.scope), known_use(module, method)
        outer, inner = split_rows(hooks) if known is not None and list(hooks) == ["kernel"] else ({}, hooks)
        if known is not None and outer:
            use = self._known_use(module, outer["kernel"], known, args, kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                return self._call_hooked(next_fun, module, method, inner, None, args, kwargs)

            if use is not None:
                return _apply_around(module, outer["kernel"], use, run, args, kwargs)
        return self._call_hooked(next_fun, module, method, hooks, known, args, kwargs)

    def _call_hooked(
        self, next_fun: Any, module: Any, method: str, hooks: dict[str, Any], known: Any, args: Any, kwargs: Any
    ) -> Any:
        """Call a method of a module with these adapters applied."""
        if module.scope.path in self.quantized_scopes and (params := quantized_params(module)):
            return self._call_dequantized(module, method, hooks, params, args, kwargs)
        if not hooks:
            return next_fun(*args, **kwargs)
        if known is not None and list(hooks) == ["kernel"] and not (hooks["kernel"].apart or hooks["kernel"].by_weight):
            use = self._known_use(module, hooks["kernel"], known, args, kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                self.running.append(module.scope.path)
                try:
                    return next_fun(*args, **kwargs)
                finally:
                    self.running.pop()

            if use is not None:
                return _apply_around(module, hooks["kernel"], use, run, args, kwargs)
        y, changed = self._call_rewritten(module, method, hooks, {}, args, kwargs)
        write_back(module.scope, changed)
        return y

    @staticmethod
    def _known_use(module: Any, hook: Any, known: tuple[Roles, ToUse], args: Any, kwargs: Any) -> Use | None:
        """Return the use of the kernel in a call of one of Flax's layers; None if the adapter cannot follow it."""
        kernel_roles, kernel_use = known
        x, rest = call_input(args, kwargs)
        use = kernel_use(module, x, rest, hook.axes)
        # A layer that gets its equation as an argument may also get the reverse one.
        if hook.forward and use.transposed and not any(rest):
            axes = kernel_roles(module, rest)
            raise AttachError(f"{'.'.join(module.scope.path)}: {contradiction_message(hook.axes, axes)}")
        return use if _is_along_roles(use) and hook.follows_use(use) else None

    def _call_dequantized(
        self, module: Any, method: str, hooks: dict[str, Any], params: dict[str, Any], args: Any, kwargs: Any
    ) -> Any:
        """Call a method with the module's quantised parameters made dense."""

        def run(params: Mapping[str, Any]) -> Any:
            dense = {leaf: quantized.to_dense(x) for leaf, x in params.items()}
            return self._call_rewritten(module, method, hooks, dense, args, kwargs)

        # The backward pass dequantises again, so that the dense weights do not stay in memory between the passes.
        y, changed = jax.checkpoint(run)(params)
        write_back(module.scope, changed)
        return y

    def _call_rewritten(
        self, module: Any, method: str, hooks: dict[str, Any], dense: Mapping[str, Any], args: Any, kwargs: Any
    ) -> Any:
        """Call a method with its adapted weights' uses rewritten; return the output and the changed collections."""
        scope, call = module.scope, isolate_method(module, method)
        params = {k: dense.get(k, meta.unbox(v)) for k, v in direct_params(module).items() if SEP not in k}
        weights = {leaf: params[leaf] for leaf in hooks}
        fixed = {leaf: x for leaf, x in dense.items() if leaf not in hooks}
        if not hooks:
            return call(fixed, *args, **kwargs)
        if scope.has_variable("params", "bias"):
            bias = meta.unbox(scope.get_variable("params", "bias"))
            new_biases = [new for hook in hooks.values() if (new := hook.bias(bias)) is not bias]
            if new_biases and len(hooks) > 1:
                raise AttachError(
                    f"{'.'.join(scope.path)}: the adapter scales the module's bias, but it is unknown to which of the"
                    f" adapted weights {list(hooks)} the bias belongs. Adapt only one of them"
                )
            fixed |= {"bias": new_biases[0]} if new_biases else {}
        by_weight = {leaf: hook for leaf, hook in hooks.items() if hook.by_weight}
        if by_weight:
            fixed |= {leaf: hook.weight(params[leaf]) for leaf, hook in by_weight.items()}
            weights, hooks = (
                {leaf: x for leaf, x in each.items() if leaf not in by_weight} for each in (weights, hooks)
            )
            if not hooks:
                return call(fixed, *args, **kwargs)
        others = {k: v for k, v in params.items() if k not in fixed and k not in hooks and k != "bias"}
        try:
            check_biases(hooks.values(), others)
        except AttachError as error:
            raise AttachError(f"{'.'.join(scope.path)}: {error}") from error
        forward = [leaf for leaf, hook in hooks.items() if hook.forward] if method == "__call__" else ()
        try:
            return rewrite.rewrite(
                lambda w, *a: call({**fixed, **w}, *a, **kwargs), weights, hooks, *args, forward=forward
            )
        except AttachError as error:
            raise AttachError(f"{'.'.join(scope.path)}: {error}") from error

    def _active_hooks(self, scope: Any) -> dict[str, AppliedMethod | AppliedMethods]:
        """Return `{leaf: hook}` for the adapters of one module."""
        hooks: dict[str, AppliedMethod | AppliedMethods] = {}
        for leaf, adapters in self.sites.get(scope.path, {}).items():
            if not scope.has_variable("params", next(iter(adapters[0].keys.values()))):
                continue  # called through `isolate_method`, whose caller applies the adapters
            applied = tuple(each.make_hook(scope, self._make_dropout(each.rate, scope)) for each in adapters)
            hooks[leaf] = applied[0] if len(applied) == 1 else AppliedMethods(applied)
        return hooks

    def _make_dropout(self, rate: float, scope: Scope) -> Drop | None:
        """Return a dropout with a key from the scope's stream, or None if dropout is off."""
        if not rate or not self.dropout:
            return None
        if not scope.has_rng(DROPOUT):
            raise AttachError(
                f'the call has rngs={{"{DROPOUT}": …}}, but these layers with dropout do not get it:\n'
                + paths.bullets(self._layers_without_stream(scope))
                + f'\nPass split_rngs={{"params": True, "{DROPOUT}": True}} to the nn.scan (or nn.vmap, …) around them,'
                " or turn the adapters' dropout off with model.clone(deterministic=True)"
            )
        key = scope.make_rng(DROPOUT)
        return Drop(rate, lambda: key)

    def _layers_without_stream(self, scope: Scope) -> list[str]:
        """Return the layers with dropout in the scope's lifted transform, which all see the same random streams."""
        prefix = scope.root.path
        layers_inside = {path: leaves.values() for path, leaves in self.sites.items() if path[: len(prefix)] == prefix}
        return [
            ".".join(path)
            for path, leaves in layers_inside.items()
            if any(each.rate for adapters in leaves for each in adapters)
        ]


@dataclasses.dataclass(frozen=True)
class UseRecorder(Interceptor):
    """Records for `summary` how each adapted weight is followed, as `{dotted leaf: note}`."""

    notes: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if (
            is_own_method(context)
            and module.scope.path in self.sites
            and known_use(module, context.method_name) is not None
        ):
            for leaf in self.sites[module.scope.path]:
                self.notes[".".join((*module.scope.path, leaf))] = f"{type(module).__name__}'s own call"
        return super().__call__(next_fun, args, kwargs, context)

    def _call_rewritten(
        self, module: Any, method: str, hooks: dict[str, Any], dense: Mapping[str, Any], args: Any, kwargs: Any
    ) -> Any:
        call = isolate_method(module, method)
        weights = {leaf: meta.unbox(module.scope.get_variable("params", leaf)) for leaf in hooks} | dict(dense)
        for leaf, uses in rewrite.uses(lambda w, *a: call(w, *a, **kwargs)[0], weights, *args).items():
            if leaf not in hooks:
                continue
            name = f"{type(module).__name__}.{method}".removesuffix(".__call__")
            self.notes[".".join((*module.scope.path, leaf))] = describe_uses(name, uses, hooks[leaf])
        return super()._call_rewritten(module, method, hooks, dense, args, kwargs)


def _apply_around(module: Any, hook: Any, use: Use, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a module, with its adapter applied to the input and the output."""
    x = hook.input(use, call_input(args, kwargs)[0])
    args, kwargs = with_input(x, args, kwargs)
    return hook.output(use, x, run(*args, **kwargs), meta.unbox(module.scope.get_variable("params", "kernel")))


def _is_along_roles(use: Use) -> bool:
    """Return True if a contraction runs over exactly all input axes, or exactly all output axes."""
    in_axes, out_axes = set(use.letters("in")), set(use.letters("out"))
    in_x, out_x = in_axes & set(use.x), out_axes & set(use.x)
    return (in_x == in_axes and not out_x) or (out_x == out_axes and not in_x)


def intercept(sites: Mapping[tuple[str, ...], Mapping[str, Sequence[LeafAdapter]]]) -> AbstractContextManager[None]:
    """Return a context in which the calls of Linen modules apply these adapters."""
    return nn.intercept_methods(Interceptor(sites))
