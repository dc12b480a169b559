"""Adapt a Flax model with layers and names of its own: from Hugging Face's weights to a PEFT folder.

    python examples/own_model.py                 # 15 seconds; writes out/own_model/base and out/own_model/adapter
    jaxadapt verify out/own_model/adapter --base out/own_model/base

The model computes what Hugging Face's Llama computes. Its weights have other names and shapes: all layers in one array,
keys and values in one array, heads on an axis of their own. KEYMAP relates them to PyTorch's names. It prints

    loss 4.876 -> 1.739
    note: LORA adapter for out/own_model/base, 16 tensors, 8 adapted modules
    note: rank 4 and scale 2 in 8 modules (down_proj, q_proj, up_proj, v_proj)
    note: out/own_model/base is the base of the training, by 8 of its weights
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxadapt
from jaxadapt import KeyMap, Weight
from jaxadapt.demo.llama import Llama, LlamaConfig
from jaxadapt.export import export_base, import_base

V, D, F, L, N, K, H = 64, 32, 48, 2, 4, 2, 8  # tokens, width, inner width, layers, heads, key heads, width of a head
SIZE = LlamaConfig(V, D, F, L, N, K, H)
LAYER = "model.layers.{l}"
KEYMAP = KeyMap("own", (  # braces around an axis: PyTorch has a tensor for each of its indices
    Weight("table", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
    Weight("layers.q", f"{LAYER}.self_attn.q_proj.weight", "{l} d n h -> (n h) d"),
    Weight("layers.kv", f"{LAYER}.self_attn.{{p}}_proj.weight", "{l} {p} d k h -> (k h) d", p=("k", "v")),
    Weight("layers.o", f"{LAYER}.self_attn.o_proj.weight", "{l} n h d -> d (n h)"),
    Weight("layers.gate_up", f"{LAYER}.mlp.{{p}}_proj.weight", "{l} {p} d f -> f d", p=("gate", "up")),
    Weight("layers.down", f"{LAYER}.mlp.down_proj.weight", "{l} f d -> d f"),
    Weight("layers.norms", f"{LAYER}.{{p}}_layernorm.weight", "{l} {p} d -> d", p=("input", "post_attention")),
    Weight("norm", "model.norm.weight", "d -> d"),
))  # fmt: skip


def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + SIZE.rms_norm_eps) * weight


def rotated(x: jax.Array) -> jax.Array:
    angles = jnp.outer(jnp.arange(x.shape[1]), SIZE.rope_theta ** (-jnp.arange(H // 2) * 2 / H))[None, :, None]
    cos, sin, (one, two) = jnp.cos(angles), jnp.sin(angles), jnp.split(x, 2, -1)  # PyTorch pairs the halves of a head
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


zeros = lambda *shape: nnx.Param(jnp.zeros(shape))  # noqa: E731
AXES = nnx.StateAxes({nnx.Param: 0, ...: 0})  # of stacked layers


class Block(nnx.Module):
    """One layer, whose weights are arrays in products of its own."""

    def __init__(self) -> None:
        self.q, self.kv, self.o = zeros(D, N, H), zeros(2, D, K, H), zeros(N, H, D)
        self.gate_up, self.down, self.norms = zeros(2, D, F), zeros(F, D), zeros(2, D)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = normed(x, self.norms[0])
        keys, values = jnp.einsum("btd,pdkh->pbtkh", y, self.kv[...])
        queries = rotated(jnp.einsum("btd,dnh->btnh", y, self.q[...]))
        mixed = jax.nn.dot_product_attention(queries, rotated(keys), values, is_causal=True)
        x = x + jnp.einsum("btnh,nhd->btd", mixed, self.o[...])
        gate, up = jnp.einsum("btd,pdf->pbtf", normed(x, self.norms[1]), self.gate_up[...])
        return x + (jax.nn.silu(gate) * up) @ self.down[...]


class OwnModel(nnx.Module):
    """Tokens (B, T) to logits (B, T, V); the layers are stacked on the first axis."""

    def __init__(self) -> None:
        self.table, self.norm = zeros(V, D), zeros(D)
        self.layers = nnx.vmap(lambda _: Block(), out_axes=AXES)(jnp.arange(L))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        run = nnx.scan(lambda block, x: block(x), in_axes=(AXES, nnx.Carry), out_axes=nnx.Carry)
        return normed(run(self.layers, self.table[...][tokens]), self.norm[...]) @ self.table[...].T


def main(folder: Path) -> None:
    """Read the base, train an adapter, save it and verify the folder."""
    if not (folder / "base").exists():  # or: hf download org/name --local-dir FOLDER/base
        (folder / "base").mkdir(parents=True)
        (folder / "base/config.json").write_text(json.dumps(SIZE.to_hf()))
        export_base(Llama(SIZE, rngs=nnx.Rngs(0)), folder / "base")
    model = import_base(folder / "base", OwnModel(), keymap=KEYMAP)
    config = jaxadapt.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    rows = (np.arange(16)[None] + np.arange(8)[:, None]) % V  # each row counts on
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1), keymap=KEYMAP, example=[rows])
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def train_step(model: OwnModel, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: OwnModel) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(rows)[:, :-1], rows[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [train_step(model, optimizer) for _ in range(20)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    jaxadapt.save(model, folder / "adapter", base_model=str(folder / "base"))
    for finding in jaxadapt.verify(folder / "adapter", folder / "base"):
        print(f"{finding.severity}: {finding.found}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/own_model"))
