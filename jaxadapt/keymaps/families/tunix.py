"""Llama 3, Qwen 2, Qwen 3 and Qwen 3 MoE of Tunix (NNX, names of google-tunix 0.1.7); heads are separate axes."""

from jaxadapt.keymaps.families import EACH_QWEN3, LAYER, KeyMap, Modules, Weight, decoder_keymap, layer_norms

_OURS = "layers.{l}."
_MLP = (
    *(Weight(f"{_OURS}mlp.{p}_proj.kernel", f"{LAYER}mlp.{p}_proj.weight", "d f -> f d") for p in ("gate", "up")),
    Weight(f"{_OURS}mlp.down_proj.kernel", f"{LAYER}mlp.down_proj.weight", "f d -> d f"),
)
_ATTENTION = (
    Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
    *(
        Weight(f"{_OURS}attn.{p}_proj.w", f"{LAYER}self_attn.{p}_proj.weight", f"d {n} h -> ({n} h) d")
        for p, n in (("q", "n"), ("k", "k"), ("v", "k"))
    ),
    Weight(f"{_OURS}attn.o_proj.w", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
)
_ENDS = (
    *layer_norms(_OURS, ((m, m) for m in ("input_layernorm", "post_attention_layernorm")), leaf="w"),
    Weight("final_norm.w", "model.norm.weight", "d -> d"),
    Weight("lm_head.w", "lm_head.weight", "d v -> v d"),
)
_BIASES = tuple(Weight(f"{_OURS}attn.{p}_bias", f"{LAYER}self_attn.{p}_proj.bias", "o -> o") for p in ("q", "k", "v"))
_NORMS = layer_norms(_OURS, ((f"attn.{p}_norm", f"self_attn.{p}_norm") for p in ("q", "k")), "h", "w")
_EXPERTS = (
    Weight(f"{_OURS}mlp.router.kernel", f"{LAYER}mlp.gate.weight", "d e -> e d", kind="parameter"),
    *(
        Weight(f"{_OURS}mlp.{p}_proj", f"{LAYER}mlp.experts.gate_up_proj[f {half}]", "e d f -> e f d", kind="experts")
        for p, half in (("gate", "0/2"), ("up", "1/2"))
    ),
    Weight(f"{_OURS}mlp.down_proj", f"{LAYER}mlp.experts.down_proj", "e f d -> e d f", kind="experts"),
)


def _keymap(
    name: str, extra: tuple[Weight, ...], mlp: tuple[Weight, ...] = _MLP, expert_modules: Modules = ()
) -> KeyMap:
    return decoder_keymap(
        f"tunix:{name}",
        (*_ATTENTION, *mlp, *_ENDS, *extra),
        complete=True,
        needs=(f"{_OURS}attn.q_proj.w", *(w.leaf for w in extra)),
        same=("d", "h"),
        expert_modules=expert_modules,
    )


LLAMA3 = _keymap("llama3", ())
QWEN2 = _keymap("qwen2", _BIASES)
QWEN3 = _keymap("qwen3", _NORMS)
QWEN3_MOE = _keymap("qwen3_moe", (*_NORMS, *_EXPERTS), mlp=(), expert_modules=EACH_QWEN3)
