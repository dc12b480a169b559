"""Models of Tunix, the gemma package, keras-hub, EasyDeL and openpi.

Llama 3, Qwen 2, Qwen 3 and Qwen 3 MoE of Tunix (NNX) have the names of google-tunix 0.1.7. Heads are separate axes.

Gemma 1 to 4 and 3n of the gemma package (gm, Linen) and of Tunix have the names of gemma 4.0.1 and Tunix 0.1.7. k and v
are fused, and in gm gate and up, too. If a model has as many key heads as query heads, q, k and v are one leaf. In
Gemma 4 k may serve as v in layers with global attention. The last layers of its E2B and E4B reuse k and v of earlier
layers, but still have weights for them in JAX. These weights are missing in transformers' models, and may be in files.

Llama, Mistral, Qwen 3 and Gemma 3 of keras-hub have the names of keras-hub 0.32. Heads are separate axes. A leaf is the
`path` of a variable, with dots in place of slashes. `load`, `merge` and `import_base` accept such a tree.

EasyDeL (easydel 0.3.0, NNX) has Hugging Face's names, except that the scale of a norm is called kernel. "easydel:llama"
is for dense decoders with Llama's layer names: Mistral, Qwen 2 and 3, Gemma, EXAONE 4, SmolLM 3, Phi 3.

π0 and π0.5 of openpi are PaliGemma's Gemma and the action expert in one scanned stack of layers. The names in PyTorch
are those of openpi's own PyTorch model, with which LeRobot's agree. Leaves of the second expert end in "_1". All models
of openpi have fewer key heads than query heads, so that no leaf holds queries, keys and values together. The vision
tower, which openpi trains without LoRA, has no entries. π0-FAST is the first expert alone, under the same names in
LeRobot's PyTorch model. `tests/full/test_openpi_full.py` compares the keymap with openpi's own conversion and with
PEFT. It is not marked as proved: there is no specimen of openpi's PyTorch model, which needs a changed transformers.
"""

from collections.abc import Iterable

from jaxadapt.keymaps.families.entries import (
    EACH_QWEN3,
    FROM,
    INTO,
    Modules,
    biases,
    decoder_keymap,
    dense,
    embeddings,
)
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_HF = "model.layers.{l}."
_KEYS_VALUES, _QKV, _GATE_UP = ("k", "v"), ("q", "k", "v"), ("gate", "up")
Names = Iterable[tuple[str, str]]
"""Pairs of a module's name in JAX and in PyTorch."""


def _norms(layer: str, names: Names, axis: str = "d", leaf: str = "scale") -> tuple[Weight, ...]:
    return tuple(Weight(f"{layer}{a}.{leaf}", f"{_HF}{b}.weight", f"{axis} -> {axis}") for a, b in names)


# ---------------------------------------------------------------- tunix


_TUNIX = "layers.{l}."
_TUNIX_MLP = (
    *(Weight(f"{_TUNIX}mlp.{p}_proj.kernel", f"{_HF}mlp.{p}_proj.weight", "d f -> f d") for p in _GATE_UP),
    Weight(f"{_TUNIX}mlp.down_proj.kernel", f"{_HF}mlp.down_proj.weight", "f d -> d f"),
)
_TUNIX_ATTENTION = (
    Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
    *(
        Weight(f"{_TUNIX}attn.{p}_proj.w", f"{_HF}self_attn.{p}_proj.weight", f"d {n} h -> ({n} h) d")
        for p, n in (("q", "n"), ("k", "k"), ("v", "k"))
    ),
    Weight(f"{_TUNIX}attn.o_proj.w", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
)
_TUNIX_ENDS = (
    *_norms(_TUNIX, ((m, m) for m in ("input_layernorm", "post_attention_layernorm")), leaf="w"),
    Weight("final_norm.w", "model.norm.weight", "d -> d"),
    Weight("lm_head.w", "lm_head.weight", "d v -> v d"),
)
_TUNIX_BIASES = tuple(Weight(f"{_TUNIX}attn.{p}_bias", f"{_HF}self_attn.{p}_proj.bias", "o -> o") for p in _QKV)
_TUNIX_NORMS = _norms(_TUNIX, ((f"attn.{p}_norm", f"self_attn.{p}_norm") for p in ("q", "k")), "h", "w")
_TUNIX_EXPERTS = (
    Weight(f"{_TUNIX}mlp.router.kernel", f"{_HF}mlp.gate.weight", "d e -> e d", kind="parameter"),
    *(
        Weight(f"{_TUNIX}mlp.{p}_proj", f"{_HF}mlp.experts.gate_up_proj[f {half}]", "e d f -> e f d", kind="experts")
        for p, half in (("gate", "0/2"), ("up", "1/2"))
    ),
    Weight(f"{_TUNIX}mlp.down_proj", f"{_HF}mlp.experts.down_proj", "e f d -> e d f", kind="experts"),
)


def _tunix(
    name: str, extra: tuple[Weight, ...], mlp: Iterable[Weight] = _TUNIX_MLP, expert_modules: Modules = ()
) -> KeyMap:
    return decoder_keymap(
        f"tunix:{name}",
        (*_TUNIX_ATTENTION, *mlp, *_TUNIX_ENDS, *extra),
        complete=True,
        needs=(f"{_TUNIX}attn.q_proj.w", *(w.leaf for w in extra)),
        same=("d", "h"),
        expert_modules=expert_modules,
    )


LLAMA3 = _tunix("llama3", ())
QWEN2 = _tunix("qwen2", _TUNIX_BIASES)
QWEN3 = _tunix("qwen3", _TUNIX_NORMS)
QWEN3_MOE = _tunix("qwen3_moe", (*_TUNIX_NORMS, *_TUNIX_EXPERTS), mlp=(), expert_modules=EACH_QWEN3)

# ---------------------------------------------------------------- gemma, of the gemma package and of tunix


_GM = "layer_{l}."
_ATTENTION, _MLP = f"{_HF}self_attn.{{p}}_proj.weight", f"{_HF}mlp.{{p}}_proj.weight"


def _four_norms(post_attention: str = "post_attention_norm") -> tuple[tuple[str, str], ...]:
    """Return the names of the norms since Gemma 2, which has four around attention and feed-forward."""
    return (
        ("pre_attention_norm", "input_layernorm"),
        (post_attention, "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    )


_GEMMA3_NORMS = (*_four_norms(), ("attn._query_norm", "self_attn.q_norm"), ("attn._key_norm", "self_attn.k_norm"))


def _gemma(name: str, layer: str, norms: tuple[tuple[str, str], ...], weights: Iterable[Weight]) -> KeyMap:
    weights = tuple(weights)
    entries = (
        Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        Weight(f"{layer}attn.q_einsum.w", f"{_HF}self_attn.q_proj.weight", "n d h -> (n h) d"),
        Weight(f"{layer}attn.kv_einsum.w", _ATTENTION, "{p} k d h -> (k h) d", p=_KEYS_VALUES),
        Weight(f"{layer}attn.qkv_einsum.w", _ATTENTION, "{p} n d h -> (n h) d", p=_QKV),
        Weight(f"{layer}attn.attn_vec_einsum.w", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *weights,
        *_norms(layer, (pair for pair in norms if not pair[0].startswith("attn."))),
        *_norms(layer, (pair for pair in norms if pair[0].startswith("attn.")), "h"),
        Weight("final_norm.scale", "model.norm.weight", "d -> d"),
    )
    return decoder_keymap(
        name,
        entries,
        complete=True,
        needs=(*(f"{layer}{a}.scale" for a, _ in norms), *(w.leaf for w in weights if "skip" in w.leaf)),
        same=("d",),
    )


def _gm(
    name: str,
    norms: tuple[tuple[str, str], ...],
    gating: str = "f d",
    extra: tuple[Weight, ...] = (),
    mlp: str = f"{_GM}mlp.",
) -> KeyMap:
    gate_up = Weight(f"{mlp}gating_einsum", _MLP, f"{{p}} {gating} -> f d", p=_GATE_UP)
    return _gemma(
        f"gemma:{name}",
        _GM,
        norms,
        (gate_up, Weight(f"{mlp}linear", f"{_HF}mlp.down_proj.weight", "f d -> d f"), *extra),
    )


def _gemma4_entries(layer: str, norm: str, embedding: str) -> tuple[Weight, ...]:
    """Return the additional entries of Gemma 4; `embedding` is the name of the per-layer embedding."""
    return (
        Weight(f"{layer}attn.k_einsum.w", f"{_HF}self_attn.k_proj.weight", "k d h -> (k h) d"),
        Weight(f"{layer}attn.{norm}key_norm.scale", f"{_HF}self_attn.k_norm.weight", "h -> h"),
        Weight(f"{layer}skip_scale", f"{_HF}layer_scalar", "one -> one"),
        Weight(f"embedder.{embedding}", "model.embed_tokens_per_layer.weight", "v n p -> v (n p)", kind="embedding"),
        Weight("embedder.per_layer_model_projection.w", "model.per_layer_model_projection.weight", "d n p -> (n p) d"),
        Weight("embedder.per_layer_projection_norm.scale", "model.per_layer_projection_norm.weight", "p -> p"),
        Weight(f"{layer}per_layer_input_gate.w", f"{_HF}per_layer_input_gate.weight", "d p -> p d"),
        Weight(f"{layer}per_layer_projection.w", f"{_HF}per_layer_projection.weight", "p d -> d p"),
        Weight(f"{layer}post_per_layer_input_norm.scale", f"{_HF}post_per_layer_input_norm.weight", "d -> d"),
    )


def _gemma_experts(module: str, w: str) -> tuple[Weight, ...]:
    """Return the entries of a layer's experts; `w` is the suffix of leaves that are separate layers in gm."""
    return (
        Weight(f"{module}router_logits{w}", f"{_HF}router.proj.weight", "d e -> e d"),
        Weight(f"{module}router_scale", f"{_HF}router.scale", "d -> d"),
        Weight(f"{module}per_expert_scale", f"{_HF}router.per_expert_scale", "e -> e"),
        Weight(f"{module}gating_einsum{w}", f"{_HF}experts.gate_up_proj", "e p f d -> e (p f) d", kind="experts"),
        Weight(f"{module}linear{w}", f"{_HF}experts.down_proj", "e f d -> e d f", kind="experts"),
    )


# Gemma 2 2B stores its gate as (D, F), all others as (F, D).
GEMMA2_2B = _gm("gemma2-2b", _four_norms(), "d f")
GEMMA2 = _gm("gemma2", _four_norms())
GEMMA3 = _gm("gemma3", _GEMMA3_NORMS)
_GM4 = _gemma4_entries(_GM, "", "per_layer_embeddings")
GEMMA4 = _gm("gemma4", (*_four_norms(), ("attn.query_norm", "self_attn.q_norm")), extra=_GM4)
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
    extra=(*_GM4, *_gemma_experts(f"{_GM}mlp.", ".w")),
    mlp=f"{_GM}mlp2.",
)
_PER_LAYER = "embedder.per_layer_input"
GEMMA3N = _gm(
    "gemma3n",
    (
        *_four_norms(),
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
        Weight(f"{_GM}altup.modality_router.w", f"{_HF}altup.modality_router.weight", "d m -> m d"),
        Weight(f"{_GM}altup.correction_coefs", f"{_HF}altup.correction_coefs.weight", "m i -> i m"),
        Weight(f"{_GM}altup.prediction_coefs", f"{_HF}altup.prediction_coefs.weight", "m i j -> (i j) m"),
        Weight(f"{_GM}altup.correct_output_scale", f"{_HF}altup.correct_output_scale", "d -> d"),
        Weight(f"{_GM}laurel.linear_left.w", f"{_HF}laurel.linear_left.weight", "d r -> r d"),
        Weight(f"{_GM}laurel.linear_right.w", f"{_HF}laurel.linear_right.weight", "r d -> d r"),
        *(
            Weight(f"{_GM}per_layer_mapping.{name}.w", f"{_HF}{name}.weight", pattern)
            for name, pattern in (("per_layer_input_gate", "d p -> p d"), ("per_layer_projection", "p d -> d p"))
        ),
    ),
)


def _tunix_gemma(name: str, norms: tuple[tuple[str, str], ...], extra: tuple[Weight, ...] = ()) -> KeyMap:
    return _gemma(f"tunix:{name}", _TUNIX, norms, (*_TUNIX_MLP, *extra))


TUNIX_GEMMA = _tunix_gemma(
    "gemma", (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm"))
)
TUNIX_GEMMA2 = _tunix_gemma("gemma2", _four_norms("post_attn_norm"))
TUNIX_GEMMA3 = _tunix_gemma("gemma3", _GEMMA3_NORMS)
_SPARSE_NORMS = (
    ("dense_post_ffw_norm", "post_feedforward_layernorm_1"),
    ("moe_pre_ffw_norm", "pre_feedforward_layernorm_2"),
    ("moe_post_ffw_norm", "post_feedforward_layernorm_2"),
)
TUNIX_GEMMA4 = _tunix_gemma(
    "gemma4",
    (*_four_norms(), ("attn._query_norm", "self_attn.q_norm")),
    (
        *_gemma4_entries(_TUNIX, "_", "per_layer_input_embedding"),
        *_gemma_experts(f"{_TUNIX}moe.", ""),
        *_norms(_TUNIX, _SPARSE_NORMS),
    ),
)

# ---------------------------------------------------------------- keras-hub


def _keras(
    name: str, layer: str, attention: str, pattern: str, modules: Names, norms: Names, extra: tuple[Weight, ...]
) -> KeyMap:
    """Return the keymap of a model.

    Args:
        name: the model.
        layer: the prefix of a layer's names.
        attention: the name of the attention module.
        pattern: the pattern of the query, key and value kernels.
        modules: `(name, PyTorch's name)` of the feed-forward kernels.
        norms: `(name, PyTorch's name)` of the norms.
        extra: further entries.
    """
    norms = tuple(norms)
    entries = (
        Weight("token_embedding.embeddings", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(
            Weight(f"{layer}{attention}.{p}.kernel", f"{_HF}self_attn.{p[0]}_proj.weight", pattern)
            for p in ("query", "key", "value")
        ),
        Weight(f"{layer}{attention}.attention_output.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *(Weight(f"{layer}{a}.kernel", f"{_HF}mlp.{b}_proj.weight", "i o -> o i") for a, b in modules),
        *_norms(layer, norms),
        *extra,
    )
    return decoder_keymap(f"keras:{name}", entries, complete=True, needs=tuple(f"{layer}{a}.scale" for a, _ in norms))


def _keras_llama(name: str, extra_norms: Names = ()) -> KeyMap:
    return _keras(
        name,
        "transformer_layer_{l}.",
        "self_attention",
        "d n h -> (n h) d",
        ((f"feedforward_{a}_dense", b) for a, b in (("gate", "gate"), ("intermediate", "up"), ("output", "down"))),
        (
            ("self_attention_layernorm", "input_layernorm"),
            ("feedforward_layernorm", "post_attention_layernorm"),
            *extra_norms,
        ),
        (
            Weight("token_embedding.reverse_embeddings", "lm_head.weight", "d v -> v d"),
            Weight("sequence_output_layernorm.scale", "model.norm.weight", "d -> d"),
        ),
    )


KERAS_LLAMA = _keras_llama("llama")
KERAS_QWEN3 = _keras_llama(
    "qwen3", ((f"self_attention.{p}_dense_layernorm", f"self_attn.{p[0]}_norm") for p in ("query", "key"))
)
KERAS_GEMMA3 = _keras(
    "gemma3",
    "decoder_block_{l}.",
    "attention",
    "n d h -> (n h) d",
    (("ffw_gating", "gate"), ("ffw_gating_2", "up"), ("ffw_linear", "down")),
    (
        *_four_norms(),
        ("attention.query_norm", "self_attn.q_norm"),
        ("attention.key_norm", "self_attn.k_norm"),
    ),
    (Weight("final_normalization.scale", "model.norm.weight", "d -> d"),),
)

# ---------------------------------------------------------------- easydel


_EASYDEL_ATTENTION = tuple(f"{_HF}self_attn.{p}_proj" for p in ("q", "k", "v", "qkv", "o"))
_EASYDEL_OUT = (f"{_HF}self_attn.o_proj", f"{_HF}mlp.down_proj")
_EASYDEL_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    *("self_attn.q_norm", "self_attn.k_norm"),
)

EASYDEL_LLAMA = decoder_keymap(
    "easydel:llama",
    (
        *embeddings("model.embed_tokens"),
        *dense(
            *_EASYDEL_ATTENTION[:-1], *(f"{_HF}mlp.{p}_proj" for p in (*_GATE_UP, "gate_up")), bias=False, axes=FROM
        ),
        *dense(*_EASYDEL_OUT, bias=False, axes=INTO),
        *dense("lm_head", bias=False),
        *biases(_EASYDEL_ATTENTION),
        *_norms(_HF, ((name, name) for name in _EASYDEL_NORMS), leaf="kernel"),
        Weight("model.norm.kernel", "model.norm.weight", "d -> d"),
    ),
    complete=True,
    same=("m",),
    needs=("model.norm.kernel",),
)

# ---------------------------------------------------------------- openpi


_PI0 = "PaliGemma.llm."
_LANGUAGE_MODEL = "paligemma_with_expert.paligemma.model.language_model."


def _pi0_expert(end: str, model: str) -> tuple[Weight, ...]:
    """Return the entries of an expert, whose names end in `end` and start with `model` in PyTorch."""
    ours, layer = f"{_PI0}layers.{{l}}.", f"{model}layers.{{l}}."
    attention, torch = f"{ours}attn.", f"{layer}self_attn."
    return (
        Weight(f"{attention}q_einsum{end}.w", f"{torch}q_proj.weight", "n d h -> (n h) d"),
        Weight(f"{attention}kv_einsum{end}.w", f"{torch}{{p}}_proj.weight", "{p} k d h -> (k h) d", p=_KEYS_VALUES),
        Weight(f"{attention}attn_vec_einsum{end}.w", f"{torch}o_proj.weight", "n h d -> d (n h)"),
        Weight(f"{ours}mlp{end}.gating_einsum", f"{layer}mlp.{{p}}_proj.weight", "{p} d f -> f d", p=_GATE_UP),
        Weight(f"{ours}mlp{end}.linear", f"{layer}mlp.down_proj.weight", "f d -> d f"),
        Weight(f"{ours}pre_attention_norm{end}.scale", f"{layer}input_layernorm.weight", "d -> d"),
        Weight(f"{ours}pre_ffw_norm{end}.scale", f"{layer}post_attention_layernorm.weight", "d -> d"),
        Weight(f"{_PI0}final_norm{end}.scale", f"{model}norm.weight", "d -> d"),
    )


PI0 = KeyMap(
    "openpi:pi0",
    (
        Weight(
            f"{_PI0}embedder.input_embedding", f"{_LANGUAGE_MODEL}embed_tokens.weight", "v d -> v d", kind="embedding"
        ),
        *(w.scanned(0) for w in _pi0_expert("", _LANGUAGE_MODEL)),
        *(w.scanned(0) for w in _pi0_expert("_1", "paligemma_with_expert.gemma_expert.model.")),
    ),
    proved=False,
)
