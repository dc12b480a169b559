"""Decoding token by token with a model's own cache gives the logits of one call with all tokens."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError
from jaxadapt.models import RelativeBias

V, D, H, N, LENGTH = 9, 8, 2, 3, 12
TOKENS = jnp.array([[3, 1, 4, 1, 5], [8, 0, 2, 6, 7]])


class Net(nnx.Module):
    """One layer of causal attention, with a cache that each call extends."""

    relative = False

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.places = nnx.Param(jax.random.normal(rngs.params(), (LENGTH, D)))
        self.qkv, self.head = nnx.Linear(D, 3 * D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)
        self.keys, self.values = (nnx.Cache(jnp.zeros((2, LENGTH, H, D // H))) for _ in range(2))
        self.used = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, tokens: Any = None, positions: Any = None, embeddings: Any = None) -> Any:
        x = self.embed(tokens) if embeddings is None else embeddings
        used, time = self.used[...], x.shape[1]
        if positions is None:
            positions = jnp.broadcast_to(used + jnp.arange(time)[None], x.shape[:2])
        x = x if self.relative else x + self.places[...][positions]
        q, k, v = (part.reshape(*x.shape[:2], H, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[...] = jax.lax.dynamic_update_slice(cache[...], new, (0, used, 0, 0))
        self.used[...] = used + time
        seen = jnp.arange(LENGTH)[None] <= (used + jnp.arange(time))[:, None]
        bias = RelativeBias(distances, jnp.array([0.5, 2.0]), used + jnp.arange(time), jnp.arange(LENGTH))
        bias = bias if self.relative else None
        y = jaxadapt.models.attention(q, self.keys[...], self.values[...], bias=bias, mask=seen[None, None])
        return self.head(y.reshape(x.shape))


class RelativeNet(Net):
    """The same with a bias of distances in place of positions."""

    relative = True


def distances(slopes: Any, queries: Any, keys: Any) -> Any:
    return -slopes[:, None, None] * (queries[:, None] - keys[None])[None]


CONFIGS = [jaxadapt.PrefixTuningConfig(num_virtual_tokens=N), jaxadapt.PromptTuningConfig(num_virtual_tokens=N)]


@pytest.mark.parametrize("net", [Net, RelativeNet])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type)
def test_decoding_with_a_cache(config: Any, net: Any) -> None:
    model = jaxadapt.adapt(net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1), example=[TOKENS])
    want = nnx.clone(model)(TOKENS)
    model(TOKENS[:, :3])
    for i in (3, 4):
        embeds = config.peft_type == "PROMPT_TUNING"
        context: Any = jaxadapt.models.invoke(model, prefilled=True) if embeds else contextlib.nullcontext()
        with context:
            step = model(TOKENS[:, i : i + 1], jnp.full((2, 1), i))
        assert step.shape == (2, 1, V)
        np.testing.assert_allclose(step[:, 0], want[:, i - 5], rtol=1e-5, atol=1e-5)


class LinenNet(nn.Module):
    """Flax's attention with its cache, under `nn.remat`, over inputs plus their positions."""

    remat: bool = False
    decode: bool = False

    @nn.compact
    def __call__(self, x: Any, positions: Any = None) -> Any:
        places = jnp.arange(x.shape[1])[None] if positions is None else positions
        layer = nn.remat(nn.MultiHeadDotProductAttention) if self.remat else nn.MultiHeadDotProductAttention
        x = x + 0.1 * places[..., None]
        mask = None if self.decode else nn.make_causal_mask(jnp.ones(x.shape[:2]))
        return layer(H, qkv_features=D, decode=self.decode, name="attention")(x, mask=mask)


X = np.random.RandomState(0).normal(size=(2, 4, D)).astype(np.float32)


def test_decoding_with_a_cache_of_linen() -> None:
    module = jaxadapt.adapt(LinenNet(), CONFIGS[0])
    variables = module.init(jax.random.key(0), X)
    want = module.apply(variables, X)
    config = jaxadapt.extract(variables).config
    stepping = jaxadapt.adapt(LinenNet(decode=True), config)
    cache = LinenNet(decode=True).init(jax.random.key(0), X)["cache"]
    step = jax.jit(lambda v, x, p: stepping.apply(v, x, p, mutable=["cache"]))
    for i in range(X.shape[1]):
        y, changed = step({**variables, "cache": cache}, X[:, i : i + 1], jnp.full((2, 1), i))
        cache = changed["cache"]
        np.testing.assert_allclose(y[:, 0], want[:, i], rtol=1e-5, atol=1e-5)


def test_gradients_with_checkpointing_in_linen() -> None:
    """PEFT refuses a prefix with gradient checkpointing; here the gradients are the same."""
    module = jaxadapt.adapt(LinenNet(), CONFIGS[0])
    variables = module.init(jax.random.key(0), X)
    adapter = jaxadapt.extract(variables)
    gradients: list[Any] = []
    for remat in (False, True):
        each = jaxadapt.adapt(LinenNet(remat=remat), adapter.config)

        def loss(adapter: Any, each: Any = each) -> Any:
            return (each.apply({**variables, **adapter.collection}, X) ** 2).sum()

        gradients += jax.tree.leaves(jax.jit(jax.grad(loss))(adapter))
    assert jnp.abs(gradients[0]).max() > 0
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_a_prefix_has_no_use_for_prefilled() -> None:
    model = jaxadapt.adapt(Net(nnx.Rngs(0)), CONFIGS[0], rngs=nnx.Rngs(1), example=[TOKENS])
    refused = pytest.raises(AttachError, match="no active adapter is a prompt of embeddings")
    with refused, jaxadapt.models.invoke(model, prefilled=True):
        pass


def test_an_orbax_checkpoint_keeps_the_encoder(tmp_path: Path) -> None:
    config = CONFIGS[0].replace(prefix_projection=True)
    model = jaxadapt.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1), example=[TOKENS])
    jaxadapt.save(model, tmp_path / "orbax", format="orbax")
    jaxadapt.save(model, tmp_path / "peft")
    one, two = (jaxadapt.load(tmp_path / name, Net(nnx.Rngs(0))) for name in ("orbax", "peft"))
    assert "kernel_1" in jaxadapt.extract(one).shared
    assert list(jaxadapt.extract(two).shared) == ["prompt_embeddings"]
    np.testing.assert_allclose(one(TOKENS), two(TOKENS), rtol=1e-5, atol=1e-6)


def test_a_module_is_saved_beside_virtual_tokens(tmp_path: Path) -> None:
    """The head is a parameter of the adapter, under the key that PEFT gives it beside a prompt."""
    config = CONFIGS[1].replace(modules_to_save=["head"])
    model = jaxadapt.adapt(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    assert jaxadapt.summary(model).trainable == N * D + D * V + V
    adapter = jaxadapt.extract(model)
    jaxadapt.inject(model, jax.tree.map(lambda x: x + 0.5, adapter))
    jaxadapt.save(model, tmp_path)
    keys = jaxadapt.read(tmp_path).tensors.keys()
    assert sorted(keys) == ["base_model.head.bias", "base_model.head.weight", "prompt_embeddings"]
    assert not [finding for finding in jaxadapt.verify(tmp_path) if finding.severity == "error"]
    again = jaxadapt.load(tmp_path, Net(nnx.Rngs(0)))
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    jaxadapt.detach(model)
    assert not hasattr(model.head, "prompt_tuning")
