"""The call of an adapted NNX layer: its own function, with active adapters applied and quantised weights made dense."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors, nnx

from jaxadapt.adapters.adapter import SHARED_NODE, Recipe
from jaxadapt.arrays.axes import Axes
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.applied import AppliedMethod, AppliedMethods, check_biases
from jaxadapt.methods.base import Drop, Method
from jaxadapt.methods.registry import COLLECTIONS
from jaxadapt.methods.rows import split_rows
from jaxadapt.models.nnx import prompt, survey
from jaxadapt.models.nnx.graph import AdapterParam, FrozenParam, SharedParam
from jaxadapt.models.nnx.survey import DROPOUT, AdaptedMeta, entry_points, kernel_use, plain_view
from jaxadapt.models.prompt import calling
from jaxadapt.models.row_sites import NO_ROUTE, RowSite
from jaxadapt.models.tracing import rewrite

ACTIVE = "active_adapters"
ROWS = "adapter_rows"
"""The attribute of a layer with a bank: `{leaf: {number of the site: {tensor: RowParam}}}`, empty without a route."""


@dataclasses.dataclass(frozen=True, eq=False)
class Attached:
    """The metadata of an `AdapterParam`: its adapter's recipe, and the method, axes and hyperparameters of its site."""

    recipe: Recipe
    method: Method = dataclasses.field(repr=False)
    axes: Axes | None = dataclasses.field(repr=False)
    hparams: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.recipe, self.method, self.axes, self.hparams))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Attached)
            and self.recipe == other.recipe
            and self.method == other.method
            and self.axes == other.axes
            and self.hparams == other.hparams
        )


def attached_to(tensors: Mapping[str, nnx.Variable[Any]]) -> Attached:
    """Return the metadata of one adapter at one leaf.

    Only its own tensors carry this metadata. Shared tensors carry their adapter's, and `LayerNumber`s carry none.
    """
    param = next(
        var for var in tensors.values()
        if isinstance(var, AdapterParam | FrozenParam) and not isinstance(var, SharedParam)
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


def _active_hooks(module: nnx.Module) -> dict[str, AppliedMethod | AppliedMethods]:
    """Return `{leaf: hook}` for the active adapters of one layer."""
    hooks: dict[str, list[AppliedMethod]] = {}
    attributes = vars(module)
    for name in attributes.get(ACTIVE, ()):
        for collection in COLLECTIONS:
            adapters = attributes.get(collection)
            if adapters is None or name not in adapters:
                continue
            for leaf, tensors in adapters[name].items():
                if leaf == SHARED_NODE:  # a prompt's tensors: see `prompt`
                    continue
                params = {t: _value_of(t, var) for t, var in tensors.items()}
                attached = attached_to(tensors)
                dropout = attributes[DROPOUT][name] if DROPOUT in attributes and name in attributes[DROPOUT] else None
                dropout = None if dropout is None or dropout.deterministic else dropout
                if dropout is not None and dropout.rngs is None:
                    raise AttachError(
                        f"the adapter {name!r} has dropout but no random stream, because it was loaded without rngs."
                        " Load it with load(…, rngs=nnx.Rngs(seed)) to train it, or call model.eval() to use it"
                    )
                assert attached.axes is not None, "only a shared tensor has no axes"
                drop = None if dropout is None else Drop(dropout.rate, dropout.rngs)
                hook = AppliedMethod.in_call(attached.method, attached.hparams, params, attached.axes, drop)
                hooks.setdefault(leaf, []).append(hook)
    for leaf, sites in attributes.get(ROWS, {}).items():
        if not sites:
            raise AttachError(NO_ROUTE)
        for tensors in sites.values():
            own = {name: var for name, var in tensors.items() if not isinstance(var, SharedParam)}
            site: RowSite = next(iter(own.values())).get_metadata()["row_site"]
            values = {name: _value_of(name, var) for name, var in tensors.items()}
            shared = {name: values.pop(name) for name in tensors if name not in own}
            hooks.setdefault(leaf, []).append(site.apply(values, shared))
    return {
        leaf: of_leaf[0] if len(of_leaf) == 1 else AppliedMethods(tuple(of_leaf)) for leaf, of_leaf in hooks.items()
    }


def _value_of(tensor: str, variable: nnx.Variable[Any]) -> Any:
    """Return a variable's value; raise `AttachError` for a slice of a shared tensor."""
    value = variable.get_value()
    if isinstance(variable, SharedParam) and value.shape != (shape := _whole_shape(variable.get_metadata())):
        raise AttachError(
            f"cannot run a layer: {tensor} belongs to the whole adapter and has shape {list(shape)}, but this layer got"
            f" {list(value.shape)}. Make the model's nnx.scan or nnx.vmap leave variables of type"
            " jaxadapt.models.SharedParam whole: nnx.StateAxes({jaxadapt.models.SharedParam: None, nnx.Param: 0,"
            " ...: 0})"
        )
    return value


def _whole_shape(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a shared tensor that no scan sliced."""
    return metadata["whole"] if "whole" in metadata else metadata["adapter"].hparams


def _call_adapted(module: Any, base: Any, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with its active adapters applied and its quantised weights made dense."""
    if f is base.__call__ and (virtual := prompt.active_prompt(module, vars(module).get(ACTIVE, ()))) is not None:
        if (hooked := calling.hooked_call(module, virtual)) is not None:
            name, first = hooked
            return getattr(base, name)(plain_view(module, base, {}), *first, *args, **kwargs)
        if virtual.method.adds != "embeddings":
            call: Any = functools.partial(_call_layer, base, f)
            return prompt.call_with_keys(module, virtual, base, call, args, kwargs)
        args, kwargs = prompt.with_embeddings(module, virtual, base, args, kwargs)
    return _call_layer(base, f, module, args, kwargs)


def _call_layer(base: Any, f: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with the adapters of its own weights."""
    hooks, known_use = _active_hooks(module), kernel_use(module)
    outer, inner = split_rows(hooks) if known_use is not None else ({}, hooks)
    if known_use is None or not outer:
        return _call_hooked(module, base, f, args, kwargs, hooks)

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return _call_hooked(module, base, f, args, kwargs, inner)

    return _call_known(module, base, outer, known_use, call, args, kwargs)


def _call_hooked(
    module: Any,
    base: Any,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    hooks: dict[str, AppliedMethod | AppliedMethods],
) -> Any:
    """Call a method of a layer with these adapters applied."""
    quantized, known_use = survey.quantized_params(module), kernel_use(module)
    if not quantized and not hooks:
        return f(module, *args, **kwargs)
    if not quantized and known_use is not None and not any(hook.apart or hook.by_weight for hook in hooks.values()):
        return _call_known(module, base, hooks, known_use, f, args, kwargs)
    variables = survey.layer_state(module)
    state = {path: var.get_value() for path, var in variables.items()}
    ready = {leaf: hook.map(_draw_key) for leaf, hook in hooks.items()} if quantized else hooks

    def run(quantized: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
        return _call_pure(module, quantized, state, ready, base, f, args, kwargs)

    try:
        # The backward pass dequantises again, so that the dense weights do not stay in memory between the passes.
        y, changed = (jax.checkpoint(run) if quantized else run)(quantized, state)
    except errors.TraceContextError as error:
        raise AttachError(
            f"{base.__name__}: the call changes a variable outside the layer. An adapted layer may change"
            " only its own variables, such as a random stream or a count. Store the object with the variable in the"
            " layer (self.rngs = rngs), or exclude the layer with exclude_modules"
        ) from error
    for path, value in changed.items():
        variables[path].set_value(value)
    return y


def _draw_key(hook: AppliedMethod) -> AppliedMethod:
    """Draw the dropout key of one call now, because a stream cannot be advanced inside `jax.checkpoint`."""
    if hook.drop is None:
        return hook
    key = hook.drop.make_key()
    return dataclasses.replace(hook, drop=dataclasses.replace(hook.drop, make_key=lambda: key))


def _call_known(
    module: Any,
    base: Any,
    hooks: Mapping[str, AppliedMethod | AppliedMethods],
    known_use: survey.KernelUse,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call one of Flax's own layers, and apply the adapter of its kernel to its input and output."""
    if not hooks:
        return f(module, *args, **kwargs)
    if "inputs" in kwargs:
        args, kwargs = (kwargs["inputs"], *args), {k: v for k, v in kwargs.items() if k != "inputs"}
    x, *rest = args
    ((leaf, hook),) = hooks.items()
    use = known_use.use(module, x, rest or [kwargs.get("einsum_str")], hook.axes)
    if not hook.follows_use(use):
        return f(plain_view(module, base, _changed_params(module, hooks)), x, *rest, **kwargs)
    x = hook.input(use, x)
    return hook.output(use, x, f(module, x, *rest, **kwargs), vars(module)[leaf].get_value())


def _changed_params(module: Any, hooks: Mapping[str, AppliedMethod | AppliedMethods]) -> dict[str, Any]:
    """Return the effective weights of a layer, and its bias if the adapters change it."""
    attributes = vars(module)
    changed = {leaf: hook.weight(attributes[leaf].get_value()) for leaf, hook in hooks.items()}
    bias = attributes.get("bias")
    if isinstance(bias, nnx.Param):
        old = changed.get("bias", bias.get_value())
        new = functools.reduce(lambda b, leaf: b if leaf == "bias" else hooks[leaf].bias(b), hooks, old)
        changed |= {} if new is old else {"bias": new}
    return changed


def _call_pure(
    module: Any,
    quantized: Mapping[str, Any],
    state: Mapping[str, Any],
    hooks: dict[str, AppliedMethod | AppliedMethods],
    base: Any,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Call a method of a layer without changing the layer; return the output and the changed state `{path: value}`."""
    if quantized:
        module = plain_view(module, base, quantized)
    attributes = vars(module)
    by_weight = {leaf: hook for leaf, hook in hooks.items() if hook.by_weight}
    replaced = _changed_params(module, by_weight) if by_weight else {}
    if replaced:
        module = plain_view(module, base, replaced)
        attributes, hooks = vars(module), {leaf: hook for leaf, hook in hooks.items() if not hook.by_weight}
    if not hooks:
        return survey.run_pure(module, base, f, {}, state, args, kwargs)
    known_use = kernel_use(module)
    if known_use is not None and not any(hook.apart for hook in hooks.values()):
        return _call_known(module, base, hooks, known_use, f, args, kwargs), {}
    new_bias: dict[str, Any] = {}
    if isinstance(bias := attributes.get("bias"), nnx.Param):
        new_bias["bias"] = functools.reduce(lambda b, hook: hook.bias(b), hooks.values(), bias.get_value())

    def call(weights: Mapping[str, Any], state: Mapping[str, Any], *args: Any) -> Any:
        return survey.run_pure(module, base, f, {**new_bias, **weights}, state, args, kwargs)

    weights = {leaf: attributes[leaf].get_value() for leaf in hooks}
    params = {attr: v.get_value() for attr, v in attributes.items() if isinstance(v, nnx.Param)}
    try:
        check_biases(hooks.values(), {a: v for a, v in params.items() if a not in hooks and a != "bias"})
        # Methods other than __call__ may use a weight in reverse, as an output head tied to an embedding does.
        forward = [leaf for leaf, hook in hooks.items() if hook.forward] if f is base.__call__ else ()
        return rewrite.rewrite(call, weights, hooks, state, *args, forward=forward)
    except AttachError as error:
        raise AttachError(f"{base.__name__}: {error}") from error
