"""MaxText's DeepSeek V2 Lite, deepseek2-16b (maxtext 0.2.5); `KeyMap.scanned` gives the stacked forms.

Other than in DeepSeek V3, the queries have one projection and the router has no bias; transformers' router is an
`nn.Linear`. The layers with experts are numbered separately from the one dense layer before them. DeepSeek V2 with 236B
has the names and the one dense layer of Kimi K2.
"""

from typing import Any

from jaxadapt.keymaps.families import LAYER, Weight, decoder_keymap, layer_norms, single_expert_names, with_options

_BLOCK = "DeepSeekMoeBlock_0."
_GATED = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
_DENSE, _SPARSE = "decoder.dense_layers_{l}.", "decoder.moe_layers_{l}."


def _layer(ours: str, mlp: tuple[Weight, ...], **options: Any) -> tuple[Weight, ...]:
    """Return the entries of a layer with this prefix of its names; `options` are those of each entry."""
    attention, torch = f"{ours}self_attention.", f"{LAYER}self_attn."
    norms = (("pre_self_attention_layer_norm", "input"), ("post_self_attention_layer_norm", "post_attention"))
    entries = (
        *layer_norms(ours, ((a, f"{b}_layernorm") for a, b in norms)),
        *layer_norms(attention, (("kv_norm", "self_attn.kv_a_layernorm"),), "r"),
        Weight(f"{attention}query.kernel", f"{torch}q_proj.weight", "d n h -> (n h) d"),
        Weight(f"{attention}wkv_a.kernel", f"{torch}kv_a_proj_with_mqa.weight", "d r -> r d"),
        Weight(f"{attention}wkv_b.kernel", f"{torch}kv_b_proj.weight", "r n h -> (n h) r"),
        Weight(f"{attention}out.kernel", f"{torch}o_proj.weight", "n h d -> d (n h)"),
        *mlp,
    )
    return with_options(entries, **options)


def _gated(module: str, torch: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"{module}{a}.kernel", f"{LAYER}{torch}{b}_proj.weight", "i o -> o i") for a, b in _GATED)


_EXPERTS = (
    *_gated(f"{_SPARSE}{_BLOCK}shared_experts.", "mlp.shared_experts."),
    Weight(f"{_SPARSE}{_BLOCK}MoeBlock_0.gate.kernel", f"{LAYER}mlp.gate.weight", "d e -> e d"),
    *(
        Weight(f"{_SPARSE}{_BLOCK}MoeBlock_0.{a}", f"{LAYER}mlp.experts.{b}", pattern, kind="experts")
        for a, b, pattern in (
            ("wi_0", "gate_up_proj[f 0/2]", "e d f -> e f d"),
            ("wi_1", "gate_up_proj[f 1/2]", "e d f -> e f d"),
            ("wo", "down_proj", "e f d -> e d f"),
        )
    ),
)
_FIRST, _LATER = _layer(_DENSE, _gated(f"{_DENSE}mlp.", "mlp.")), _layer(_SPARSE, _EXPERTS, layers=(1, 1))

DEEPSEEK2 = decoder_keymap(
    "maxtext:deepseek2",
    (
        Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
        Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
        *_FIRST,
        *_LATER,
    ),
    complete=True,
    needs=tuple(w.leaf for w in _LATER),
    counts=((_FIRST[0].leaf, 1),),
    expert_modules=single_expert_names("mlp", ("gate_proj", "up_proj"), "down_proj"),
)
