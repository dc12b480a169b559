"""A call of a model with the virtual tokens of an adapter: the changed embeddings, masks and positions.

Pure functions, for NNX and Linen alike.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters.adapter import Recipe, is_array
from jaxadapt.configs.method_config import PromptLearningConfig
from jaxadapt.core.errors import AttachError, MismatchError
from jaxadapt.methods.prompt import PREFILLED, BaseSizes, PromptMethod, keys_and_values
from jaxadapt.methods.registry import METHODS, get_method
from jaxadapt.models.prompt import rewriting
from jaxadapt.models.prompt.attention import AttentionCall, RelativeBias, add_gated, causal_mask, gated_layers
from jaxadapt.models.prompt.rewriting import TakesEmbeddings, TakesKeys

# ---------------------------------------------------------------- arguments


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
        method = METHODS[self.recipe.config.peft_type]
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
