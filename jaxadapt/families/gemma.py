"""Gemma 3 as the gemma package (gemma.gm, Linen) and Tunix (NNX) hold it: fused k and v, in gm fused gate and up.

Where there are as many key heads as query heads, q, k and v are one leaf. Names as in gemma 4.0.1, google-tunix 0.1.7.
"""

from collections.abc import Iterable

from jaxadapt.families.llama import TIED
from jaxadapt.families.spellings import VISION_LANGUAGE, bare
from jaxadapt.keymap import KeyMap
from jaxadapt.weight import Weight

_HF = "model.layers.{l}."
_ATTENTION, _MLP = f"{_HF}self_attn.{{p}}_proj.weight", f"{_HF}mlp.{{p}}_proj.weight"
_QK_NORMS = (("attn._query_norm", "self_attn.q_norm"), ("attn._key_norm", "self_attn.k_norm"))
_LAYER_NORMS = (
    ("pre_attention_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("pre_ffw_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)


def _table(name: str, layer: str, mlp: Iterable[Weight]) -> KeyMap:
    lines = (
        Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight(f"{layer}attn.q_einsum.w", f"{_HF}self_attn.q_proj.weight", "n d h -> (n h) d"),
        Weight(f"{layer}attn.kv_einsum.w", _ATTENTION, "{p} k d h -> (k h) d", p=("k", "v")),
        Weight(f"{layer}attn.qkv_einsum.w", _ATTENTION, "{p} n d h -> (n h) d", p=("q", "k", "v")),
        Weight(f"{layer}attn.attn_vec_einsum.w", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *mlp,
        *(Weight(f"{layer}{a}.scale", f"{_HF}{b}.weight", "d -> d") for a, b in _LAYER_NORMS + _QK_NORMS),
        Weight("final_norm.scale", "model.norm.weight", "d -> d"),
    )
    return KeyMap(
        name,
        lines,
        output="lm_head",
        whole=True,
        needs=tuple(f"{layer}{a}.scale" for a, _ in _LAYER_NORMS + _QK_NORMS),
        tied=TIED,
        spellings=(*VISION_LANGUAGE, *bare("model.")),
    )


GEMMA3 = _table(
    "gemma:gemma3",
    "layer_{l}.",
    (
        Weight("layer_{l}.mlp.gating_einsum", _MLP, "{p} f d -> f d", p=("gate", "up")),
        Weight("layer_{l}.mlp.linear", f"{_HF}mlp.down_proj.weight", "f d -> d f"),
    ),
)
TUNIX_GEMMA3 = _table(
    "tunix:gemma3",
    "layers.{l}.",
    (
        Weight(f"layers.{{l}}.mlp.{p}_proj.kernel", f"{_HF}mlp.{p}_proj.weight", "i o -> o i")
        for p in ("gate", "up", "down")
    ),
)
