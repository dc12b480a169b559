"""Mixtures of experts under Hugging Face's names whose router has a correction bias: GLM 4 MoE and MiniMax M2.

The bias is a tensor of the router in GLM 4 MoE (GLM 4.5 to 4.7), and of the block of the experts in MiniMax M2.
"""

from jaxadapt.keymaps.families import (
    EACH_DEEPSEEK,
    EACH_MIXTRAL,
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

_QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")
_MLP = tuple(f"{prefix}{p}_proj" for prefix in ("mlp.", "mlp.shared_experts.") for p in ("gate", "up", "down"))
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")


def _keymap(name: str, bias: str, extra: tuple[Weight, ...], expert_modules: Modules, complete: bool = False) -> KeyMap:
    return decoder_keymap(
        name,
        (
            *embeddings("model.embed_tokens"),
            *layer_kernels(*_QKVO),
            *layer_norms(LAYER, ((m, m) for m in _NORMS), leaf="weight"),
            router_kernel("mlp.gate"),
            Weight(f"{LAYER}{bias}", f"{LAYER}{bias}", "e -> e"),
            *expert_arrays("mlp", "e o i"),
            *extra,
            Weight("model.norm.weight", "model.norm.weight", "d -> d"),
            Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
        ),
        complete=complete,
        same=("m",),
        needs=tuple(LAYER + leaf for leaf in (bias, "mlp.experts.gate_up_proj", "self_attn.k_proj.kernel")),
        expert_modules=expert_modules,
    )


GLM4_MOE = _keymap(
    "glm4_moe",
    "mlp.gate.e_score_correction_bias",
    (*layer_kernels(*_MLP), *biases(f"{LAYER}{m}" for m in _QKVO[:3])),
    EACH_DEEPSEEK,
)
_BIAS = "e_score_correction_bias"
MINIMAX_M2 = _keymap(
    "minimax_m2",
    f"mlp.{_BIAS}",
    (),
    (*EACH_MIXTRAL, (f"{LAYER}mlp.{_BIAS}", (f"{LAYER}block_sparse_moe.{_BIAS}",))),
    complete=True,  # HY 3 has dense layers and shared experts, and else the same names
)
