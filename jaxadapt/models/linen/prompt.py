"""Prompt methods on Linen modules: calls with the virtual tokens of the active adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxadapt.core.errors import AttachError
from jaxadapt.methods.prompt.base import BaseSizes
from jaxadapt.models.prompt import calling
from jaxadapt.models.prompt.attention import Findable, attention


def find_attention(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Intercept the calls of Flax's attention modules, so that a trace shows those of their attention function."""
    module = context.module
    is_attention = isinstance(module, nn.MultiHeadDotProductAttention) and context.method_name == "__call__"
    if not is_attention or module.attention_fn is attention or isinstance(module.attention_fn, Findable):
        return next_fun(*args, **kwargs)
    copy = module.clone(parent=module.scope, attention_fn=Findable(module.attention_fn))
    return copy(*args, **kwargs)


def call_module(
    module: nn.Module,
    prompt: calling.Prompt,
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call `apply(variables, *args, **kwargs)` with the virtual tokens of an adapter.

    Raises `AttachError` for another method than `__call__`.
    """
    method = kwargs.get("method")
    if not (method is None or method == "__call__" or method is type(module).__call__):
        name = method if isinstance(method, str) else method.__name__
        raise AttachError(
            f"the virtual tokens of {prompt.recipe.config.peft_type} enter the module's __call__, and this is a call of"
            f" {name!r}. Call it without the adapter, model.clone(active=())"
        )
    options = {name: kwargs[name] for name in ("rngs", "method", "capture_intermediates") if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in options}

    def run(state: Any, *args: Any, **kwargs: Any) -> Any:
        variables, rngs = state
        with nn.intercept_methods(find_attention):
            return apply(variables, *args, **{**options, **({} if rngs is None else {"rngs": rngs}), **kwargs})

    state = (variables, options.get("rngs"))
    return calling.call_with_prompt(run, call_signature(module), prompt, args, rest, state)


def call_signature(module: nn.Module) -> inspect.Signature:
    """Return the parameters of a module's call, without `self`."""
    signature = inspect.signature(type(module).__call__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def measure_base(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> BaseSizes:
    """Return the sizes of a base model that a trace of its `init` shows."""

    def run(rngs: Any, args: Any, kwargs: Any) -> Any:
        with nn.intercept_methods(find_attention):
            return module.init(rngs, *args, **kwargs)

    traced = jax.eval_shape(lambda x: x, (rngs, args, kwargs))
    return calling.measure_base(run, *traced)
