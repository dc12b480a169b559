"""GPT-2 in NNX and in Linen whose call takes positions and embeddings, beside transformers' GPT2LMHeadModel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxadapt
from tests.support.twins import gpt2, once

HEADS = 4


def forward(model: Any, tokens: Any, mask: Any, positions: Any, embeddings: Any) -> Any:
    """Tokens (batch, time) to logits (batch, time, vocabulary)."""
    x = model.layer("transformer.wte")(tokens) if embeddings is None else embeddings
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2]) if positions is None else positions
    x = x + model.layer("transformer.wpe")(positions)
    seen = None if mask is None else (mask != 0)[:, None, None]
    for i in range(model.layers):
        at = f"transformer.h.{i}"
        qkv = jnp.split(model.layer(f"{at}.attn.c_attn")(model.layer(f"{at}.ln_1")(x)), 3, axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in qkv)
        y = jaxadapt.models.attention(q, k, v, mask=seen, is_causal=True).reshape(x.shape)
        x = x + model.layer(f"{at}.attn.c_proj")(y)
        y = jax.nn.gelu(model.layer(f"{at}.mlp.c_fc")(model.layer(f"{at}.ln_2")(x)), approximate=True)
        x = x + model.layer(f"{at}.mlp.c_proj")(y)
    return model.layer("transformer.wte").attend(model.layer("transformer.ln_f")(x))


class GPT2(once.OnceNnx):
    def __init__(self, modules: Any, layers: int) -> None:
        super().__init__(modules, 1e-5)
        self.layers = layers

    def __call__(self, tokens: Any = None, mask: Any = None, positions: Any = None, embeddings: Any = None) -> Any:
        return forward(self, tokens, mask, positions, embeddings)


class LinenGPT2(once.OnceLinen):
    layers: int

    def __call__(self, tokens: Any = None, mask: Any = None, positions: Any = None, embeddings: Any = None) -> Any:
        return forward(self, tokens, mask, positions, embeddings)


def torch_gpt2(layers: int = 2) -> Any:
    """A random transformers GPT-2 in eval mode."""
    return gpt2.torch_gpt2(gpt2.Shape(layers=layers, heads=HEADS))


def twin_of(model: Any, api: str) -> Any:
    """The NNX model, or (module, variables) for "linen"."""
    modules, layers = once.modules_of(model.state_dict(), ("lm_head",)), model.config.n_layer
    return LinenGPT2.of(modules, 1e-5, layers=layers) if api == "linen" else GPT2(modules, layers)
