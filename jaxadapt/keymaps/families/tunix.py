"""Llama 3, Qwen 2, Qwen 3 and Qwen 3 MoE of Tunix (NNX, names of google-tunix 0.1.7); heads are separate axes."""

from collections.abc import Iterable

from jaxadapt.keymaps.families.entries import EACH_QWEN3, Modules, decoder_keymap
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_OURS, _HF = "layers.{l}.", "model.layers.{l}."

_SHARED = (
    Weight("embedder.input_embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
    *(
        Weight(f"{_OURS}attn.{p}_proj.w", f"{_HF}self_attn.{p}_proj.weight", f"d {n} h -> ({n} h) d")
        for p, n in (("q", "n"), ("k", "k"), ("v", "k"))
    ),
    Weight(f"{_OURS}attn.o_proj.w", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)"),
    *(Weight(f"{_OURS}mlp.{p}_proj.kernel", f"{_HF}mlp.{p}_proj.weight", "d f -> f d") for p in ("gate", "up")),
    Weight(f"{_OURS}mlp.down_proj.kernel", f"{_HF}mlp.down_proj.weight", "f d -> d f"),
    *(Weight(f"{_OURS}{m}.w", f"{_HF}{m}.weight", "d -> d") for m in ("input_layernorm", "post_attention_layernorm")),
    Weight("final_norm.w", "model.norm.weight", "d -> d"),
    Weight("lm_head.w", "lm_head.weight", "d v -> v d"),
)
_BIASES = tuple(Weight(f"{_OURS}attn.{p}_bias", f"{_HF}self_attn.{p}_proj.bias", "o -> o") for p in ("q", "k", "v"))
_NORMS = tuple(Weight(f"{_OURS}attn.{p}_norm.w", f"{_HF}self_attn.{p}_norm.weight", "h -> h") for p in ("q", "k"))


def _keymap(name: str, extra: Iterable[Weight], expert_modules: Modules = ()) -> KeyMap:
    extra = tuple(extra)
    # Experts replace the feed-forward kernels in every layer.
    shared = (w for w in _SHARED if not expert_modules or not w.leaf.endswith("_proj.kernel"))
    return decoder_keymap(
        f"tunix:{name}",
        (*shared, *extra),
        complete=True,
        needs=(f"{_OURS}attn.q_proj.w", *(w.leaf for w in extra)),
        same=("d", "h"),
        expert_modules=expert_modules,
    )


LLAMA3 = _keymap("llama3", ())
QWEN2 = _keymap("qwen2", _BIASES)
QWEN3 = _keymap("qwen3", _NORMS)

_EXPERTS = (
    Weight(f"{_OURS}mlp.router.kernel", f"{_HF}mlp.gate.weight", "d e -> e d", kind="parameter"),
    *(
        Weight(f"{_OURS}mlp.{p}_proj", f"{_HF}mlp.experts.gate_up_proj[f {half}]", "e d f -> e f d", kind="experts")
        for p, half in (("gate", "0/2"), ("up", "1/2"))
    ),
    Weight(f"{_OURS}mlp.down_proj", f"{_HF}mlp.experts.down_proj", "e f d -> e d f", kind="experts"),
)
QWEN3_MOE = _keymap("qwen3_moe", (*_NORMS, *_EXPERTS), EACH_QWEN3)
