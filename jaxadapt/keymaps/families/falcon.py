"""Falcon under Hugging Face's names, with nn.LayerNorm's `scale`: 7B, RW, and 40B, 180B and Falcon 2 with two norms.

`query_key_value` is as in PyTorch: the queries that share a key head, then that key and that value, for each key head;
Falcon 7B has one key head. Only RW has biases.
"""

from jaxadapt.keymaps.families import FROM, INTO, KeyMap, bare, dense, embeddings, norms

_LAYER = "transformer.h.{l}."
_NORMS = ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp")

FALCON = KeyMap(
    "falcon",
    (
        *embeddings("transformer.word_embeddings"),
        *dense(f"{_LAYER}self_attention.query_key_value", f"{_LAYER}mlp.dense_h_to_4h", axes=FROM),
        *dense(f"{_LAYER}self_attention.dense", f"{_LAYER}mlp.dense_4h_to_h", axes=INTO),
        *norms(*(_LAYER + norm for norm in _NORMS), "transformer.ln_f"),
        *dense("lm_head", bias=False),
    ),
    output="lm_head",
    order=(
        *("transformer", "lm_head", "word_embeddings", "h", "self_attention", "query_key_value", "dense"),
        *("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    complete=True,  # Bloom has a norm of the embedding, and else the same names
    same=("m",),
    tied=(("lm_head.weight", "transformer.word_embeddings.weight"),),
    spellings=bare("transformer."),
)
