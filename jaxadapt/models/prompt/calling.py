"""A call of a model with virtual tokens: what changes in its arguments, and in its attention.

Pure functions, for NNX and Linen alike. `f` computes the call as a function of its arguments.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt import methods
from jaxadapt.adapters.adapter import Recipe, is_array
from jaxadapt.core.errors import AttachError, MismatchError
from jaxadapt.methods.prompt import PromptMethod
from jaxadapt.methods.prompt.base import EMBEDDINGS, BaseSizes
from jaxadapt.methods.prompt.prefix import keys_and_values
from jaxadapt.models.prompt import rewriting
from jaxadapt.models.prompt.attention import AttentionCall, causal_mask

Array = Any

POSITIONS = ("positions", "position_ids", "segment_pos", "input_positions")
"""The names by which a model may call the positions of its tokens, (batch, time) or (time,)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """An active adapter of a prompt method: its recipe and its tensors."""

    recipe: Recipe
    params: Mapping[str, Array]

    @property
    def method(self) -> PromptMethod:
        method = methods.METHODS[self.recipe.config.peft_type]
        assert isinstance(method, PromptMethod)
        return method


def require_one(prompts: Mapping[str, Prompt]) -> None:
    """Raise `AttachError` if several adapters with virtual tokens are active."""
    if len(prompts) > 1:
        raise AttachError(
            "cannot apply several adapters with virtual tokens at once (as in PEFT). Activate one of them:"
            f" {', '.join(prompts)}"
        )


def call_with_prompt(
    f: Callable[..., Any],
    signature: inspect.Signature,
    prompt: Prompt,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    state: Any = None,
) -> Any:
    """Evaluate `f(state, *args, **kwargs)` with the virtual tokens of an adapter.

    Args:
        f: the call of the model, as a function of its state and its arguments.
        signature: the parameters of the call, without `self`.
        prompt: the adapter.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        state: whatever `f` takes as its first argument: arrays that the call may change.

    Raises `AttachError` if the model cannot take the virtual tokens, or `MismatchError` if they have another width.
    """
    config: Any = prompt.recipe.config
    tokens = prompt.method.store(config, prompt.params)[EMBEDDINGS]
    arguments = shift_positions(signature, args, kwargs, config.num_virtual_tokens, prompt.method.peft_type)
    layers = keys_and_values(tokens, config.num_layers)
    return rewriting.rewrite_attention(
        lambda state, a: f(state, *a.args, **a.kwargs), add_keys, layers, state, arguments
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def shift_positions(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], n: int, peft_type: str
) -> Arguments:
    """Return the arguments of a call with the positions moved by `n`; without positions, the first token has n.

    Raises `AttachError` if the model takes no positions.
    """
    name = next((name for name in POSITIONS if name in signature.parameters), None)
    if name is None:
        raise AttachError(
            f"{peft_type} puts {n} virtual tokens before the others, so these must have positions from {n} on, and this"
            f" model takes no positions. Give its call an argument {' or '.join(map(repr, POSITIONS[:2]))} of shape"
            " (batch, time)"
        )
    bound = signature.bind(*args, **kwargs)
    positions = bound.arguments.get(name)
    if positions is None:
        batch, length = _batch_and_length(bound.arguments.values())
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    bound.arguments[name] = positions + n
    return Arguments(bound.args, bound.kwargs)


def _batch_and_length(values: Any) -> tuple[int, int]:
    """Return the sizes of the first two axes of the first argument that has them."""
    for value in values:
        if is_array(value) and len(value.shape) >= 2:
            return value.shape[0], value.shape[1]
    raise AttachError("the call has no argument of shape (batch, time, …), from which the positions follow; pass them")


def add_keys(call: AttentionCall, arrays: Mapping[str, Array], layer: Array) -> Array:
    """Return the attention with keys and values before those of the call, visible to every query.

    Args:
        call: the call.
        arrays: its arrays: query (..., T, H, h), key (..., S, K, h), value (..., S, K, v).
        layer: the keys and the values to add, (2, n, K · h).
    """
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    if "bias" in arrays:
        raise AttachError(
            "cannot add keys to an attention with a bias, whose values for these keys only the model can compute. Pass"
            " a boolean mask instead, if the bias hides keys"
        )
    n, width = layer.shape[1:]
    for name, x in (("keys", key), ("values", value)):
        if width != x.shape[-2] * x.shape[-1]:
            raise MismatchError(
                f"the adapter's {name} have the width {width} (token_dim), and those of the model"
                f" {x.shape[-2]} heads of size {x.shape[-1]}. Use an adapter of a model with the same heads"
            )
    first, second = (
        jnp.broadcast_to(new.reshape(n, *x.shape[-2:]).astype(x.dtype), (*x.shape[:-3], n, *x.shape[-2:]))
        for new, x in zip(layer, (key, value), strict=True)
    )
    changed = dict(arrays)
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
