"""One call of a layer with adapters on its weights, for NNX and Linen alike.

The two libraries only say how to get a layer's parameters, how to run its method without changing the layer, and how to
write back the state that such a run changes: see `Layer`. Flax's own layers run as they are, with the adapter applied
around the call. In all other layers the uses of adapted weights are rewritten.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import Use, contradiction_message
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.applied import AppliedMethod, AppliedMethods, check_biases
from jaxadapt.methods.rows import split_rows
from jaxadapt.models import layers
from jaxadapt.models.tracing import rewrite
from jaxadapt.models.tracing.operations import Hook

Hooks = Mapping[str, AppliedMethod | AppliedMethods]
"""`{leaf: the adapters on it}` of one layer."""
Args = Sequence[Any]
Kwargs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One method of one layer, ready to be called.

    Attributes:
        name: names the layer in messages.
        module: the layer, for its configuration.
        method: the method, as the layer's class has it.
        is_call: True for `__call__`. Other methods may use a weight in reverse, as a tied output head does.
        params: `{leaf: array}` of the layer's own parameters, quantised ones as they are stored.
        plain: runs the method on the layer itself.
        run: `run(weights, *args, **kwargs)` runs the method with other values for some parameters, and leaves the
            layer unchanged. Returns the output, and the state that the run changed.
        write_back: writes the changed state into the layer.
    """

    name: str
    module: Any
    method: Callable[..., Any]
    is_call: bool
    params: Mapping[str, Any]
    plain: Callable[..., Any]
    run: Callable[..., tuple[Any, Mapping[str, Any]]]
    write_back: Callable[[Mapping[str, Any]], None]

    @property
    def kernel(self) -> layers.Kernel | None:
        """How the method uses the kernel if it is one of Flax's own calls; None if it is traced."""
        return layers.kernel_of(self.method)

    def output(self, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `run` returns as the output."""
        return self.run(weights, *args, **kwargs)[0]


def split_input(args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, str | None]:
    """Return the input of a call of one of Flax's layers, the other arguments, and an einsum's equation among them."""
    if "inputs" in kwargs:
        args, kwargs = (kwargs["inputs"], *args), {name: x for name, x in kwargs.items() if name != "inputs"}
    x, *rest = args
    return x, rest, kwargs, rest[0] if rest else kwargs.get("einsum_str")


def apply(layer: Layer, hooks: Hooks, args: Args, kwargs: Kwargs) -> Any:
    """Call a layer's method with its adapters applied and its quantised weights made dense."""
    outer, inner = split_rows(hooks)
    use = _known_use(layer, outer, args, kwargs)
    if use is None:
        return _apply_inside(layer, hooks, args, kwargs)
    weight = layer.params["kernel"]
    return _call_around(outer["kernel"], use, weight, lambda *a, **k: _apply_inside(layer, inner, a, k), args, kwargs)


def _apply_inside(layer: Layer, hooks: Hooks, args: Args, kwargs: Kwargs) -> Any:
    stored = {leaf: x for leaf, x in layer.params.items() if quantized.is_quantized(x)}
    if not stored and not hooks:
        return layer.plain(*args, **kwargs)
    if not stored and not any(hook.apart or hook.by_weight for hook in hooks.values()):
        use = _known_use(layer, hooks, args, kwargs)
        if use is not None:
            return _call_around(hooks["kernel"], use, layer.params["kernel"], layer.plain, args, kwargs)
    # A random stream cannot advance inside `jax.checkpoint`, so its key is drawn here.
    ready = {leaf: hook.map(_draw_key) for leaf, hook in hooks.items()} if stored else hooks

    def run(stored: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        dense = {leaf: quantized.to_dense(x) for leaf, x in stored.items()}
        return _run_adapted(layer, ready, dense, args, kwargs)

    # The backward pass dequantises again, so that the dense weights do not stay in memory between the passes.
    y, changed = (jax.checkpoint(run) if stored else run)(stored)
    layer.write_back(changed)
    return y


def _draw_key(hook: AppliedMethod) -> AppliedMethod:
    if hook.drop is None:
        return hook
    key = hook.drop.make_key()
    return dataclasses.replace(hook, drop=dataclasses.replace(hook.drop, make_key=lambda: key))


def _run_adapted(
    layer: Layer, hooks: Hooks, dense: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> tuple[Any, Mapping[str, Any]]:
    """Run a layer's method on dense parameters, with changed weights or rewritten uses of them."""
    params = {**layer.params, **dense}
    fixed = {**dense, **{leaf: hook.weight(params[leaf]) for leaf, hook in hooks.items() if hook.by_weight}}
    fixed |= _changed_bias(layer, hooks, {**params, **fixed})
    hooks = {leaf: hook for leaf, hook in hooks.items() if not hook.by_weight}
    if not hooks:
        return layer.run(fixed, *args, **kwargs)
    use = None if any(hook.apart for hook in hooks.values()) else _known_use(layer, hooks, args, kwargs)
    if use is not None:  # Flax's own layers with a kernel have no state
        run = functools.partial(layer.output, fixed)
        return _call_around(hooks["kernel"], use, params["kernel"], run, args, kwargs), {}
    return _run_rewritten(layer, hooks, params, fixed, args, kwargs)


def _run_rewritten(
    layer: Layer, hooks: Hooks, params: Mapping[str, Any], fixed: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> tuple[Any, Mapping[str, Any]]:
    """Run a layer's method on its parameters, with `fixed` in place of some, and with rewritten uses of the others."""
    others = {leaf: x for leaf, x in params.items() if leaf not in hooks and leaf != "bias"}
    kept = {leaf: x for leaf, x in fixed.items() if leaf not in hooks}
    forward = [leaf for leaf, hook in hooks.items() if hook.forward and layer.is_call]

    def run(weights: Mapping[str, Any], *args: Any) -> tuple[Any, Mapping[str, Any]]:
        return layer.run({**kept, **weights}, *args, **kwargs)

    try:
        check_biases(hooks.values(), others)
        return rewrite.rewrite(run, {leaf: params[leaf] for leaf in hooks}, hooks, *args, forward=forward)
    except AttachError as error:
        raise AttachError(f"{layer.name}: {error}") from error


def _changed_bias(layer: Layer, hooks: Hooks, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bias that the layer must use, if the adapters of its weights change it."""
    bias = params.get("bias")
    changed = {leaf: hook.bias(bias) for leaf, hook in hooks.items() if leaf != "bias" and bias is not None}
    changed = {leaf: new for leaf, new in changed.items() if new is not bias}
    if len(changed) > 1:
        raise AttachError(
            f"{layer.name}: the adapter scales the module's bias, but it is unknown to which of the adapted weights"
            f" {list(changed)} the bias belongs. Adapt only one of them"
        )
    return {} if not changed else {"bias": next(iter(changed.values()))}


def _known_use(layer: Layer, hooks: Hooks, args: Args, kwargs: Kwargs) -> Use | None:
    """Return the use of the kernel in a call of one of Flax's layers; None if the adapter cannot follow it there."""
    kernel = layer.kernel
    if kernel is None or list(hooks) != ["kernel"]:
        return None
    hook, (x, _, _, equation) = hooks["kernel"], split_input(args, kwargs)
    use = kernel.use(layer.module, x, equation, hook.axes)
    # A layer that gets its equation as an argument may also get the reverse one.
    if hook.forward and use.transposed and not equation:
        own = kernel.axes(layer.module, equation)
        raise AttachError(f"{layer.name}: {contradiction_message(hook.axes, own)}")
    return use if _is_along_roles(use) and hook.follows_use(use) else None


def _is_along_roles(use: Use) -> bool:
    """Return True if a contraction runs over exactly all input axes, or exactly all output axes."""
    in_axes, out_axes = set(use.letters("in")), set(use.letters("out"))
    in_x, out_x = in_axes & set(use.x), out_axes & set(use.x)
    return (in_x == in_axes and not out_x) or (out_x == out_axes and not in_x)


def _call_around(
    hook: AppliedMethod | AppliedMethods,
    use: Use,
    weight: Any,
    call: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
) -> Any:
    """Call one of Flax's layers, and apply the adapter of its kernel to its input and output."""
    x, rest, kwargs, _ = split_input(args, kwargs)
    x = hook.input(use, x)
    return hook.output(use, x, call(x, *rest, **kwargs), weight)


def describe(name: str, layer: Layer, hooks: Mapping[str, Hook], args: Args, kwargs: Kwargs) -> dict[str, str]:
    """Return `{leaf: note}` on how each adapter follows its weight in a call of the method called `name`."""
    if layer.kernel is not None:
        return dict.fromkeys(hooks, f"{name}'s own call")
    weights = {leaf: quantized.to_dense(layer.params[leaf]) for leaf in hooks}
    uses = rewrite.uses(functools.partial(layer.output, **kwargs), weights, *args)
    return {leaf: rewrite.describe_uses(name, uses[leaf], hook) for leaf, hook in hooks.items()}
