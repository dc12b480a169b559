"""The models of jax-ml/bonsai for its specimens: its own classes with tiny configurations, and a call of each.

Three of its computations differ from those of transformers 5.12.1, and the calls here have transformers': DINOv3 rounds
queries and keys to bfloat16 for its rotary embedding, Whisper's encoder has an approximate GELU behind its convolutions
(and Whisper as a whole has no call yet), and UMT5's head gets its input without the factor 1/√d_model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from tests.keymaps.families.specimens import HEADS, INPUTS, KV, LAYERS, D, F, Specimen, V

PATCH, LABELS, MEL, SOURCE, TARGET = 4, 5, 8, 6, 32
Parts = tuple[Callable[[], nnx.Module], Callable[[Any], Any], Any]
"""A function that creates a model, one that calls it, and the filter of its weights."""


def _library(name: str) -> Any:
    return importlib.import_module(f"bonsai.models.{name}.modeling")


def qwen3(specimen: Specimen) -> Parts:
    library, config = _library("qwen3"), qwen3_config(tied=False)
    ids = jnp.asarray(INPUTS["input_ids"], jnp.int32)

    def run(model: Any) -> Any:
        cache = library.init_cache(config, len(ids), ids.shape[1], 0, jnp.float32)
        return model(ids, cache=cache, segment_ids=jnp.ones_like(ids))

    return lambda: library.Qwen3(config, rngs=nnx.Rngs(0)), run, nnx.Param


def qwen3_config(tied: bool) -> Any:
    return _library("qwen3").ModelConfig(
        num_layers=LAYERS, vocab_size=V, emb_dim=D, mlp_dim=F, num_heads=HEADS, head_dim=6, num_kv_heads=KV,
        rope_theta=1_000_000, rope_scaling_factor=8.0, local_rope_theta=1e4, norm_eps=1e-6, tie_word_embeddings=tied,
    )  # fmt: skip


def gemma3(specimen: Specimen) -> Parts:
    library, config = _library("gemma3"), gemma3_config()
    ids, kinds = (jnp.asarray(INPUTS[name], jnp.int32) for name in ("input_ids/image", "token_type_ids"))
    image = jnp.asarray(INPUTS["pixel_values"]).transpose(0, 2, 3, 1)

    def run(model: Any) -> Any:
        cache = library.init_cache(config, len(ids), ids.shape[1], 0, jnp.float32)
        return model(ids, image, cache=cache, segment_ids=jnp.ones_like(ids), token_type_ids=kinds)

    return lambda: library.Gemma3Model(config, rngs=nnx.Rngs(0)), run, nnx.Param


def gemma3_config() -> Any:
    library = _library("gemma3")
    mode = library.AttentionMode
    return library.ModelConfig(
        vision_config=library.VisionConfig(
            attention_dropout=0.0, hidden_size=D, image_size=2 * PATCH, intermediate_size=F, layer_norm_eps=1e-6,
            num_attention_heads=HEADS, num_channels=3, num_hidden_layers=LAYERS, patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=library.TextConfig(
            attention_bias=False, attention_dropout=0.0, head_dim=6, hidden_size=D, intermediate_size=F,
            layer_types=[mode.SLIDE, mode.FULL, mode.SLIDE], max_position_embeddings=32, num_attention_heads=HEADS,
            num_hidden_layers=LAYERS, num_key_value_heads=KV, rms_norm_eps=1e-6, rope_full_factor=1.0,
            rope_full_theta=1_000_000.0, rope_slide_factor=1.0, rope_slide_theta=10_000.0, sliding_window=4,
            vocab_size=V, norm_dtype=jnp.float32,
        ),
        mm_tokens_per_image=4, dtype="float32", final_logit_softcapping=None,
    )  # fmt: skip


def vit(specimen: Specimen) -> Parts:
    library = _library("vit")
    image = jnp.asarray(INPUTS["pixel_values"]).transpose(0, 2, 3, 1)
    return (
        lambda: library.ViTClassificationModel(vit_config(), rngs=nnx.Rngs(0)),
        lambda model: model(image, rngs=None),
        nnx.Param,
    )


def vit_config() -> Any:
    return _library("vit").ModelConfig(
        image_size=(2 * PATCH, 2 * PATCH), patch_size=(PATCH, PATCH), num_channels=3, hidden_dim=D,
        attn_dropout_prob=0.0, dropout_prob=0.0, num_heads=HEADS, mlp_dim=F, eps=1e-12, num_layers=LAYERS,
        num_labels=LABELS,
    )  # fmt: skip


def dinov3(specimen: Specimen) -> Parts:
    library = _library("dinov3")
    config, image = dinov3_config(specimen.options["gated"]), jnp.asarray(INPUTS["pixel_values"])

    def turned(q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, ...]:
        first = q.shape[-2] - cos.shape[-2]  # the class token and the registers have no place
        cos = jnp.concatenate([jnp.ones((first, cos.shape[-1])), cos])
        sin = jnp.concatenate([jnp.zeros((first, sin.shape[-1])), sin])
        return tuple(x * cos + library.rotate_half(x) * sin for x in (q, k))

    def run(model: Any) -> Any:
        with mock.patch.object(library, "apply_rotary_pos_emb", turned):
            return model(image)["last_hidden_state"]

    return lambda: library.Dinov3ViTModel(config, rngs=nnx.Rngs(0)), run, nnx.Param


def dinov3_config(gated: bool) -> Any:
    return _library("dinov3").ModelConfig(
        patch_size=(PATCH, PATCH), hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, hidden_act="silu" if gated else "gelu", image_size=2 * PATCH, use_gated_mlp=gated,
        num_register_tokens=2,
    )  # fmt: skip


def whisper(specimen: Specimen) -> Parts:
    library = _library("whisper")
    sound = jnp.asarray(INPUTS["input_features"]).transpose(0, 2, 1)
    ids = jnp.asarray(INPUTS["decoder_input_ids"], jnp.int32)

    def gelu(x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x, approximate=False)

    def run(model: Any) -> Any:
        encoder, decoder = model.encoder, model.decoder
        x = gelu(encoder.conv2(gelu(encoder.conv1(sound)))) + encoder.embed_positions(jnp.arange(SOURCE))
        for layer in encoder.layers:
            x = layer(x, None)
        mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1]), bool))
        y = decoder(ids, mask, encoder.layer_norm(x), None, decode=False)
        return decoder.embed_tokens.attend(y)

    kept = nnx.All(nnx.Param, lambda path, _: tuple(path[-2:]) != ("key", "bias"))  # they are zero; PyTorch has none
    return lambda: library.Whisper(whisper_config(), rngs=nnx.Rngs(0)), run, kept


def whisper_config() -> Any:
    library = _library("whisper")
    tiny = vars(library.ModelConfig.whisper_tiny())
    sizes = {
        "vocab_size": V, "d_model": D, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_mel_bins": MEL,
        "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": F, "decoder_ffn_dim": F,
        "max_source_positions": SOURCE, "max_target_positions": TARGET, "max_length": TARGET,
    }  # fmt: skip
    return library.ModelConfig(**{**tiny, **sizes})


def umt5(specimen: Specimen) -> Parts:
    library = _library("umt5")
    ids, targets = (jnp.asarray(INPUTS[name], jnp.int32) for name in ("input_ids", "decoder_input_ids"))

    def make() -> nnx.Module:
        model = library.UMT5Model(umt5_config(), rngs=nnx.Rngs(0))
        model.eval()
        return model

    def run(model: Any) -> Any:
        return model.lm_head(model(ids, decoder_input_ids=targets) * D**-0.5)

    return make, run, nnx.Param


def umt5_config() -> Any:
    return _library("umt5").ModelConfig(
        vocab_size=V, d_model=D, d_kv=6, d_ff=F, num_layers=LAYERS, num_heads=HEADS, tie_word_embeddings=False
    )


MODELS: dict[str, Callable[[Specimen], Parts]] = {
    "qwen3": qwen3,
    "gemma3": gemma3,
    "vit": vit,
    "dinov3": dinov3,
    "whisper": whisper,
    "umt5": umt5,
}
