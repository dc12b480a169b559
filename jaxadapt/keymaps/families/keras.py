"""Llama, Mistral, Qwen 3 and Gemma 3 of keras-hub: heads are axes of their own. Names as in keras-hub 0.32.

A leaf is a variable's `path`, with dots for its slashes: such a tree is what `load`, `merge` and `import_base` take.
"""

from collections.abc import Iterable

from jaxadapt.keymaps.families.llama import TIED
from jaxadapt.keymaps.families.spellings import VISION_LANGUAGE, bare
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_HF = "model.layers.{l}."


def _table(
    name: str,
    layer: str,
    attention: str,
    query: str,
    modules: Iterable[tuple[str, str]],
    norms: Iterable[tuple[str, str]],
    more: tuple[Weight, ...],
) -> KeyMap:
    """`query` is how the kernels of query, key and value lie; `modules` and `norms` are pairs of ours and PyTorch's."""
    norms = tuple(norms)
    lines = (
        Weight("token_embedding.embeddings", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(
            Weight(f"{layer}{attention}.{p}.kernel", f"{_HF}self_attn.{p[0]}_proj.weight", query)
            for p in ("query", "key", "value")
        ),
        Weight(f"{layer}{attention}.attention_output.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *(Weight(f"{layer}{a}.kernel", f"{_HF}mlp.{b}_proj.weight", "i o -> o i") for a, b in modules),
        *(Weight(f"{layer}{a}.scale", f"{_HF}{b}.weight", "d -> d") for a, b in norms),
        *more,
    )
    return KeyMap(
        f"keras:{name}",
        lines,
        output="lm_head",
        whole=True,
        needs=tuple(f"{layer}{a}.scale" for a, _ in norms),
        tied=TIED,
        spellings=(*VISION_LANGUAGE, *bare("model.")),
    )


def _llama(name: str, more_norms: Iterable[tuple[str, str]] = ()) -> KeyMap:
    return _table(
        name,
        "transformer_layer_{l}.",
        "self_attention",
        "d n h -> (n h) d",
        ((f"feedforward_{a}_dense", b) for a, b in (("gate", "gate"), ("intermediate", "up"), ("output", "down"))),
        (
            ("self_attention_layernorm", "input_layernorm"),
            ("feedforward_layernorm", "post_attention_layernorm"),
            *more_norms,
        ),
        (
            Weight("token_embedding.reverse_embeddings", "lm_head.weight", "d v -> v d"),
            Weight("sequence_output_layernorm.scale", "model.norm.weight", "d -> d"),
        ),
    )


LLAMA = _llama("llama")
QWEN3 = _llama("qwen3", ((f"self_attention.{p}_dense_layernorm", f"self_attn.{p[0]}_norm") for p in ("query", "key")))
GEMMA3 = _table(
    "gemma3",
    "decoder_block_{l}.",
    "attention",
    "n d h -> (n h) d",
    (("ffw_gating", "gate"), ("ffw_gating_2", "up"), ("ffw_linear", "down")),
    (
        ("pre_attention_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
        ("attention.query_norm", "self_attn.q_norm"),
        ("attention.key_norm", "self_attn.k_norm"),
    ),
    (Weight("final_normalization.scale", "model.norm.weight", "d -> d"),),
)
