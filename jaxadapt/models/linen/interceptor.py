"""Interception of method calls inside a Linen model, to apply adapters and dequantise weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
from flax.core import meta, unfreeze
from flax.core.scope import Scope, subtract_filters

from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.applied import Applicable, AppliedMethod, AppliedMethods, together
from jaxadapt.methods.base import Drop
from jaxadapt.models import call

SEP = "~"  # marks the names of leaves that are added to `params` for one call and never stored
DROPOUT = "dropout"  # the random stream that `flax.linen.Dropout` uses


# ---------------------------------------------------------------- intercepted calls


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


def bind_layer(module: nn.Module, method: str, plain: Callable[..., Any]) -> call.Layer:
    """Return one method of a module as a layer that an adapter can run.

    Its `run` works on a copy of the module's scope without the leaves marked with `SEP`, and draws the same random
    numbers as the plain call. The changed state is that of the mutable collections other than "params", such as a cache
    or batch statistics.
    """
    scope = module.scope
    assert scope is not None
    mutable = subtract_filters(scope.mutable, "params")

    def run(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        variables: dict[str, Any] = unfreeze(dict(scope.variables()))
        stored = {k: v for k, v in variables.get("params", {}).items() if SEP not in k}
        variables["params"] = {**stored, **weights}
        # A scope belongs to the trace that creates it, so it is created here and not outside `run`.
        copy = Scope(variables, scope.rngs, scope.name, mutable, path=scope.path, flags=scope.flags)
        copy.rng_counters = scope.rng_counters
        y = getattr(module.copy(parent=copy), method)(*args, **kwargs)
        captured = copy.get_variable("intermediates", method)
        # The outer call captures this output too (capture_intermediates), so it is removed here.
        if isinstance(captured, tuple) and captured and captured[-1] is y:
            copy.put_variable("intermediates", method, captured[:-1])
        return y, {k: v for k, v in copy.mutable_variables().items() if k != "params"}

    def write_back(changed: Mapping[str, Any]) -> None:
        for collection, tree in changed.items():
            for key, value in unfreeze(dict(tree)).items():
                scope.put_variable(collection, key, value)

    own = {k: v for k, v in scope.variables().get("params", {}).items() if not isinstance(v, Mapping) and SEP not in k}
    params = {k: meta.unbox(v) for k, v in own.items()}
    function = getattr(type(module), method)
    return call.Layer(".".join(scope.path), module, function, method == "__call__", params, plain, run, write_back)


# ---------------------------------------------------------------- one call of a module with adapted leaves


@dataclasses.dataclass(frozen=True)
class LeafAdapter:
    """One adapter, or those of a batch's rows, at one leaf.

    Attributes:
        site: the method at this leaf.
        keys: the names in `params` of its tensors during the call.
        shared: the names in `params` of the tensors that all layers and all rows have in common.
        whole: such tensors that are not in `params`, because the model's scan would slice them there.
    """

    site: Applicable
    keys: Mapping[str, str]
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    whole: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def rate(self) -> float:
        """The dropout rate."""
        return self.site.method.dropout(self.site.hparams)

    def make_hook(self, scope: Any, drop: Drop | None) -> AppliedMethod:
        """Return the method with the tensors that `scope` holds."""
        if self.whole and any("jit(" in part for part in scope.debug_path):
            raise AttachError(
                f"{'.'.join(scope.path)}: cannot pass {', '.join(self.whole)}, which belong to the whole adapter, into"
                " nn.jit around or inside a scan over layers: its compiled function would keep the first values. Remove"
                " that nn.jit, and compile the whole call with jax.jit"
            )
        tensors, shared = (
            {tensor: scope.get_variable("params", key) for tensor, key in keys.items()}
            for keys in (self.keys, self.shared)
        )
        shared |= self.whole
        if isinstance(self.site, call.RowSite):
            return self.site.apply(tensors, shared)
        return AppliedMethod.in_call(self.site, {**tensors, **shared}, drop)


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """Applies adapters, and dequantises weights, in the calls of a model's modules.

    Args:
        sites: `{scope path: {leaf: one LeafAdapter per adapter}}`.
        quantized_scopes: the scope paths of modules with quantised parameters.
        dropout: True if the call has a random stream "dropout". Each site with a dropout rate then draws from it.
        running: the scope paths of modules whose plain call is in progress. The methods that such a call uses are not
            intercepted.
    """

    sites: Mapping[tuple[str, ...], Mapping[str, Sequence[LeafAdapter]]]
    quantized_scopes: frozenset[tuple[str, ...]] = frozenset()
    dropout: bool = False
    running: list[tuple[str, ...]] = dataclasses.field(default_factory=list[tuple[str, ...]])

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not self._intercepts(context):
            return next_fun(*args, **kwargs)
        refuse_mapped(context, self.sites)
        hooks = self._active_hooks(module.scope)
        if not hooks and module.scope.path not in self.quantized_scopes:
            return next_fun(*args, **kwargs)

        def plain(*args: Any, **kwargs: Any) -> Any:
            self.running.append(module.scope.path)
            try:
                return next_fun(*args, **kwargs)
            finally:
                self.running.pop()

        return call.apply(bind_layer(module, context.method_name, plain), hooks, args, kwargs)

    def _intercepts(self, context: Any) -> bool:
        return is_own_method(context) and context.module.scope.path not in self.running

    def _active_hooks(self, scope: Any) -> dict[str, AppliedMethod | AppliedMethods]:
        """Return `{leaf: hook}` for the adapters of one module."""
        hooks: dict[str, AppliedMethod | AppliedMethods] = {}
        for leaf, adapters in self.sites.get(scope.path, {}).items():
            if not scope.has_variable("params", next(iter(adapters[0].keys.values()))):
                continue  # a copy of the scope, whose caller applies the adapters
            applied = tuple(each.make_hook(scope, self._make_dropout(each.rate, scope)) for each in adapters)
            hooks[leaf] = together(applied)
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
        module, method = context.module, context.method_name
        if self._intercepts(context) and (hooks := self._active_hooks(module.scope)):
            name = f"{type(module).__name__}.{method}".removesuffix(".__call__")
            notes = call.describe(name, bind_layer(module, method, next_fun), hooks, args, kwargs)
            self.notes.update({".".join((*module.scope.path, leaf)): note for leaf, note in notes.items()})
        return super().__call__(next_fun, args, kwargs, context)


def intercept(sites: Mapping[tuple[str, ...], Mapping[str, Sequence[LeafAdapter]]]) -> AbstractContextManager[None]:
    """Return a context in which the calls of Linen modules apply these adapters."""
    return nn.intercept_methods(Interceptor(sites))
