"""Evaluation of a function with changes to its calls of `attention`, by interpreting its jaxpr.

Only equations that contain such a call are interpreted: nested `jit`, `checkpoint` and `scan`. All others are evaluated
unchanged. Two methods of a model (`TakesEmbeddings`, `TakesKeys`) tell how virtual tokens enter it, where jaxadapt
cannot do it by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.prompt import BaseSizes
from jaxadapt.models.prompt.attention import AttentionCall
from jaxadapt.models.tracing.rewrite import called_jaxpr, evaluate_unchanged, interpret, trace

# ---------------------------------------------------------------- rewriting


Array = Any
Change = Callable[[AttentionCall, dict[str, Array], Any], Array]


@dataclasses.dataclass(frozen=True)
class AttentionShapes:
    """The shapes of the queries and keys in one call of `attention`, for each of the layers that a scan repeats."""

    query: tuple[int, ...]
    key: tuple[int, ...]


def attention_calls(f: Callable[..., Any], *args: Any) -> list[AttentionShapes]:
    """Return the calls of `attention` in `f(*args)`, in order, without computing anything.

    Raises `AttachError` for a call inside a loop or a function with a gradient of its own.

    >>> from jaxadapt.models.prompt.attention import attention
    >>> q = jax.ShapeDtypeStruct((1, 3, 2, 4), "float32")
    >>> [call.key for call in attention_calls(lambda q: attention(q, q, q), q)]
    [(1, 3, 2, 4)]
    """
    return _find(trace(lambda _, *a: f(*a), {}, args).closed.jaxpr)


@dataclasses.dataclass(frozen=True)
class CallCounts:
    """The calls of `attention` in one call of a model: those that a prefix may enter, and those with `prefix=False`."""

    prefixed: int
    others: int


def rewrite_attention(f: Callable[..., Any], change: Change, layers: Callable[[CallCounts], Any], *args: Any) -> Any:
    """Evaluate `f(*args)` with the result of each call of `attention` replaced.

    Args:
        f: a function; it may close over arrays and tracers. Works inside jit, grad, vmap, scan and remat.
        change: called as `change(call, arrays, layer)`; returns what replaces the result of the call.
        layers: returns, for the numbers of calls, a tree of arrays whose first axis numbers those that a prefix may
            enter, in the order in which `f` makes them. `change` gets the tree of one call.

    >>> from jaxadapt.models.prompt.attention import attention
    >>> x = jnp.ones((1, 3, 2, 4))
    >>> double = lambda call, arrays, factor: call.run(arrays) * factor
    >>> twice = lambda calls: jnp.full(calls.prefixed, 2.0)
    >>> rewrite_attention(lambda x: attention(x, x, x), double, twice, x).max().item()
    2.0
    """
    traced = trace(lambda _, *a: f(*a), {}, args)
    jaxpr = traced.closed.jaxpr
    of_calls = layers(CallCounts(len(_find(jaxpr)), _count_others(jaxpr)))
    return traced.result(_evaluate(jaxpr, traced.closed.consts, traced.arrays, change, of_calls))


def require_count(calls: CallCounts, expected: int, decoder: bool = False) -> None:
    """Raise `AttachError` if the call of a model has another number of attention layers than its adapter.

    With `decoder`, the layers are those of the decoder of an encoder-decoder, which may be fewer. Each has a cross
    attention, and the encoder has `expected` layers, unless its outputs are given. Another number of calls without a
    prefix shows that some of those with one are no self-attention of the decoder.
    """
    count = calls.prefixed
    if count == expected or (decoder and 0 < count < expected and calls.others in (count, count + expected)):
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
        f"{text} with a prefix, and {calls.others} without one. Only the self-attention of the decoder has a prefix:"
        " call jaxadapt.models.attention with prefix=False in the encoder and in the cross attention. A decoder may"
        " have fewer layers than num_layers, which PEFT takes from the encoder; for one with more layers, where PEFT"
        " fails, train an adapter with its number"
    )


def _call(eqn: core.JaxprEqn) -> AttentionCall | None:
    """Return the call of `attention` that an equation is; None if it is none."""
    policy = eqn.params.get("policy") if eqn.primitive is primitives.remat_p else None
    return policy if isinstance(policy, AttentionCall) else None


def _policy(eqn: core.JaxprEqn) -> AttentionCall | None:
    """Return the call of `attention` that an equation is; None if it is none, or one without prefixes."""
    call = _call(eqn)
    return call if call is not None and call.prefix else None


def _spec(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _bodies(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """Return the jaxprs inside an equation."""
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    bodies = (v.jaxpr if isinstance(v, core.ClosedJaxpr) else v for v in values)
    return [body for body in bodies if isinstance(body, core.Jaxpr)]


def _find(jaxpr: core.Jaxpr) -> list[AttentionShapes]:
    """Return the calls of `attention` in a jaxpr, in order; those in a scan once for each of its steps."""
    return [call for eqn in jaxpr.eqns for call in _calls_in(eqn)]


def _calls_in(eqn: core.JaxprEqn) -> list[AttentionShapes]:
    if (call := _policy(eqn)) is not None:
        shapes = call.arrays([_spec(a) for a in eqn.invars])
        return [AttentionShapes(shapes["query"].shape, shapes["key"].shape)]
    inside = [call for body in _bodies(eqn) for call in _find(body)]
    if eqn.primitive is primitives.scan_p:
        return inside * eqn.params["length"]
    if inside and called_jaxpr(eqn) is None:
        raise AttachError(
            f"cannot add keys and values to an attention inside {eqn.primitive.name!r}; use a Python loop, a scan, jit"
            " or remat"
        )
    return inside


def _count_others(jaxpr: core.Jaxpr) -> int:
    """Return the number of calls of `attention` in a jaxpr that no prefix enters."""
    count = 0
    for eqn in jaxpr.eqns:
        call, length = _call(eqn), eqn.params["length"] if eqn.primitive is primitives.scan_p else 1
        count += sum(map(_count_others, _bodies(eqn))) * length if call is None else not call.prefix
    return count


def _evaluate(
    jaxpr: core.Jaxpr, consts: Sequence[Any], values: Sequence[Any], change: Change, layers: Any
) -> list[Any]:
    """Evaluate a jaxpr; `layers` has an entry for each of its calls of `attention`."""
    start = 0

    def step(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        nonlocal start
        if not (count := len(_calls_in(eqn))):
            return evaluate_unchanged(eqn, operands)
        first, start = start, start + count
        own = jax.tree.map(lambda x: x[first : first + count], layers)
        if (call := _policy(eqn)) is not None:
            return [_checked(change(call, call.arrays(operands), jax.tree.map(lambda x: x[0], own)), eqn)]
        if eqn.primitive is primitives.scan_p:
            return _scan(eqn, operands, change, own)
        if eqn.primitive is primitives.remat_p:
            return _checkpoint(eqn, operands, change, own)
        body = called_jaxpr(eqn)
        assert body is not None  # `_find` has raised for any other
        return _evaluate(*body, operands, change, own)

    return interpret(jaxpr, consts, values, step)


def _checked(y: Array, eqn: core.JaxprEqn) -> Array:
    """Return y in the dtype of the result that it replaces."""
    want = _spec(eqn.outvars[0])
    if jnp.shape(y) != want.shape:
        raise AttachError(f"the attention function returned an array of shape {jnp.shape(y)}, expected {want.shape}")
    return y.astype(want.dtype)


def _scan(eqn: core.JaxprEqn, operands: list[Any], change: Change, layers: Any) -> list[Any]:
    """Evaluate a scan; the layers of its steps become one more of its scanned inputs."""
    p = eqn.params
    if "ft_in" in p:  # jax 0.12
        n_consts, n_carry, _ = map(len, p["ft_in"].unpack())
    else:
        n_consts, n_carry = p["num_consts"], p["num_carry"]
    consts, others = operands[:n_consts], operands[n_consts:]
    steps = jax.tree.map(lambda x: x.reshape(p["length"], -1, *x.shape[1:]), layers)

    def body(carry: list[Any], sliced: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        inner, step = sliced
        outs = _evaluate(p["jaxpr"].jaxpr, p["jaxpr"].consts, [*consts, *carry, *inner], change, step)
        return outs[:n_carry], outs[n_carry:]

    options = {name: p[name] for name in ("length", "reverse", "unroll")}
    carry, ys = jax.lax.scan(body, others[:n_carry], (others[n_carry:], steps), **options)
    return [*carry, *ys]


def _checkpoint(eqn: core.JaxprEqn, operands: list[Any], change: Change, layers: Any) -> list[Any]:
    """Evaluate a `checkpoint` under the same policy."""

    def body(layers: Any, *values: Any) -> list[Any]:
        return _evaluate(eqn.params["jaxpr"], (), values, change, layers)

    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    return again(layers, *operands)


# ---------------------------------------------------------------- hooks


@runtime_checkable
class TakesEmbeddings(Protocol):
    """A model with a call of its own for virtual tokens that are embeddings (prompt tuning, p-tuning, …).

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
        ...


@runtime_checkable
class TakesKeys(Protocol):
    """A model with a call of its own for virtual tokens that are keys and values (prefix tuning, cartridges).

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
        ...


# ---------------------------------------------------------------- embedding


def input_embedding(keymap: KeyMap, leaves: Iterable[str]) -> str | None:
    """Return the leaf with the embeddings of the tokens; None if it is not the only candidate.

    The candidates are the embedding entries of the keymap, or for a model of no known family the leaves that Flax's
    embedding layers create. Of several, the one that the head is tied to in PyTorch's model is it.

    >>> from jaxadapt.keymaps.generic import GENERIC
    >>> input_embedding(GENERIC, ["embed.embedding", "layers.0.q.kernel"])
    'embed.embedding'
    """
    matched = {leaf: keymap.match(leaf) for leaf in leaves}
    keys = {leaf: m.weight.file_key for leaf, m in matched.items() if m is not None and m.weight.kind == "embedding"}
    keys = keys or {leaf: leaf for leaf in matched if leaf.rpartition(".")[2] == "embedding"}
    tied = {same for _, same in keymap.tied}
    found = list(keys) if len(keys) == 1 else [leaf for leaf, key in keys.items() if key in tied]
    return found[0] if len(found) == 1 else None


def with_width(sizes: BaseSizes, keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> BaseSizes:
    """Return the sizes of a base with the width of its token embeddings, where a base parameter shows it."""
    leaf = input_embedding(keymap, shapes)
    return sizes if leaf is None else dataclasses.replace(sizes, token_dim=shapes[leaf][-1])
