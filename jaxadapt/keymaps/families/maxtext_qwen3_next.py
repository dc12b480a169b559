"""MaxText's Qwen3-Next and Qwen 3.5 (maxtext 0.2.5), unrolled, and stacked in blocks of four layers.

A block is three layers with a gated delta net, then one with attention. The names of the projections are transformers'.
The queries and the gates of the attention's outputs are one kernel, with both parts in each head. A layer's routed
experts are `routed_experts`, with two arrays for gate and up. The norms store PyTorch's weights: both libraries
multiply by 1 + w. A stacked Qwen3-Next has one leaf for the three delta nets of all blocks, with two stacked axes; a
stacked Qwen 3.5 has one for each layer of a block.

Unrolled, Qwen 3.5 has the leaves of Qwen3-Next, so the keymap must be given. For each key head, its `in_proj_qkvz` has
rows of transformers' `in_proj_qkv` and `in_proj_z`, and its `in_proj_ba` rows of `in_proj_b` and `in_proj_a`. Each of
these modules has an A of its own in PEFT, so the two leaves cannot be adapted. In Qwen 3.5's keymaps both have the key
of `in_proj_qkv`: an adapter of them is refused, and so is the conversion of a whole model.
"""

from jaxadapt.keymaps.families import EACH_QWEN3, LAYER, KeyMap, Weight, decoder_keymap, layer_norms, with_options

_LINEAR, _EXPERTS = f"{LAYER}linear_attn.", f"{LAYER}mlp.experts."


def _layer(ours: str, joined: bool, layers: tuple[int, int] = (1, 0), **sizes: int) -> tuple[Weight, ...]:
    """Return the entries of a layer with this prefix of its names; `joined` is True for Qwen 3.5's projections."""
    attention, net, mlp = f"{ours}attention.attention.", f"{ours}attention.", f"{ours}mlp."
    entries = (
        *layer_norms(ours, ((name, name) for name in ("input_layernorm", "post_attention_layernorm"))),
        Weight(f"{attention}query.kernel", f"{LAYER}self_attn.q_proj.weight", "d n h -> (n h) d"),
        Weight(f"{attention}key.kernel", f"{LAYER}self_attn.k_proj.weight", "d k h -> (k h) d"),
        Weight(f"{attention}value.kernel", f"{LAYER}self_attn.v_proj.weight", "d k h -> (k h) d"),
        Weight(f"{attention}out.kernel", f"{LAYER}self_attn.o_proj.weight", "i d -> d i"),
        *layer_norms(attention, (("query_norm", "self_attn.q_norm"), ("key_norm", "self_attn.k_norm")), "h"),
        *(
            Weight(f"{net}{p}.kernel", f"{_LINEAR}in_proj_qkv.weight", "i o -> o i", kind="other")
            if joined
            else Weight(f"{net}{p}.kernel", f"{_LINEAR}{p}.weight", "i o -> o i")
            for p in ("in_proj_qkvz", "in_proj_ba")
        ),
        Weight(f"{net}out_proj.kernel", f"{_LINEAR}out_proj.weight", "i o -> o i"),
        Weight(f"{net}conv1d.kernel", f"{_LINEAR}conv1d.weight", "w i o -> o i w", kind="other"),
        Weight(f"{net}A_log", f"{_LINEAR}A_log", "n -> n"),
        Weight(f"{net}dt_bias", f"{_LINEAR}dt_bias", "n -> n"),
        Weight(f"{net}norm.rms_norm.scale", f"{_LINEAR}norm.weight", "h -> h"),
        Weight(f"{mlp}routed_experts.gate.kernel", f"{LAYER}mlp.gate.weight", "d e -> e d", kind="parameter"),
        Weight(f"{mlp}routed_experts.wi_0", f"{_EXPERTS}gate_up_proj[f 0/2]", "e d f -> e f d", kind="experts"),
        Weight(f"{mlp}routed_experts.wi_1", f"{_EXPERTS}gate_up_proj[f 1/2]", "e d f -> e f d", kind="experts"),
        Weight(f"{mlp}routed_experts.wo", f"{_EXPERTS}down_proj", "e f d -> e d f", kind="experts"),
        *(
            Weight(f"{mlp}shared_expert.{a}.kernel", f"{LAYER}mlp.shared_expert.{b}_proj.weight", "i o -> o i")
            for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
        ),
        Weight(f"{mlp}shared_expert_gate.kernel", f"{LAYER}mlp.shared_expert_gate.weight", "d o -> o d"),
    )
    return with_options(entries, layers=layers, **sizes)


def _keymap(name: str, *layers: tuple[Weight, ...]) -> KeyMap:
    entries = tuple(w for layer in layers for w in layer)
    return decoder_keymap(
        f"maxtext:{name}",
        (
            Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
            Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
            Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
            *entries,
        ),
        complete=True,
        needs=tuple(w.leaf for w in layers[0] if w.key.endswith(("in_proj_qkvz.weight", "mlp.gate.weight"))),
        expert_modules=EACH_QWEN3,
    )


QWEN3_NEXT, QWEN3_5 = (
    _keymap(name, _layer("decoder.layers_{l}.", joined)) for name, joined in (("qwen3_next", False), ("qwen3_5", True))
)
QWEN3_NEXT_BLOCKS = _keymap(
    "qwen3_next-blocks",
    _layer("decoder.layers_{l}.local_layers_#.", False, (4, 0), place=3),
    _layer("decoder.layers_{l}.global_layer.", False, (4, 3)),
)
QWEN3_5_BLOCKS = _keymap(
    "qwen3_5-blocks", *(_layer(f"decoder.layers_{{l}}.layer_{at}.", True, (4, at)) for at in range(4))
)
