"""One call inside a Linen model: what kind it is, and how adapters take part in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze
from flax.core.scope import Scope, subtract_filters

from jaxadapt import methods
from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import Axes, Use, find_contradiction
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.methods import AppliedMethod, AppliedMethods
from jaxadapt.models import layers
from jaxadapt.models.tracing import rewrite, uses

SEP = "~"  # in the name of a leaf laid into `params` for one call; never stored
DROPOUT = "dropout"  # the stream of random numbers, as `flax.linen.Dropout` names it

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


def known_use(module: nn.Module, method: str) -> tuple[_Roles, _ToUse] | None:
    """How a layer uses its kernel, if its class says so; a subclass with its own `__call__` is traced."""
    if method != "__call__":
        return None
    owner = next((c for c in type(module).__mro__ if "__call__" in vars(c)), None)
    return _KNOWN.get(owner) if owner is not None else None


def known_roles(module: nn.Module, method: str, leaf: str) -> tuple[Axes, str, int] | None:
    """Roles, kind and groups of a weight that is used in no product, if the layer's class says so."""
    owner = next((c for c in type(module).__mro__ if method in vars(c)), None)
    m: Any = module
    if owner in (nn.Conv, nn.Conv.__mro__[1]) and isinstance(m, nn.Conv) and leaf == "kernel" and m.mask is None:
        window = (m.kernel_size,) if isinstance(m.kernel_size, int) else tuple(m.kernel_size)
        return layers.conv_axes(len(window) + 2), "conv", m.feature_group_count
    if owner is nn.Embed and leaf == "embedding":
        return layers.EMBEDDING, "embedding", 1
    return None


# ---------------------------------------------------------------- calls, as an interceptor sees them


def call_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The input of a known layer's call, and its other arguments (an einsum's equation)."""
    if "inputs" in kwargs:
        return kwargs["inputs"], [*args] or [kwargs.get("einsum_str")]
    return args[0], [*args[1:]] or [kwargs.get("einsum_str")]


def with_input(x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another input."""
    return (args, {**kwargs, "inputs": x}) if "inputs" in kwargs else ((x, *args[1:]), kwargs)


def is_own_method(context: Any) -> bool:
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
        hit = [module.scope.path] if is_mapped(module.scope) and module.scope.path in adapted else []
    leaves = [".".join((*path, leaf)) for path in hit for leaf in adapted[path]]
    if leaves:
        raise AttachError(f"{', '.join(leaves)}: {MAPPED}; leave the layer out with exclude_modules")


MAPPED = (
    "its weight passes through nn.map_variables (as nn.WeightNorm and nn.SpectralNorm do),"
    " which would change the adapter too"
)


def is_mapped(scope: Scope) -> bool:
    """Whether a scope shows other variables than the stored ones; flax notes transforms in `debug_path`."""
    return any("map_variables(" in part for part in scope.debug_path)


def direct_params(module: nn.Module) -> dict[str, Any]:
    """The leaves of "params" that a module's scope holds directly."""
    assert module.scope is not None
    params = module.scope.variables().get("params", {})
    return {k: v for k, v in params.items() if not isinstance(v, Mapping)}


def quantized_params(module: nn.Module) -> dict[str, Any]:
    """The leaves of "params" that a module's scope holds directly, and that are quantised."""
    return {k: meta.unbox(v) for k, v in direct_params(module).items() if quantized.is_quantized(v)}


def isolate_method(module: nn.Module, method: str) -> Callable[..., Any]:
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
        seen = mine.get_variable("intermediates", method)
        if isinstance(seen, tuple) and seen and seen[-1] is y:  # capture_intermediates; the plain call's does it too
            mine.put_variable("intermediates", method, seen[:-1])
        return y, {k: v for k, v in mine.mutable_variables().items() if k != "params"}

    return call


def write_back(scope: Scope, changed: Mapping[str, Any]) -> None:
    """What `isolate_method` returned, into the real scope; inner mappings in place, as other scopes hold them."""

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
                scope.put_variable(collection, key, unfreeze(dict(value)) if isinstance(value, Mapping) else value)


# ---------------------------------------------------------------- one call of a module with adapted leaves


@dataclasses.dataclass(frozen=True)
class LeafAdapter:
    """One adapter at one leaf: `keys` are the names its tensors have in `params` for the call."""

    method: methods.Method
    hparams: Any
    axes: Axes
    keys: Mapping[str, str]

    @property
    def rate(self) -> float:
        return self.method.dropout(self.hparams)

    def hook(self, scope: Any, drop: Callable[[Any], Any] | None) -> AppliedMethod:
        tensors = {tensor: scope.get_variable("params", key) for tensor, key in self.keys.items()}
        return AppliedMethod(self.method, self.hparams, tensors, self.axes, drop)


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """Applies the overlaid adapters, `{scope path: {leaf: one site per adapter}}`, and dequantises in `small` paths.

    With `drops` the call brings a stream "dropout", and every site with a dropout rate draws from it.
    """

    sites: Mapping[tuple[str, ...], Mapping[str, Sequence[LeafAdapter]]]
    small: frozenset[tuple[str, ...]] = frozenset()
    drops: bool = False
    inside: list[tuple[str, ...]] = dataclasses.field(default_factory=list[tuple[str, ...]])

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if not is_own_method(context) or module.scope.path in self.inside:
            return next_fun(*args, **kwargs)
        refuse_mapped(context, self.sites)
        hooks = self._hooks(module.scope)
        if module.scope.path in self.small and (small := quantized_params(module)):
            return self._dequantised(module, method, hooks, small, args, kwargs)
        if not hooks:
            return next_fun(*args, **kwargs)
        layer = known_use(module, method)
        if layer is not None and list(hooks) == ["kernel"] and not hooks["kernel"].apart:
            hook = hooks["kernel"]
            x, rest = call_input(args, kwargs)
            use = layer[1](module, x, rest, hook.axes)
            # (A layer that is told its equation by each call may be told the reverse, too.)
            if hook.forward and use.transposed and not any(rest):
                own = layer[0](module, rest)
                raise AttachError(f"{'.'.join(module.scope.path)}: {find_contradiction(hook.axes, own)}")
            if _along_roles(use):
                x = hook.input(use, x)
                args, kwargs = with_input(x, args, kwargs)
                self.inside.append(module.scope.path)
                try:
                    y = next_fun(*args, **kwargs)
                finally:
                    self.inside.pop()
                return hook.output(use, x, y, meta.unbox(module.scope.get_variable("params", "kernel")))
        y, changed = self._rewritten(module, method, hooks, {}, args, kwargs)
        write_back(module.scope, changed)
        return y

    def _dequantised(
        self, module: Any, method: str, hooks: dict[str, Any], small: dict[str, Any], args: Any, kwargs: Any
    ) -> Any:
        def run(small: Mapping[str, Any]) -> Any:
            dense = {leaf: quantized.to_dense(x) for leaf, x in small.items()}
            return self._rewritten(module, method, hooks, dense, args, kwargs)

        # The backward pass dequantises again: kept from the forward pass, the dense weights would fill the memory.
        y, changed = jax.checkpoint(run)(small)
        write_back(module.scope, changed)
        return y

    def _rewritten(
        self, module: Any, method: str, hooks: dict[str, Any], dense: Mapping[str, Any], args: Any, kwargs: Any
    ) -> Any:
        scope, call = module.scope, isolate_method(module, method)
        own = {k: dense.get(k, meta.unbox(v)) for k, v in direct_params(module).items() if SEP not in k}
        weights = {leaf: own[leaf] for leaf in hooks}
        fixed = {leaf: x for leaf, x in dense.items() if leaf not in hooks}
        if not hooks:
            return call(fixed, *args, **kwargs)
        if scope.has_variable("params", "bias"):
            bias = meta.unbox(scope.get_variable("params", "bias"))
            changed = [new for hook in hooks.values() if (new := hook.bias(bias)) is not bias]
            if changed and len(hooks) > 1:
                where = ".".join(scope.path)
                raise AttachError(f"{where}: which of the weights {list(hooks)} its bias belongs to is unknown")
            fixed |= {"bias": changed[0]} if changed else {}
        others = {k: v for k, v in own.items() if k not in hooks and k != "bias"}
        try:
            methods.check_biases(hooks.values(), others)
        except AttachError as error:
            raise AttachError(f"{'.'.join(scope.path)}: {error}") from error
        forward = [leaf for leaf, hook in hooks.items() if hook.forward] if method == "__call__" else ()
        try:
            return rewrite.rewrite(
                lambda w, *a: call({**fixed, **w}, *a, **kwargs), weights, hooks, *args, forward=forward
            )
        except AttachError as error:
            raise AttachError(f"{'.'.join(scope.path)}: {error}") from error

    def _hooks(self, scope: Any) -> dict[str, AppliedMethod | AppliedMethods]:
        out: dict[str, AppliedMethod | AppliedMethods] = {}
        for leaf, sites in self.sites.get(scope.path, {}).items():
            if not scope.has_variable("params", next(iter(sites[0].keys.values()))):
                continue  # this module is being called alone, without what was laid beside its weights
            hooks = tuple(site.hook(scope, self._dropout(site.rate, scope)) for site in sites)
            out[leaf] = hooks[0] if len(hooks) == 1 else AppliedMethods(hooks)
        return out

    def _dropout(self, rate: float, scope: Scope) -> Callable[[Any], Any] | None:
        if not rate or not self.drops:
            return None
        if not scope.has_rng(DROPOUT):
            raise AttachError(
                f'the call brings rngs={{"{DROPOUT}": …}}, and these layers, which have lora_dropout, do not see it:\n'
                + paths.bullets(self._blind(scope))
                + f'\nGive the nn.scan (or nn.vmap, …) around them split_rngs={{"params": True, "{DROPOUT}": True}}; or'
                " turn the adapters' dropout off, model.clone(deterministic=True)"
            )
        key = scope.make_rng(DROPOUT)

        def drop(x: Any) -> Any:
            return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)

        return drop

    def _blind(self, scope: Scope) -> list[str]:
        """The layers with dropout in the same lifted transform, which all have the random numbers of its scope."""
        begin = scope.root.path
        inside = {path: leaves.values() for path, leaves in self.sites.items() if path[: len(begin)] == begin}
        return [".".join(path) for path, held in inside.items() if any(site.rate for sites in held for site in sites)]


@dataclasses.dataclass(frozen=True)
class UseRecorder(Interceptor):
    """Notes how each adapted weight is followed, `{dotted leaf: note}`, for `summary`."""

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

    def _rewritten(
        self, module: Any, method: str, hooks: dict[str, Any], dense: Mapping[str, Any], args: Any, kwargs: Any
    ) -> Any:
        call = isolate_method(module, method)
        weights = {leaf: meta.unbox(module.scope.get_variable("params", leaf)) for leaf in hooks} | dict(dense)
        for leaf, found in rewrite.uses(lambda w, *a: call(w, *a, **kwargs)[0], weights, *args).items():
            if leaf not in hooks:
                continue
            name = f"{type(module).__name__}.{method}".removesuffix(".__call__")
            self.notes[".".join((*module.scope.path, leaf))] = uses.describe_uses(name, found, hooks[leaf])
        return super()._rewritten(module, method, hooks, dense, args, kwargs)


def _along_roles(use: Use) -> bool:
    """Whether a contraction runs over the inputs or over the outputs, and over nothing else."""
    inputs, out = set(use.letters("in")) & set(use.x), set(use.letters("out")) & set(use.x)
    return (inputs == set(use.letters("in")) and not out) or (out == set(use.letters("out")) and not inputs)
