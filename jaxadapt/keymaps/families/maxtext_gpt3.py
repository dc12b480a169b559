"""MaxText's GPT-3 (maxtext 0.2.5) under the names of transformers' GPT-2, of the same architecture.

Queries, keys and values are one kernel (in, 3, heads, head_dim), in the order of GPT-2's c_attn. PyTorch's Conv1D
stores (in, out). The norms store w - 1. `KeyMap.scanned` gives the stacked forms.
"""

from jaxadapt.keymaps.families import KeyMap, Weight, bare

_OURS, _TORCH = "decoder.layers_{l}.", "transformer.h.{l}."
_KERNELS = (
    ("self_attention.qkv_proj", "attn.c_attn", "d p n h -> d (p n h)", "p n h -> (p n h)"),
    ("self_attention.out", "attn.c_proj", "n h d -> (n h) d", "d -> d"),
    ("mlp.wi", "mlp.c_fc", "d f -> d f", "f -> f"),
    ("mlp.wo", "mlp.c_proj", "f d -> f d", "d -> d"),
)
_NORMS = (
    (f"{_OURS}pre_self_attention_norm", f"{_TORCH}ln_1"),
    (f"{_OURS}mlp.mlp_layer_norm", f"{_TORCH}ln_2"),
    ("decoder.decoder_norm", "transformer.ln_f"),
)

GPT3 = KeyMap(
    "maxtext:gpt3",
    (
        Weight("token_embedder.embedding", "transformer.wte.weight", "v d -> v d", kind="embedding"),
        Weight("decoder.position_embedder.embedding", "transformer.wpe.weight", "p d -> p d", kind="embedding"),
        *(
            Weight(f"{_OURS}{a}.kernel", f"{_TORCH}{b}.weight", pattern, fan_in_fan_out=True)
            for a, b, pattern, _ in _KERNELS
        ),
        *(Weight(f"{_OURS}{a}.bias", f"{_TORCH}{b}.bias", pattern) for a, b, _, pattern in _KERNELS),
        *(Weight(f"{a}.scale", f"{b}.weight", "d -> d", shift=-1.0) for a, b in _NORMS),
        *(Weight(f"{a}.bias", f"{b}.bias", "d -> d") for a, b in _NORMS),
        Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
    ),
    output="lm_head",
    complete=True,
    needs=(f"{_OURS}self_attention.qkv_proj.kernel",),
    order=("transformer", "lm_head", "wte", "wpe", "h", "attn", "mlp", "c_attn", "c_fc", "c_proj"),
    tied=(("lm_head.weight", "transformer.wte.weight"),),
    buffers=(f"{_TORCH}attn.bias", f"{_TORCH}attn.masked_bias"),
    spellings=bare("transformer."),
)
