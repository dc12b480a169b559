"""Learned positions, padding, token types and labels that a call takes; attention that no prefix can enter as it is."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, ConfigError
from jaxadapt.models import RelativeBias

B, T, D, H, S, N, V = 2, 5, 8, 2, 4, 3, 11
TOKENS = jnp.array([[3, 1, 4, 1, 5], [8, 0, 2, 6, 7]])
PREFIX = jaxadapt.PrefixTuningConfig(num_virtual_tokens=N)
X = np.random.RandomState(0).normal(size=(B, T, D)).astype(np.float32)


class LinenNet(nn.Module):
    """Flax's attention, with any attention function."""

    function: Any
    options: Any = ()

    @nn.compact
    def __call__(self, x: Any, positions: Any = None) -> Any:
        return nn.MultiHeadDotProductAttention(H, qkv_features=D, attention_fn=self.function, **dict(self.options))(x)


class NnxNet(nnx.Module):
    def __init__(self, function: Any) -> None:
        self.layer = nnx.MultiHeadAttention(H, D, decode=False, attention_fn=function, rngs=nnx.Rngs(0))

    def __call__(self, x: Any, positions: Any = None) -> Any:
        return self.layer(x)


def test_attention_is_an_attention_function_of_flaxs_layers() -> None:
    """The outputs are those of Flax's own function, also with a prefix."""
    outputs: list[Any] = []
    for function in (nnx.dot_product_attention, jaxadapt.models.attention):
        plain = NnxNet(function)(X)
        net = jaxadapt.adapt(NnxNet(function), PREFIX, rngs=nnx.Rngs(1), example=[X])
        outputs.append((plain, jax.jit(net)(X)))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)  # the order of float32 sums
    assert np.abs(outputs[0][0] - outputs[0][1]).max() > 1e-2

    outputs.clear()
    for function in (nn.dot_product_attention, jaxadapt.models.attention):
        module = jaxadapt.adapt(LinenNet(function), PREFIX)
        variables = module.init(jax.random.key(0), X)
        plain = module.module.apply({"params": variables["params"]}, X)
        outputs.append((plain, jax.jit(module.apply)(variables, X)))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_linens_layer_keeps_its_arguments_beside_a_prefix() -> None:
    """Linen passes an attention function only the arguments in its signature: dtype and dropout arrive."""
    options = (("dtype", jnp.bfloat16), ("dropout_rate", 0.5), ("deterministic", False))
    module = jaxadapt.adapt(LinenNet(nn.dot_product_attention, options), PREFIX)
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    one, two = (module.apply(variables, X, rngs={"dropout": jax.random.key(i)}) for i in (2, 3))
    assert one.dtype == jnp.bfloat16
    assert (one != two).any()


def test_cross_attention_in_flaxs_layers_gets_no_prefix() -> None:
    cross = functools.partial(jaxadapt.models.attention, prefix=False)
    net = NnxNet(cross)
    with pytest.raises(ConfigError, match="token_dim, num_layers, num_attention_heads must be set"):
        jaxadapt.adapt(net, PREFIX, rngs=nnx.Rngs(1), example=[X])
    module = jaxadapt.adapt(LinenNet(cross), PREFIX.replace(token_dim=D, num_layers=1, num_attention_heads=H))
    with pytest.raises(AttachError, match="computes no attention to which keys and values can be added"):
        module.apply(module.init(jax.random.key(0), X), X)


def test_a_layer_that_records_its_weights_is_refused() -> None:
    with pytest.raises(AttachError, match="without sow_weights"):
        NnxNet(jaxadapt.models.attention).layer(X, sow_weights=True)


class Biased(nnx.Module):
    """Causal attention with a bias of its own, from distances."""

    def __init__(self, relative: bool) -> None:
        self.slopes = nnx.Param(jnp.array([0.5, 0.25]))
        self.relative = relative

    def __call__(self, x: Any, positions: Any = None) -> Any:
        q, places = x.reshape(*x.shape[:2], H, S), jnp.arange(x.shape[1])
        bias: Any = RelativeBias(distance_bias, self.slopes[...], places, places)
        bias = bias if self.relative else bias.values()
        return jaxadapt.models.attention(q, q, q, bias=bias, is_causal=True).reshape(x.shape)


def distance_bias(slopes: Any, queries: Any, keys: Any) -> Any:
    return -slopes[:, None, None] * (queries[:, None] - keys[None])[None]


def test_a_bias_of_distances_counts_the_prefix() -> None:
    model = jaxadapt.adapt(Biased(True), PREFIX, rngs=nnx.Rngs(1), example=[X])
    prefix = np.asarray(jaxadapt.extract(model).shared["prompt_embeddings"]).reshape(N, 2, H, S)
    q = X.reshape(B, T, H, S)
    k, v = (np.concatenate([np.broadcast_to(prefix[:, i], (B, N, H, S)), q], axis=1) for i in (0, 1))
    distances = (N + np.arange(T))[:, None] - np.arange(N + T)[None]
    scores = np.einsum("bths,bnhs->bhtn", q, k) / 2 - np.array([0.5, 0.25])[:, None, None] * distances
    scores = np.where(distances >= 0, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhtn,bnhs->bths", p / p.sum(-1, keepdims=True), v).reshape(X.shape)

    def loss(model: Any) -> Any:
        y = model(X)
        return y.sum(), y

    wrt = nnx.DiffState(0, nnx.Param)
    (_, found), gradient = nnx.jit(nnx.value_and_grad(loss, argnums=wrt, has_aux=True))(model)
    np.testing.assert_allclose(found, want, atol=2e-6)
    assert jnp.abs(gradient["slopes"].get_value()).max() > 0
    other = jaxadapt.adapt(Biased(False), PREFIX, rngs=nnx.Rngs(1), example=[X])
    with pytest.raises(AttachError, match=r"attention with a bias.*RelativeBias"):
        other(X)


class Net(nnx.Module):
    """A call with every argument that virtual tokens extend; it returns them."""

    def __init__(self) -> None:
        self.embed = nnx.Embed(V, D, rngs=nnx.Rngs(0))

    def __call__(
        self, tokens: Any = None, mask: Any = None, position_ids: Any = None, token_type_ids: Any = None,
        labels: Any = None, inputs_embeds: Any = None,
    ) -> Any:  # fmt: skip
        return tokens, mask, position_ids, token_type_ids, labels, inputs_embeds


def test_arguments_of_a_call_are_extended_as_pefts() -> None:
    model = jaxadapt.adapt(Net(), jaxadapt.PromptTuningConfig(num_virtual_tokens=N), rngs=nnx.Rngs(1))
    virtual = jaxadapt.extract(model).shared["prompt_embeddings"]
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    tokens, seen, positions, types, labels, embeddings = model(
        TOKENS, mask=mask, position_ids=jnp.arange(T)[None], token_type_ids=jnp.ones((B, T), int), labels=TOKENS
    )
    assert tokens is None
    np.testing.assert_array_equal(embeddings[:, :N], jnp.broadcast_to(virtual[None], (B, N, D)))
    np.testing.assert_array_equal(embeddings[:, N:], model.embed.embedding[...][TOKENS])
    assert seen.tolist() == [[1] * 8, [1, 1, 1, 0, 0, 1, 1, 1]]
    assert positions.tolist() == [list(range(8))] * 2
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]] * 2
    assert labels.tolist() == [[-100] * 3 + row for row in TOKENS.tolist()]
    classes = model(TOKENS, labels=jnp.array([2, 0]))[4]  # of the rows
    assert classes.tolist() == [2, 0]


def test_labels_of_a_prefix_stay() -> None:
    extend = jaxadapt.models.extend_labels
    assert extend(PREFIX, TOKENS) is TOKENS
    for cls, length in (("PromptTuningConfig", T), ("MultitaskPromptTuningConfig", N + T)):
        config = getattr(jaxadapt, cls)(num_virtual_tokens=N, task_type="SEQ_2_SEQ_LM")
        assert extend(config, TOKENS).shape == (B, length)
