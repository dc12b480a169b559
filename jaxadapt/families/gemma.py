"""Gemma 1 to 3 as the gemma package (gemma.gm, Linen) and Tunix (NNX) hold them: k and v fused, in gm gate and up too.

Where there are as many key heads as query heads, q, k and v are one leaf. Names as in gemma 4.0.1, google-tunix 0.1.7.
"""

from collections.abc import Iterable

from jaxadapt.families.llama import TIED
from jaxadapt.families.spellings import VISION_LANGUAGE, bare
from jaxadapt.keymap import KeyMap
from jaxadapt.weight import Weight

_HF = "model.layers.{l}."
_ATTENTION, _MLP = f"{_HF}self_attn.{{p}}_proj.weight", f"{_HF}mlp.{{p}}_proj.weight"
_Names = tuple[tuple[str, str], ...]
_GEMMA1: _Names = (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm"))


def _gemma2(post_attention: str) -> _Names:
    """The norms since Gemma 2, where four lie around attention and feed-forward."""
    return (
        ("pre_attention_norm", "input_layernorm"),
        (post_attention, "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )


_GEMMA3: _Names = (
    *_gemma2("post_attention_norm"),
    ("attn._query_norm", "self_attn.q_norm"),
    ("attn._key_norm", "self_attn.k_norm"),
)


def _table(name: str, layer: str, norms: _Names, mlp: Iterable[Weight]) -> KeyMap:
    lines = (
        Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight(f"{layer}attn.q_einsum.w", f"{_HF}self_attn.q_proj.weight", "n d h -> (n h) d"),
        Weight(f"{layer}attn.kv_einsum.w", _ATTENTION, "{p} k d h -> (k h) d", p=("k", "v")),
        Weight(f"{layer}attn.qkv_einsum.w", _ATTENTION, "{p} n d h -> (n h) d", p=("q", "k", "v")),
        Weight(f"{layer}attn.attn_vec_einsum.w", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *mlp,
        *(Weight(f"{layer}{a}.scale", f"{_HF}{b}.weight", "d -> d") for a, b in norms if not a.startswith("attn.")),
        *(Weight(f"{layer}{a}.scale", f"{_HF}{b}.weight", "h -> h") for a, b in norms if a.startswith("attn.")),
        Weight("final_norm.scale", "model.norm.weight", "d -> d"),
    )
    return KeyMap(
        name,
        lines,
        output="lm_head",
        whole=True,
        needs=tuple(f"{layer}{a}.scale" for a, _ in norms),
        same=("d",),
        tied=TIED,
        spellings=(*VISION_LANGUAGE, *bare("model.")),
    )


def _gm(name: str, norms: _Names, gating: str) -> KeyMap:
    mlp = (
        Weight("layer_{l}.mlp.gating_einsum", _MLP, f"{{p}} {gating} -> f d", p=("gate", "up")),
        Weight("layer_{l}.mlp.linear", f"{_HF}mlp.down_proj.weight", "f d -> d f"),
    )
    return _table(f"gemma:{name}", "layer_{l}.", norms, mlp)


# Gemma 2 with 2 billion weights holds its gate as (D, F), all others as (F, D).
GEMMA2_2B = _gm("gemma2-2b", _gemma2("post_attention_norm"), "d f")
GEMMA2 = _gm("gemma2", _gemma2("post_attention_norm"), "f d")
GEMMA3 = _gm("gemma3", _GEMMA3, "f d")


def _tunix(name: str, norms: _Names) -> KeyMap:
    line = "layers.{l}.mlp."
    mlp = (
        *(Weight(f"{line}{p}_proj.kernel", f"{_HF}mlp.{p}_proj.weight", "d f -> f d") for p in ("gate", "up")),
        Weight(f"{line}down_proj.kernel", f"{_HF}mlp.down_proj.weight", "f d -> d f"),
    )
    return _table(f"tunix:{name}", "layers.{l}.", norms, mlp)


TUNIX_GEMMA = _tunix("gemma", _GEMMA1)
TUNIX_GEMMA2 = _tunix("gemma2", _gemma2("post_attn_norm"))
TUNIX_GEMMA3 = _tunix("gemma3", _GEMMA3)
