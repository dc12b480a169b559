"""Dense decoders in NNX under Hugging Face's names: OLMo 3, Phi 3, GPT-NeoX, Falcon, StableLM and Qwen 3.

They are twins of tiny transformers models, by the fields of their configurations, written from the formulas of the
torch classes, for tests only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support.twins.moe import Mlp, Norm, attend, linear, rotated

Config = Mapping[str, Any]
Array = jax.Array
# {kind: (the inner model, its embedding, its layers, its last norm, the head, a layer's attention)}
NAMES = {
    "gpt_neox": ("gpt_neox", "embed_in", "layers", "final_layer_norm", "embed_out", "attention"),
    "falcon": ("transformer", "word_embeddings", "h", "ln_f", "lm_head", "self_attention"),
}
LLAMA = ("model", "embed_tokens", "layers", "norm", "lm_head", "self_attn")


def layer_norm(size: int, rngs: nnx.Rngs, bias: bool = True) -> nnx.LayerNorm:
    return nnx.LayerNorm(size, epsilon=1e-5, use_bias=bias, rngs=rngs)


class Heads(nnx.Module):
    """A norm for each head."""

    def __init__(self, size: int, heads: int, rngs: nnx.Rngs):
        self.norms = nnx.List([layer_norm(size, rngs, False) for _ in range(heads)])

    def __call__(self, x: Array) -> Array:
        return jnp.stack([norm(x[:, :, i]) for i, norm in enumerate(self.norms)], 2)


class Attention(nnx.Module):
    """Attention whose projections are one layer, or one each."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        d, n, k = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        self.kind, self.heads, self.h, self.theta = c["kind"], (n, k), c.get("head_dim", d // n), c["theta"]
        self.part, all_heads = c.get("rotary", 1.0), (n + 2 * k) * self.h
        if self.kind in NAMES:
            bias = self.kind == "gpt_neox"
            self.query_key_value, self.dense = linear(d, all_heads, rngs, bias), linear(d, d, rngs, bias)
        else:
            self.o_proj = linear(n * self.h, d, rngs)
        if self.kind == "phi3":
            self.qkv_proj = linear(d, all_heads, rngs)
        if self.kind in ("olmo3", "stablelm", "qwen3"):
            bias = c.get("use_qkv_bias", False)
            self.q_proj = linear(d, n * self.h, rngs, bias)
            self.k_proj, self.v_proj = linear(d, k * self.h, rngs, bias), linear(d, k * self.h, rngs, bias)
        if self.kind == "olmo3":  # over all heads
            self.q_norm, self.k_norm = Norm(n * self.h), Norm(k * self.h)
        if self.kind == "qwen3":
            self.q_norm, self.k_norm = Norm(self.h), Norm(self.h)
        self.by_head = c.get("qk_layernorm", False)
        if self.by_head:
            self.q_layernorm, self.k_layernorm = Heads(self.h, n, rngs), Heads(self.h, k, rngs)

    def __call__(self, x: Array) -> Array:
        q, k, v = (y.reshape(*x.shape[:2], -1, self.h) for y in self.project(x))
        if self.by_head:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if self.kind == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotated(y, self.theta, False, self.part) for y in (q, k))
        return (self.dense if self.kind in NAMES else self.o_proj)(attend(q, k, v))

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        (n, k), shape = self.heads, x.shape[:2]
        if self.kind == "phi3":
            q, key, v = jnp.split(self.qkv_proj(x), [n * self.h, (n + k) * self.h], -1)
            return q, key, v
        if self.kind in NAMES:  # the queries of each key head, its key, its value
            each = self.query_key_value(x).reshape(*shape, k, n // k + 2, self.h)
            return each[:, :, :, :-2], each[:, :, :, -2], each[:, :, :, -1]
        q, key = self.q_proj(x), self.k_proj(x)
        return (self.q_norm(q), self.k_norm(key), self.v_proj(x)) if self.kind == "olmo3" else (q, key, self.v_proj(x))


class Fused(nnx.Module):
    """Phi's MLP."""

    def __init__(self, d: int, f: int, rngs: nnx.Rngs):
        self.gate_up_proj, self.down_proj = linear(d, 2 * f, rngs), linear(f, d, rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gate_up_proj(x), 2, -1)
        return self.down_proj(jax.nn.silu(gate) * up)


class Plain(nnx.Module):
    """The MLP of GPT-NeoX and Falcon."""

    def __init__(self, d: int, f: int, bias: bool, rngs: nnx.Rngs):
        self.dense_h_to_4h, self.dense_4h_to_h = linear(d, f, rngs, bias), linear(f, d, rngs, bias)

    def __call__(self, x: Array) -> Array:
        return self.dense_4h_to_h(jax.nn.gelu(self.dense_h_to_4h(x), approximate=False))


class Layer(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.kind, d, f = c["kind"], c["hidden_size"], c["intermediate_size"]
        setattr(self, NAMES.get(self.kind, LLAMA)[-1], Attention(c, rngs))
        if self.kind in NAMES:
            self.mlp = Plain(d, 4 * d if self.kind == "falcon" else f, self.kind == "gpt_neox", rngs)
        else:
            self.mlp = (Fused if self.kind == "phi3" else Mlp)(d, f, rngs)
        first, second = {
            "falcon": ("ln_attn", "ln_mlp"),
            "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
        }.get(self.kind, ("input_layernorm", "post_attention_layernorm"))
        if self.kind == "falcon" and c["num_key_value_heads"] == 1:  # the old architecture has one norm
            second = first = "input_layernorm"
        self.names = first, second
        for name in self.names:
            with_mean = self.kind in (*NAMES, "stablelm")
            setattr(self, name, layer_norm(d, rngs) if with_mean else Norm(d))

    def __call__(self, x: Array) -> Array:
        attention = getattr(self, NAMES.get(self.kind, LLAMA)[-1])
        first, second = (getattr(self, name) for name in self.names)
        if self.kind in NAMES:
            return x + attention(first(x)) + self.mlp(second(x))
        if self.kind == "olmo3":
            x = x + first(attention(x))
            return x + second(self.mlp(x))
        x = x + attention(first(x))
        return x + self.mlp(second(x))


class Model(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        _, embedding, layers, norm, *_ = self.names = NAMES.get(c["kind"], LLAMA)
        setattr(self, embedding, nnx.Embed(c["vocab_size"], c["hidden_size"], rngs=rngs))
        setattr(self, layers, nnx.List([Layer(c, rngs) for _ in range(c["num_hidden_layers"])]))
        with_mean = c["kind"] in (*NAMES, "stablelm")
        setattr(self, norm, layer_norm(c["hidden_size"], rngs) if with_mean else Norm(c["hidden_size"]))

    def __call__(self, ids: Array) -> Array:
        _, embedding, layers, norm, *_ = self.names
        x = getattr(self, embedding)(ids)
        for layer in getattr(self, layers):
            x = layer(x)
        return getattr(self, norm)(x)


class CausalLM(nnx.Module):
    """`kind` is transformers' model type; `theta` and `rotary` (the part of a head that RoPE turns) are of its RoPE.

    With `tied`, the token embedding is the head.
    """

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.inner, self.embedding, *_, self.head, _ = NAMES.get(c["kind"], LLAMA)
        setattr(self, self.inner, Model(c, rngs))
        self.tied = c.get("tied", False)
        if not self.tied:
            setattr(self, self.head, linear(c["hidden_size"], c["vocab_size"], rngs))

    def __call__(self, ids: Array) -> Array:
        inner = getattr(self, self.inner)
        return getattr(inner, self.embedding).attend(inner(ids)) if self.tied else getattr(self, self.head)(inner(ids))
