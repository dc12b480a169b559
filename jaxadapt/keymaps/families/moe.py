"""Mixtures of experts under Hugging Face's names: Mixtral, Qwen 3 MoE, GPT-OSS, Llama 4, DeepSeek V3.

As in transformers 5, all experts of a layer are in one array, (expert, in, out), with gate and up concatenated
(GPT-OSS: interleaved). PyTorch stores (expert, out, in), except for GPT-OSS and Llama 4, which store (expert, in, out).
PEFT reads this from a module's `is_transposed`, which only GPT-OSS has. A of a Llama 4 adapter is therefore on the
outputs, and the entries follow PEFT. Routers are parameters of separate classes, not of nn.Linear.
"""

from collections.abc import Iterable, Iterator

from jaxadapt.keymaps.families.entries import EACH_DEEPSEEK, EACH_MIXTRAL, EACH_QWEN3, Modules, biases, decoder_keymap
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_LAYER = "model.layers.{l}."
_MLP = ("gate_proj", "up_proj", "down_proj")
_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def _dense(*modules: str) -> Iterator[Weight]:
    for m in modules:
        axes = "i m -> m i" if m.endswith((".o_proj", "down_proj")) else "m o -> o m"
        yield Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", "r o -> o r" if m.endswith("_b_proj") else axes)


def _norms(*modules: str) -> Iterator[Weight]:
    for m in modules:
        yield Weight(f"{_LAYER}{m}.weight", f"{_LAYER}{m}.weight", "d -> d")


def _router(module: str) -> Weight:
    return Weight(f"{_LAYER}{module}.kernel", f"{_LAYER}{module}.weight", "d e -> e d", kind="parameter")


def _experts(block: str, pattern: str, turned: bool = False) -> Iterator[Weight]:
    for p, i, o in (("gate_up_proj", "m", "f"), ("down_proj", "f", "m")):
        prefix, torch = f"{_LAYER}{block}.experts.{p}", pattern.translate({ord("i"): i, ord("o"): o})
        yield Weight(prefix, prefix, f"e {i} {o} -> {torch}", kind="experts", fan_in_fan_out=turned)


def _keymap(name: str, entries: Iterable[Weight], needs: tuple[str, ...], expert_modules: Modules = ()) -> KeyMap:
    shared = (
        Weight("model.embed_tokens.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *_norms("input_layernorm", "post_attention_layernorm"),
        Weight("model.norm.weight", "model.norm.weight", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    )
    return decoder_keymap(
        name,
        (*shared, *entries),
        same=("m",),
        needs=tuple(_LAYER + leaf for leaf in needs),
        expert_modules=expert_modules,
    )


_MIXTRAL = (*_dense(*_QKVO), _router("mlp.gate"), *_experts("mlp", "e o i"))
MIXTRAL = _keymap("mixtral", _MIXTRAL, ("mlp.gate.kernel", "mlp.experts.gate_up_proj"), EACH_MIXTRAL)
QWEN3_MOE = _keymap(
    "qwen3_moe",
    (*_MIXTRAL, *_norms(*_QK_NORMS), *_dense(*(f"mlp.{p}" for p in _MLP))),
    ("mlp.gate.kernel", "mlp.experts.gate_up_proj", "self_attn.q_norm.weight"),
    EACH_QWEN3,
)
GPT_OSS = _keymap(
    "gpt_oss",
    (
        *_dense(*_QKVO),
        *biases(f"{_LAYER}{m}" for m in (*_QKVO, "mlp.router")),
        Weight(f"{_LAYER}self_attn.sinks", f"{_LAYER}self_attn.sinks", "n -> n"),
        _router("mlp.router"),
        *_experts("mlp", "e i o", turned=True),
        *(
            Weight(f"{_LAYER}mlp.experts.{p}_bias", f"{_LAYER}mlp.experts.{p}_bias", "e o -> e o", kind="other")
            for p in ("gate_up_proj", "down_proj")
        ),
    ),
    ("mlp.router.kernel", "mlp.experts.gate_up_proj", "self_attn.sinks"),
)
LLAMA4 = _keymap(
    "llama4",
    (
        *_dense(*_QKVO, *(f"feed_forward.{prefix}{p}" for prefix in ("", "shared_expert.") for p in _MLP)),
        _router("feed_forward.router"),
        *_experts("feed_forward", "e i o"),
    ),
    ("feed_forward.router.kernel", "feed_forward.experts.gate_up_proj"),
)
DEEPSEEK_V3 = _keymap(
    "deepseek_v3",
    (
        *_dense(*(f"self_attn.{p}_proj" for p in ("q", "q_a", "q_b", "kv_b", "o")), "self_attn.kv_a_proj_with_mqa"),
        *_norms("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
        *_dense(*(f"mlp.{prefix}{p}" for prefix in ("", "shared_experts.") for p in _MLP)),
        _router("mlp.gate"),
        Weight(f"{_LAYER}mlp.gate.e_score_correction_bias", f"{_LAYER}mlp.gate.e_score_correction_bias", "e -> e"),
        *_experts("mlp", "e o i"),
    ),
    ("mlp.gate.kernel", "mlp.experts.gate_up_proj", "self_attn.kv_b_proj.kernel"),
    EACH_DEEPSEEK,
)
