"""The arguments of a model's call, changed for virtual tokens: embeddings, masks and positions."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters.adapter import is_array
from jaxadapt.configs.method_config import PromptLearningConfig
from jaxadapt.core.errors import AttachError, MismatchError
from jaxadapt.methods import get_method
from jaxadapt.methods.prompt import PromptMethod

Array = Any

IGNORED = -100
"""The label of a token without loss, as in torch."""


@dataclasses.dataclass(frozen=True)
class Names:
    """The names by which a model may call the arguments of a sequence.

    Attributes:
        positions: the positions of its tokens, (batch, time).
        embeddings: the embeddings that it takes in place of tokens, (batch, time, width).
        masks: the mask of its tokens, (batch, time), which is 0 or False for padding.
        tokens: the tokens, (batch, time); empty: the first argument of such integers that has no other meaning.
    """

    positions: tuple[str, ...]
    embeddings: tuple[str, ...]
    masks: tuple[str, ...]
    tokens: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.positions, *self.embeddings, *self.masks, *self.tokens)


INPUT = Names(
    ("positions", "position_ids", "segment_pos", "input_positions"),
    ("embeddings", "inputs_embeds", "input_embeds", "input_embeddings"),
    ("mask", "attention_mask", "padding_mask", "input_mask"),
)
DECODER = Names(
    ("decoder_positions", "decoder_position_ids"),
    ("decoder_embeddings", "decoder_inputs_embeds", "decoder_input_embeds"),
    ("decoder_mask", "decoder_attention_mask"),
    ("decoder_tokens", "decoder_input_ids", "decoder_input_tokens"),
)
TOKEN_TYPES, LABELS = ("token_type_ids",), ("labels",)


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
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    n: int,
    peft_type: str,
    names: Names = INPUT,
    relative: bool = False,
) -> Arguments:
    """Return the arguments of a call with the positions moved by `n`; without positions, the first token has n.

    Args:
        signature: the parameters of the call.
        args: its positional arguments.
        kwargs: its keyword arguments.
        n: the number of virtual tokens.
        peft_type: the method, for messages.
        names: the arguments of the sequence that gets the virtual tokens.
        relative: True if the model knows positions only as distances.

    Raises `AttachError` if the model takes no positions, unless they are relative.
    """
    name = _parameter(signature, names.positions)
    if name is None and relative:
        return Arguments(tuple(args), dict(kwargs))
    if name is None:
        raise AttachError(
            f"{peft_type} puts {n} virtual tokens before the input, so the input's positions begin at {n}, but this"
            f" model takes no positions. Give its call an argument {' or '.join(map(repr, names.positions[:2]))} of"
            " shape (batch, time); a model that knows only distances passes them to jaxadapt.models.RelativeBias, and"
            " its KeyMap has relative_positions=True"
        )
    bound = signature.bind(*args, **kwargs)
    positions = bound.arguments.get(name)
    if positions is None:
        given = [bound.arguments.get(name) for name in (*names.tokens, *names.embeddings)]
        batch, length = _batch_and_length(given if names.tokens else bound.arguments.values())
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    bound.arguments[name] = positions + n
    return Arguments(bound.args, bound.kwargs)


def prepend_mask(bound: inspect.BoundArguments, n: int, names: Names = INPUT) -> None:
    """Add n visible tokens at the start of the mask of the tokens, if the call has one."""
    name = _parameter(bound.signature, names.masks)
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
    names: Names = INPUT,
    labels: bool = True,
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
        names: the arguments of the sequence that gets the virtual tokens.
        labels: True if the labels are those of this sequence.

    Raises `AttachError` if the model takes no embeddings, `MismatchError` if they have another width.
    """
    name = _parameter(signature, names.embeddings)
    if name is None:
        raise AttachError(
            f"{peft_type} puts embeddings before those of the tokens, but this model takes no embeddings. Give its call"
            f" an argument {' or '.join(map(repr, names.embeddings[:2]))} of shape (batch, time, width), which it uses"
            " in place of tokens"
        )
    bound = signature.bind(*args, **kwargs)
    given = bound.arguments.get(name)
    if given is None:
        tokens = _tokens(bound, names)
        given = embed(bound.arguments[tokens])
        bound.arguments[tokens] = None
    batch, length, width = given.shape
    n = virtual.shape[-2]
    if virtual.shape[-1] != width or (virtual.ndim == 3 and virtual.shape[0] != batch):
        raise MismatchError(
            f"the adapter's virtual tokens have the shape {tuple(virtual.shape)}, but the embeddings of this call have"
            f" {tuple(given.shape)}. The last axis (token_dim, the width of the base) and a batch axis must be equal"
        )
    virtual = jnp.broadcast_to(virtual.astype(given.dtype), (batch, n, width))
    bound.arguments[name] = jnp.concatenate([virtual, given], axis=1)
    prepend_mask(bound, n, names)
    filled = {**dict.fromkeys(TOKEN_TYPES if names is INPUT else (), 0), **dict.fromkeys(LABELS * labels, IGNORED)}
    for argument, value in filled.items():
        ids = bound.arguments.get(argument)
        if ids is not None and ids.ndim == 2:
            bound.arguments[argument] = _extend(ids, n, value)
    position = _parameter(signature, names.positions)
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


def extend_labels(config: PromptLearningConfig, labels: Array) -> Array:
    """Return labels for the outputs of a model with an adapter whose virtual tokens are embeddings, as PEFT does.

    The outputs begin with those of the virtual tokens, which have no loss. A prefix of keys and values has no outputs,
    and in an encoder-decoder only MULTITASK_PROMPT_TUNING has some.

    Args:
        config: the adapter's configuration.
        labels: integers (batch, time), -100 for tokens without loss.

    Returns integers (batch, n + time) that begin with -100, or the labels themselves. Raises `ConfigError` for a type
    that is not implemented.

    >>> from jaxadapt.configs import PromptTuningConfig
    >>> extend_labels(PromptTuningConfig(num_virtual_tokens=2), jnp.array([[5, 7]])).tolist()
    [[-100, -100, 5, 7]]
    """
    method = get_method(config)
    if (
        not isinstance(method, PromptMethod)
        or method.adds == "keys"
        or (config.submodules == 2 and not method.in_decoder)
    ):
        return labels
    return _extend(labels, config.num_virtual_tokens or 0, IGNORED)


def _extend(ids: Array, n: int, value: int) -> Array:
    """Return integers (batch, time) with n columns of a value before them."""
    return jnp.concatenate([jnp.full((ids.shape[0], n), value, ids.dtype), ids], axis=1)


def _tokens(bound: inspect.BoundArguments, names: Names) -> str:
    """Return the name of the argument that holds the tokens."""
    if names.tokens:
        named = [name for name in names.tokens if bound.arguments.get(name) is not None]
        if named:
            return named[0]
        raise AttachError(
            f"the call has neither embeddings nor tokens of the decoder ({' or '.join(map(repr, names.tokens[:2]))})"
        )
    others = {*INPUT.positions, *INPUT.masks, *TOKEN_TYPES, *LABELS, *DECODER.all}
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
