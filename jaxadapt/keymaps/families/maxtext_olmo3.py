"""MaxText's OLMo 3 (maxtext 0.2.5), unrolled. (A stacked model has blocks of four layers, and no keymap.)

A layer has norms only behind its attention and its feed-forward. The norms of queries and keys see all heads at once.
The queries are PyTorch's: the layer multiplies them by 1/√head_dim.
"""

from jaxadapt.keymaps.families import LAYER, Weight, decoder_keymap, layer_norms

_OURS = "decoder.layers_{l}."
_NORMS = (
    ("attention.query_norm", "self_attn.q_norm"),
    ("attention.key_norm", "self_attn.k_norm"),
    ("post_self_attention_layer_norm", "post_attention_layernorm"),
    ("post_mlp_layer_norm", "post_feedforward_layernorm"),
)

OLMO3 = decoder_keymap(
    "maxtext:olmo3",
    (
        Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
        Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
        Weight(f"{_OURS}attention.query.kernel", f"{LAYER}self_attn.q_proj.weight", "d n h -> (n h) d"),
        Weight(f"{_OURS}attention.key.kernel", f"{LAYER}self_attn.k_proj.weight", "d k h -> (k h) d"),
        Weight(f"{_OURS}attention.value.kernel", f"{LAYER}self_attn.v_proj.weight", "d k h -> (k h) d"),
        Weight(f"{_OURS}attention.out.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *layer_norms(_OURS, _NORMS),
        *(
            Weight(f"{_OURS}mlp.{a}.kernel", f"{LAYER}mlp.{b}_proj.weight", "i o -> o i")
            for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
        ),
    ),
    complete=True,
    needs=tuple(f"{_OURS}{a}.scale" for a, _ in _NORMS),
)
