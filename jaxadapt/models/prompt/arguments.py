"""The arguments of a model's call, changed for virtual tokens: embeddings, masks and positions."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters.adapter import is_array
from jaxadapt.core.errors import AttachError, MismatchError

Array = Any

POSITIONS = ("positions", "position_ids", "segment_pos", "input_positions")
"""The names by which a model may call the positions of its tokens, (batch, time)."""

EMBEDDINGS = ("embeddings", "inputs_embeds", "input_embeds", "input_embeddings")
"""The names by which a model may call the embeddings that it takes in place of tokens, (batch, time, width)."""

MASKS = ("mask", "attention_mask", "padding_mask", "input_mask")
"""The names by which a model may call the mask of its tokens, (batch, time), which is 0 or False for padding."""

TOKEN_TYPES = ("token_type_ids",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def signature_of(call: Callable[..., Any]) -> inspect.Signature:
    """Return the parameters of a method, without `self`."""
    signature = inspect.signature(call)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def shift_positions(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], n: int, peft_type: str
) -> Arguments:
    """Return the arguments of a call with the positions moved by `n`; without positions, the first token has n.

    Raises `AttachError` if the model takes no positions.
    """
    name = _parameter(signature, POSITIONS)
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


def prepend_mask(bound: inspect.BoundArguments, n: int) -> None:
    """Add n visible tokens at the start of the mask of the tokens, if the call has one."""
    name = _parameter(bound.signature, MASKS)
    mask = None if name is None else bound.arguments.get(name)
    if name is None or mask is None:
        return
    if mask.ndim != 2:
        raise AttachError(
            f"{name}: expected a mask of the tokens, (batch, time), found one of shape {tuple(mask.shape)}, which"
            " virtual tokens cannot extend"
        )
    bound.arguments[name] = jnp.concatenate([jnp.ones((mask.shape[0], n), mask.dtype), mask], axis=1)


def prepend_embeddings(
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    virtual: Array,
    embed: Callable[[Array], Array],
    peft_type: str,
) -> Arguments:
    """Return the arguments of a call with embeddings in place of tokens, and virtual tokens before them.

    Positions count from 0 at the first virtual token. Positions that are given move by the number of virtual tokens.
    (PEFT ignores given positions, with a warning.)

    Args:
        signature: the parameters of the call.
        args: its positional arguments.
        kwargs: its keyword arguments.
        virtual: the embeddings of the virtual tokens, (n, width) or (batch, n, width).
        embed: returns the embeddings of tokens (batch, time), as the model computes them.
        peft_type: the method, for messages.

    Raises `AttachError` if the model takes no embeddings, `MismatchError` if they have another width.
    """
    name = _parameter(signature, EMBEDDINGS)
    if name is None:
        raise AttachError(
            f"{peft_type} puts embeddings before those of the tokens, and this model takes no embeddings. Give its call"
            f" an argument {' or '.join(map(repr, EMBEDDINGS[:2]))} of shape (batch, time, width), which it uses in"
            " place of tokens"
        )
    bound = signature.bind(*args, **kwargs)
    given = bound.arguments.get(name)
    if given is None:
        tokens = _tokens(bound)
        given = embed(bound.arguments[tokens])
        bound.arguments[tokens] = None
    batch, length, width = given.shape
    n = virtual.shape[-2]
    if virtual.shape[-1] != width or (virtual.ndim == 3 and virtual.shape[0] != batch):
        raise MismatchError(
            f"the adapter's virtual tokens have the shape {tuple(virtual.shape)}, and the embeddings of this call"
            f" {tuple(given.shape)}. The last axis is token_dim, the width of the base, and the first the batch"
        )
    virtual = jnp.broadcast_to(virtual.astype(given.dtype), (batch, n, width))
    bound.arguments[name] = jnp.concatenate([virtual, given], axis=1)
    prepend_mask(bound, n)
    for types in (types for types in TOKEN_TYPES if bound.arguments.get(types) is not None):
        ids = bound.arguments[types]
        bound.arguments[types] = jnp.concatenate([jnp.zeros((batch, n), ids.dtype), ids], axis=1)
    position = _parameter(signature, POSITIONS)
    if position is not None:
        own = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (batch, n))
        after = bound.arguments.get(position)
        if after is None:
            after = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
        after = jnp.broadcast_to(after if after.ndim == 2 else after[None], (batch, length)) + n
        bound.arguments[position] = jnp.concatenate([own.astype(after.dtype), after], axis=1)
    return Arguments(bound.args, bound.kwargs)


def _parameter(signature: inspect.Signature, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in signature.parameters), None)


def _tokens(bound: inspect.BoundArguments) -> str:
    """Return the name of the argument that holds the tokens: the first one of integers of shape (batch, time)."""
    others = {*POSITIONS, *MASKS, *TOKEN_TYPES}
    for name, value in bound.arguments.items():
        if (
            name not in others
            and is_array(value)
            and len(value.shape) == 2
            and jnp.issubdtype(value.dtype, jnp.integer)
        ):
            return name
    raise AttachError("the call has neither embeddings nor tokens of shape (batch, time)")


def _batch_and_length(values: Any) -> tuple[int, int]:
    """Return the sizes of the first two axes of the first argument that has them."""
    for value in values:
        if is_array(value) and len(value.shape) >= 2:
            return value.shape[0], value.shape[1]
    raise AttachError("the call has no argument of shape (batch, time, …), from which the positions follow; pass them")
