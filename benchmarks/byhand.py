"""LoRA written by hand into the demo's Llama, in NNX and in Linen: what jaxadapt is measured against.

No table, no hooks, no configuration: the layers a person would write who needs LoRA in this one model.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxadapt.demo.llama import PROJECTIONS, LinenRMSNorm, LlamaConfig, rope_at, rotate
from jaxadapt.demo.llama import Llama as NnxLlama
from jaxadapt.models.attention_calls import attention  # the demo's: only LoRA is written here

R, ALPHA = 8, 16


# ---------------------------------------------------------------- NNX


class HandLinear(nnx.Module):
    """x·W + (x·A)·s·B."""

    def __init__(self, linear: nnx.Linear, rngs: nnx.Rngs) -> None:
        inner, outer = linear.kernel.shape
        self.kernel = linear.kernel
        self.lora_a = nnx.LoRAParam(jax.random.uniform(rngs(), (inner, R), minval=-1, maxval=1) * inner**-0.5)
        self.lora_b = nnx.LoRAParam(jnp.zeros((R, outer)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...] + ((x @ self.lora_a[...]) * (ALPHA / R)) @ self.lora_b[...]


def adapt_nnx(model: NnxLlama, rngs: nnx.Rngs) -> NnxLlama:
    """Put a `HandLinear` in the place of every projection."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in PROJECTIONS:
                if hasattr(part, name):
                    setattr(part, name, HandLinear(getattr(part, name), rngs))
    return model


# ---------------------------------------------------------------- Linen


class HandDense(nn.Module):
    """x·W + (x·A)·s·B, with A and B in the collection "lora"."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = x.shape[-1]
        w = self.param("kernel", nn.initializers.lecun_normal(), (inner, self.features))
        a: Any = self.variable("lora", "a", jnp.zeros, (inner, R))  # `value` fills it
        b: Any = self.variable("lora", "b", jnp.zeros, (R, self.features))
        return x @ w + ((x @ a.value) * (ALPHA / R)) @ b.value


def value(path: Any, spec: Any) -> jax.Array:
    """The initial value of one leaf of the collection."""
    if path[-1].key == "b":
        return jnp.zeros(spec.shape)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(str(path).encode()))
    return jax.random.uniform(key, spec.shape, minval=-1, maxval=1) * spec.shape[0] ** -0.5


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, rope: Any) -> jax.Array:
        config = self.config
        heads = (*x.shape[:2], -1, config.head_dim)
        q = HandDense(config.num_heads * config.head_dim, name="q_proj")(x).reshape(heads)
        k = HandDense(config.num_kv_heads * config.head_dim, name="k_proj")(x).reshape(heads)
        v = HandDense(config.num_kv_heads * config.head_dim, name="v_proj")(x).reshape(heads)
        mixed = attention(rotate(q, rope), rotate(k, rope), v, is_causal=True).reshape(*x.shape[:2], -1)
        return HandDense(config.hidden_size, name="o_proj")(mixed)


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = HandDense(self.config.intermediate_size, name="gate_proj")(x)
        up = HandDense(self.config.intermediate_size, name="up_proj")(x)
        return HandDense(self.config.hidden_size, name="down_proj")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, rope: Any) -> jax.Array:
        normed = LinenRMSNorm(self.config, name="input_layernorm")(x)
        x = x + Attention(self.config, name="self_attn")(normed, rope)
        normed = LinenRMSNorm(self.config, name="post_attention_layernorm")(x)
        return x + MLP(self.config, name="mlp")(normed)


class Layers(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, rope: Any) -> jax.Array:
        for l in range(self.config.num_layers):
            x = Block(self.config, name=str(l))(x, rope)
        return x


class LlamaModel(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        self.embed_tokens = nn.Embed(self.config.vocab_size, self.config.hidden_size)
        self.layers = Layers(self.config)
        self.norm = LinenRMSNorm(self.config)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.layers(self.embed_tokens(tokens), rope_at(self.config, jnp.arange(tokens.shape[1])[None]))
        return self.norm(x)

    def attend(self, x: jax.Array) -> jax.Array:
        return self.embed_tokens.attend(x)


class Llama(nn.Module):
    """The demo's Linen Llama (tied embeddings), at the same parameter paths."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        model = LlamaModel(self.config, name="model")
        return model.attend(model(tokens)).astype(jnp.float32)
