"""Llama, Mistral, Qwen 3 and Gemma 3 of keras-hub, with the names of keras-hub 0.32. Heads are separate axes.

A leaf is the `path` of a variable, with dots in place of slashes. `load`, `merge` and `import_base` accept such a tree.
"""

from jaxadapt.keymaps.families import LAYER, KeyMap, Names, Weight, decoder_keymap, layer_norms


def _keymap(
    name: str,
    layer: str,
    attention: str,
    pattern: str,
    modules: Names,
    norms: tuple[tuple[str, str], ...],
    extra: tuple[Weight, ...],
) -> KeyMap:
    """Return the keymap of a model.

    Args:
        name: the model.
        layer: the prefix of a layer's names.
        attention: the name of the attention module.
        pattern: the pattern of the query, key and value kernels.
        modules: `(name, PyTorch's name)` of the feed-forward kernels.
        norms: `(name, PyTorch's name)` of the norms.
        extra: further entries.
    """
    entries = (
        Weight("token_embedding.embeddings", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(
            Weight(f"{layer}{attention}.{p}.kernel", f"{LAYER}self_attn.{p[0]}_proj.weight", pattern)
            for p in ("query", "key", "value")
        ),
        Weight(f"{layer}{attention}.attention_output.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *(Weight(f"{layer}{a}.kernel", f"{LAYER}mlp.{b}_proj.weight", "i o -> o i") for a, b in modules),
        *layer_norms(layer, norms),
        *extra,
    )
    return decoder_keymap(f"keras:{name}", entries, complete=True, needs=tuple(f"{layer}{a}.scale" for a, _ in norms))


def _llama(name: str, extra_norms: Names = ()) -> KeyMap:
    return _keymap(
        name,
        "transformer_layer_{l}.",
        "self_attention",
        "d n h -> (n h) d",
        ((f"feedforward_{a}_dense", b) for a, b in (("gate", "gate"), ("intermediate", "up"), ("output", "down"))),
        (
            ("self_attention_layernorm", "input_layernorm"),
            ("feedforward_layernorm", "post_attention_layernorm"),
            *extra_norms,
        ),
        (
            Weight("token_embedding.reverse_embeddings", "lm_head.weight", "d v -> v d"),
            Weight("sequence_output_layernorm.scale", "model.norm.weight", "d -> d"),
        ),
    )


LLAMA = _llama("llama")
QWEN3 = _llama("qwen3", ((f"self_attention.{p}_dense_layernorm", f"self_attn.{p[0]}_norm") for p in ("query", "key")))
GEMMA3 = _keymap(
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
