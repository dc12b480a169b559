"""MaxText's Qwen3-Next (maxtext 0.2.5), unrolled: three layers with a gated delta net, then one with attention.

The names of the projections are transformers'. The queries and the gates of the attention's outputs are one kernel,
with both parts in each head. A layer's routed experts are `routed_experts`, with two arrays for gate and up. The norms
store PyTorch's weights: both libraries multiply by 1 + w.

MaxText's Qwen 3.5 has the same leaves. For each key head, its `in_proj_qkvz` has rows of transformers' `in_proj_qkv`
and `in_proj_z`, and its `in_proj_ba` rows of `in_proj_b` and `in_proj_a`. Each of these modules has an A of its own in
PEFT, so the two leaves cannot be adapted. In `QWEN3_5` both have the key of `in_proj_qkv`: an adapter of them is
refused, and so is the conversion of a whole model. A model is recognized as neither of the two: the keymap must be
given.

MaxText stacks the model in blocks of four layers: one leaf for the delta nets of all blocks, with two stacked axes. No
entry can have two such axes, so these models need `scan_layers=false`.
"""

from jaxadapt.keymaps.families import EACH_QWEN3, LAYER, KeyMap, Weight, decoder_keymap, layer_norms

_OURS = "decoder.layers_{l}."
_ATTENTION, _NET, _MLP = f"{_OURS}attention.attention.", f"{_OURS}attention.", f"{_OURS}mlp."
_LINEAR, _EXPERTS = f"{LAYER}linear_attn.", f"{LAYER}mlp.experts."


def _keymap(name: str, projections: tuple[Weight, ...], proved: bool) -> KeyMap:
    return decoder_keymap(
        f"maxtext:{name}",
        (
            Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
            Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
            Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
            *layer_norms(_OURS, ((name, name) for name in ("input_layernorm", "post_attention_layernorm"))),
            Weight(f"{_ATTENTION}query.kernel", f"{LAYER}self_attn.q_proj.weight", "d n h -> (n h) d"),
            Weight(f"{_ATTENTION}key.kernel", f"{LAYER}self_attn.k_proj.weight", "d k h -> (k h) d"),
            Weight(f"{_ATTENTION}value.kernel", f"{LAYER}self_attn.v_proj.weight", "d k h -> (k h) d"),
            Weight(f"{_ATTENTION}out.kernel", f"{LAYER}self_attn.o_proj.weight", "i d -> d i"),
            *layer_norms(_ATTENTION, (("query_norm", "self_attn.q_norm"), ("key_norm", "self_attn.k_norm")), "h"),
            *projections,
            Weight(f"{_NET}out_proj.kernel", f"{_LINEAR}out_proj.weight", "i o -> o i"),
            Weight(f"{_NET}conv1d.kernel", f"{_LINEAR}conv1d.weight", "w i o -> o i w", kind="other"),
            Weight(f"{_NET}A_log", f"{_LINEAR}A_log", "n -> n"),
            Weight(f"{_NET}dt_bias", f"{_LINEAR}dt_bias", "n -> n"),
            Weight(f"{_NET}norm.rms_norm.scale", f"{_LINEAR}norm.weight", "h -> h"),
            Weight(f"{_MLP}routed_experts.gate.kernel", f"{LAYER}mlp.gate.weight", "d e -> e d", kind="parameter"),
            Weight(f"{_MLP}routed_experts.wi_0", f"{_EXPERTS}gate_up_proj[f 0/2]", "e d f -> e f d", kind="experts"),
            Weight(f"{_MLP}routed_experts.wi_1", f"{_EXPERTS}gate_up_proj[f 1/2]", "e d f -> e f d", kind="experts"),
            Weight(f"{_MLP}routed_experts.wo", f"{_EXPERTS}down_proj", "e f d -> e d f", kind="experts"),
            *(
                Weight(f"{_MLP}shared_expert.{a}.kernel", f"{LAYER}mlp.shared_expert.{b}_proj.weight", "i o -> o i")
                for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
            ),
            Weight(f"{_MLP}shared_expert_gate.kernel", f"{LAYER}mlp.shared_expert_gate.weight", "d o -> o d"),
        ),
        complete=True,
        needs=(f"{_NET}in_proj_qkvz.kernel", f"{_MLP}routed_experts.wi_0"),
        proved=proved,
        expert_modules=EACH_QWEN3,
    )


QWEN3_NEXT = _keymap(
    "qwen3_next",
    tuple(Weight(f"{_NET}{p}.kernel", f"{_LINEAR}{p}.weight", "i o -> o i") for p in ("in_proj_qkvz", "in_proj_ba")),
    proved=True,
)
QWEN3_5 = _keymap(
    "qwen3_5",
    (
        Weight(f"{_NET}in_proj_qkvz.kernel", f"{_LINEAR}in_proj_qkv.weight", "i o -> o i", kind="other"),
        Weight(f"{_NET}in_proj_ba.kernel", f"{_LINEAR}in_proj_qkv.weight", "i o -> o i", kind="other"),
    ),
    proved=False,
)
