"""A call of a model with the virtual tokens of an adapter: the changed embeddings, masks and positions.

Pure functions, for NNX and Linen alike.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp

from jaxadapt.adapters.adapter import Recipe, is_array
from jaxadapt.configs.prompts import PromptLearningConfig
from jaxadapt.core.errors import AttachError, MismatchError
from jaxadapt.methods.base import METHODS, Array, get_method
from jaxadapt.methods.prompt import PREFILLED, PromptMethod, keys_and_values
from jaxadapt.models.attention_calls import (
    AttentionCall,
    RelativeBias,
    TakesEmbeddings,
    TakesKeys,
    hide_later,
    rewrite_attention,
)

# ---------------------------------------------------------------- arguments


IGNORED = -100
"""The label of a token without loss, as in torch."""


class Names(NamedTuple):
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
TOKEN_TYPES, LABELS = "token_type_ids", "labels"


def _bind(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Return the arguments of a method by name, without `self`."""
    signature = inspect.signature(call)
    return signature.replace(parameters=list(signature.parameters.values())[1:]).bind(*args, **kwargs)


def _parameter(bound: inspect.BoundArguments, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in bound.signature.parameters), None)


def _first_positions(batch: int, length: int) -> Array:
    """Return the positions of the first tokens, integers (batch, length)."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))


def _shift_positions(
    bound: inspect.BoundArguments, n: int, peft_type: str, names: Names = INPUT, relative: bool = False
) -> None:
    """Move the positions of a call by the number of virtual tokens; without positions, the first token has n.

    With `relative`, a model that takes no positions knows only distances; else raise `AttachError` for it.
    """
    name = _parameter(bound, names.positions)
    if name is None and relative:
        return
    if name is None:
        raise AttachError(
            f"{peft_type} puts {n} virtual tokens before the input, so the input's positions begin at {n}, but this"
            f" model takes no positions. Give its call an argument {' or '.join(map(repr, names.positions[:2]))} of"
            " shape (batch, time); a model that knows only distances passes them to jaxadapt.models.RelativeBias, and"
            " its KeyMap has relative_positions=True"
        )
    positions = bound.arguments.get(name)
    if positions is None:
        candidates = (*names.tokens, *names.embeddings) if names.tokens else bound.arguments
        values: Any = map(bound.arguments.get, candidates)
        shape = next((x.shape for x in values if is_array(x) and len(x.shape) >= 2), None)
        if shape is None:
            raise AttachError(
                "the call has no argument of shape (batch, time, …), from which the positions follow; pass them"
            )
        positions = _first_positions(*shape[:2])
    bound.arguments[name] = positions + n


def _prepend_mask(bound: inspect.BoundArguments, n: int, names: Names = INPUT) -> None:
    """Add n visible tokens at the start of the mask of the tokens, if the call has one."""
    name = _parameter(bound, names.masks) or ""
    mask = bound.arguments.get(name)
    if mask is None:
        return
    if mask.ndim != 2:
        raise AttachError(
            f"{name}: expected a mask of the tokens, (batch, time), found one of shape {tuple(mask.shape)}, which"
            " virtual tokens cannot extend"
        )
    bound.arguments[name] = jnp.concatenate([jnp.ones((mask.shape[0], n), mask.dtype), mask], axis=1)


def _prepend_embeddings(
    bound: inspect.BoundArguments,
    virtual: Array,
    embed: Callable[[Array], Array],
    peft_type: str,
    names: Names = INPUT,
    labels: bool = True,
) -> None:
    """Put embeddings in place of the tokens of a call, and virtual tokens before them.

    Positions count from 0 at the first virtual token. Positions that are given move by the number of virtual tokens.
    (PEFT ignores given positions, with a warning.)

    Args:
        bound: the arguments of the call.
        virtual: the embeddings of the virtual tokens, (n, width) or (batch, n, width).
        embed: returns the embeddings of tokens (batch, time), as the model computes them.
        peft_type: the method, for messages.
        names: the arguments of the sequence that gets the virtual tokens.
        labels: True if the labels are those of this sequence.

    Raises `AttachError` if the model takes no embeddings, `MismatchError` if they have another width.
    """
    name, arguments = _parameter(bound, names.embeddings), bound.arguments
    if name is None:
        raise AttachError(
            f"{peft_type} puts embeddings before those of the tokens, but this model takes no embeddings. Give its call"
            f" an argument {' or '.join(map(repr, names.embeddings[:2]))} of shape (batch, time, width), which it uses"
            " in place of tokens"
        )
    given = arguments.get(name)
    if given is None:
        tokens = _tokens(bound, names)
        given = embed(arguments[tokens])
        arguments[tokens] = None
    (batch, length, width), n = given.shape, virtual.shape[-2]
    if virtual.shape[-1] != width or (virtual.ndim == 3 and virtual.shape[0] != batch):
        raise MismatchError(
            f"the adapter's virtual tokens have the shape {tuple(virtual.shape)}, but the embeddings of this call have"
            f" {tuple(given.shape)}. The last axis (token_dim, the width of the base) and a batch axis must be equal"
        )
    virtual = jnp.broadcast_to(virtual.astype(given.dtype), (batch, n, width))
    arguments[name] = jnp.concatenate([virtual, given], axis=1)
    _prepend_mask(bound, n, names)
    for argument, value, own in ((TOKEN_TYPES, 0, names is INPUT), (LABELS, IGNORED, labels)):
        ids = arguments.get(argument)
        if own and ids is not None and ids.ndim == 2:
            arguments[argument] = _extend(ids, n, value)
    if (position := _parameter(bound, names.positions)) is not None:
        after = arguments.get(position)
        after = _first_positions(batch, length) if after is None else after
        after = jnp.broadcast_to(after if after.ndim == 2 else after[None], (batch, length)) + n
        arguments[position] = jnp.concatenate([_first_positions(batch, n).astype(after.dtype), after], axis=1)


def extend_labels(config: PromptLearningConfig, labels: Array) -> Array:
    """Return labels for the outputs of a model with an adapter whose virtual tokens are embeddings, as PEFT does.

    The outputs begin with those of the virtual tokens, which have no loss. A prefix of keys and values has no outputs,
    and in an encoder-decoder only MULTITASK_PROMPT_TUNING has some.

    Args:
        config: the adapter's configuration.
        labels: integers (batch, time), -100 for tokens without loss.

    Returns integers (batch, n + time) that begin with -100, or the labels themselves. Raises `ConfigError` for a type
    that is not implemented.

    >>> from jaxadapt.configs.prompts import PromptTuningConfig
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
    others = {*INPUT.positions, *INPUT.masks, TOKEN_TYPES, LABELS, *(name for group in DECODER for name in group)}
    for name, x in bound.arguments.items():
        if name not in others and is_array(x) and len(x.shape) == 2 and jnp.issubdtype(x.dtype, jnp.integer):
            return name
    raise AttachError("the call has neither embeddings nor tokens of shape (batch, time)")


# ---------------------------------------------------------------- calling


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
        return cast(PromptMethod, METHODS[self.recipe.config.peft_type])

    @property
    def n(self) -> int:
        """The number of virtual tokens before the others."""
        return self.recipe.config.get("num_virtual_tokens")

    @property
    def encoder_decoder(self) -> bool:
        """True if the base has an encoder and a decoder."""
        return self.recipe.config.get("num_transformer_submodules") == 2

    def keys_and_values(self) -> Array:
        """Return the keys and values of every attention layer, (layers, 2, n, heads · size)."""
        return keys_and_values(self.tokens(), self.recipe.config.get("num_layers"), 2 if self.encoder_decoder else 1)

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
    if PREFILLED in prompt.data:
        raise AttachError(
            "invoke(prefilled=True) has no effect on a model with call_with_embeddings, because that method fills the"
            " cache itself; deactivate the adapter for the later calls"
        )
    if not keys:
        return "call_with_embeddings", (prompt.tokens(),)
    layers = prompt.keys_and_values()
    return "call_with_keys", (layers[:, 0], layers[:, 1])


def only_one(prompts: Mapping[str, Prompt]) -> Prompt | None:
    """Return the active adapter with virtual tokens, if there is one; raise `AttachError` if there are several."""
    if len(prompts) > 1:
        raise AttachError(
            "cannot apply several adapters with virtual tokens at once (as in PEFT). Activate one of them:"
            f" {', '.join(prompts)}"
        )
    return next(iter(prompts.values()), None)


def with_embeddings(
    prompt: Prompt,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    embed: Callable[[Array], Array],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with an adapter whose virtual tokens are embeddings.

    Args:
        prompt: the adapter.
        call: the method, as the model's class has it.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        embed: returns the embeddings of tokens (batch, time), as the model computes them.

    Raises `AttachError` if the model cannot take them, `MismatchError` if they have another width.
    """
    bound, n, peft_type = _bind(call, args, kwargs), prompt.n, prompt.method.peft_type
    if PREFILLED in prompt.data:  # an earlier call has put the virtual tokens into the model's cache
        if prompt.encoder_decoder:
            raise AttachError("invoke(prefilled=True) is not implemented for models with an encoder; call it without")
        _shift_positions(bound, n, peft_type)
        _prepend_mask(bound, n)
    elif not prompt.encoder_decoder:
        _prepend_embeddings(bound, prompt.tokens(), embed, peft_type)
    else:
        virtual = prompt.tokens()
        _prepend_embeddings(bound, virtual[..., :n, :], embed, peft_type, labels=False)
        if prompt.method.in_decoder:
            _prepend_embeddings(bound, virtual[..., n:, :], embed, peft_type, DECODER)
    return bound.args, bound.kwargs


def call_with_keys(
    f: Callable[..., Any],
    prompt: Prompt,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    state: Any,
    base: Callable[[], Mapping[str, Any]],
) -> Any:
    """Evaluate `f(state, args, kwargs)` with keys and values of an adapter in the attention layers.

    Args:
        f: the call of the model, as a function of its state and its arguments.
        prompt: the adapter.
        call: the method, as the model's class has it.
        args: the positional arguments of the call.
        kwargs: the keyword arguments of the call.
        state: a tree of arrays.
        base: returns the base parameters, `{leaf: array}`.

    Raises `AttachError` if the model cannot take them, `MismatchError` if they have another width.
    """
    method = prompt.method
    if method.adds == "attention":
        layers = method.layers(prompt.recipe.config, prompt.recipe.keymap, prompt.params, base())

        def attend(call: AttentionCall, arrays: Mapping[str, Any], layer: Mapping[str, Array]) -> Array:
            return method.attend(call.run, arrays, layer)

        return rewrite_attention(f, attend, layers, state, tuple(args), dict(kwargs))
    bound = _bind(call, args, kwargs)
    _shift_positions(
        bound,
        prompt.n,
        method.peft_type,
        DECODER if prompt.encoder_decoder else INPUT,
        prompt.recipe.keymap.relative_positions,
    )
    layers = prompt.keys_and_values()
    return rewrite_attention(f, add_keys, layers, state, bound.args, bound.kwargs, decoder=prompt.encoder_decoder)


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
    if dict(call.options).get("is_causal"):  # the function applies a causal mask of its own
        mask = hide_later(mask, query.shape[-3], key.shape[-3])
        changes["is_causal"] = False
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:-1], key.shape[-3]))
        changed["mask"] = jnp.concatenate([jnp.ones((*mask.shape[:-1], n), bool), mask.astype(bool)], axis=-1)
    return call.run(changed, **changes)
