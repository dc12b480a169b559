"""Gemma 1, 2 and 3 of keras-hub, with the names of keras-hub 0.32. Heads are the first axis of the attention kernels.

Gemma 2 to 4 have norms after the attention and the feed-forward layer. The norm before the feed-forward layer has
another name in PyTorch's Gemma 1. Gemma 3 also has norms of queries and keys, and its keymap needs them.

Gemma 4's `layer_scalar` has no axis, PyTorch's has one, so it has no entry: adapters are saved and loaded, but whole
models cannot be exported or imported.
"""

from jaxadapt.keymaps.families import LAYER, KeyMap, Names, Weight, decoder_keymap, layer_norms

_BLOCK = "decoder_block_{l}."
_FFW = (("ffw_gating", "gate"), ("ffw_gating_2", "up"), ("ffw_linear", "down"))


def _keymap(name: str, norms: Names, extra: tuple[Weight, ...] = (), complete: bool = True) -> KeyMap:
    norms = tuple(norms)
    entries = (
        Weight("token_embedding.embeddings", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(
            Weight(f"{_BLOCK}attention.{p}.kernel", f"{LAYER}self_attn.{p[0]}_proj.weight", "n d h -> (n h) d")
            for p in ("query", "key", "value")
        ),
        Weight(f"{_BLOCK}attention.attention_output.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *(Weight(f"{_BLOCK}{a}.kernel", f"{LAYER}mlp.{b}_proj.weight", "i o -> o i") for a, b in _FFW),
        *layer_norms(_BLOCK, norms),
        Weight("final_normalization.scale", "model.norm.weight", "d -> d"),
        *extra,
    )
    return decoder_keymap(
        f"keras:{name}", entries, complete=complete, needs=tuple(f"{_BLOCK}{a}.scale" for a, _ in norms)
    )


_BOTH_SIDES = (
    ("pre_attention_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("pre_ffw_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
GEMMA = _keymap("gemma", (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm")))
GEMMA2 = _keymap("gemma2", _BOTH_SIDES)
_HEAD_NORMS = (("attention.query_norm", "self_attn.q_norm"), ("attention.key_norm", "self_attn.k_norm"))
GEMMA3 = _keymap("gemma3", (*_BOTH_SIDES, *_HEAD_NORMS))

_PER_LAYER = (("per_layer_input_gate", "per_layer_input_gate"), ("per_layer_up_proj", "per_layer_projection"))
_MIXED = (
    ("post_ffw_norm_dense", "post_feedforward_layernorm_1"),
    ("pre_ffw_norm_moe", "pre_feedforward_layernorm_2"),
    ("post_ffw_norm_moe_path", "post_feedforward_layernorm_2"),
    ("post_per_layer_input_norm", "post_per_layer_input_norm"),
)
_BANK = f"{_BLOCK}moe_expert_bank."
GEMMA4 = _keymap(
    "gemma4",
    (*_BOTH_SIDES, *_HEAD_NORMS),
    (
        Weight(
            "per_layer_token_embedding.embeddings",
            "model.embed_tokens_per_layer.weight",
            "v p -> v p",
            kind="embedding",
        ),
        Weight("per_layer_model_projection.kernel", "model.per_layer_model_projection.weight", "i o -> o i"),
        Weight("per_layer_projection_norm.scale", "model.per_layer_projection_norm.weight", "p -> p"),
        *(Weight(f"{_BLOCK}{a}.kernel", f"{LAYER}{b}.weight", "i o -> o i") for a, b in _PER_LAYER),
        *layer_norms(_BLOCK, _MIXED),
        Weight(f"{_BLOCK}moe_router.proj.kernel", f"{LAYER}router.proj.weight", "d e -> e d"),
        Weight(f"{_BLOCK}moe_router.per_dim_scale", f"{LAYER}router.scale", "d -> d"),
        Weight(f"{_BANK}per_expert_scale", f"{LAYER}router.per_expert_scale", "e -> e"),
        Weight(f"{_BANK}gate_proj", f"{LAYER}experts.gate_up_proj[f 0/2]", "e d f -> e f d", kind="experts"),
        Weight(f"{_BANK}up_proj", f"{LAYER}experts.gate_up_proj[f 1/2]", "e d f -> e f d", kind="experts"),
        Weight(f"{_BANK}down_proj", f"{LAYER}experts.down_proj", "e f d -> e d f", kind="experts"),
    ),
    complete=False,
)
