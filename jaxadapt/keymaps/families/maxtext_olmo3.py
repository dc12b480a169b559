"""MaxText's OLMo 3 (maxtext 0.2.5), unrolled, and stacked in blocks of four layers.

A layer has norms only behind its attention and its feed-forward. The norms of queries and keys see all heads at once.
The queries are PyTorch's: the layer multiplies them by 1/√head_dim.
"""

from jaxadapt.keymaps.families import LAYER, KeyMap, Weight, decoder_keymap, layer_norms, with_options

_NORMS = (
    ("attention.query_norm", "self_attn.q_norm"),
    ("attention.key_norm", "self_attn.k_norm"),
    ("post_self_attention_layer_norm", "post_attention_layernorm"),
    ("post_mlp_layer_norm", "post_feedforward_layernorm"),
)


def _layer(ours: str, layers: tuple[int, int] = (1, 0)) -> tuple[Weight, ...]:
    """Return the entries of a layer with this prefix of its names."""
    entries = (
        Weight(f"{ours}attention.query.kernel", f"{LAYER}self_attn.q_proj.weight", "d n h -> (n h) d"),
        Weight(f"{ours}attention.key.kernel", f"{LAYER}self_attn.k_proj.weight", "d k h -> (k h) d"),
        Weight(f"{ours}attention.value.kernel", f"{LAYER}self_attn.v_proj.weight", "d k h -> (k h) d"),
        Weight(f"{ours}attention.out.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *layer_norms(ours, _NORMS),
        *(
            Weight(f"{ours}mlp.{a}.kernel", f"{LAYER}mlp.{b}_proj.weight", "i o -> o i")
            for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
        ),
    )
    return with_options(entries, layers=layers)


def _keymap(name: str, layers: tuple[Weight, ...]) -> KeyMap:
    return decoder_keymap(
        f"maxtext:{name}",
        (
            Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
            Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
            Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
            *layers,
        ),
        complete=True,
        needs=tuple(w.leaf for w in layers if w.kind == "vector"),
    )


OLMO3 = _keymap("olmo3", _layer("decoder.layers_{l}."))
OLMO3_BLOCKS = _keymap(
    "olmo3-blocks", tuple(w for at in range(4) for w in _layer(f"decoder.layers_{{l}}.layers_{at}.", (4, at)))
)
