"""Qwen 3 Next and Nemotron H in NNX under Hugging Face's names: decoders some of whose layers are recurrent.

They are twins of tiny transformers models, by the fields of their configurations, written from the formulas of the
torch classes, for tests only. The recurrences run one token after the other, where the torch classes take chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support.twins.moe import Mlp, Norm, attend, best, linear, rotated

Config = Mapping[str, Any]
Array = jax.Array


def causal_conv(x: Array, kernel: Array, bias: Array | float = 0.0) -> Array:
    """A depthwise convolution of (batch, token, channel) with (window, 1, channel), over the tokens before."""
    window = len(kernel)
    padded = jnp.pad(x, ((0, 0), (window - 1, 0), (0, 0)))
    steps = [padded[:, i : i + x.shape[1]] * kernel[i, 0][None, None] for i in range(window)]
    return jax.nn.silu(sum(steps) + bias)


def conv(channels: int, rngs: nnx.Rngs, bias: bool) -> nnx.Conv:
    return nnx.Conv(channels, channels, 4, feature_group_count=channels, use_bias=bias, rngs=rngs)


def over_tokens(step: Any, state: Array, *inputs: Array) -> Array:
    """The outputs of a recurrence over axis 1 of its inputs."""
    _, out = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in inputs))
    return out.swapaxes(0, 1)


# ---- Qwen 3 Next -------------------------------------------------------------------------------------------


class PlusOne(Norm):
    """A norm that multiplies by 1 + w."""

    def __call__(self, x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + self.weight[...])


class GatedAttention(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        d, h, n, k = c["hidden_size"], c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj, self.k_proj, self.v_proj = (linear(d, m * h, rngs) for m in (2 * n, k, k))
        self.o_proj, self.q_norm, self.k_norm = linear(n * h, d, rngs), PlusOne(h), PlusOne(h)
        self.h, self.theta, self.part = h, c["theta"], c["rotary"]

    def __call__(self, x: Array) -> Array:
        q, gate = jnp.split(self.q_proj(x).reshape(*x.shape[:2], -1, 2 * self.h), 2, -1)
        k, v = (p(x).reshape(*x.shape[:2], -1, self.h) for p in (self.k_proj, self.v_proj))
        q, k = (rotated(y, self.theta, False, self.part) for y in (self.q_norm(q), self.k_norm(k)))
        return self.o_proj(attend(q, k, v) * jax.nn.sigmoid(gate.reshape(*x.shape[:2], -1)))


class DeltaNet(nnx.Module):
    """Linear attention whose state is corrected by the delta rule."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.n, self.k = c["linear_num_value_heads"], c["linear_num_key_heads"]
        self.dk, self.dv, d = c["linear_key_head_dim"], c["linear_value_head_dim"], c["hidden_size"]
        keys, values = self.k * self.dk, self.n * self.dv
        self.conv1d = conv(2 * keys + values, rngs, False)
        self.in_proj_qkvz, self.in_proj_ba = linear(d, 2 * (keys + values), rngs), linear(d, 2 * self.n, rngs)
        self.dt_bias, self.A_log = nnx.Param(jnp.zeros(self.n)), nnx.Param(jnp.zeros(self.n))
        self.norm, self.out_proj = Norm(self.dv), linear(values, d, rngs)

    def __call__(self, x: Array) -> Array:
        shape, per = x.shape[:2], self.n // self.k
        parts = self.in_proj_qkvz(x).reshape(*shape, self.k, -1)
        q, k, v, z = jnp.split(parts, [self.dk, 2 * self.dk, 2 * self.dk + per * self.dv], -1)
        b, a = (y.reshape(*shape, self.n) for y in jnp.split(self.in_proj_ba(x).reshape(*shape, self.k, -1), 2, -1))
        mixed = jnp.concatenate([y.reshape(*shape, -1) for y in (q, k, v)], -1)
        mixed = causal_conv(mixed, self.conv1d.kernel[...])
        q, k, v = jnp.split(mixed, [self.k * self.dk, 2 * self.k * self.dk], -1)
        q, k = (jnp.repeat(y.reshape(*shape, self.k, self.dk), per, 2) for y in (q, k))
        q, k = (y * jax.lax.rsqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        decay = jnp.exp(-jnp.exp(self.A_log[...]) * jax.nn.softplus(a + self.dt_bias[...]))

        def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
            q, k, v, decay, beta = now  # (batch, head, …)
            state = state * decay[..., None, None]
            delta = (v - jnp.einsum("bnkv,bnk->bnv", state, k)) * beta[..., None]
            state = state + jnp.einsum("bnk,bnv->bnkv", k, delta)
            return state, jnp.einsum("bnkv,bnk->bnv", state, q)

        start = jnp.zeros((shape[0], self.n, self.dk, self.dv))
        v = v.reshape(*shape, self.n, self.dv)
        out = over_tokens(step, start, q * self.dk**-0.5, k, v, decay, jax.nn.sigmoid(b))
        out = self.norm(out) * jax.nn.silu(z.reshape(*shape, self.n, self.dv))
        return self.out_proj(out.reshape(*shape, -1))


class Router(nnx.Module):
    """The scores of the best experts of each token, by softmax, or by sigmoid with a correction bias."""

    def __init__(self, c: Config, biased: bool):
        self.kernel = nnx.Param(jnp.zeros((c["hidden_size"], c["experts"])))
        self.k, self.biased, self.factor = c["num_experts_per_tok"], biased, c.get("routed_scaling_factor", 1.0)
        if biased:
            self.e_score_correction_bias = nnx.Param(jnp.zeros(c["experts"]))

    def __call__(self, x: Array) -> Array:
        logits = x @ self.kernel[...]
        scores = jax.nn.sigmoid(logits) if self.biased else jax.nn.softmax(logits, -1)
        choice = scores + self.e_score_correction_bias[...] if self.biased else scores
        scores = jnp.where(best(choice, self.k), scores, 0)
        return self.factor * scores / scores.sum(-1, keepdims=True)


class Experts(nnx.Module):
    """Every expert on every token; with `gated`, gate and up are one array."""

    def __init__(self, c: Config, gated: bool):
        e, d, f = c["experts"], c["hidden_size"], c["expert_size"]
        self.gated, self.down_proj = gated, nnx.Param(jnp.zeros((e, f, d)))
        setattr(self, self.name, nnx.Param(jnp.zeros((e, d, 2 * f if gated else f))))

    @property
    def name(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    def __call__(self, x: Array, scores: Array) -> Array:
        first, last = getattr(self, self.name)[...], self.down_proj[...]
        mid = jnp.einsum("etd,edf->etf", jnp.broadcast_to(x[None], (len(first), *x.shape)), first)
        if self.gated:
            gate, up = jnp.split(mid, 2, -1)
            mid = jax.nn.silu(gate) * up
        else:
            mid = jnp.square(jax.nn.relu(mid))
        return jnp.einsum("etd,te->td", jnp.einsum("etf,efd->etd", mid, last), scores)


class QwenBlock(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        d = c["hidden_size"]
        self.gate, self.experts = Router(c, False), Experts(c, True)
        self.shared_expert, self.shared_expert_gate = Mlp(d, c["expert_size"], rngs), linear(d, 1, rngs)

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        shared = jax.nn.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return (self.experts(flat, self.gate(flat)) + shared).reshape(x.shape)


class QwenLayer(nnx.Module):
    def __init__(self, c: Config, number: int, rngs: nnx.Rngs):
        d = c["hidden_size"]
        self.mixer = "linear_attn" if c["layer_types"][number] == "linear_attention" else "self_attn"
        setattr(self, self.mixer, (DeltaNet if self.mixer == "linear_attn" else GatedAttention)(c, rngs))
        dense = number in c["mlp_only_layers"]
        self.mlp = Mlp(d, c["intermediate_size"], rngs) if dense else QwenBlock(c, rngs)
        self.input_layernorm, self.post_attention_layernorm = PlusOne(d), PlusOne(d)

    def __call__(self, x: Array) -> Array:
        x = x + getattr(self, self.mixer)(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- Nemotron H --------------------------------------------------------------------------------------------


class Mamba2(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.n, self.p, self.s, self.g = (
            c[k] for k in ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups")
        )
        inner, mixed = self.n * self.p, self.n * self.p + 2 * self.g * self.s
        self.conv1d, self.in_proj = conv(mixed, rngs, True), linear(c["hidden_size"], inner + mixed + self.n, rngs)
        self.dt_bias, self.A_log, self.D = (nnx.Param(jnp.zeros(self.n)) for _ in range(3))
        self.norm, self.out_proj = GroupedNorm(inner, self.g), linear(inner, c["hidden_size"], rngs)

    def __call__(self, x: Array) -> Array:
        shape, inner = x.shape[:2], self.n * self.p
        gate, mixed, dt = jnp.split(self.in_proj(x), [inner, 2 * inner + 2 * self.g * self.s], -1)
        mixed = causal_conv(mixed, self.conv1d.kernel[...], self.conv1d.bias[...])
        y, b, c = jnp.split(mixed, [inner, inner + self.g * self.s], -1)
        y = y.reshape(*shape, self.n, self.p)
        b, c = (jnp.repeat(z.reshape(*shape, self.g, self.s), self.n // self.g, 2) for z in (b, c))
        dt = jnp.maximum(jax.nn.softplus(dt + self.dt_bias[...]), 1e-3)

        def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
            y, b, c, dt = now  # (batch, head, …)
            state = state * jnp.exp(-jnp.exp(self.A_log[...]) * dt)[..., None, None]
            state = state + jnp.einsum("bn,bnp,bns->bnps", dt, y, b)
            return state, jnp.einsum("bnps,bns->bnp", state, c)

        out = over_tokens(step, jnp.zeros((shape[0], self.n, self.p, self.s)), y, b, c, dt) + y * self.D[...][:, None]
        return self.out_proj(self.norm(out.reshape(*shape, inner) * jax.nn.silu(gate)))


class GroupedNorm(Norm):
    def __init__(self, size: int, groups: int):
        super().__init__(size)
        self.groups = groups

    def __call__(self, x: Array) -> Array:
        y = x.reshape(*x.shape[:-1], self.groups, -1)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
        return y.reshape(x.shape) * self.weight[...]


class PlainAttention(nnx.Module):
    """Attention without positions."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        d, n, k, self.h = (
            c[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        )
        self.q_proj, self.k_proj, self.v_proj = (linear(d, m * self.h, rngs) for m in (n, k, k))
        self.o_proj = linear(n * self.h, d, rngs)

    def __call__(self, x: Array) -> Array:
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.h) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(q, k, v))


class SquaredMlp(nnx.Module):
    def __init__(self, d: int, f: int, rngs: nnx.Rngs):
        self.up_proj, self.down_proj = linear(d, f, rngs), linear(f, d, rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jnp.square(jax.nn.relu(self.up_proj(x))))


class NemotronBlock(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.gate, self.experts = Router(c, True), Experts(c, False)
        self.shared_experts = SquaredMlp(c["hidden_size"], c["expert_size"], rngs)

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        return self.experts(flat, self.gate(flat)).reshape(x.shape) + self.shared_experts(x)


class NemotronLayer(nnx.Module):
    def __init__(self, c: Config, number: int, rngs: nnx.Rngs):
        kind = c["layers_block_type"][number]
        self.norm = Norm(c["hidden_size"])
        if kind == "mlp":
            self.mixer: Any = SquaredMlp(c["hidden_size"], c["intermediate_size"], rngs)
        else:
            self.mixer = {"mamba": Mamba2, "attention": PlainAttention, "moe": NemotronBlock}[kind](c, rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.mixer(self.norm(x))


# ---- models ------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.qwen, d = c["kind"] == "qwen3_next", c["hidden_size"]
        self.names = ("embed_tokens", "norm") if self.qwen else ("embeddings", "norm_f")
        setattr(self, self.names[0], nnx.Embed(c["vocab_size"], d, rngs=rngs))
        layer, count = (QwenLayer, len(c["layer_types"])) if self.qwen else (NemotronLayer, len(c["layers_block_type"]))
        self.layers = nnx.List([layer(c, i, rngs) for i in range(count)])
        setattr(self, self.names[1], PlusOne(d) if self.qwen else Norm(d))

    def __call__(self, ids: Array) -> Array:
        x = getattr(self, self.names[0])(ids)
        for layer in self.layers:
            x = layer(x)
        return getattr(self, self.names[1])(x)


class CausalLM(nnx.Module):
    """`kind` is transformers' model type; `experts`, `expert_size`, `theta`, `rotary` say what it calls otherwise."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.model = Model(c, rngs)
        self.lm_head = linear(c["hidden_size"], c["vocab_size"], rngs)

    def __call__(self, ids: Array) -> Array:
        return self.lm_head(self.model(ids))
