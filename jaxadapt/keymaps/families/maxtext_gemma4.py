"""MaxText's Gemma 4 (maxtext 0.2.5): 26B with experts and 31B, unrolled and stacked in blocks of six layers; E2B, E4B.

The norms store PyTorch's weight, not 1 + w as in MaxText's Gemma 2 and 3; the embedding includes the factor √d. In the
layers with global attention, k serves as v, and there are no weights for v. The router is an `nn.Linear`; its experts
are two arrays (expert, in, out). E2B and E4B, which MaxText does not stack, have embeddings for each layer. Their last
layers use the keys and values of earlier ones, and have no weights for them.

A stacked model has one leaf for the five local layers of all blocks, with two stacked axes, and one for the layer with
global attention. The layers of both sizes are whole blocks.
"""

from typing import Any

from jaxadapt.keymaps.families import LAYER, KeyMap, Weight, decoder_keymap, layer_norms, with_options

_PER_LAYER = "decoder.per_layer_embedder."
_GATED = (("wi_0", "gate", "d f -> f d"), ("wi_1", "up", "d f -> f d"), ("wo", "down", "f d -> d f"))


def _layer(ours: str, **options: Any) -> tuple[Weight, ...]:
    """Return the entries of a layer with this prefix of its names; `options` are those of each entry."""
    attention, block = f"{ours}self_attention.", f"{ours}mlp.moe_block."
    entries = (
        Weight(f"{attention}query.kernel", f"{LAYER}self_attn.q_proj.weight", "d n h -> (n h) d"),
        Weight(f"{attention}key.kernel", f"{LAYER}self_attn.k_proj.weight", "d k h -> (k h) d"),
        Weight(f"{attention}value.kernel", f"{LAYER}self_attn.v_proj.weight", "d k h -> (k h) d"),
        Weight(f"{attention}out.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *layer_norms(attention, (("query_norm", "self_attn.q_norm"), ("key_norm", "self_attn.k_norm")), "h"),
        *layer_norms(
            ours,
            (
                ("pre_self_attention_norm", "input_layernorm"),
                ("post_self_attention_norm", "post_attention_layernorm"),
                ("pre_ffw_norm", "pre_feedforward_layernorm"),
                ("post_ffw_norm", "post_feedforward_layernorm"),
                ("post_per_layer_input_norm", "post_per_layer_input_norm"),
                ("mlp.post_feedforward_layernorm_1", "post_feedforward_layernorm_1"),
                ("mlp.pre_feedforward_layernorm_2", "pre_feedforward_layernorm_2"),
                ("mlp.post_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
            ),
        ),
        *(
            Weight(f"{module}{a}.kernel", f"{LAYER}mlp.{b}_proj.weight", pattern)
            for module in (f"{ours}mlp.", f"{block}shared_experts.")
            for a, b, pattern in _GATED
        ),
        Weight(f"{ours}layer_scalar", f"{LAYER}layer_scalar", "one -> one"),
        Weight(f"{ours}per_layer_input_gate.kernel", f"{LAYER}per_layer_input_gate.weight", "d p -> p d"),
        Weight(f"{ours}per_layer_projection.kernel", f"{LAYER}per_layer_projection.weight", "p d -> d p"),
        Weight(f"{ours}mlp.pre_forward_scale_2", f"{LAYER}router.scale", "d -> d"),
        Weight(f"{block}MoeBlock_0.gate.kernel", f"{LAYER}router.proj.weight", "d e -> e d"),
        Weight(f"{block}MoeBlock_0.per_expert_scale", f"{LAYER}router.per_expert_scale", "e -> e"),
        *(
            Weight(f"{block}MoeBlock_0.{a}", f"{LAYER}experts.{b}", f"e {axes[0]} {axes[1]} -> {right}", kind="experts")
            for a, b, axes, right in (
                ("wi_0", "gate_up_proj[f 0/2]", "df", "e f d"),
                ("wi_1", "gate_up_proj[f 1/2]", "df", "e f d"),
                ("wo", "down_proj", "fd", "e d f"),
            )
        ),
    )
    return with_options(entries, **options)


def _keymap(name: str, layers: tuple[Weight, ...]) -> KeyMap:
    embedding = Weight(
        "token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding", scale=("d", 0.5)
    )
    return decoder_keymap(
        f"maxtext:{name}",
        (
            embedding,
            Weight(
                f"{_PER_LAYER}embed_tokens_per_layer",
                "model.embed_tokens_per_layer.weight",
                "v p -> v p",
                kind="embedding",
            ),
            Weight(
                f"{_PER_LAYER}per_layer_model_projection.kernel",
                "model.per_layer_model_projection.weight",
                "d p -> p d",
            ),
            Weight(f"{_PER_LAYER}per_layer_projection_norm.scale", "model.per_layer_projection_norm.weight", "p -> p"),
            Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
            Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
            *layers,
        ),
        complete=True,
        needs=tuple(w.leaf for w in layers if w.leaf.endswith("layer_scalar")),
    )


GEMMA4 = _keymap("gemma4", _layer("decoder.layers_{l}."))
GEMMA4_BLOCKS = _keymap(
    "gemma4-blocks",
    (
        *_layer("decoder.scanned_blocks_{l}.local_layers_#.", layers=(6, 0), place=5),
        *_layer("decoder.scanned_blocks_{l}.global_layer.", layers=(6, 5)),
    ),
)
