"""Gemma 1 to 4 and 3n of the gemma package (gm, Linen) and Tunix (NNX), with the names of gemma 4.0.1 and Tunix 0.1.7.

k and v are fused, and in gm gate and up, too. If a model has as many key heads as query heads, q, k and v are one leaf.
In Gemma 4 k may serve as v in layers with global attention. The last layers of its E2B and E4B reuse k and v of earlier
layers, but still have weights for them in JAX. These weights are missing in transformers' models, and may be in files.
"""

from jaxadapt.keymaps.families import LAYER, KeyMap, Weight, decoder_keymap, layer_norms

_Names = tuple[tuple[str, str], ...]
_GM, _TUNIX = "layer_{l}.", "layers.{l}."
_ATTENTION, _MLP = f"{LAYER}self_attn.{{p}}_proj.weight", f"{LAYER}mlp.{{p}}_proj.weight"


def _gemma2(post_attention: str = "post_attention_norm") -> _Names:
    """Return the names of the norms since Gemma 2, which has four around attention and feed-forward."""
    return (
        ("pre_attention_norm", "input_layernorm"),
        (post_attention, "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )


_GEMMA1 = (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm"))
_GEMMA3 = (*_gemma2(), ("attn._query_norm", "self_attn.q_norm"), ("attn._key_norm", "self_attn.k_norm"))


def _keymap(name: str, layer: str, norms: _Names, weights: tuple[Weight, ...]) -> KeyMap:
    return decoder_keymap(
        name,
        (
            Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
            Weight(f"{layer}attn.q_einsum.w", f"{LAYER}self_attn.q_proj.weight", "n d h -> (n h) d"),
            Weight(f"{layer}attn.kv_einsum.w", _ATTENTION, "{p} k d h -> (k h) d", p=("k", "v")),
            Weight(f"{layer}attn.qkv_einsum.w", _ATTENTION, "{p} n d h -> (n h) d", p=("q", "k", "v")),
            Weight(f"{layer}attn.attn_vec_einsum.w", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
            *weights,
            *layer_norms(layer, (pair for pair in norms if not pair[0].startswith("attn."))),
            *layer_norms(layer, (pair for pair in norms if pair[0].startswith("attn.")), "h"),
            Weight("final_norm.scale", "model.norm.weight", "d -> d"),
        ),
        complete=True,
        needs=(*(f"{layer}{a}.scale" for a, _ in norms), *(w.leaf for w in weights if "skip" in w.leaf)),
        same=("d",),
    )


def _gm(
    name: str,
    norms: _Names,
    gating: str = "f d",
    extra: tuple[Weight, ...] = (),
    mlp: str = f"{_GM}mlp.",
) -> KeyMap:
    return _keymap(
        f"gemma:{name}",
        _GM,
        norms,
        (
            Weight(f"{mlp}gating_einsum", _MLP, f"{{p}} {gating} -> f d", p=("gate", "up")),
            Weight(f"{mlp}linear", f"{LAYER}mlp.down_proj.weight", "f d -> d f"),
            *extra,
        ),
    )


def _gemma4_entries(layer: str, norm: str, embedding: str) -> tuple[Weight, ...]:
    """Return the additional entries of Gemma 4; `embedding` is the name of the per-layer embedding."""
    return (
        Weight(f"{layer}attn.k_einsum.w", f"{LAYER}self_attn.k_proj.weight", "k d h -> (k h) d"),
        Weight(f"{layer}attn.{norm}key_norm.scale", f"{LAYER}self_attn.k_norm.weight", "h -> h"),
        Weight(f"{layer}skip_scale", f"{LAYER}layer_scalar", "one -> one"),
        Weight(f"embedder.{embedding}", "model.embed_tokens_per_layer.weight", "v n p -> v (n p)", kind="embedding"),
        Weight("embedder.per_layer_model_projection.w", "model.per_layer_model_projection.weight", "d n p -> (n p) d"),
        Weight("embedder.per_layer_projection_norm.scale", "model.per_layer_projection_norm.weight", "p -> p"),
        Weight(f"{layer}per_layer_input_gate.w", f"{LAYER}per_layer_input_gate.weight", "d p -> p d"),
        Weight(f"{layer}per_layer_projection.w", f"{LAYER}per_layer_projection.weight", "p d -> d p"),
        Weight(f"{layer}post_per_layer_input_norm.scale", f"{LAYER}post_per_layer_input_norm.weight", "d -> d"),
    )


def _experts(module: str, w: str) -> tuple[Weight, ...]:
    """Return the entries of a layer's experts; `w` is the suffix of leaves that are separate layers in gm."""
    return (
        Weight(f"{module}router_logits{w}", f"{LAYER}router.proj.weight", "d e -> e d"),
        Weight(f"{module}router_scale", f"{LAYER}router.scale", "d -> d"),
        Weight(f"{module}per_expert_scale", f"{LAYER}router.per_expert_scale", "e -> e"),
        Weight(f"{module}gating_einsum{w}", f"{LAYER}experts.gate_up_proj", "e p f d -> e (p f) d", kind="experts"),
        Weight(f"{module}linear{w}", f"{LAYER}experts.down_proj", "e f d -> e d f", kind="experts"),
    )


# Gemma 1 and Gemma 2 2B store their gate as (D, F), all others as (F, D).
GEMMA = _gm("gemma", _GEMMA1, "d f")
GEMMA2_2B = _gm("gemma2-2b", _gemma2(), "d f")
GEMMA2 = _gm("gemma2", _gemma2())
GEMMA3 = _gm("gemma3", _GEMMA3)
_GM4 = _gemma4_entries(_GM, "", "per_layer_embeddings")
GEMMA4 = _gm("gemma4", (*_gemma2(), ("attn.query_norm", "self_attn.q_norm")), extra=_GM4)
# In the model with experts, "mlp" are the experts, and "mlp2" is the feed-forward layer of every token.
GEMMA4_MOE = _gm(
    "gemma4-moe",
    (
        ("pre_attention_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("pre_ffw2_norm", "pre_feedforward_layernorm"),
        ("post_ffw2_norm", "post_feedforward_layernorm_1"),
        ("pre_ffw_norm", "pre_feedforward_layernorm_2"),
        ("post_ffw1_norm", "post_feedforward_layernorm_2"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
        ("attn.query_norm", "self_attn.q_norm"),
    ),
    extra=(*_GM4, *_experts(f"{_GM}mlp.", ".w")),
    mlp=f"{_GM}mlp2.",
)
_PER_LAYER = "embedder.per_layer_input"
GEMMA3N = _gm(
    "gemma3n",
    (
        *_gemma2(),
        ("attn.query_norm", "self_attn.q_norm"),
        ("attn.key_norm", "self_attn.k_norm"),
        ("post_laurel_norm", "laurel.post_laurel_norm"),
        ("altup.router_norm_layer", "altup.router_norm"),
        ("per_layer_mapping.post_per_layer_input_norm", "post_per_layer_input_norm"),
    ),
    extra=(
        Weight(f"{_PER_LAYER}_embedding", "model.embed_tokens_per_layer.weight", "v n p -> v (n p)", kind="embedding"),
        Weight(f"{_PER_LAYER}_projection.w", "model.per_layer_model_projection.weight", "d n p -> (n p) d"),
        Weight("embedder.per_layer_projection_norm.scale", "model.per_layer_projection_norm.weight", "p -> p"),
        *(
            Weight(f"altup_{ours}_{{i}}.altup_{ours}_{{i}}", f"model.altup_{ours}s.{{i}}.weight", "c o -> o c")
            for ours in ("projection", "unembed_projection")
        ),
        Weight(f"{_GM}altup.modality_router.w", f"{LAYER}altup.modality_router.weight", "d m -> m d"),
        Weight(f"{_GM}altup.correction_coefs", f"{LAYER}altup.correction_coefs.weight", "m i -> i m"),
        Weight(f"{_GM}altup.prediction_coefs", f"{LAYER}altup.prediction_coefs.weight", "m i j -> (i j) m"),
        Weight(f"{_GM}altup.correct_output_scale", f"{LAYER}altup.correct_output_scale", "d -> d"),
        Weight(f"{_GM}laurel.linear_left.w", f"{LAYER}laurel.linear_left.weight", "d r -> r d"),
        Weight(f"{_GM}laurel.linear_right.w", f"{LAYER}laurel.linear_right.weight", "r d -> d r"),
        *(
            Weight(f"{_GM}per_layer_mapping.{name}.w", f"{LAYER}{name}.weight", pattern)
            for name, pattern in (("per_layer_input_gate", "d p -> p d"), ("per_layer_projection", "p d -> d p"))
        ),
    ),
)


_TUNIX_MLP = (
    *(Weight(f"{_TUNIX}mlp.{p}_proj.kernel", f"{LAYER}mlp.{p}_proj.weight", "d f -> f d") for p in ("gate", "up")),
    Weight(f"{_TUNIX}mlp.down_proj.kernel", f"{LAYER}mlp.down_proj.weight", "f d -> d f"),
)


def _tunix(name: str, norms: _Names, extra: tuple[Weight, ...] = ()) -> KeyMap:
    return _keymap(f"tunix:{name}", _TUNIX, norms, (*_TUNIX_MLP, *extra))


TUNIX_GEMMA = _tunix("gemma", _GEMMA1)
TUNIX_GEMMA2 = _tunix("gemma2", _gemma2("post_attn_norm"))
TUNIX_GEMMA3 = _tunix("gemma3", _GEMMA3)
_TUNIX_MIXED = (
    ("dense_post_ffw_norm", "post_feedforward_layernorm_1"),
    ("moe_pre_ffw_norm", "pre_feedforward_layernorm_2"),
    ("moe_post_ffw_norm", "post_feedforward_layernorm_2"),
)
TUNIX_GEMMA4 = _tunix(
    "gemma4",
    (*_gemma2(), ("attn._query_norm", "self_attn.q_norm")),
    (
        *_gemma4_entries(_TUNIX, "_", "per_layer_input_embedding"),
        *_experts(f"{_TUNIX}moe.", ""),
        *layer_norms(_TUNIX, _TUNIX_MIXED),
    ),
)
