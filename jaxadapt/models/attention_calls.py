"""Attention that a prompt method can find in a trace: `attention`, and `Findable` for any other attention function.

A call is marked by `jax.checkpoint` with an `AttentionCall` as its policy. As the policy saves every value, nothing is
computed twice, and the compiled program is the same. The equation of the jaxpr holds the policy, and with it the
function that was called and the names of its arguments, whatever scan, jit, remat or grad surround it.

`rewrite_attention` evaluates a function with changes to these calls, by interpreting its jaxpr. Only equations that
contain such a call are interpreted: nested `jit`, `checkpoint` and `scan`. All others are evaluated unchanged. Two
methods of a model (`TakesEmbeddings`, `TakesKeys`) tell how virtual tokens enter it, where jaxadapt cannot do it by
itself.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, primitives

from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.prompt import BaseSizes
from jaxadapt.models.jaxprs import called_jaxpr, evaluate_scan, evaluate_unchanged, interpret, rematerialized, trace

# ---------------------------------------------------------------- attention


Array = Any

_ARRAYS = ("query", "key", "value", "bias", "mask", "dropout_rng")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A bias of attention scores by positions, such as T5's or ALiBi's; it also computes the bias of a prefix.

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
        return dataclasses.replace(self, keys=jnp.concatenate([jnp.arange(-n, 0, dtype=self.keys.dtype), self.keys]))


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
    rate = float(dropout_rate) if dropout_rate and not deterministic else 0.0
    if rate and dropout_rng is None:
        raise AttachError("attention: dropout_rate is not 0, so pass dropout_rng, or deterministic=True")
    return _mark(
        _grouped_attention,
        {
            "query": query, "key": key, "value": value, "bias": bias, "mask": mask, "dtype": dtype,
            "precision": precision, "is_causal": is_causal, "dropout_rng": dropout_rng if rate else None,
            "dropout": (rate, broadcast_dropout),
        },
        prefix,
    )  # fmt: skip


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


def hide_later(mask: Array | None, queries: int, keys: int) -> Array:
    """Return a mask, broadcastable to (..., queries, keys), that also hides key j from query i if j > i."""
    causal = jnp.tril(jnp.ones((queries, keys), dtype=bool))
    return causal if mask is None else mask & jnp.expand_dims(causal, range(mask.ndim - 2))


def _grouped_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | RelativeBias | None = None,
    mask: Array | None = None,
    dropout_rng: Array | None = None,
    *,
    dropout: tuple[float, bool],
    dtype: Any,
    precision: Any,
    is_causal: bool,
) -> Array:
    """Compute what `attention` returns; `dropout` has its `dropout_rate` and `broadcast_dropout`."""
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
        mask = hide_later(mask, length, key.shape[-3])
    if mask is not None:
        scores = jnp.where(by_group(mask), scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    if dropout_rng is not None:
        rate, broadcast = dropout
        shape = (1,) * (weights.ndim - 2) + weights.shape[-2:] if broadcast else weights.shape
        kept = jax.random.bernoulli(dropout_rng, 1 - rate, shape)
        weights = jnp.where(kept, weights / (1 - rate), 0).astype(value.dtype)
    return einsum("...kgts,...skh->...tkgh", weights, value).reshape(*batch, length, heads, value.shape[-1])


# ---------------------------------------------------------------- rewriting


Change = Callable[[AttentionCall, dict[str, Array], Any], Array]


Heads = tuple[int, int, int]
"""The queries' heads, the keys' heads and the size of a head in one call of `attention`."""


def rewrite_attention(f: Callable[..., Any], change: Change, layers: Any, *args: Any, decoder: bool = False) -> Any:
    """Evaluate `f(*args)` with the result of each call of `attention` replaced.

    Args:
        f: a function; it may close over arrays and tracers. Works inside jit, grad, vmap, scan and remat.
        change: called as `change(call, arrays, layer)`; returns what replaces the result of the call.
        layers: a tree of arrays whose first axis numbers the calls that a prefix may enter, in the order in which `f`
            makes them. `change` gets the tree of one call.
        args: the arguments of `f`.
        decoder: True if the layers are those of the decoder of an encoder-decoder; see `require_count`.

    Raises `AttachError` if `f` makes another number of such calls.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> double = lambda call, arrays, factor: call.run(arrays) * factor
    >>> rewrite_attention(lambda x: attention(x, x, x), double, jnp.full(1, 2.0), x).max().item()
    2.0
    """
    traced = trace(lambda _, *a: f(*a), {}, args)
    jaxpr = traced.closed.jaxpr
    calls = _find(jaxpr)
    others = calls.count(None)
    require_count(len(calls) - others, others, len(jax.tree.leaves(layers)[0]), decoder)
    return traced.result(_evaluate(jaxpr, traced.closed.consts, traced.arrays, change, layers))


def require_count(count: int, others: int, expected: int, decoder: bool) -> None:
    """Raise `AttachError` if the call of a model has another number of attention layers than its adapter.

    With `decoder`, the layers are those of the decoder of an encoder-decoder, which may be fewer. Each has a cross
    attention, and the encoder has `expected` layers, unless its outputs are given. Another number of calls without a
    prefix shows that some of those with one are no self-attention of the decoder.

    Args:
        count: the number of calls that a prefix may enter.
        others: the number of calls with `prefix=False`.
        expected: the number of layers of the adapter.
        decoder: True for an encoder-decoder.
    """
    if count == expected or (decoder and 0 < count < expected and others in (count, count + expected)):
        return
    if not count:
        raise AttachError(
            "this call of the model computes no attention to which keys and values can be added. Call"
            " jaxadapt.models.attention in its layers, or use nnx.MultiHeadAttention or nn.MultiHeadDotProductAttention"
        )
    text = (
        f"the adapter has keys and values for {expected} attention layers (num_layers), and this call of the model"
        f" computes {count}"
    )
    if not decoder:
        raise AttachError(f"{text}. Use an adapter of a model with as many layers")
    raise AttachError(
        f"{text} with a prefix, and {others} without one. Only the self-attention of the decoder has a prefix:"
        " call jaxadapt.models.attention with prefix=False in the encoder and in the cross attention. A decoder may"
        " have fewer layers than num_layers, which PEFT takes from the encoder; for one with more layers, where PEFT"
        " fails, train an adapter with its number"
    )


def _call(eqn: JaxprEqn) -> AttentionCall | None:
    """Return the call of `attention` that an equation is; None if it is none."""
    policy = eqn.params.get("policy") if eqn.primitive is primitives.remat_p else None
    return policy if isinstance(policy, AttentionCall) else None


def _spec(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _find(jaxpr: Jaxpr) -> list[Heads | None]:
    """Return the calls of `attention` in a jaxpr, in order; those in a scan once for each of its steps.

    A call that no prefix enters is None.
    """
    return [call for eqn in jaxpr.eqns for call in _calls_in(eqn)]


def _calls_in(eqn: JaxprEqn) -> list[Heads | None]:
    if (call := _call(eqn)) is not None:
        if not call.prefix:
            return [None]
        specs = call.arrays([_spec(a) for a in eqn.invars])
        return [(specs["query"].shape[-2], *specs["key"].shape[-2:])]
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    bodies = (v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values)
    inside = [call for body in bodies if isinstance(body, Jaxpr) for call in _find(body)]
    if eqn.primitive is primitives.scan_p:
        return inside * eqn.params["length"]
    if any(inside) and called_jaxpr(eqn) is None:
        raise AttachError(
            f"cannot add keys and values to an attention inside {eqn.primitive.name!r}; use a Python loop, a scan, jit"
            " or remat"
        )
    return inside


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], values: Sequence[Any], change: Change, layers: Any) -> list[Any]:
    """Evaluate a jaxpr; `layers` has an entry for each of its calls of `attention`."""
    start = 0

    def step(eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        nonlocal start
        if not (count := sum(call is not None for call in _calls_in(eqn))):
            return evaluate_unchanged(eqn, operands)
        first, start = start, start + count
        own = jax.tree.map(lambda x: x[first : first + count], layers)
        if (call := _call(eqn)) is not None:
            return [_checked(change(call, call.arrays(operands), jax.tree.map(lambda x: x[0], own)), eqn)]
        if eqn.primitive is primitives.scan_p:  # the layers of its steps become one more of its scanned inputs
            closed = eqn.params["jaxpr"]
            steps = jax.tree.map(lambda x: x.reshape(eqn.params["length"], -1, *x.shape[1:]), own)
            return evaluate_scan(
                eqn, operands, steps, lambda values, each: _evaluate(closed.jaxpr, closed.consts, values, change, each)
            )
        if eqn.primitive is primitives.remat_p:
            again = rematerialized(eqn, lambda *values: _evaluate(eqn.params["jaxpr"], (), values, change, own))
            return again(*operands)
        body = called_jaxpr(eqn)
        assert body is not None  # `_find` has raised for any other
        return _evaluate(*body, operands, change, own)

    return interpret(jaxpr, consts, values, step)


def _checked(y: Array, eqn: JaxprEqn) -> Array:
    """Return y in the dtype of the result that it replaces."""
    want = _spec(eqn.outvars[0])
    if jnp.shape(y) != want.shape:
        raise AttachError(f"the attention function returned an array of shape {jnp.shape(y)}, expected {want.shape}")
    return y.astype(want.dtype)


# ---------------------------------------------------------------- hooks


@runtime_checkable
class TakesEmbeddings(Protocol):
    """Protocol of a model with its own method for virtual tokens that are embeddings (prompt tuning, p-tuning, …).

    An adapted NNX model or Linen module that has this method is called by it. The method is responsible for positions,
    masks and whatever else counts tokens; it may call `self(…)`, which is then the plain model.

    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __call__(self, tokens): ...
    ...     def call_with_embeddings(self, virtual, tokens): ...
    >>> isinstance(Net(), TakesEmbeddings)
    True
    """

    def call_with_embeddings(self, virtual: Array, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's call with these arguments returns with virtual tokens before the others.

        Args:
            virtual: their embeddings, (n, width), or (batch, n, width) if the rows have different ones.
            args: the positional arguments of the call.
            kwargs: the keyword arguments of the call.
        """


@runtime_checkable
class TakesKeys(Protocol):
    """Protocol of a model with its own method for virtual tokens that are keys and values (prefix tuning, cartridges).

    An adapted NNX model or Linen module that has this method is called by it, for example to put them into a cache. The
    method is responsible for positions and masks; it may call `self(…)`, which is then the plain model.

    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __call__(self, tokens, cache=None): ...
    ...     def call_with_keys(self, keys, values, tokens): ...
    >>> isinstance(Net(), TakesKeys)
    True
    """

    def call_with_keys(self, keys: Array, values: Array, *args: Any, **kwargs: Any) -> Any:
        """Return what the model's call with these arguments returns with keys and values before those of the tokens.

        Args:
            keys: for every attention layer, (layers, n, heads · size). They are used as they are: where the model
                rotates its keys, these are rotated already.
            values: as the keys.
            args: the positional arguments of the call.
            kwargs: the keyword arguments of the call.
        """


# ---------------------------------------------------------------- sizes of a base


def input_embedding(keymap: KeyMap, leaves: Iterable[str]) -> str | None:
    """Return the leaf with the embeddings of the tokens; None if it is not the only candidate.

    The candidates are the embedding entries of the keymap, or for a model of no known family the leaves that Flax's
    embedding layers create. Of several, the one that the head is tied to in PyTorch's model is it.

    >>> from jaxadapt.keymaps.keymap import GENERIC
    >>> input_embedding(GENERIC, ["embed.embedding", "layers.0.q.kernel"])
    'embed.embedding'
    """
    matched = {leaf: keymap.match(leaf) for leaf in leaves}
    keys = {leaf: m.weight.file_key for leaf, m in matched.items() if m is not None and m.weight.kind == "embedding"}
    keys = keys or {leaf: leaf for leaf in matched if leaf.rpartition(".")[2] == "embedding"}
    tied = {same for _, same in keymap.tied}
    found = list(keys) if len(keys) == 1 else [leaf for leaf, key in keys.items() if key in tied]
    return found[0] if len(found) == 1 else None


def measure_base(f: Callable[..., Any], *args: Any) -> BaseSizes:
    """Return the sizes of a base model that a trace of one call, `f(*args)`, shows.

    Raises `AttachError` if the layers differ, or for a call of `attention` inside a loop or a function with a gradient
    of its own.

    >>> q = jax.ShapeDtypeStruct((1, 3, 2, 4), "float32")
    >>> measure_base(lambda q: attention(q, q, q), q).head_dim
    4
    """
    calls = [heads for heads in _find(trace(lambda _, *a: f(*a), {}, args).closed.jaxpr) if heads is not None]
    if not calls:
        return BaseSizes()
    if len(set(calls)) > 1:
        raise AttachError(
            "the attention layers of this model differ in their heads (queries' heads, keys' heads, size):"
            f" {sorted(set(calls))}. Prefixes for such models are not implemented"
        )
    queries, keys, size = calls[0]
    return BaseSizes(num_layers=len(calls), num_attention_heads=queries, num_kv_heads=keys, head_dim=size)


def with_width(sizes: BaseSizes, keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> BaseSizes:
    """Return the sizes of a base with the width of its token embeddings, where a base parameter shows it."""
    leaf = input_embedding(keymap, shapes)
    return sizes if leaf is None else dataclasses.replace(sizes, token_dim=shapes[leaf][-1])
