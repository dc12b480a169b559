"""A call of a model with the virtual tokens of an adapter. Pure functions, for NNX and Linen alike."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxadapt import methods
from jaxadapt.adapters.adapter import Recipe
from jaxadapt.core.errors import AttachError, MismatchError
from jaxadapt.methods.prompt import PREFILLED, BaseSizes, PromptMethod, keys_and_values
from jaxadapt.models.prompt import rewriting
from jaxadapt.models.prompt.arguments import (
    DECODER,
    INPUT,
    Arguments,
    prepend_embeddings,
    prepend_mask,
    shift_positions,
)
from jaxadapt.models.prompt.attention import AttentionCall, RelativeBias, causal_mask
from jaxadapt.models.prompt.gated import add_gated, gated_layers
from jaxadapt.models.prompt.hooks import TakesEmbeddings, TakesKeys

Array = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """The active adapter of a prompt method in one call.

    Attributes:
        recipe: the adapter's recipe.
        params: its tensors.
        data: what the method's `call_data` returned for this call.
    """

    recipe: Recipe
    params: Mapping[str, Array]
    data: Mapping[str, Array] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def method(self) -> PromptMethod:
        method = methods.METHODS[self.recipe.config.peft_type]
        assert isinstance(method, PromptMethod)
        return method

    @property
    def prefilled(self) -> bool:
        """True if an earlier call has put the virtual tokens into the model's cache."""
        return PREFILLED in self.data

    @property
    def n(self) -> int:
        """The number of virtual tokens before the others."""
        count: int = self.recipe.config.get("num_virtual_tokens")
        return count

    @property
    def encoder_decoder(self) -> bool:
        """True if the base has an encoder and a decoder."""
        submodules: int = self.recipe.config.get("num_transformer_submodules") or 1
        return submodules == 2

    def keys_and_values(self, calls: rewriting.CallCounts | None = None) -> Array:
        """Return the keys and values of every attention layer, (layers, 2, n, heads · size).

        Raises `AttachError` if the call of the model has another number of layers.
        """
        layers = self.recipe.config.get("num_layers")
        whole = keys_and_values(self.tokens(), layers, 2 if self.encoder_decoder else 1)
        if calls is None:
            return whole
        rewriting.require_count(calls, layers, self.encoder_decoder)
        return whole[: calls.prefixed]

    def tokens(self) -> Array:
        """Return the virtual tokens, (n, width) or (batch, n, width)."""
        return self.method.tokens(self.recipe.config, self.params, self.data)


def hooked_call(model: Any, prompt: Prompt) -> tuple[str, tuple[Array, ...]] | None:
    """Return the name of a model's own call for virtual tokens and its first arguments; None if it has none.

    Raises `AttachError` for a call with `prefilled`, since such a model decides itself how its cache is filled.
    """
    keys = prompt.method.adds == "keys"
    if prompt.method.adds == "attention" or not isinstance(model, TakesKeys if keys else TakesEmbeddings):
        return None
    if prompt.prefilled:
        raise AttachError(
            "invoke(prefilled=True) has no effect on a model with call_with_embeddings, because that method fills the"
            " cache itself; deactivate the adapter for the later calls"
        )
    if not keys:
        return "call_with_embeddings", (prompt.tokens(),)
    layers = prompt.keys_and_values()
    return "call_with_keys", (layers[:, 0], layers[:, 1])


def require_one(prompts: Mapping[str, Prompt]) -> None:
    """Raise `AttachError` if several adapters with virtual tokens are active."""
    if len(prompts) > 1:
        raise AttachError(
            "cannot apply several adapters with virtual tokens at once (as in PEFT). Activate one of them:"
            f" {', '.join(prompts)}"
        )


def with_embeddings(
    signature: inspect.Signature,
    prompt: Prompt,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    embed: Callable[[Array], Array],
) -> Arguments:
    """Return the arguments of a call with an adapter whose virtual tokens are embeddings.

    Args:
        signature: the parameters of the call, without `self`.
        prompt: the adapter.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        embed: returns the embeddings of tokens (batch, time), as the model computes them.

    Raises `AttachError` if the model cannot take them, `MismatchError` if they have another width.
    """
    peft_type = prompt.method.peft_type
    if not prompt.prefilled:
        n, virtual = prompt.n, prompt.tokens()
        if not prompt.encoder_decoder:
            return prepend_embeddings(signature, args, kwargs, virtual, embed, peft_type)
        both = prepend_embeddings(signature, args, kwargs, virtual[..., :n, :], embed, peft_type, labels=False)
        if not prompt.method.in_decoder:
            return both
        return prepend_embeddings(signature, both.args, both.kwargs, virtual[..., n:, :], embed, peft_type, DECODER)
    if prompt.encoder_decoder:
        raise AttachError("invoke(prefilled=True) is not implemented for models with an encoder; call it without")
    shifted = shift_positions(signature, args, kwargs, prompt.n, peft_type)
    bound = signature.bind(*shifted.args, **shifted.kwargs)
    prepend_mask(bound, prompt.n)
    return Arguments(bound.args, bound.kwargs)


def call_with_keys(
    f: Callable[..., Any],
    signature: inspect.Signature,
    prompt: Prompt,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    state: Any,
    base: Callable[[], Mapping[str, Any]],
) -> Any:
    """Evaluate `f(state, *args, **kwargs)` with keys and values of an adapter in the attention layers.

    Args:
        f: the call of the model, as a function of its state and its arguments.
        signature: the parameters of the call, without `self`.
        prompt: the adapter.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        state: a tree of arrays.
        base: returns the base parameters, `{leaf: array}`.

    Raises `AttachError` if the model cannot take them, `MismatchError` if they have another width.
    """
    if prompt.method.adds == "attention":
        arguments, change = Arguments(tuple(args), dict(kwargs)), add_gated
        layers: Callable[[rewriting.CallCounts], Any] = functools.partial(
            _of_calls, gated_layers(prompt.recipe, prompt.params, base())
        )
    else:
        names, relative = DECODER if prompt.encoder_decoder else INPUT, prompt.recipe.keymap.relative_positions
        arguments = shift_positions(signature, args, kwargs, prompt.n, prompt.method.peft_type, names, relative)
        change, layers = add_keys, prompt.keys_and_values
    return rewriting.rewrite_attention(lambda state, a: f(state, *a.args, **a.kwargs), change, layers, state, arguments)


def _of_calls(layers: Mapping[str, Array], calls: rewriting.CallCounts) -> Mapping[str, Array]:
    """Return the layers; raise `AttachError` if the call of the model has another number of them."""
    rewriting.require_count(calls, len(layers["gate"]))
    return layers


def add_keys(call: AttentionCall, arrays: Mapping[str, Any], layer: Array) -> Array:
    """Return the attention with keys and values before those of the call, visible to every query.

    Args:
        call: the call.
        arrays: its arrays: query (..., T, H, h), key (..., S, K, h), value (..., S, K, v).
        layer: the keys and the values to add, (2, n, K · h).
    """
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    bias = arrays.get("bias")
    if bias is not None and not isinstance(bias, RelativeBias):
        raise AttachError(
            "cannot add keys to an attention with a bias: only the model can compute the bias of the added keys. If the"
            " bias hides keys, pass a boolean mask instead; if it depends on distances, pass a"
            " jaxadapt.models.RelativeBias"
        )
    n, width = layer.shape[1:]
    for name, x in (("keys", key), ("values", value)):
        if width != x.shape[-2] * x.shape[-1]:
            raise MismatchError(
                f"the adapter's {name} have the width {width} (token_dim), but those of the model have"
                f" {x.shape[-2]} heads of size {x.shape[-1]}. Use an adapter of a model with the same heads"
            )
    first, second = (
        jnp.broadcast_to(new.reshape(n, *x.shape[-2:]).astype(x.dtype), (*x.shape[:-3], n, *x.shape[-2:]))
        for new, x in zip(layer, (key, value), strict=True)
    )
    changed = dict(arrays) if bias is None else {**arrays, "bias": bias.extended(n)}
    changed["key"] = jnp.concatenate([first, key], axis=-3)
    changed["value"] = jnp.concatenate([second, value], axis=-3)
    mask, changes = arrays.get("mask"), dict[str, Any]()
    if call.is_causal:
        hidden = causal_mask(query.shape[-3], key.shape[-3])
        mask = hidden if mask is None else mask & hidden.reshape((1,) * (mask.ndim - 2) + hidden.shape)
        changes["is_causal"] = False
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:-1], key.shape[-3]))
        changed["mask"] = jnp.concatenate([jnp.ones((*mask.shape[:-1], n), bool), mask.astype(bool)], axis=-1)
    return call.run(changed, **changes)


def measure_base(f: Callable[..., Any], *args: Any) -> BaseSizes:
    """Return the sizes of a base model that a trace of one call, `f(*args)`, shows."""
    calls = rewriting.attention_calls(f, *args)
    if not calls:
        return BaseSizes()
    heads = {(call.query[-2], call.key[-2], call.key[-1]) for call in calls}
    if len(heads) > 1:
        raise AttachError(
            "the attention layers of this model differ in their heads (queries' heads, keys' heads, size):"
            f" {sorted(heads)}. Prefixes for such models are not implemented"
        )
    ((queries, keys, size),) = heads
    return BaseSizes(num_layers=len(calls), num_attention_heads=queries, num_kv_heads=keys, head_dim=size)
