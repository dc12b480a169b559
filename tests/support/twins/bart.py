"""BART in NNX and in Linen, beside transformers' BartForConditionalGeneration: its positions are learned."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxadapt
from tests.support.twins import once

HEADS, OFFSET = 4, 2  # the first two rows of the positions' tables are not used


def stack(model: Any, name: str, x: Any, mask: Any, positions: Any, other: Any = None, other_mask: Any = None) -> Any:
    """The encoder, or the decoder over the encoder's outputs (`other`)."""
    decoder = other is not None
    places = jnp.arange(x.shape[1])[None] if positions is None else positions
    x = x + model.layer(f"model.{name}.embed_positions")(places + OFFSET)
    x = model.layer(f"model.{name}.layernorm_embedding")(x)
    for i in range(model.layers):
        at = f"model.{name}.layers.{i}"

        def attend(part: str, x: Any, source: Any, at: str = at, **options: Any) -> Any:
            q, k, v = (
                model.layer(f"{at}.{part}.{p}_proj")(y).reshape(*y.shape[:2], HEADS, -1)
                for p, y in (("q", x), ("k", source), ("v", source))
            )
            y = jaxadapt.models.attention(q, k, v, **options).reshape(x.shape)
            return model.layer(f"{at}.{part}_layer_norm")(x + model.layer(f"{at}.{part}.out_proj")(y))

        x = attend("self_attn", x, x, mask=mask, is_causal=decoder, prefix=decoder)
        if decoder:
            x = attend("encoder_attn", x, other, mask=other_mask, prefix=False)
        y = model.layer(f"{at}.fc2")(jax.nn.gelu(model.layer(f"{at}.fc1")(x), approximate=False))
        x = model.layer(f"{at}.final_layer_norm")(x + y)
    return x


def forward(model: Any, tokens: Any, decoder_tokens: Any, mask: Any, decoder_positions: Any) -> Any:
    """Tokens of the encoder and the decoder to the decoder's logits."""
    shared = model.layer("model.shared")
    seen = None if mask is None else (mask != 0)[:, None, None]
    x = stack(model, "encoder", shared(tokens), seen, None)
    return shared.attend(stack(model, "decoder", shared(decoder_tokens), None, decoder_positions, x, seen))


class Bart(once.OnceNnx):
    def __init__(self, modules: Any, layers: int) -> None:
        super().__init__(modules, 1e-5)
        self.layers = layers

    def __call__(self, tokens: Any, decoder_tokens: Any, mask: Any = None, decoder_positions: Any = None) -> Any:
        return forward(self, tokens, decoder_tokens, mask, decoder_positions)


class LinenBart(once.OnceLinen):
    layers: int

    def __call__(self, tokens: Any, decoder_tokens: Any, mask: Any = None, decoder_positions: Any = None) -> Any:
        return forward(self, tokens, decoder_tokens, mask, decoder_positions)


def torch_bart(layers: int = 2) -> Any:
    """A random transformers BART in eval mode."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, init_std=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def twin_of(model: Any, api: str) -> Any:
    """The NNX model, or (module, variables) for "linen"."""
    tied = ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    modules, layers = once.modules_of(model.state_dict(), tied), model.config.encoder_layers
    return LinenBart.of(modules, 1e-5, layers=layers) if api == "linen" else Bart(modules, layers)
