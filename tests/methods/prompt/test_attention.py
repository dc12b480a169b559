"""Prefixes on Flax's own attention layers, against the formula written with NumPy; decoding with a cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError

B, T, D, H, S, N = 2, 5, 8, 2, 4, 3  # batch, time, width, heads, size of a head, virtual tokens
CONFIG = jaxadapt.PrefixTuningConfig(num_virtual_tokens=N)
X = np.random.RandomState(0).normal(size=(B, T, D)).astype(np.float32)


class NnxNet(nnx.Module):
    """One layer of attention over inputs plus their positions."""

    def __init__(self, rngs: nnx.Rngs, **options: Any) -> None:
        self.attention = nnx.MultiHeadAttention(H, D, decode=False, rngs=rngs, **options)

    def __call__(self, x: Any, positions: Any = None, mask: Any = None, decode: bool = False) -> Any:
        if positions is not None:
            x = x + 0.1 * positions[..., None]
        return self.attention(x, mask=None if mask is None else mask[:, None, None], decode=decode)


class LinenNet(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: Any, positions: Any = None, mask: Any = None) -> Any:
        if positions is not None:
            x = x + 0.1 * positions[..., None]
        return nn.MultiHeadDotProductAttention(H, qkv_features=D)(x, mask=None if mask is None else mask[:, None, None])


def expected(weights: Any, prefix: Any, x: np.ndarray, mask: np.ndarray, start: int, causal: bool = False) -> Any:
    """The output, with positions from `start` on."""
    x = x + 0.1 * (start + np.arange(x.shape[1]))[None, :, None]
    x_of = {n: np.einsum("btd,dhs->bths", x, weights[n]["kernel"]) + weights[n]["bias"] for n in weights if n != "out"}
    q, k, v = x_of["query"], x_of["key"], x_of["value"]
    first, second = (np.broadcast_to(p.reshape(N, H, S), (len(x), N, H, S)) for p in np.split(prefix, 2, axis=1))
    k, v = np.concatenate([first, k], 1), np.concatenate([second, v], 1)
    scores = np.einsum("bths,bnhs->bhtn", q, k) / np.sqrt(S)
    seen = np.concatenate([np.ones((len(x), N), bool), mask], 1)[:, None, None]
    if causal:
        seen = seen & np.concatenate([np.ones((x.shape[1], N), bool), np.tril(np.ones((x.shape[1],) * 2, bool))], 1)
    scores = np.where(seen, scores, -1e30)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhtn,bnhs->bths", p / p.sum(-1, keepdims=True), v)
    return np.einsum("bths,hsd->btd", mixed, weights["out"]["kernel"]) + weights["out"]["bias"]


MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], bool)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_nnx_attention(mask: Any) -> None:
    net = NnxNet(nnx.Rngs(0))
    plain, function = net(X), net.attention.attention_fn
    jaxadapt.adapt(net, CONFIG, rngs=nnx.Rngs(1), example=[jnp.asarray(X)])
    prefix = np.asarray(jaxadapt.extract(net).shared["prompt_embeddings"])
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net.attention, nnx.Param)))
    found = net(jnp.asarray(X), mask=None if mask is None else jnp.asarray(mask))
    want = expected(weights, prefix, X, np.ones((B, T), bool) if mask is None else mask, start=N)
    np.testing.assert_allclose(found, want, atol=2e-6)  # float32 sums
    jaxadapt.detach(net)
    assert net.attention.attention_fn is function
    np.testing.assert_array_equal(net(X), plain)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_linen_attention(mask: Any) -> None:
    module = jaxadapt.adapt(LinenNet(), CONFIG)
    variables = module.init(jax.random.key(0), jnp.asarray(X))
    prefix = np.asarray(jaxadapt.extract(variables).shared["prompt_embeddings"])
    weights = jax.tree.map(np.asarray, variables["params"]["MultiHeadDotProductAttention_0"])
    found = module.apply(variables, jnp.asarray(X), mask=None if mask is None else jnp.asarray(mask))
    want = expected(weights, prefix, X, np.ones((B, T), bool) if mask is None else mask, start=N)
    np.testing.assert_allclose(found, want, atol=2e-6)


def test_a_step_with_a_cache_is_the_last_row_of_a_whole_call() -> None:
    """The prefix is in no cache; it is there at every step."""
    net = NnxNet(nnx.Rngs(0))
    jaxadapt.adapt(net, CONFIG, rngs=nnx.Rngs(1), example=[jnp.asarray(X)])
    prefix = np.asarray(jaxadapt.extract(net).shared["prompt_embeddings"])
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net.attention, nnx.Param)))
    net.attention.init_cache(X.shape)
    want = expected(weights, prefix, X, np.ones((B, T), bool), start=N, causal=True)
    for t in range(T):
        y = net(jnp.asarray(X[:, t : t + 1]), positions=jnp.full((B, 1), t), decode=True)
        np.testing.assert_allclose(y[:, 0], want[:, t], atol=2e-6)


def test_gradients_reach_only_the_prefix() -> None:
    net = NnxNet(nnx.Rngs(0))
    jaxadapt.adapt(net, CONFIG, rngs=nnx.Rngs(1), example=[jnp.asarray(X)])
    wrt = nnx.DiffState(0, jaxadapt.AdapterParam)
    gradient = nnx.jit(nnx.grad(lambda net, x: net(x).sum(), argnums=wrt))(net, jnp.asarray(X))
    ((path, value),) = nnx.to_flat_state(gradient)
    assert path[0] == "prefix_tuning"
    assert np.abs(value.get_value()).max() > 0


def test_a_model_without_positions_is_refused() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attention = nnx.MultiHeadAttention(H, D, decode=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.attention(x)

    net = jaxadapt.adapt(Net(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1), example=[jnp.asarray(X)])
    with pytest.raises(AttachError, match="takes no positions"):
        net(jnp.asarray(X))


def test_a_model_without_attention_is_refused() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x: Any, positions: Any = None) -> Any:
            return self.linear(x)

    sizes = CONFIG.replace(token_dim=8, num_attention_heads=2, num_layers=1)
    net = jaxadapt.adapt(Net(nnx.Rngs(0)), sizes, rngs=nnx.Rngs(1))
    with pytest.raises(AttachError, match="no attention to which keys and values can be added"):
        net(jnp.asarray(X))
