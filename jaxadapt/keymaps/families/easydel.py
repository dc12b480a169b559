"""Models of EasyDeL (easydel 0.3.0, NNX): Hugging Face's names, except that the scale of a norm is called kernel.

"easydel:llama" is for dense decoders with Llama's layer names: Mistral, Qwen 2 and 3, Gemma, EXAONE 4, SmolLM 3, Phi 3.
"""

from jaxadapt.keymaps.families import FROM, INTO, LAYER, Weight, biases, decoder_keymap, dense, embeddings, layer_norms

_ATTENTION = tuple(f"{LAYER}self_attn.{p}_proj" for p in ("q", "k", "v", "qkv", "o"))
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    *("self_attn.q_norm", "self_attn.k_norm"),
)

LLAMA = decoder_keymap(
    "easydel:llama",
    (
        *embeddings("model.embed_tokens"),
        *dense(*_ATTENTION[:-1], *(f"{LAYER}mlp.{p}_proj" for p in ("gate", "up", "gate_up")), bias=False, axes=FROM),
        *dense(_ATTENTION[-1], f"{LAYER}mlp.down_proj", bias=False, axes=INTO),
        *dense("lm_head", bias=False),
        *biases(_ATTENTION),
        *layer_norms(LAYER, ((name, name) for name in _NORMS), leaf="kernel"),
        Weight("model.norm.kernel", "model.norm.weight", "d -> d"),
    ),
    complete=True,
    same=("m",),
    needs=("model.norm.kernel",),
)
