"""Mixtures of experts under Hugging Face's names: Mixtral, Qwen 3 MoE, GPT-OSS, Llama 4, DeepSeek V3.

As in transformers 5, all experts of a layer are in one array, (expert, in, out), with gate and up concatenated
(GPT-OSS: interleaved). PyTorch stores (expert, out, in), except for GPT-OSS and Llama 4, which store (expert, in, out).
PEFT reads this from a module's `is_transposed`, which only GPT-OSS has. A of a Llama 4 adapter is therefore on the
outputs, and the entries follow PEFT. Routers are parameters of separate classes, not of nn.Linear.
"""

from jaxadapt.keymaps.families import (
    EACH_DEEPSEEK,
    EACH_MIXTRAL,
    EACH_QWEN3,
    LAYER,
    KeyMap,
    Modules,
    Weight,
    biases,
    decoder_keymap,
    embeddings,
    expert_arrays,
    layer_kernels,
    layer_norms,
    router_kernel,
)

_MLP = ("gate_proj", "up_proj", "down_proj")
_QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")


def _norms(*modules: str) -> tuple[Weight, ...]:
    return layer_norms(LAYER, ((m, m) for m in modules), leaf="weight")


def _keymap(name: str, weights: tuple[Weight, ...], needs: tuple[str, ...], expert_modules: Modules = ()) -> KeyMap:
    return decoder_keymap(
        name,
        (
            *embeddings("model.embed_tokens"),
            *_norms("input_layernorm", "post_attention_layernorm"),
            Weight("model.norm.weight", "model.norm.weight", "d -> d"),
            Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
            *weights,
        ),
        same=("m",),
        needs=tuple(LAYER + leaf for leaf in needs),
        expert_modules=expert_modules,
    )


_MIXTRAL = (*layer_kernels(*_QKVO), router_kernel("mlp.gate"), *expert_arrays("mlp", "e o i"))
MIXTRAL = _keymap("mixtral", _MIXTRAL, ("mlp.gate.kernel", "mlp.experts.gate_up_proj"), EACH_MIXTRAL)
QWEN3_MOE = _keymap(
    "qwen3_moe",
    (*_MIXTRAL, *_norms("self_attn.q_norm", "self_attn.k_norm"), *layer_kernels(*(f"mlp.{p}" for p in _MLP))),
    ("mlp.gate.kernel", "mlp.experts.gate_up_proj", "self_attn.q_norm.weight"),
    EACH_QWEN3,
)
GPT_OSS = _keymap(
    "gpt_oss",
    (
        *layer_kernels(*_QKVO),
        *biases(f"{LAYER}{m}" for m in (*_QKVO, "mlp.router")),
        Weight(f"{LAYER}self_attn.sinks", f"{LAYER}self_attn.sinks", "n -> n"),
        router_kernel("mlp.router"),
        *expert_arrays("mlp", "e i o", turned=True),
        *(
            Weight(f"{LAYER}mlp.experts.{p}_bias", f"{LAYER}mlp.experts.{p}_bias", "e o -> e o", kind="other")
            for p in ("gate_up_proj", "down_proj")
        ),
    ),
    ("mlp.router.kernel", "mlp.experts.gate_up_proj", "self_attn.sinks"),
)
LLAMA4 = _keymap(
    "llama4",
    (
        *layer_kernels(*_QKVO, *(f"feed_forward.{prefix}{p}" for prefix in ("", "shared_expert.") for p in _MLP)),
        router_kernel("feed_forward.router"),
        *expert_arrays("feed_forward", "e i o"),
    ),
    ("feed_forward.router.kernel", "feed_forward.experts.gate_up_proj"),
)
DEEPSEEK_V3 = _keymap(
    "deepseek_v3",
    (
        *layer_kernels(
            *(f"self_attn.{p}_proj" for p in ("q", "q_a", "q_b", "kv_b", "o")), "self_attn.kv_a_proj_with_mqa"
        ),
        *_norms("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
        *layer_kernels(*(f"mlp.{prefix}{p}" for prefix in ("", "shared_experts.") for p in _MLP)),
        router_kernel("mlp.gate"),
        Weight(f"{LAYER}mlp.gate.e_score_correction_bias", f"{LAYER}mlp.gate.e_score_correction_bias", "e -> e"),
        *expert_arrays("mlp", "e o i"),
    ),
    ("mlp.gate.kernel", "mlp.experts.gate_up_proj", "self_attn.kv_b_proj.kernel"),
    EACH_DEEPSEEK,
)
