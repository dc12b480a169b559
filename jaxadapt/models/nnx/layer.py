"""What an adapted NNX layer computes: its own function, with the active adapters and its weights dequantised."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors, nnx

from jaxadapt import methods
from jaxadapt.adapters.adapter import Recipe
from jaxadapt.arrays.axes import Axes
from jaxadapt.core.errors import AttachError
from jaxadapt.methods import AppliedMethod, AppliedMethods, Method
from jaxadapt.models.nnx import survey
from jaxadapt.models.nnx.params import AdapterParam
from jaxadapt.models.nnx.survey import DROPOUT, AdaptedMeta, entry_points, kernel_use, plain_view
from jaxadapt.models.tracing import rewrite

ACTIVE = "active_adapters"


@dataclasses.dataclass(frozen=True, eq=False)
class Attached:
    """What an `AdapterParam` carries as metadata: its recipe, and what its site's arithmetic needs."""

    recipe: Recipe
    method: Method = dataclasses.field(repr=False)
    axes: Axes = dataclasses.field(repr=False)
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
    """What the parameters of one adapter at one leaf carry; other variables beside them do not."""
    found: Attached = next(var for var in tensors.values() if isinstance(var, AdapterParam)).get_metadata()["adapter"]
    return found


# ---------------------------------------------------------------- the run-time subclass


@functools.cache
def adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of a layer class whose call, and own public methods, apply the active adapters."""

    def following(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            return _call(self, base, f, args, kwargs)

        return method

    body: dict[str, Any] = {name: following(f) for name, f in entry_points(base).items()}
    body |= {"base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    made: Any = AdaptedMeta(f"Adapted{base.__name__}", (base,), body)
    return made


copyreg.pickle(AdaptedMeta, lambda cls: (adapted_class, (cls.base,)))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- calling


def _hooks(module: nnx.Module) -> dict[str, AppliedMethod | AppliedMethods]:
    """`{leaf: hook}` of the active adapters of one layer."""
    found: dict[str, list[AppliedMethod]] = {}
    own = vars(module)
    for name in own.get(ACTIVE, ()):
        for collection in methods.COLLECTIONS:
            held = own.get(collection)
            if held is None or name not in held:
                continue
            for leaf, tensors in held[name].items():
                params = {t: var.get_value() for t, var in tensors.items()}
                attached = attached_to(tensors)
                drop = own[DROPOUT][name] if DROPOUT in own and name in own[DROPOUT] else None
                drop = None if drop is None or drop.deterministic else drop
                if drop is not None and drop.rngs is None:
                    raise AttachError(
                        f"the adapter {name!r} has dropout, and was loaded without random numbers for it:"
                        " load(…, rngs=nnx.Rngs(seed)) to train it further, model.eval() to use it"
                    )
                hook = AppliedMethod(attached.method, attached.hparams, params, attached.axes, drop)
                found.setdefault(leaf, []).append(hook)
    return {leaf: hooks[0] if len(hooks) == 1 else AppliedMethods(tuple(hooks)) for leaf, hooks in found.items()}


def _call(module: Any, base: Any, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of a layer's functions, with the active adapters and its weights dequantised."""
    hooks, small = _hooks(module), survey.quantized_params(module)
    by_class = kernel_use(module)
    if not small and by_class is not None and not any(hook.apart or hook.replaces for hook in hooks.values()):
        return _by_class(module, hooks, by_class, f, args, kwargs)
    state = survey.layer_state(module)
    held = {path: var.get_value() for path, var in state.items()}
    drawn = {leaf: hook.map(_drawn) for leaf, hook in hooks.items()} if small else hooks

    def run(small: Mapping[str, Any], held: Mapping[str, Any]) -> Any:
        return _applied(module, small, held, drawn, base, f, args, kwargs)

    try:
        # The backward pass dequantises again: kept from the forward pass, the dense weights would fill the memory.
        y, changed = (jax.checkpoint(run) if small else run)(small, held)
    except errors.TraceContextError as error:
        raise AttachError(
            f"{base.__name__}: an adapted layer may change what it holds itself, a random stream or a count, and this"
            " one changes a variable of somebody else's; let it hold the object that has it (self.rngs = rngs), or"
            " leave it out with exclude_modules"
        ) from error
    for path, value in changed.items():
        state[path].set_value(value)
    return y


def _drawn(hook: AppliedMethod) -> AppliedMethod:
    """With its random numbers for one call at hand: nothing may draw them while JAX traces a part of the call."""
    if not isinstance(hook.drop, nnx.Dropout):
        return hook
    stream: Any = hook.drop.rngs
    return dataclasses.replace(hook, drop=functools.partial(hook.drop, rngs=stream()))


def _by_class(
    module: Any,
    hooks: Mapping[str, AppliedMethod | AppliedMethods],
    by_class: survey.KernelUse,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not hooks:
        return f(module, *args, **kwargs)
    if "inputs" in kwargs:
        args, kwargs = (kwargs["inputs"], *args), {k: v for k, v in kwargs.items() if k != "inputs"}
    x, *rest = args
    ((leaf, hook),) = hooks.items()
    use = by_class.use(module, x, rest or [kwargs.get("einsum_str")], hook.axes)
    x = hook.input(use, x)
    return hook.output(use, x, f(module, x, *rest, **kwargs), vars(module)[leaf].get_value())


def _applied(
    module: Any,
    small: Mapping[str, Any],
    held: Mapping[str, Any],
    hooks: dict[str, AppliedMethod | AppliedMethods],
    base: Any,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The output, and what of the layer's state (`held`) has changed."""
    if small:
        module = plain_view(module, base, small)
    own = vars(module)
    replaced = {leaf: hook.weight(own[leaf].get_value()) for leaf, hook in hooks.items() if hook.replaces}
    if replaced:
        module = plain_view(module, base, replaced)
        own, hooks = vars(module), {leaf: hook for leaf, hook in hooks.items() if not hook.replaces}
    if not hooks:
        return survey.run_pure(module, base, f, {}, held, args, kwargs)
    by_class = kernel_use(module)
    if by_class is not None and not any(hook.apart for hook in hooks.values()):
        return _by_class(module, hooks, by_class, f, args, kwargs), {}
    changed: dict[str, Any] = {}
    if isinstance(bias := own.get("bias"), nnx.Param):
        changed["bias"] = functools.reduce(lambda b, hook: hook.bias(b), hooks.values(), bias.get_value())

    def call(weights: Mapping[str, Any], held: Mapping[str, Any], *args: Any) -> Any:
        return survey.run_pure(module, base, f, {**changed, **weights}, held, args, kwargs)

    weights = {leaf: own[leaf].get_value() for leaf in hooks}
    params = {attr: v.get_value() for attr, v in own.items() if isinstance(v, nnx.Param)}
    try:
        methods.check_biases(hooks.values(), {a: v for a, v in params.items() if a not in hooks and a != "bias"})
        # (Another method than the call may use a weight the other way round: a head tied to an embedding, say.)
        forward = [leaf for leaf, hook in hooks.items() if hook.forward] if f is base.__call__ else ()
        return rewrite.rewrite(call, weights, hooks, held, *args, forward=forward)
    except AttachError as error:
        raise AttachError(f"{base.__name__}: {error}") from error
