"""GPT-2 and Phi 3 of keras-hub, with the names of keras-hub 0.32. PyTorch has several of the leaves in one tensor.

Queries, keys and values are three leaves, and in Phi 3 gate and up are two. PEFT has one A for the leaves of a tensor.
The tensor is divided into equal parts, so a Phi 3 is recognized only if it has as many key heads as query heads (mini).
GPT-2's tensors are those of PyTorch's Conv1D, (in, out).
"""

from jaxadapt.keymaps.families import LAYER, KeyMap, Weight, bare, decoder_keymap, layer_norms

_OURS = "transformer_layer_{l}."
_HEADS = tuple(enumerate(("query", "key", "value")))
_H = "transformer.h.{l}."
_NORMS = (("self_attention_layer_norm", "ln_1"), ("feedforward_layer_norm", "ln_2"))
_MLP = (("intermediate", "c_fc"), ("output", "c_proj"))
_AFFINE = (("gamma", "weight"), ("beta", "bias"))

GPT2 = KeyMap(
    "keras:gpt2",
    (
        Weight("token_embedding.embeddings", "transformer.wte.weight", "v d -> v d", kind="embedding"),
        Weight("position_embedding.embeddings", "transformer.wpe.weight", "p d -> p d", kind="embedding"),
        *(
            Weight(
                f"{_OURS}self_attention.{p}.kernel",
                f"{_H}attn.c_attn.weight[n {i}/3]",
                "d n h -> d (n h)",
                kind="fused",
                fan_in_fan_out=True,
            )
            for i, p in _HEADS
        ),
        *(Weight(f"{_OURS}self_attention.{p}.bias", f"{_H}attn.c_attn.bias[{i}/3]", "n h -> (n h)") for i, p in _HEADS),
        Weight(
            f"{_OURS}self_attention.attention_output.kernel",
            f"{_H}attn.c_proj.weight",
            "n h d -> (n h) d",
            fan_in_fan_out=True,
        ),
        Weight(f"{_OURS}self_attention.attention_output.bias", f"{_H}attn.c_proj.bias", "d -> d"),
        *(
            Weight(f"{_OURS}feedforward_{a}_dense.kernel", f"{_H}mlp.{b}.weight", "i o -> i o", fan_in_fan_out=True)
            for a, b in _MLP
        ),
        *(Weight(f"{_OURS}feedforward_{a}_dense.bias", f"{_H}mlp.{b}.bias", "o -> o") for a, b in _MLP),
        *(Weight(f"{_OURS}{a}.{x}", f"{_H}{b}.{y}", "d -> d") for a, b in _NORMS for x, y in _AFFINE),
        *(Weight(f"layer_norm.{x}", f"transformer.ln_f.{y}", "d -> d") for x, y in _AFFINE),
    ),
    output="lm_head",
    order=("transformer", "lm_head", "wte", "wpe", "h", "attn", "mlp", "c_attn", "c_fc", "c_proj"),
    complete=True,
    needs=("position_embedding.embeddings", f"{_OURS}self_attention.query.bias", "layer_norm.gamma"),
    tied=(("lm_head.weight", "transformer.wte.weight"),),
    buffers=(f"{_H}attn.bias", f"{_H}attn.masked_bias"),
    spellings=bare("transformer."),
)

_GATES = enumerate(("gate", "intermediate"))
_PHI3_NORMS = (
    ("pre_attention_layernorm", "input_layernorm"),
    ("post_attention_layernorm", "post_attention_layernorm"),
)
PHI3 = decoder_keymap(
    "keras:phi3",
    (
        Weight("token_embedding.embeddings", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(
            Weight(
                f"{_OURS}attention.{p}.kernel",
                f"{LAYER}self_attn.qkv_proj.weight[{i}/3]",
                "d n h -> (n h) d",
                kind="fused",
            )
            for i, p in _HEADS
        ),
        Weight(f"{_OURS}attention.attention_output.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *(
            Weight(
                f"{_OURS}feedforward_{p}_dense.kernel",
                f"{LAYER}mlp.gate_up_proj.weight[{i}/2]",
                "i o -> o i",
                kind="fused",
            )
            for i, p in _GATES
        ),
        Weight(f"{_OURS}feedforward_output_dense.kernel", f"{LAYER}mlp.down_proj.weight", "i o -> o i"),
        *layer_norms(_OURS, _PHI3_NORMS),
        Weight("token_embedding.reverse_embeddings", "lm_head.weight", "d v -> v d"),
        Weight("sequence_output_layernorm.scale", "model.norm.weight", "d -> d"),
    ),
    complete=True,
    needs=tuple(f"{_OURS}{a}.scale" for a, _ in _PHI3_NORMS),
    same=("n",),
)
