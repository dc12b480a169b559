"""PREFIX_TUNING (arXiv:2101.00190; PEFT's `tuners/prefix_tuning/model.py` and `PeftModel.get_prompt`).

The stored form is one tensor `prompt_embeddings` (n, layers · 2 · token_dim), whose last axis is (layer, key or value,
head, dim). The keys are used as they are: where the base rotates its keys, they are taken to be rotated already.

In an encoder-decoder (`num_transformer_submodules` 2) the prefix enters the self-attention of the decoder. PEFT gives
its layer i the keys and values of layer 2·i mod layers, because its cache takes four tensors a layer (those for cross
attention are dropped); so does jaxadapt, since a file trained by PEFT means that. PEFT takes the number of layers from
the encoder: a decoder of fewer layers uses the first of them, and in one of more layers PEFT fails. A new adapter of
jaxadapt has as many layers as the decoder, which PEFT reads from the configuration.

With `prefix_projection` the trained form is an embedding table and two dense layers:
prompt_embeddings = tanh(embedding · kernel_0 + bias_0) · kernel_1 + bias_1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import Config
from jaxadapt.methods.base import Array, Params
from jaxadapt.methods.prompt import EMBEDDINGS, BaseSizes, PromptMethod, dense, draw_dense, fill_in


class PrefixTuning(PromptMethod):
    """Trained keys and values before those of every attention layer."""

    peft_type = "PREFIX_TUNING"
    adds = "keys"

    def complete(self, config: Any, sizes: BaseSizes) -> Config:
        width = None if sizes.num_kv_heads is None or sizes.head_dim is None else sizes.num_kv_heads * sizes.head_dim
        config = fill_in(
            config, {"num_layers": sizes.num_layers, "token_dim": width, "num_attention_heads": sizes.num_kv_heads}
        )
        return fill_in(config, {"num_transformer_submodules": config.submodules} | self.own_sizes(config))

    def own_sizes(self, config: Any) -> dict[str, int | None]:
        """Return the fields of this method that follow from the others."""
        return {"encoder_hidden_size": config.token_dim}

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        self.require_sizes(config)
        n, d, width = config.num_virtual_tokens, config.token_dim, config.num_layers * 2 * config.token_dim
        if stored or not config.prefix_projection:
            return {EMBEDDINGS: (n, width)}
        h = config.encoder_hidden_size or d
        return {"embedding": (n, d), "kernel_0": (d, h), "bias_0": (h,), "kernel_1": (h, width), "bias_1": (width,)}

    def draw(self, config: Any, name: str) -> Draw:
        zero = config.init_weights == "zero"
        if name in (EMBEDDINGS, "embedding"):  # torch's nn.Embedding
            return Draw("constant", 0.0) if zero and name == EMBEDDINGS else Draw("normal", 1.0)
        if zero and name in ("kernel_1", "bias_1"):
            return Draw("constant", 0.0)
        fan_in = config.token_dim if name.endswith("0") else config.encoder_hidden_size or config.token_dim
        return draw_dense(fan_in)

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        if EMBEDDINGS in shared:
            return {EMBEDDINGS: shared[EMBEDDINGS]}
        return {EMBEDDINGS: dense(shared, 1, jnp.tanh(dense(shared, 0, shared["embedding"])))}

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return (
            {"num_virtual_tokens": 3},
            {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5},
        )


METHOD = PrefixTuning()
