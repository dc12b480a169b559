"""MaxText's Llama 4 (maxtext 0.2.5): Scout, with experts in each layer, and Maverick, in every second; stacked too.

The queries are PyTorch's: the factor 1/√head_dim is in the layer, not in the weights, other than in MaxText's Llama 2
and 3, and the pairs of the RoPE are in transformers' order. transformers stores the experts as (expert, in, out), gate
and up concatenated. As in "llama4", PEFT sees their A on the outputs. A stacked model has blocks of four layers.
"""

from typing import Any

from jaxadapt.keymaps.families import LAYER, KeyMap, Weight, decoder_keymap, layer_norms, with_options

_BLOCK = "Llama4MoEBlock_0."
_GATED = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))


def _layer(ours: str, **options: Any) -> tuple[Weight, ...]:
    """Return the entries of a layer with this prefix of its names; `options` are those of each entry."""
    attention, experts = f"{ours}self_attention.", f"{LAYER}feed_forward.experts."
    norms = (("pre_self_attention_layer_norm", "input"), ("post_self_attention_layer_norm", "post_attention"))
    entries = (
        *layer_norms(ours, ((a, f"{b}_layernorm") for a, b in norms)),
        Weight(f"{attention}query.kernel", f"{LAYER}self_attn.q_proj.weight", "d n h -> (n h) d"),
        Weight(f"{attention}key.kernel", f"{LAYER}self_attn.k_proj.weight", "d k h -> (k h) d"),
        Weight(f"{attention}value.kernel", f"{LAYER}self_attn.v_proj.weight", "d k h -> (k h) d"),
        Weight(f"{attention}out.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *(
            Weight(f"{ours}{a}{name}.kernel", f"{LAYER}feed_forward.{b}{torch}_proj.weight", "i o -> o i")
            for a, b in (("mlp.", ""), (f"{_BLOCK}shared_experts.", "shared_expert."))
            for name, torch in _GATED
        ),
        Weight(
            f"{ours}{_BLOCK}MoeBlock_0.gate.kernel",
            f"{LAYER}feed_forward.router.weight",
            "d e -> e d",
            kind="parameter",
        ),
        *(
            Weight(f"{ours}{_BLOCK}MoeBlock_0.{name}", f"{experts}{torch}", f"{axes} -> {axes}", kind="experts")
            for name, torch, axes in (
                ("wi_0", "gate_up_proj[f 0/2]", "e d f"),
                ("wi_1", "gate_up_proj[f 1/2]", "e d f"),
                ("wo", "down_proj", "e f d"),
            )
        ),
    )
    return with_options(entries, **options)


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
        needs=(next(w.leaf for w in reversed(layers) if w.leaf.endswith(".wi_0")),),  # the first layers may be dense
    )


LLAMA4 = _keymap("llama4", _layer("decoder.layers_{l}."))
LLAMA4_BLOCKS = _keymap(
    "llama4-blocks",
    tuple(w for place in range(4) for w in _layer(f"decoder.layers_{{l}}.layers_{place}.", layers=(4, place))),
)
