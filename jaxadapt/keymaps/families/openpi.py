"""π0 and π0.5 of openpi: PaliGemma's Gemma and the action expert in one scanned stack of layers.

The names in PyTorch are those of openpi's own PyTorch model, with which LeRobot's agree. Leaves of the second expert
end in "_1". All models of openpi have fewer key heads than query heads, so that no leaf holds queries, keys and values
together. The vision tower, which openpi trains without LoRA, has no entries. π0-FAST is the first expert alone, under
the same names in LeRobot's PyTorch model.

`tests/full/test_openpi_full.py` compares it with openpi's own conversion and with PEFT. It is not marked as proved:
there is no specimen of openpi's PyTorch model, which needs a changed transformers.
"""

from jaxadapt.keymaps.families import KeyMap, Weight

_PI0 = "PaliGemma.llm."
_LANGUAGE_MODEL = "paligemma_with_expert.paligemma.model.language_model."


def _expert(end: str, model: str) -> tuple[Weight, ...]:
    """Return the entries of an expert, whose names end in `end` and start with `model` in PyTorch."""
    ours, layer = f"{_PI0}layers.{{l}}.", f"{model}layers.{{l}}."
    attention, torch = f"{ours}attn.", f"{layer}self_attn."
    return (
        Weight(f"{attention}q_einsum{end}.w", f"{torch}q_proj.weight", "n d h -> (n h) d"),
        Weight(f"{attention}kv_einsum{end}.w", f"{torch}{{p}}_proj.weight", "{p} k d h -> (k h) d", p=("k", "v")),
        Weight(f"{attention}attn_vec_einsum{end}.w", f"{torch}o_proj.weight", "n h d -> d (n h)"),
        Weight(f"{ours}mlp{end}.gating_einsum", f"{layer}mlp.{{p}}_proj.weight", "{p} d f -> f d", p=("gate", "up")),
        Weight(f"{ours}mlp{end}.linear", f"{layer}mlp.down_proj.weight", "f d -> d f"),
        Weight(f"{ours}pre_attention_norm{end}.scale", f"{layer}input_layernorm.weight", "d -> d"),
        Weight(f"{ours}pre_ffw_norm{end}.scale", f"{layer}post_attention_layernorm.weight", "d -> d"),
        Weight(f"{_PI0}final_norm{end}.scale", f"{model}norm.weight", "d -> d"),
    )


PI0 = KeyMap(
    "openpi:pi0",
    (
        Weight(
            f"{_PI0}embedder.input_embedding", f"{_LANGUAGE_MODEL}embed_tokens.weight", "v d -> v d", kind="embedding"
        ),
        *(w.scanned(0) for w in _expert("", _LANGUAGE_MODEL)),
        *(w.scanned(0) for w in _expert("_1", "paligemma_with_expert.gemma_expert.model.")),
    ),
    proved=False,
)
