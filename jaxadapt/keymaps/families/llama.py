"""Llama, Mistral, Qwen 2, Qwen 3 and similar models under Hugging Face's names (transformers' Flax classes)."""

from jaxadapt.keymaps.families.entries import decoder_keymap
from jaxadapt.keymaps.weight import Weight

_LAYER = "model.layers.{l}."
_FROM, _INTO = "m o -> o m", "i m -> m i"  # kernels that read the residual stream, and kernels that write to it
_DENSE = {f"self_attn.{p}_proj": _FROM for p in "qkv"} | {"self_attn.o_proj": _INTO}
_MLP = {"mlp.gate_proj": _FROM, "mlp.up_proj": _FROM, "mlp.down_proj": _INTO}
_NORMS = {
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "d -> d"),
    **dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), "h -> h"),
}


LLAMA = decoder_keymap(
    "llama",
    (
        Weight("model.embed_tokens.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", p) for m, p in (_DENSE | _MLP).items()),
        *(Weight(f"{_LAYER}{m}.bias", f"{_LAYER}{m}.bias", "o -> o") for m in _DENSE | _MLP),
        *(Weight(f"{_LAYER}{m}.weight", f"{_LAYER}{m}.weight", p) for m, p in _NORMS.items()),
        Weight("model.norm.weight", "model.norm.weight", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    same=("m",),
)
