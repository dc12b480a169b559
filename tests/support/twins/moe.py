"""Mixtral, Qwen 3 MoE, GPT-OSS, Llama 4, DeepSeek V3, GLM 4 MoE and MiniMax M2 in NNX under Hugging Face's names.

They are twins of tiny transformers models, by the fields of their configurations, written from the formulas of the
torch classes, for tests only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Config = Mapping[str, Any]
Array = jax.Array
ZERO = nnx.initializers.zeros_init()


def linear(inputs: int, out: int, rngs: nnx.Rngs, bias: bool = False) -> nnx.Linear:
    return nnx.Linear(inputs, out, use_bias=bias, rngs=rngs)


class Norm(nnx.Module):
    def __init__(self, size: int):
        self.weight = nnx.Param(jnp.ones(size))

    def __call__(self, x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * self.weight[...]


def rotated(x: Array, theta: float, pairs: bool, part: float = 1.0) -> Array:
    """RoPE on (batch, token, head, dim), of halves or of neighboring `pairs` (which come out as halves).

    A `part` below 1 leaves the rest of each head as it is.
    """
    if part < 1:
        size = int(x.shape[-1] * part)
        return jnp.concatenate([rotated(x[..., :size], theta, pairs), x[..., size:]], -1)
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * theta ** -(jnp.arange(half) / half)[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q: Array, k: Array, v: Array, sinks: Array | None = None) -> Array:
    """Causal attention of (batch, token, head, dim), scaled by 1/√dim; heads flattened in the result."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], -1)
    weights = jax.nn.softmax(scores, -1)[..., : k.shape[1]]
    return jnp.einsum("bnqk,bknh->bqnh", weights, v).reshape(*q.shape[:2], -1)


class Attention(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        d, h, sinks = c["hidden_size"], c["head_dim"], c["kind"] == "gpt_oss"
        bias = sinks or c["kind"] == "glm4_moe"
        n, k = c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj, self.k_proj = linear(d, n * h, rngs, bias), linear(d, k * h, rngs, bias)
        self.v_proj, self.o_proj = linear(d, k * h, rngs, bias), linear(n * h, d, rngs, sinks)
        self.kind, self.heads, self.theta, self.part = c["kind"], (n, k), c["theta"], c.get("rotary", 1.0)
        if self.kind in ("qwen3_moe", "glm4_moe"):
            self.q_norm, self.k_norm = Norm(h), Norm(h)
        if self.kind == "minimax_m2":  # over all heads
            self.q_norm, self.k_norm = Norm(n * h), Norm(k * h)
        if sinks:
            self.sinks = nnx.Param(jnp.zeros(n))

    def __call__(self, x: Array) -> Array:
        n, k = self.heads
        q, key, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.kind == "minimax_m2":
            q, key = self.q_norm(q), self.k_norm(key)
        q, key, v = (y.reshape(*x.shape[:2], heads, -1) for y, heads in ((q, n), (key, k), (v, k)))
        if self.kind in ("qwen3_moe", "glm4_moe"):
            q, key = self.q_norm(q), self.k_norm(key)
        q, key = (rotated(y, self.theta, self.kind == "llama4", self.part) for y in (q, key))
        if self.kind == "llama4":
            q, key = (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6) for y in (q, key))
        return self.o_proj(attend(q, key, v, self.sinks[...] if self.kind == "gpt_oss" else None))


class Latent(nnx.Module):
    """DeepSeek's attention."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        d, n, q, kv = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
        self.nope, self.rope, self.n, self.kv = c["qk_nope_head_dim"], c["qk_rope_head_dim"], n, kv
        self.theta = c["theta"]
        self.q_a_proj, self.q_a_layernorm = linear(d, q, rngs), Norm(q)
        self.q_b_proj = linear(q, n * (self.nope + self.rope), rngs)
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = linear(d, kv + self.rope, rngs), Norm(kv)
        self.kv_b_proj = linear(kv, n * (self.nope + c["v_head_dim"]), rngs)
        self.o_proj = linear(n * c["v_head_dim"], d, rngs)

    def __call__(self, x: Array) -> Array:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).reshape(*x.shape[:2], self.n, -1)
        both = self.kv_a_proj_with_mqa(x)
        kv = self.kv_b_proj(self.kv_a_layernorm(both[..., : self.kv])).reshape(*x.shape[:2], self.n, -1)
        turned = rotated(both[..., None, self.kv :], self.theta, True)
        k = jnp.concatenate([kv[..., : self.nope], jnp.repeat(turned, self.n, 2)], -1)
        q = jnp.concatenate([q[..., : self.nope], rotated(q[..., self.nope :], self.theta, True)], -1)
        return self.o_proj(attend(q, k, kv[..., self.nope :]))


class Mlp(nnx.Module):
    def __init__(self, d: int, f: int, rngs: nnx.Rngs):
        self.gate_proj, self.up_proj, self.down_proj = linear(d, f, rngs), linear(d, f, rngs), linear(f, d, rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nnx.Module):
    """A score for each (token, expert), 0 where the token does not go there."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jnp.zeros((c["hidden_size"], c["experts"])))
        self.kind, self.k, self.groups = c["kind"], c["num_experts_per_tok"], c.get("n_group", 1)
        if self.kind == "gpt_oss":
            self.bias = nnx.Param(jnp.zeros(c["experts"]))
        if self.kind in GROUPED:
            self.e_score_correction_bias = nnx.Param(jnp.zeros(c["experts"]))
            self.chosen, self.factor = c["topk_group"], c["routed_scaling_factor"]

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        logits = x @ self.kernel[...]
        if self.kind == "llama4":
            return jnp.where(best(logits, self.k), jax.nn.sigmoid(logits), 0)
        if self.kind == "gpt_oss":
            logits = logits + self.bias[...][None]
            return jax.nn.softmax(jnp.where(best(logits, self.k), logits, -1e30), -1)
        if self.kind == "minimax_m2":
            scores = jax.nn.sigmoid(logits)
            scores = jnp.where(best(scores + bias[None], self.k), scores, 0)
            return scores / scores.sum(-1, keepdims=True)
        if self.kind in GROUPED:
            scores = jax.nn.sigmoid(logits)
            choice = scores + self.e_score_correction_bias[...][None]
            by_group = choice.reshape(len(x), self.groups, -1)
            held = best(jax.lax.top_k(by_group, 2)[0].sum(-1), self.chosen)
            choice = jnp.where(jnp.repeat(held, by_group.shape[-1], 1), choice, -1e30)
            scores = jnp.where(best(choice, self.k), scores, 0)
            return self.factor * scores / scores.sum(-1, keepdims=True)
        scores = jnp.where(best(logits, self.k), jax.nn.softmax(logits, -1), 0)
        return scores / scores.sum(-1, keepdims=True)


def best(x: Array, k: int) -> Array:
    return jax.nn.one_hot(jax.lax.top_k(x, k)[1], x.shape[-1], dtype=bool).any(-2)


class Experts(nnx.Module):
    """Every expert on every token, by einsums; `ragged`: each expert on its own tokens, sorted."""

    def __init__(self, c: Config, ragged: bool):
        e, d, f = c["experts"], c["hidden_size"], c["expert_size"]
        self.gate_up_proj = nnx.Param(jnp.zeros((e, d, 2 * f)))
        self.down_proj = nnx.Param(jnp.zeros((e, f, d)))
        self.kind, self.ragged = c["kind"], ragged
        if self.kind == "gpt_oss":
            self.gate_up_proj_bias, self.down_proj_bias = nnx.Param(jnp.zeros((e, 2 * f))), nnx.Param(jnp.zeros((e, d)))

    def __call__(self, x: Array, scores: Array) -> Array:
        first, last = self.gate_up_proj[...], self.down_proj[...]
        if self.ragged:
            tokens = jnp.tile(x, (len(first), 1))  # sorted by expert
            sizes = jnp.full(len(first), len(x))
            out = jax.lax.ragged_dot(self.gated(jax.lax.ragged_dot(tokens, first, sizes)), last, sizes)
            return jnp.einsum("etd,te->td", out.reshape(len(first), *x.shape), scores)
        each = jnp.broadcast_to(x[None], (len(first), *x.shape))
        each = each * scores.T[:, :, None] if self.kind == "llama4" else each
        mid = jnp.einsum("etd,edf->etf", each, first)
        if self.kind == "gpt_oss":
            mid = mid + self.gate_up_proj_bias[...][:, None]
        out = jnp.einsum("etf,efd->etd", self.gated(mid), last)
        if self.kind == "gpt_oss":
            out = out + self.down_proj_bias[...][:, None]
        return out.sum(0) if self.kind == "llama4" else jnp.einsum("etd,te->td", out, scores)

    def gated(self, x: Array) -> Array:
        if self.kind == "gpt_oss":
            gate, up = jnp.minimum(x[..., ::2], 7.0), jnp.clip(x[..., 1::2], -7.0, 7.0)
            return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
        gate, up = jnp.split(x, 2, -1)
        return jax.nn.silu(gate) * up


GROUPED = ("deepseek_v3", "glm4_moe")
NAMES = {
    "gpt_oss": ("router", ""),
    "llama4": ("router", "shared_expert"),
    **dict.fromkeys(GROUPED, ("gate", "shared_experts")),
}


class Block(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.names = NAMES.get(c["kind"], ("gate", ""))
        router, shared = self.names
        setattr(self, router, Router(c, rngs))
        self.experts = Experts(c, ragged=c["kind"] in ("mixtral", "deepseek_v3"))
        if shared:
            setattr(self, shared, Mlp(c["hidden_size"], c["expert_size"], rngs))
        self.biased = c["kind"] == "minimax_m2"
        if self.biased:
            self.e_score_correction_bias = nnx.Param(jnp.zeros(c["experts"]))

    def __call__(self, x: Array) -> Array:
        flat, (router, shared) = x.reshape(-1, x.shape[-1]), self.names
        bias = (self.e_score_correction_bias[...],) if self.biased else ()
        out = self.experts(flat, getattr(self, router)(flat, *bias)).reshape(x.shape)
        return out + getattr(self, shared)(x) if shared else out


class Layer(nnx.Module):
    def __init__(self, c: Config, number: int, rngs: nnx.Rngs):
        d = c["hidden_size"]
        self.input_layernorm, self.post_attention_layernorm = Norm(d), Norm(d)
        self.self_attn = Latent(c, rngs) if c["kind"] == "deepseek_v3" else Attention(c, rngs)
        self.block = "feed_forward" if c["kind"] == "llama4" else "mlp"
        dense = number in c.get("dense", ())
        setattr(self, self.block, Mlp(d, c["dense_size"], rngs) if dense else Block(c, rngs))

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + getattr(self, self.block)(self.post_attention_layernorm(x))


class Model(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(c["vocab_size"], c["hidden_size"], rngs=rngs)
        self.layers = nnx.List([Layer(c, i, rngs) for i in range(c["num_hidden_layers"])])
        self.norm = Norm(c["hidden_size"])

    def __call__(self, ids: Array) -> Array:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class CausalLM(nnx.Module):
    """`kind` is transformers' model type; `experts`, `expert_size`, `dense`, `dense_size`, `theta` say what it calls
    otherwise.
    """

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.model = Model(c, rngs)
        self.lm_head = linear(c["hidden_size"], c["vocab_size"], rngs)

    def __call__(self, ids: Array) -> Array:
        return self.lm_head(self.model(ids))
