"""BERT with a classifier in NNX and in Linen, beside transformers' BertForSequenceClassification."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxadapt
from tests.support.twins import once

HEADS = 4


def forward(model: Any, tokens: Any, mask: Any, token_type_ids: Any, positions: Any, embeddings: Any) -> Any:
    """Tokens (batch, time) to the logits of the classes (batch, classes)."""
    x = model.layer("bert.embeddings.word_embeddings")(tokens) if embeddings is None else embeddings
    batch, time, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(time)[None], (batch, time)) if positions is None else positions
    types = jnp.zeros((batch, time), int) if token_type_ids is None else token_type_ids
    x = x + model.layer("bert.embeddings.position_embeddings")(positions)
    x = x + model.layer("bert.embeddings.token_type_embeddings")(types)
    x = model.layer("bert.embeddings.LayerNorm")(x)
    seen = None if mask is None else (mask != 0)[:, None, None]
    for i in range(model.layers):
        at = f"bert.encoder.layer.{i}"
        q, k, v = (
            model.layer(f"{at}.attention.self.{part}")(x).reshape(batch, time, HEADS, -1)
            for part in ("query", "key", "value")
        )
        y = jaxadapt.models.attention(q, k, v, mask=seen).reshape(x.shape)
        x = model.layer(f"{at}.attention.output.LayerNorm")(x + model.layer(f"{at}.attention.output.dense")(y))
        y = jax.nn.gelu(model.layer(f"{at}.intermediate.dense")(x), approximate=False)
        x = model.layer(f"{at}.output.LayerNorm")(x + model.layer(f"{at}.output.dense")(y))
    return model.layer("classifier")(jnp.tanh(model.layer("bert.pooler.dense")(x[:, 0])))


class Bert(once.OnceNnx):
    def __init__(self, modules: Any, layers: int) -> None:
        super().__init__(modules, 1e-12)
        self.layers = layers

    def __call__(
        self, tokens: Any = None, mask: Any = None, token_type_ids: Any = None, positions: Any = None,
        embeddings: Any = None,
    ) -> Any:  # fmt: skip
        return forward(self, tokens, mask, token_type_ids, positions, embeddings)


class LinenBert(once.OnceLinen):
    layers: int

    def __call__(
        self, tokens: Any = None, mask: Any = None, token_type_ids: Any = None, positions: Any = None,
        embeddings: Any = None,
    ) -> Any:  # fmt: skip
        return forward(self, tokens, mask, token_type_ids, positions, embeddings)


def torch_bert(layers: int = 2) -> Any:
    """A random transformers BERT in eval mode."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=layers, num_attention_heads=HEADS, intermediate_size=24,
        max_position_embeddings=32, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def twin_of(model: Any, api: str) -> Any:
    """The NNX model, or (module, variables) for "linen"."""
    modules, layers = once.modules_of(model.state_dict()), model.config.num_hidden_layers
    return LinenBert.of(modules, 1e-12, layers=layers) if api == "linen" else Bert(modules, layers)
