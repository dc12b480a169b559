"""MaxText's decoders (maxtext 0.2.5), unrolled; `KeyMap.scanned` gives the stacked forms for any `param_scan_axis`.

All models have the same layer names, but their weights differ. The queries of Llama and Mistral include the factor
1/√head_dim. With the RoPE "llama3.1", the features of each query and key head are interleaved pairs, where PyTorch has
first halves and second halves. Names are therefore not sufficient to recognize a Llama.

Gemma's norms store 1 + w, and its embeddings include the factor √d. A layer of MaxText's Gemma 2 is two PyTorch layers,
a local one and a global one, and its queries include the factor 1/√head_dim (also in the 27B, where PyTorch uses
another factor). A stacked Gemma 3 has blocks of six layers and a remainder. The layer numbers of the remainder depend
on the number of blocks, so each size has its own keymap.

In the mixtures of experts, gate and up of all experts are two arrays (expert, in, out). transformers 5 concatenates
them in one array; its GPT-OSS interleaves them, and stores (expert, in, out). In a stacked GPT-OSS, two layers are one
block. DeepSeek's layers with experts are numbered separately from the dense layers before them: three in DeepSeek V3,
one in Kimi K2.
"""

from collections.abc import Iterable

from jaxadapt.keymaps.families import EACH_DEEPSEEK, EACH_MIXTRAL, EACH_QWEN3, KeyMap, Modules, Weight, decoder_keymap

# ---------------------------------------------------------------- dense models


_OURS, _HF = "decoder.layers_{l}.", "model.layers.{l}."
_QUERY, _KEY = f"{_OURS}self_attention.query.kernel", f"{_OURS}self_attention.key.kernel"
_Q_PROJ, _K_PROJ = f"{_HF}self_attn.q_proj.weight", f"{_HF}self_attn.k_proj.weight"
_MLP_NAMES = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))

SHARED = (
    Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
    Weight(f"{_OURS}self_attention.value.kernel", f"{_HF}self_attn.v_proj.weight", "d k h -> (k h) d"),
    Weight(f"{_OURS}self_attention.out.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
    *(Weight(f"{_OURS}mlp.{a}.kernel", f"{_HF}mlp.{b}_proj.weight", "i o -> o i") for a, b in _MLP_NAMES),
    *(
        Weight(f"{_OURS}{a}_self_attention_layer_norm.scale", f"{_HF}{b}_layernorm.weight", "d -> d")
        for a, b in (("pre", "input"), ("post", "post_attention"))
    ),
    Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d"),
    Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
)


def make_keymap(
    name: str,
    extra: Iterable[Weight],
    needs: tuple[str, ...] = (),
    shared: Iterable[Weight] = SHARED,
    expert_modules: Modules = (),
    counts: tuple[tuple[str, int], ...] = (),
) -> KeyMap:
    """Return the keymap of a model: the shared entries, and the extra entries of the model."""
    return decoder_keymap(
        f"maxtext:{name}",
        (*shared, *extra),
        complete=True,
        needs=needs,
        expert_modules=expert_modules,
        counts=counts,
    )


LLAMA31 = make_keymap(
    "llama3.1",
    (
        Weight(_QUERY, _Q_PROJ, "d n (c p) -> (n p c) d", p=2, scale=("c p", -0.5)),
        Weight(_KEY, _K_PROJ, "d k (c p) -> (k p c) d", p=2),
    ),
)
QUERY_SCALED = (
    Weight(_QUERY, _Q_PROJ, "d n h -> (n h) d", scale=("h", -0.5)),
    Weight(_KEY, _K_PROJ, "d k h -> (k h) d"),
)
PLAIN = (Weight(_QUERY, _Q_PROJ, "d n h -> (n h) d"), Weight(_KEY, _K_PROJ, "d k h -> (k h) d"))
_BIASES = tuple(
    Weight(f"{_OURS}self_attention.{name}.bias", f"{_HF}self_attn.{name[0]}_proj.bias", "n h -> (n h)")
    for name in ("query", "key", "value")
)
NORMS = tuple(
    Weight(f"{_OURS}self_attention.{name}_norm.scale", f"{_HF}self_attn.{name[0]}_norm.weight", "h -> h")
    for name in ("query", "key")
)
LLAMA3, MISTRAL = (make_keymap(name, QUERY_SCALED) for name in ("llama3", "mistral"))
QWEN2 = make_keymap("qwen2", (*PLAIN, *_BIASES), needs=tuple(w.leaf for w in _BIASES))
QWEN3 = make_keymap("qwen3", (*PLAIN, *NORMS), needs=tuple(w.leaf for w in NORMS))

# ---------------------------------------------------------------- gemma


_TOP = (
    Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding", scale=("d", 0.5)),
    Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d", shift=1.0),
    Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
)


def _at(
    entries: Iterable[Weight], prefix: str = _OURS, layers: tuple[int, int] = (1, 0), torch: str = _HF
) -> tuple[Weight, ...]:
    """Return the entries of a layer with other prefixes of its names, or for some of PyTorch's layers."""
    return tuple(
        Weight(
            w.leaf.replace(_OURS, prefix),
            w.key.replace(_HF, torch),
            w.pattern,
            **dict(w.options, layers=(*layers, *w.scan)),
        )
        for w in entries
    )


def _layer(kind: str = "", scale: tuple[str, float] | None = None) -> tuple[Weight, ...]:
    attention, torch = f"{_OURS}self_attention{kind}.", f"{_HF}self_attn."
    return (
        Weight(f"{attention}query.kernel", f"{torch}q_proj.weight", "d n h -> (n h) d", scale=scale),
        *(
            Weight(f"{attention}{name}.kernel", f"{torch}{name[0]}_proj.weight", "d k h -> (k h) d")
            for name in ("key", "value")
        ),
        Weight(f"{attention}out.kernel", f"{torch}o_proj.weight", "n h d -> d (n h)"),
        *(Weight(f"{_OURS}mlp{kind}.{a}.kernel", f"{_HF}mlp.{b}_proj.weight", "i o -> o i") for a, b in _MLP_NAMES),
        *(
            Weight(f"{_OURS}{a}{kind}.scale", f"{_HF}{b}.weight", "d -> d", shift=1.0)
            for a, b in (
                ("pre_self_attention_norm", "input_layernorm"),
                ("post_self_attention_norm", "post_attention_layernorm"),
                ("pre_ffw_norm", "pre_feedforward_layernorm"),
                ("post_ffw_norm", "post_feedforward_layernorm"),
            )
        ),
    )


_GEMMA2_LAYERS = (
    *_at(_layer("_local", ("h", -0.5)), layers=(2, 0)),
    *_at(_layer("_global", ("h", -0.5)), layers=(2, 1)),
)
GEMMA2 = make_keymap("gemma2", _GEMMA2_LAYERS, needs=tuple(w.leaf for w in _GEMMA2_LAYERS if w.shift), shared=_TOP)
_GEMMA3_LAYER = (*_layer(), *(Weight(w.leaf, w.key, w.pattern, shift=1.0) for w in NORMS))
GEMMA3 = make_keymap("gemma3", _GEMMA3_LAYER, needs=tuple(w.leaf for w in _GEMMA3_LAYER if w.shift), shared=_TOP)


def _blocks(size: str, layers: int) -> KeyMap:
    """Return the keymap of a stacked Gemma 3: one layer for each position in a block of six, and the remainder."""
    count, remainder = divmod(layers, 6)
    blocks = [_at(_GEMMA3_LAYER, f"{_OURS}layers_{place}.", (6, place)) for place in range(6)]
    rest = [
        _at(_GEMMA3_LAYER, f"decoder.layers_remainder.layers_{place}.", torch=f"model.layers.{6 * count + place}.")
        for place in range(remainder)
    ]
    entries = [w for layer in (*blocks, *rest) for w in layer]
    return make_keymap(
        f"gemma3-{size}",
        entries,
        tuple(w.leaf for w in entries),
        shared=_TOP,
        counts=tuple((block[0].leaf, count) for block in blocks),
    )


GEMMA3_4B, GEMMA3_12B, GEMMA3_27B = _blocks("4b", 34), _blocks("12b", 48), _blocks("27b", 62)

# ---------------------------------------------------------------- mixtures of experts


def _experts(block: str, torch: str, wide: str, down: str, halves: tuple[str, str]) -> tuple[Weight, ...]:
    """Return the entries of a layer's experts.

    Args:
        block: the name of the module.
        torch: PyTorch's name of the module.
        wide: PyTorch's axes of the array of gate and up; those of GPT-OSS are (in, out).
        down: PyTorch's axes of the array of the down projection.
        halves: the parts of gate and up in PyTorch's array.
    """
    turned = wide == "e d f"
    experts = f"{_HF}{torch}.experts."
    return tuple(
        Weight(f"{_OURS}{block}.{ours}", f"{experts}{key}", pattern, kind="experts", fan_in_fan_out=turned)
        for ours, key, pattern in (
            ("wi_0", f"gate_up_proj[f {halves[0]}]", f"e d f -> {wide}"),
            ("wi_1", f"gate_up_proj[f {halves[1]}]", f"e d f -> {wide}"),
            ("wo", "down_proj", f"e f d -> {down}"),
        )
    )


def _router(block: str, torch: str) -> Weight:
    return Weight(f"{_OURS}{block}.gate.kernel", f"{_HF}{torch}.weight", "d e -> e d", kind="parameter")


_COMMON = tuple(w for w in SHARED if ".mlp." not in w.leaf)
_LAYER_NORMS = tuple(w for w in SHARED if "layer_norm" in w.leaf)
_OUTSIDE = tuple(w for w in SHARED if _OURS not in w.leaf)


def _usual(block: str) -> tuple[Weight, ...]:
    return (_router(block, "mlp.gate"), *_experts(block, "mlp", "e f d", "e d f", ("0/2", "1/2")))


_MIXTRAL, _QWEN3 = _usual("MoeBlock_0"), _usual("moe_block")
MIXTRAL = make_keymap(
    "mixtral",
    (*QUERY_SCALED, *_MIXTRAL),
    tuple(w.leaf for w in _MIXTRAL),
    shared=_COMMON,
    expert_modules=EACH_MIXTRAL,
)
QWEN3_MOE = make_keymap(
    "qwen3_moe",
    (*PLAIN, *NORMS, *_QWEN3),
    tuple(w.leaf for w in (*NORMS, *_QWEN3)),
    shared=_COMMON,
    expert_modules=EACH_QWEN3,
)

_PROJ = (("query", "q", "n"), ("key", "k", "k"), ("value", "v", "k"))


_GPT_OSS_ATTENTION = f"{_OURS}GptOssAttention."
_GPT_OSS_LAYER = (
    *(
        Weight(f"{_GPT_OSS_ATTENTION}{a}.kernel", f"{_HF}self_attn.{p}_proj.weight", f"d {n} h -> ({n} h) d")
        for a, p, n in _PROJ
    ),
    *(
        Weight(f"{_GPT_OSS_ATTENTION}{a}.bias", f"{_HF}self_attn.{p}_proj.bias", f"{n} h -> ({n} h)")
        for a, p, n in _PROJ
    ),
    Weight(f"{_GPT_OSS_ATTENTION}out.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
    Weight(f"{_GPT_OSS_ATTENTION}out.bias", f"{_HF}self_attn.o_proj.bias", "d -> d"),
    Weight(f"{_GPT_OSS_ATTENTION}sinks", f"{_HF}self_attn.sinks", "n -> n"),
    _router("GptOssMlp", "mlp.router"),
    Weight(f"{_OURS}GptOssMlp.gate.bias", f"{_HF}mlp.router.bias", "e -> e"),
    *_experts("GptOssMlp", "mlp", "e d f", "e f d", ("0::2", "1::2")),
    *(
        Weight(f"{_OURS}GptOssMlp.{a}_bias", f"{_HF}mlp.experts.{b}", "e f -> e f", kind="other")
        for a, b in (
            ("wi_0", "gate_up_proj_bias[f 0::2]"),
            ("wi_1", "gate_up_proj_bias[f 1::2]"),
            ("wo", "down_proj_bias"),
        )
    ),
    *_LAYER_NORMS,
)


def _top(name: str, entries: tuple[Weight, ...]) -> KeyMap:
    return make_keymap(name, entries, needs=tuple(w.leaf for w in entries), shared=_OUTSIDE)


GPT_OSS = _top("gpt_oss", _GPT_OSS_LAYER)
GPT_OSS_BLOCKS = _top(
    "gpt_oss-blocks", tuple(w for place in (0, 1) for w in _at(_GPT_OSS_LAYER, f"{_OURS}layers_{place}.", (2, place)))
)

# DeepSeek V3: dense layers first; the layers with experts are numbered separately.


def _deepseek_layer(mlp: str, torch_mlp: str) -> tuple[Weight, ...]:
    attention, torch = f"{_OURS}self_attention.", f"{_HF}self_attn."
    return (
        *_LAYER_NORMS,
        *(
            Weight(f"{attention}{a}.kernel", f"{torch}{b}.weight", pattern)
            for a, b, pattern in (
                ("wq_a", "q_a_proj", "d r -> r d"),
                ("wq_b", "q_b_proj", "r n h -> (n h) r"),
                ("wkv_a", "kv_a_proj_with_mqa", "d r -> r d"),
                ("wkv_b", "kv_b_proj", "r n h -> (n h) r"),
                ("out", "o_proj", "n h d -> d (n h)"),
            )
        ),
        *(Weight(f"{attention}{a}_norm.scale", f"{torch}{a}_a_layernorm.weight", "d -> d") for a in ("q", "kv")),
        *(Weight(f"{_OURS}{mlp}.{a}.kernel", f"{_HF}{torch_mlp}.{b}_proj.weight", "i o -> o i") for a, b in _MLP_NAMES),
    )


def _deepseek(name: str, dense: int) -> KeyMap:
    """Return the keymap of a model with this number of dense layers before those with experts."""
    block = "DeepSeekMoeBlock_0.MoeBlock_0"
    bias = f"{_HF}mlp.gate.e_score_correction_bias"  # not a parameter, so it is always stacked on axis 0
    sparse_layer = (
        *_deepseek_layer("DeepSeekMoeBlock_0.shared_experts", "mlp.shared_experts"),
        *_usual(block),
        Weight(f"{_OURS}{block}.gate.bias", bias, "e -> e", layers=(1, 0, 0)),
    )
    first = _at(_deepseek_layer("mlp", "mlp"), "decoder.dense_layers_{l}.")
    later = _at(sparse_layer, "decoder.moe_layers_{l}.", (1, dense))
    return make_keymap(
        name,
        (*first, *later),
        tuple(w.leaf for w in later if not w.scan),
        shared=_OUTSIDE,
        expert_modules=EACH_DEEPSEEK,
        counts=((first[0].leaf, dense),),
    )


DEEPSEEK_V3 = _deepseek("deepseek_v3", 3)
KIMI_K2 = _deepseek("kimi_k2", 1)
