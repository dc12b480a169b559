"""Llama and dense decoders with its layer names, as in Hugging Face's classes (transformers' Flax classes).

Mistral, Qwen 2 and 3, the language model of Qwen 3 VL, OLMo 3, and Phi 3 and 4 (transformers' Phi3ForCausalLM),
which fuse q, k and v in one layer, and gate and up in another, as PEFT's file does.
"""

from jaxadapt.keymaps.families import LAYER, Weight, biases, decoder_keymap, embeddings, layer_kernels, layer_norms

_MODULES = (
    *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "o", "qkv")),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "gate_up", "down")),
)

LLAMA = decoder_keymap(
    "llama",
    (
        *embeddings("model.embed_tokens"),
        *layer_kernels(*_MODULES),
        *biases(f"{LAYER}{m}" for m in _MODULES),
        *layer_norms(LAYER, ((m, m) for m in ("input_layernorm", "post_attention_layernorm")), leaf="weight"),
        *layer_norms(LAYER, (("post_feedforward_layernorm", "post_feedforward_layernorm"),), leaf="weight"),
        *layer_norms(LAYER, ((m, m) for m in ("self_attn.q_norm", "self_attn.k_norm")), "h", "weight"),
        Weight("model.norm.weight", "model.norm.weight", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    same=("m",),
)
