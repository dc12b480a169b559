"""MaxText's decoders (maxtext 0.2.5), unrolled; `KeyMap.scanned` gives the stacked forms for any `param_scan_axis`.

All models have the same layer names, but their weights differ. The queries of Llama and Mistral include the factor
1/√head_dim. With the RoPE "llama3.1", the features of each query and key head are interleaved pairs, where PyTorch has
first halves and second halves. Names are therefore not sufficient to recognize a Llama.
"""

from collections.abc import Iterable

from jaxadapt.keymaps.families.llama import decoder_keymap
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_OURS, _HF = "decoder.layers_{l}.", "model.layers.{l}."
_QUERY, _KEY = f"{_OURS}self_attention.query.kernel", f"{_OURS}self_attention.key.kernel"
_Q_PROJ, _K_PROJ = f"{_HF}self_attn.q_proj.weight", f"{_HF}self_attn.k_proj.weight"

SHARED = (
    Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
    Weight(f"{_OURS}self_attention.value.kernel", f"{_HF}self_attn.v_proj.weight", "d k h -> (k h) d"),
    Weight(f"{_OURS}self_attention.out.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
    *(
        Weight(f"{_OURS}mlp.{a}.kernel", f"{_HF}mlp.{b}_proj.weight", "i o -> o i")
        for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
    ),
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
    expert_modules: tuple[tuple[str, tuple[str, ...]], ...] = (),
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
LLAMA3 = make_keymap("llama3", QUERY_SCALED)
QWEN2 = make_keymap("qwen2", (*PLAIN, *_BIASES), needs=tuple(w.leaf for w in _BIASES))
QWEN3 = make_keymap("qwen3", (*PLAIN, *NORMS), needs=tuple(w.leaf for w in NORMS))
