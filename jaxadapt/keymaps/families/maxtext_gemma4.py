"""MaxText's Gemma 4 (maxtext 0.2.5), unrolled: 26B with experts, and 31B.

The norms store PyTorch's weight, not 1 + w as in MaxText's Gemma 2 and 3; the embedding includes the factor √d. In the
layers with global attention, k serves as v, and there are no weights for v. The router is an `nn.Linear`; its experts
are two arrays (expert, in, out). E2B and E4B have further leaves, so this keymap does not match them.

MaxText stacks the models in blocks of six layers: one leaf for the five local layers of all blocks, with two stacked
axes. No entry can have two such axes, so these models need `scan_layers=false`.
"""

from jaxadapt.keymaps.families import LAYER, Weight, decoder_keymap, layer_norms

_OURS = "decoder.layers_{l}."
_ATTENTION, _BLOCK = f"{_OURS}self_attention.", f"{_OURS}mlp.moe_block."
_GATED = (("wi_0", "gate", "d f -> f d"), ("wi_1", "up", "d f -> f d"), ("wo", "down", "f d -> d f"))

GEMMA4 = decoder_keymap(
    "maxtext:gemma4",
    (
        Weight(
            "token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding", scale=("d", 0.5)
        ),
        Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
        Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
        Weight(f"{_ATTENTION}query.kernel", f"{LAYER}self_attn.q_proj.weight", "d n h -> (n h) d"),
        Weight(f"{_ATTENTION}key.kernel", f"{LAYER}self_attn.k_proj.weight", "d k h -> (k h) d"),
        Weight(f"{_ATTENTION}value.kernel", f"{LAYER}self_attn.v_proj.weight", "d k h -> (k h) d"),
        Weight(f"{_ATTENTION}out.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *layer_norms(_ATTENTION, (("query_norm", "self_attn.q_norm"), ("key_norm", "self_attn.k_norm")), "h"),
        *layer_norms(
            _OURS,
            (
                ("pre_self_attention_norm", "input_layernorm"),
                ("post_self_attention_norm", "post_attention_layernorm"),
                ("pre_ffw_norm", "pre_feedforward_layernorm"),
                ("post_ffw_norm", "post_feedforward_layernorm"),
                ("mlp.post_feedforward_layernorm_1", "post_feedforward_layernorm_1"),
                ("mlp.pre_feedforward_layernorm_2", "pre_feedforward_layernorm_2"),
                ("mlp.post_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
            ),
        ),
        *(
            Weight(f"{module}{a}.kernel", f"{LAYER}mlp.{b}_proj.weight", pattern)
            for module in (f"{_OURS}mlp.", f"{_BLOCK}shared_experts.")
            for a, b, pattern in _GATED
        ),
        Weight(f"{_OURS}layer_scalar", f"{LAYER}layer_scalar", "one -> one"),
        Weight(f"{_OURS}mlp.pre_forward_scale_2", f"{LAYER}router.scale", "d -> d"),
        Weight(f"{_BLOCK}MoeBlock_0.gate.kernel", f"{LAYER}router.proj.weight", "d e -> e d"),
        Weight(f"{_BLOCK}MoeBlock_0.per_expert_scale", f"{LAYER}router.per_expert_scale", "e -> e"),
        *(
            Weight(
                f"{_BLOCK}MoeBlock_0.{a}", f"{LAYER}experts.{b}", f"e {axes[0]} {axes[1]} -> {right}", kind="experts"
            )
            for a, b, axes, right in (
                ("wi_0", "gate_up_proj[f 0/2]", "df", "e f d"),
                ("wi_1", "gate_up_proj[f 1/2]", "df", "e f d"),
                ("wo", "down_proj", "fd", "e d f"),
            )
        ),
    ),
    complete=True,
    needs=(f"{_OURS}layer_scalar",),
)
