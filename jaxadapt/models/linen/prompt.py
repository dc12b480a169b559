"""Prompt methods on Linen modules: calls with the virtual tokens of the active adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.prompt import BaseSizes
from jaxadapt.models.linen import collections
from jaxadapt.models.prompt import calling
from jaxadapt.models.prompt.attention import Findable, is_findable


def find_attention(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Intercept the calls of Flax's attention modules, so that a trace shows those of their attention function."""
    module = context.module
    is_attention = isinstance(module, nn.MultiHeadDotProductAttention) and context.method_name == "__call__"
    if not is_attention or is_findable(module.attention_fn):
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
            f"{prompt.recipe.config.peft_type} adds virtual tokens only to the module's __call__, but the call is of"
            f" {name!r}. Call {name!r} without the adapter, model.clone(active=())"
        )
    options = {name: kwargs[name] for name in ("rngs", "method", "capture_intermediates") if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in options}
    if (hooked := calling.hooked_call(module, prompt)) is not None:
        name, first = hooked
        return apply(variables, *first, *args, **{**kwargs, "method": name})
    if prompt.method.adds == "embeddings":

        def embed(tokens: Any) -> Any:
            return _embed(lambda: apply(variables, *args, **kwargs), tokens, prompt.method.peft_type)

        args, rest = calling.with_embeddings(prompt, type(module).__call__, args, rest, embed)
        return apply(variables, *args, **rest, **options)

    def run(state: Any, *args: Any, **kwargs: Any) -> Any:
        variables, rngs = state
        with nn.intercept_methods(find_attention):
            return apply(variables, *args, **{**options, **({} if rngs is None else {"rngs": rngs}), **kwargs})

    def base() -> dict[str, Any]:
        return paths.flatten(collections.unbox_tree(variables.get("params", {})))

    state = (variables, options.get("rngs"))
    return calling.call_with_keys(run, prompt, type(module).__call__, args, rest, state, base)


class _EmbeddedError(Exception):
    """Ends a call once the embeddings of its tokens are known."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings = embeddings


def _embed(call: Callable[[], Any], tokens: Any, peft_type: str) -> Any:
    """Return the embeddings of the tokens of a call, by the module's own `nn.Embed`. The call ends with them."""

    def stop(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if isinstance(context.module, nn.Embed) and context.method_name == "__call__" and given[0] is tokens:
            raise _EmbeddedError(y)
        return y

    try:
        with nn.intercept_methods(stop):
            call()
    except _EmbeddedError as found:
        return found.embeddings
    raise AttachError(
        f"{peft_type}: the module does not embed its tokens with an nn.Embed, so their embeddings are unknown. Pass"
        " embeddings to the call in place of tokens"
    )


def measure_base(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> BaseSizes:
    """Return the sizes of a base model that a trace of its `init` shows."""

    def run(rngs: Any, args: Any, kwargs: Any) -> Any:
        with nn.intercept_methods(find_attention):
            return module.init(rngs, *args, **kwargs)

    traced = jax.eval_shape(lambda x: x, (rngs, args, kwargs))
    return calling.measure_base(run, *traced)
