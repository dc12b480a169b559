"""Llama, Mistral, Qwen 2 and 3 of EasyDeL (easydel 0.3.0, NNX): Hugging Face's names, the scale of a norm a kernel."""

from jaxadapt.families.lines import biases, dense, embeddings
from jaxadapt.families.llama import TIED
from jaxadapt.families.spellings import VISION_LANGUAGE, bare
from jaxadapt.keymap import KeyMap
from jaxadapt.weight import Weight

_LAYER = "model.layers.{l}."
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_QKV = tuple(f"{_LAYER}self_attn.{p}_proj" for p in "qkv")
_OTHERS = (f"{_LAYER}self_attn.o_proj", *(f"{_LAYER}mlp.{p}_proj" for p in ("gate", "up", "down")))

LLAMA = KeyMap(
    "easydel:llama",
    (
        *embeddings("model.embed_tokens"),
        *dense(*_QKV, *_OTHERS, "lm_head", bias=False),
        *biases(_QKV),
        *(Weight(f"{m}.kernel", f"{m}.weight", "d -> d") for m in (*(_LAYER + n for n in _NORMS), "model.norm")),
    ),
    output="lm_head",
    whole=True,
    needs=(f"{_LAYER}input_layernorm.kernel",),
    tied=TIED,
    spellings=(*VISION_LANGUAGE, *bare("model.")),
)
