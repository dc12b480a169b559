"""Attention that a prompt method can find in a trace: `attention`, and `Findable` for any other attention function.

A call is marked by `jax.checkpoint` with an `AttentionCall` as its policy. As the policy saves every value, nothing is
computed twice, and the compiled program is the same. The equation of the jaxpr holds the policy, and with it the
function that was called and the names of its arguments, whatever scan, jit, remat or grad surround it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.core.errors import AttachError

# ---------------------------------------------------------------- attention


Array = Any

_ARRAYS = ("query", "key", "value", "bias", "mask", "dropout_rng")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A bias of attention scores that depends on positions, as T5's or ALiBi's, so that a prefix gets one too.

    The keys of a prefix of n tokens have the positions -n … -1, before the first key at 0.

    Attributes:
        function: `function(params, queries, keys)` returns the bias, broadcastable to (..., H, T, S).
        params: the arrays that it needs, such as a table; a tree.
        queries: the positions of the queries, integers (T,).
        keys: the positions of the keys, integers (S,), counted from 0.

    >>> slope = lambda params, queries, keys: -params * jnp.abs(queries[:, None] - keys[None])
    >>> q = jnp.ones((1, 3, 2, 4))
    >>> attention(q, q, q, bias=RelativeBias(slope, jnp.array(0.5), jnp.arange(3), jnp.arange(3))).shape
    (1, 3, 2, 4)
    """

    function: Callable[[Any, Array, Array], Array] = dataclasses.field(metadata={"static": True})
    params: Any
    queries: Array
    keys: Array

    def values(self) -> Array:
        """Return the bias."""
        return self.function(self.params, self.queries, self.keys)

    def extended(self, n: int) -> RelativeBias:
        """Return the bias for n more keys before the others."""
        first = jnp.arange(-n, 0, dtype=self.keys.dtype)
        return dataclasses.replace(self, keys=jnp.concatenate([first, self.keys]))


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function: the function, the arguments that are arrays, and all others.

    Attributes:
        function: an attention function with the arguments of `attention`.
        structure: the structure of the arguments that are arrays, or hold some, `{argument: tree}`.
        ndims: the numbers of axes of these arrays, in the order in which the equation of the jaxpr has them.
        options: `(argument, value)` of the other arguments.
        prefix: False if no prefix enters this attention.
    """

    function: Callable[..., Array]
    structure: Any
    ndims: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    prefix: bool = True

    def __call__(self, *_: Any, **__: Any) -> bool:
        """Answer `jax.checkpoint`'s question if it should save a value."""
        return True

    def arrays(self, operands: list[Array]) -> dict[str, Any]:
        """Return `{argument: array or tree of arrays}` from the operands of the equation.

        Raises `AttachError` for an array with more axes than the function was called with, as under `jax.vmap`.
        """
        own = operands[-len(self.ndims) :]
        if any(jnp.ndim(x) != ndim for x, ndim in zip(own, self.ndims, strict=True)):
            raise AttachError(
                "cannot add keys and values to an attention that runs under jax.vmap inside the model; write its batch"
                " axes as axes of its arguments"
            )
        return jax.tree.unflatten(self.structure, own)

    def run(self, arrays: Mapping[str, Any], **changes: Any) -> Array:
        """Call the function with these arrays, and with changes to the other arguments."""
        return self.function(**arrays, **{**dict(self.options), **changes})

    @property
    def is_causal(self) -> bool:
        """True if the function applies a causal mask of its own."""
        return bool(dict(self.options).get("is_causal", False))


@dataclasses.dataclass(frozen=True)
class Findable:
    """An attention function that behaves as the given one and whose calls a prompt method finds.

    Args:
        function: a function with the arguments of `flax.nnx.dot_product_attention`.

    >>> from flax import nnx
    >>> q = jnp.ones((1, 3, 2, 4))
    >>> bool((Findable(nnx.dot_product_attention)(q, q, q) == nnx.dot_product_attention(q, q, q)).all())
    True
    """

    function: Callable[..., Array]

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's parameters: Linen passes an attention function only the arguments that it has."""
        return inspect.signature(self.function)

    def __call__(
        self, query: Array, key: Array, value: Array, bias: Any = None, mask: Any = None, **kwargs: Any
    ) -> Any:
        return _mark(self.function, {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, **kwargs})


def is_findable(function: Callable[..., Any]) -> bool:
    """Return True for `attention`, with or without some of its arguments, and for a `Findable`.

    >>> is_findable(functools.partial(attention, prefix=False)), is_findable(len)
    (True, False)
    """
    while isinstance(function, functools.partial):
        function = function.func
    return function is attention or isinstance(function, Findable)


def attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | RelativeBias | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: None = None,
    is_causal: bool = False,
    prefix: bool = True,
) -> Array:
    """Compute dot-product attention, to which a prompt method can add keys and values.

    Pass it as `attention_fn` to `nnx.MultiHeadAttention` or `nn.MultiHeadDotProductAttention`, or call it in a layer of
    your own. Its arguments are those of `flax.nnx.dot_product_attention`; besides, several heads of the queries may
    share one head of keys and values (grouped-query attention). For the cross attention of Flax's layers, pass
    `functools.partial(jaxadapt.models.attention, prefix=False)`.

    Args:
        query: (..., T, H, h).
        key: (..., S, K, h), with K dividing H; head i of the queries reads head i // (H / K).
        value: (..., S, K, v).
        bias: added to the scores, broadcastable to (..., H, T, S); or a `jaxadapt.models.RelativeBias`, if a prefix may
            be added.
        mask: boolean, broadcastable to (..., H, T, S); False hides a key from a query.
        broadcast_dropout: use one dropout mask for all axes but the last two.
        dropout_rng: the key for dropout, needed if `dropout_rate` is not 0 and `deterministic` is False.
        dropout_rate: the probability with which an attention weight is dropped.
        deterministic: True turns dropout off.
        dtype: the dtype of the computation; None: that of the arguments.
        precision: as in `jax.lax.dot_general`.
        module: always None; the attention weights cannot be recorded (`sow_weights`).
        is_causal: True hides key j from query i if j > i.
        prefix: False if no prefix enters this attention: in cross attention, and in the encoder of an encoder-decoder.

    Returns (..., T, H, v). Scores and their softmax are in float32 or wider. Raises `AttachError` if dropout lacks its
    key, or for a module.

    >>> q, k = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 2, 8))
    >>> attention(q, k, k, is_causal=True).shape
    (1, 3, 4, 8)
    """
    if module is not None:  # pyright: ignore[reportUnnecessaryComparison]
        raise AttachError(
            "jaxadapt.models.attention records no weights in a module; call the layer without sow_weights"
        )
    arguments = {
        "query": query, "key": key, "value": value, "bias": bias, "mask": mask, "dropout_rng": dropout_rng,
        "broadcast_dropout": broadcast_dropout, "dropout_rate": dropout_rate, "deterministic": deterministic,
        "dtype": dtype, "precision": precision, "is_causal": is_causal,
    }  # fmt: skip
    return _mark(_grouped_attention, arguments, prefix)


def _mark(function: Callable[..., Array], arguments: Mapping[str, Any], prefix: bool = True) -> Array:
    """Call an attention function such that the call can be found in a jaxpr."""
    arrays = {name: arguments[name] for name in _ARRAYS if arguments.get(name) is not None}
    options = {name: value for name, value in arguments.items() if name not in _ARRAYS}
    if options.get("module") is not None:  # it records the weights in this module, so the call is not pure
        return function(**arguments)
    operands, structure = jax.tree.flatten(arrays)
    call = AttentionCall(function, structure, tuple(map(jnp.ndim, operands)), tuple(options.items()), prefix)
    run = jax.checkpoint(lambda *operands: call.run(call.arrays(list(operands))), policy=call, prevent_cse=False)
    return run(*operands)


def causal_mask(queries: int, keys: int) -> Array:
    """Return the boolean mask (queries, keys) that hides key j from query i if j > i."""
    return jnp.tril(jnp.ones((queries, keys), dtype=bool))


def _grouped_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | RelativeBias | None = None,
    mask: Array | None = None,
    *,
    broadcast_dropout: bool,
    dropout_rng: Array | None = None,
    dropout_rate: float,
    deterministic: bool,
    dtype: Any,
    precision: Any,
    is_causal: bool,
) -> Array:
    """Compute what `attention` returns."""
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    *batch, length, heads, size = query.shape
    groups = key.shape[-2]
    einsum = functools.partial(jnp.einsum, precision=precision)
    grouped = query.reshape(*batch, length, groups, heads // groups, size)
    scores = einsum("...tkgh,...skh->...kgts", grouped, key)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)) * size**-0.5

    def by_group(x: Array) -> Array:
        """Reshape an array that broadcasts to (..., H, T, S) so that it broadcasts to (..., K, H / K, T, S)."""
        x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
        split = (1, 1) if x.shape[-3] == 1 else (groups, heads // groups)
        return x.reshape(*x.shape[:-3], *split, *x.shape[-2:])

    if bias is not None:
        scores = scores + by_group(bias.values() if isinstance(bias, RelativeBias) else bias)
    if is_causal:
        mask = (
            causal_mask(length, key.shape[-3])
            if mask is None
            else mask & _like(causal_mask(length, key.shape[-3]), mask)
        )
    if mask is not None:
        scores = jnp.where(by_group(mask), scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if dropout_rate and not deterministic:
        if dropout_rng is None:
            raise AttachError("attention: dropout_rate is not 0, so pass dropout_rng, or deterministic=True")
        shape = (1,) * (weights.ndim - 2) + weights.shape[-2:] if broadcast_dropout else weights.shape
        kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0).astype(value.dtype)
    return einsum("...kgts,...skh->...tkgh", weights, value).reshape(*batch, length, heads, value.shape[-1])


def _like(x: Array, other: Array) -> Array:
    """Add leading axes of size 1, so that x has as many axes as the other array."""
    return x.reshape((1,) * (other.ndim - x.ndim) + x.shape)
