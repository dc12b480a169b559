"""A GPT-2 of one's own: Hugging Face's names, and `nn.Dense` where transformers' Flax classes turn the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt

WIDTH = 16
TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(nn.Dense(3 * WIDTH, name="c_attn")(x), 3, -1)
        return nn.Dense(WIDTH, name="c_proj")(jax.nn.softmax(q @ k.mT) @ v)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(WIDTH, name="c_proj")(nn.gelu(nn.Dense(4 * WIDTH, name="c_fc")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + Attention(name="attn")(nn.LayerNorm(name="ln_1")(x))
        return x + MLP(name="mlp")(nn.LayerNorm(name="ln_2")(x))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Block(name="1")(Block(name="0")(x))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(50, WIDTH, name="wte")(tokens)
        return nn.LayerNorm(name="ln_f")(Layers(name="h")(x))


class GPT(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Dense(50, use_bias=False, name="lm_head")(Transformer(name="transformer")(tokens))


@pytest.mark.peft
def test_peft_changes_the_same_weights_by_the_same(tmp_path: Path):
    """`attn.c_proj` is square: taken the wrong way round, its change would fit as well, transposed."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=50, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=1, bos_token_id=None, eos_token_id=None
    )
    names = sorted({name.rpartition(".")[2] for name in TARGETS})
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=True)
    torch_model: Any = peft.get_peft_model(GPT2LMHeadModel(shape), config)
    torch_model.save_pretrained(tmp_path / "peft")

    tokens = jnp.zeros((1, 4), jnp.int32)
    params = GPT().init(jax.random.key(0), tokens)["params"]
    module = jaxadapt.adapt(GPT(), jaxadapt.read_config(tmp_path / "peft"))
    fresh = jax.eval_shape(module.init, jax.random.key(0), tokens)
    variables = jaxadapt.load(tmp_path / "peft", {"params": params, "lora": fresh["lora"]})
    merged = jaxadapt.merge(params, jaxadapt.extract(variables))
    for layer, block in enumerate(torch_model.base_model.model.transformer.h):
        for name in TARGETS:
            part, which = name.split(".")
            new, old = (tree["transformer"]["h"][str(layer)][part][which]["kernel"] for tree in (merged, params))
            want = block.get_submodule(name).get_delta_weight("default").detach().numpy()  # (in, out), as Conv1D has it
            np.testing.assert_allclose(new - old, want, atol=1e-5)

    jaxadapt.save(variables, tmp_path / "back")
    ours, theirs = (jaxadapt.read(tmp_path / folder).tensors for folder in ("back", "peft"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_array_equal(ours[key], tensor)
