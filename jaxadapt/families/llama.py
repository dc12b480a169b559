"""Llama, Mistral, Qwen2, Qwen3 and kin under Hugging Face's own names (transformers' Flax classes, the demo)."""

from jaxadapt.families.spellings import VISION_LANGUAGE, bare
from jaxadapt.keymap import KeyMap
from jaxadapt.weight import Weight

_LAYER = "model.layers.{l}."
_DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")

TIED = (("lm_head.weight", "model.embed_tokens.weight"),)

LLAMA = KeyMap(
    "llama",
    (
        Weight("model.embed_tokens.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", "i o -> o i") for m in _DENSE + _MLP),
        *(Weight(f"{_LAYER}{m}.bias", f"{_LAYER}{m}.bias", "o -> o") for m in _DENSE + _MLP),
        *(Weight(f"{_LAYER}{m}.weight", f"{_LAYER}{m}.weight", "d -> d") for m in _NORMS),
        Weight("model.norm.weight", "model.norm.weight", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    output="lm_head",
    tied=TIED,
    spellings=(*VISION_LANGUAGE, *bare("model.")),
)
