"""Llama, Mistral, Qwen 2, Qwen 3 and similar models under Hugging Face's names (transformers' Flax classes)."""

from jaxadapt.keymaps.families import LAYER, Weight, biases, decoder_keymap, embeddings, layer_kernels, layer_norms

_MODULES = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))

LLAMA = decoder_keymap(
    "llama",
    (
        *embeddings("model.embed_tokens"),
        *layer_kernels(*_MODULES),
        *biases(f"{LAYER}{m}" for m in _MODULES),
        *layer_norms(LAYER, ((m, m) for m in ("input_layernorm", "post_attention_layernorm")), leaf="weight"),
        *layer_norms(LAYER, ((m, m) for m in ("self_attn.q_norm", "self_attn.k_norm")), "h", "weight"),
        Weight("model.norm.weight", "model.norm.weight", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    same=("m",),
)
