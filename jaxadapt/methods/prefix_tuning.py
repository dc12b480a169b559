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

from typing import Any

import jax.numpy as jnp

from jaxadapt.methods.prompt import EMBEDDINGS, Array, Draw, Examples, Params, PromptMethod, dense


class PrefixTuning(PromptMethod, peft_type="PREFIX_TUNING"):
    """Trained keys and values before those of every attention layer."""

    adds = "keys"
    examples: Examples = (
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5},
    )

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        self.require_sizes(config)
        width = config.num_layers * 2 * config.token_dim
        if stored or not config.prefix_projection:
            return {EMBEDDINGS: (config.num_virtual_tokens, width)}
        h = config.encoder_hidden_size or config.token_dim
        return {
            "embedding": (config.num_virtual_tokens, config.token_dim),
            "kernel_0": (config.token_dim, h),
            "bias_0": (h,),
            "kernel_1": (h, width),
            "bias_1": (width,),
        }

    def draw(self, config: Any, name: str) -> Draw:
        zero = config.init_weights == "zero"
        if name in (EMBEDDINGS, "embedding"):  # torch's nn.Embedding
            return Draw("constant", 0.0) if zero and name == EMBEDDINGS else Draw("normal", 1.0)
        if zero and name in ("kernel_1", "bias_1"):
            return Draw("constant", 0.0)
        fan_in = config.token_dim if name.endswith("0") else config.encoder_hidden_size or config.token_dim
        return Draw.kaiming(fan_in)

    def encode(self, config: Any, shared: Params) -> Array:
        return dense(shared, 1, jnp.tanh(dense(shared, 0, shared["embedding"])))
