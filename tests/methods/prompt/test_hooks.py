"""A model's own calls for virtual tokens give what the built-in ones give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxadapt
from jaxadapt import AttachError
from jaxadapt.demo import llama
from jaxadapt.demo.llama import LlamaConfig

SIZES = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)
TOKENS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
PREFIX = jaxadapt.PrefixTuningConfig(num_virtual_tokens=3)
PROMPT = jaxadapt.PromptTuningConfig(num_virtual_tokens=3)


class Hooked(llama.Llama):
    """The demo's model without its own way in: the arguments have names that jaxadapt does not know."""

    def __call__(self, tokens: Any = None, *, where: Any = None, vectors: Any = None) -> Any:
        return super().__call__(tokens, positions=where, embeddings=vectors)

    def call_with_embeddings(self, virtual: Any, tokens: Any) -> Any:
        first = jnp.broadcast_to(virtual[None], (len(tokens), *virtual.shape))
        return self(vectors=jnp.concatenate([first, self.model.embed_tokens(tokens)], axis=1))

    def call_with_keys(self, keys: Any, values: Any, tokens: Any) -> Any:
        return keys, values, self(tokens)


class HookedLinen(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any = None, vectors: Any = None) -> Any:
        return llama.LinenLlama(SIZES, name="inner")(tokens, embeddings=vectors)

    def call_with_embeddings(self, virtual: Any, tokens: Any) -> Any:
        table = self.variables["params"]["inner"]["model"]["embed_tokens"]["embedding"]
        first = jnp.broadcast_to(virtual[None], (len(tokens), *virtual.shape))
        return self(vectors=jnp.concatenate([first, table[tokens]], axis=1))


def test_embeddings() -> None:
    plain, hooked = llama.Llama(SIZES, rngs=nnx.Rngs(0)), Hooked(SIZES, rngs=nnx.Rngs(0))
    want, found = (jaxadapt.adapt(m, PROMPT, rngs=nnx.Rngs(1))(TOKENS) for m in (plain, hooked))
    np.testing.assert_array_equal(found, want)


def test_embeddings_in_linen() -> None:
    module = jaxadapt.adapt(HookedLinen(), PROMPT.replace(token_dim=8))
    variables = module.init(jax.random.key(0), TOKENS)
    inner = jaxadapt.adapt(llama.LinenLlama(SIZES), PROMPT.replace(token_dim=8))
    same = {"params": variables["params"]["inner"], **jaxadapt.extract(variables).collection}
    np.testing.assert_array_equal(module.apply(variables, TOKENS), inner.apply(same, TOKENS))


def test_keys_and_values() -> None:
    sizes = PREFIX.replace(num_layers=2, token_dim=4, num_attention_heads=1)
    model = jaxadapt.adapt(Hooked(SIZES, rngs=nnx.Rngs(0)), sizes, rngs=nnx.Rngs(1))
    prefix = jaxadapt.extract(model).shared["prompt_embeddings"]
    keys, values, logits = model(TOKENS)
    np.testing.assert_array_equal(np.stack([keys, values], 1).transpose(2, 0, 1, 3).reshape(3, -1), prefix)
    with jaxadapt.disable(model) as base:
        np.testing.assert_array_equal(logits, base(TOKENS))


def test_a_cache_is_the_models_own_matter() -> None:
    model = jaxadapt.adapt(Hooked(SIZES, rngs=nnx.Rngs(0)), PROMPT, rngs=nnx.Rngs(1))
    with pytest.raises(AttachError, match="prefilled"), jaxadapt.models.invoke(model, prefilled=True):
        model(TOKENS)


def test_without_hooks_unknown_names_are_refused() -> None:
    class Unknown(nnx.Module):
        def __init__(self) -> None:
            self.llama = llama.Llama(SIZES, rngs=nnx.Rngs(0))

        def __call__(self, tokens: Any = None, where: Any = None, vectors: Any = None) -> Any:
            return self.llama(tokens, positions=where, embeddings=vectors)

    for config, text in ((PROMPT, "takes no embeddings"), (PREFIX, "takes no positions")):
        model = jaxadapt.adapt(Unknown(), config, rngs=nnx.Rngs(1), example=[TOKENS])
        with pytest.raises(AttachError, match=text):
            model(TOKENS)
