"""Gemma 1 to 4 and 3n of the gemma package (gm, Linen) and Tunix (NNX), with the names of gemma 4.0.1 and Tunix 0.1.7.

k and v are fused, and in gm gate and up, too. If a model has as many key heads as query heads, q, k and v are one leaf.
In Gemma 4 k may serve as v in layers with global attention. The last layers of its E2B and E4B reuse k and v of earlier
layers, but still have weights for them in JAX. These weights are missing in transformers' models, and may be in files.
"""

from collections.abc import Iterable

from jaxadapt.keymaps.families.entries import decoder_keymap
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_HF = "model.layers.{l}."
_ATTENTION, _MLP = f"{_HF}self_attn.{{p}}_proj.weight", f"{_HF}mlp.{{p}}_proj.weight"
_Names = tuple[tuple[str, str], ...]
_GEMMA1: _Names = (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm"))


def _gemma2(post_attention: str) -> _Names:
    """Return the names of the norms since Gemma 2, which has four around attention and feed-forward."""
    return (
        ("pre_attention_norm", "input_layernorm"),
        (post_attention, "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )


_GEMMA3: _Names = (
    *_gemma2("post_attention_norm"),
    ("attn._query_norm", "self_attn.q_norm"),
    ("attn._key_norm", "self_attn.k_norm"),
)


def _gemma4(norm: str) -> _Names:
    return (*_gemma2("post_attention_norm"), (f"attn.{norm}query_norm", "self_attn.q_norm"))


def _keymap(name: str, layer: str, norms: _Names, mlp: Iterable[Weight], extra: Iterable[str] = ()) -> KeyMap:
    entries = (
        Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight(f"{layer}attn.q_einsum.w", f"{_HF}self_attn.q_proj.weight", "n d h -> (n h) d"),
        Weight(f"{layer}attn.kv_einsum.w", _ATTENTION, "{p} k d h -> (k h) d", p=("k", "v")),
        Weight(f"{layer}attn.qkv_einsum.w", _ATTENTION, "{p} n d h -> (n h) d", p=("q", "k", "v")),
        Weight(f"{layer}attn.attn_vec_einsum.w", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *mlp,
        *(Weight(f"{layer}{a}.scale", f"{_HF}{b}.weight", "d -> d") for a, b in norms if not a.startswith("attn.")),
        *(Weight(f"{layer}{a}.scale", f"{_HF}{b}.weight", "h -> h") for a, b in norms if a.startswith("attn.")),
        Weight("final_norm.scale", "model.norm.weight", "d -> d"),
    )
    return decoder_keymap(
        name,
        entries,
        complete=True,
        needs=(*(f"{layer}{a}.scale" for a, _ in norms), *extra),
        same=("d",),
    )


def _gm(name: str, norms: _Names, gating: str, extra: tuple[Weight, ...] = (), mlp_name: str = "mlp") -> KeyMap:
    module = f"layer_{{l}}.{mlp_name}."
    mlp = (
        Weight(f"{module}gating_einsum", _MLP, f"{{p}} {gating} -> f d", p=("gate", "up")),
        Weight(f"{module}linear", f"{_HF}mlp.down_proj.weight", "f d -> d f"),
    )
    return _keymap(f"gemma:{name}", "layer_{l}.", norms, (*mlp, *extra), [w.leaf for w in extra if "skip" in w.leaf])


def _gemma4_entries(layer: str, norm: str, embedding: str) -> tuple[Weight, ...]:
    """Return the additional entries of Gemma 4; `embedding` is the name of the per-layer embedding."""
    gate, back = (f"{name}.weight" for name in ("per_layer_input_gate", "per_layer_projection"))
    return (
        Weight(f"{layer}attn.k_einsum.w", f"{_HF}self_attn.k_proj.weight", "k d h -> (k h) d"),
        Weight(f"{layer}attn.{norm}key_norm.scale", f"{_HF}self_attn.k_norm.weight", "h -> h"),
        Weight(f"{layer}skip_scale", f"{_HF}layer_scalar", "one -> one"),
        Weight(f"embedder.{embedding}", "model.embed_tokens_per_layer.weight", "v n p -> v (n p)", kind="embedding"),
        Weight("embedder.per_layer_model_projection.w", "model.per_layer_model_projection.weight", "d n p -> (n p) d"),
        Weight("embedder.per_layer_projection_norm.scale", "model.per_layer_projection_norm.weight", "p -> p"),
        Weight(f"{layer}per_layer_input_gate.w", f"{_HF}{gate}", "d p -> p d"),
        Weight(f"{layer}per_layer_projection.w", f"{_HF}{back}", "p d -> d p"),
        Weight(f"{layer}post_per_layer_input_norm.scale", f"{_HF}post_per_layer_input_norm.weight", "d -> d"),
    )


def _experts(module: str, w: str) -> tuple[Weight, ...]:
    """Return the entries of a layer's experts; `w` is the suffix of leaves that are separate layers in gm."""
    proj, scale, each = (f"{_HF}router.{name}" for name in ("proj.weight", "scale", "per_expert_scale"))
    return (
        Weight(f"{module}router_logits{w}", proj, "d e -> e d"),
        Weight(f"{module}router_scale", scale, "d -> d"),
        Weight(f"{module}per_expert_scale", each, "e -> e"),
        Weight(f"{module}gating_einsum{w}", f"{_HF}experts.gate_up_proj", "e p f d -> e (p f) d", kind="experts"),
        Weight(f"{module}linear{w}", f"{_HF}experts.down_proj", "e f d -> e d f", kind="experts"),
    )


# Gemma 2 2B stores its gate as (D, F), all others as (F, D).
GEMMA2_2B = _gm("gemma2-2b", _gemma2("post_attention_norm"), "d f")
GEMMA2 = _gm("gemma2", _gemma2("post_attention_norm"), "f d")
GEMMA3 = _gm("gemma3", _GEMMA3, "f d")
_GM4 = _gemma4_entries("layer_{l}.", "", "per_layer_embeddings")
GEMMA4 = _gm("gemma4", _gemma4(""), "f d", _GM4)
# In the model with experts, "mlp" are the experts, and "mlp2" is the feed-forward layer of every token.
_MIXED: _Names = (
    ("pre_attention_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("pre_ffw2_norm", "pre_feedforward_layernorm"),
    ("post_ffw2_norm", "post_feedforward_layernorm_1"),
    ("pre_ffw_norm", "pre_feedforward_layernorm_2"),
    ("post_ffw1_norm", "post_feedforward_layernorm_2"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("attn.query_norm", "self_attn.q_norm"),
)
GEMMA4_MOE = _gm("gemma4-moe", _MIXED, "f d", (*_GM4, *_experts("layer_{l}.mlp.", ".w")), "mlp2")


_EMBEDDING = "embedder.per_layer_input"
_LAUREL, _ALTUP, _PER_LAYER = "layer_{l}.laurel.", "layer_{l}.altup.", "layer_{l}.per_layer_mapping."
_3N: _Names = (
    *_gemma2("post_attention_norm"),
    ("attn.query_norm", "self_attn.q_norm"),
    ("attn.key_norm", "self_attn.k_norm"),
    ("post_laurel_norm", "laurel.post_laurel_norm"),
    ("altup.router_norm_layer", "altup.router_norm"),
    ("per_layer_mapping.post_per_layer_input_norm", "post_per_layer_input_norm"),
)
GEMMA3N = _gm(
    "gemma3n",
    _3N,
    "f d",
    (
        Weight(f"{_EMBEDDING}_embedding", "model.embed_tokens_per_layer.weight", "v n p -> v (n p)", kind="embedding"),
        Weight(f"{_EMBEDDING}_projection.w", "model.per_layer_model_projection.weight", "d n p -> (n p) d"),
        Weight("embedder.per_layer_projection_norm.scale", "model.per_layer_projection_norm.weight", "p -> p"),
        *(
            Weight(f"altup_{ours}_{{i}}.altup_{ours}_{{i}}", f"model.altup_{ours}s.{{i}}.weight", "c o -> o c")
            for ours in ("projection", "unembed_projection")
        ),
        Weight(f"{_ALTUP}modality_router.w", f"{_HF}altup.modality_router.weight", "d m -> m d"),
        Weight(f"{_ALTUP}correction_coefs", f"{_HF}altup.correction_coefs.weight", "m i -> i m"),
        Weight(f"{_ALTUP}prediction_coefs", f"{_HF}altup.prediction_coefs.weight", "m i j -> (i j) m"),
        Weight(f"{_ALTUP}correct_output_scale", f"{_HF}altup.correct_output_scale", "d -> d"),
        Weight(f"{_LAUREL}linear_left.w", f"{_HF}laurel.linear_left.weight", "d r -> r d"),
        Weight(f"{_LAUREL}linear_right.w", f"{_HF}laurel.linear_right.weight", "r d -> d r"),
        Weight(f"{_PER_LAYER}per_layer_input_gate.w", f"{_HF}per_layer_input_gate.weight", "d p -> p d"),
        Weight(f"{_PER_LAYER}per_layer_projection.w", f"{_HF}per_layer_projection.weight", "p d -> d p"),
    ),
)


def _tunix(name: str, norms: _Names, extra: tuple[Weight, ...] = ()) -> KeyMap:
    module = "layers.{l}.mlp."
    mlp = (
        *(Weight(f"{module}{p}_proj.kernel", f"{_HF}mlp.{p}_proj.weight", "d f -> f d") for p in ("gate", "up")),
        Weight(f"{module}down_proj.kernel", f"{_HF}mlp.down_proj.weight", "f d -> d f"),
    )
    return _keymap(f"tunix:{name}", "layers.{l}.", norms, (*mlp, *extra), [w.leaf for w in extra if "skip" in w.leaf])


TUNIX_GEMMA = _tunix("gemma", _GEMMA1)
TUNIX_GEMMA2 = _tunix("gemma2", _gemma2("post_attn_norm"))
TUNIX_GEMMA3 = _tunix("gemma3", _GEMMA3)
_TUNIX_MIXED = tuple(
    Weight(f"layers.{{l}}.{a}.scale", f"{_HF}{b}.weight", "d -> d")
    for a, b in (
        ("dense_post_ffw_norm", "post_feedforward_layernorm_1"),
        ("moe_pre_ffw_norm", "pre_feedforward_layernorm_2"),
        ("moe_post_ffw_norm", "post_feedforward_layernorm_2"),
    )
)
_TUNIX4 = (
    *_gemma4_entries("layers.{l}.", "_", "per_layer_input_embedding"),
    *_experts("layers.{l}.moe.", ""),
    *_TUNIX_MIXED,
)
TUNIX_GEMMA4 = _tunix("gemma4", _gemma4("_"), _TUNIX4)
