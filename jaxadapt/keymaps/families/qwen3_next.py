"""Qwen 3 Next under Hugging Face's names: layers of linear attention and of attention, and mixtures of experts.

`in_proj_qkvz` and `in_proj_ba` have the parts of one key head side by side, then those of the next, as in PyTorch. The
depthwise convolution is stored and merged, but not adapted: PEFT asks for a rank that its thousands of groups divide.
"""

from jaxadapt.keymaps.families import (
    EACH_QWEN3,
    FROM,
    INTO,
    LAYER,
    Weight,
    biases,
    decoder_keymap,
    dense,
    embeddings,
    expert_arrays,
    layer_kernels,
    layer_norms,
    router_kernel,
)

_LINEAR = f"{LAYER}linear_attn."
_QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")
_MLP = tuple(f"{prefix}{p}_proj" for prefix in ("mlp.", "mlp.shared_expert.") for p in ("gate", "up", "down"))
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "linear_attn.norm")

QWEN3_NEXT = decoder_keymap(
    "qwen3_next",
    (
        *embeddings("model.embed_tokens"),
        *layer_kernels(*_QKVO, *_MLP, "mlp.shared_expert_gate"),
        *biases(f"{LAYER}{m}" for m in _QKVO),
        *layer_norms(LAYER, ((m, m) for m in _NORMS), leaf="weight"),
        *dense(f"{_LINEAR}in_proj_qkvz", f"{_LINEAR}in_proj_ba", bias=False, axes=FROM),
        *dense(f"{_LINEAR}out_proj", bias=False, axes=INTO),
        Weight(f"{_LINEAR}conv1d.kernel", f"{_LINEAR}conv1d.weight", "w i o -> o i w", kind="other"),
        *(Weight(f"{_LINEAR}{name}", f"{_LINEAR}{name}", "n -> n") for name in ("dt_bias", "A_log")),
        router_kernel("mlp.gate"),
        *expert_arrays("mlp", "e o i"),
        Weight("model.norm.weight", "model.norm.weight", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    same=("m",),
    needs=(f"{_LINEAR}in_proj_qkvz.kernel",),
    expert_modules=EACH_QWEN3,
)
