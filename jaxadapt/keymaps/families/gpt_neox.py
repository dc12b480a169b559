"""GPT-NeoX and Pythia under Hugging Face's names, with nn.LayerNorm's `scale`.

`query_key_value` has q, k and v of one head side by side, then those of the next head, as in PyTorch.
"""

from jaxadapt.keymaps.families import FROM, INTO, KeyMap, bare, dense, embeddings, norms

_LAYER = "gpt_neox.layers.{l}."

GPT_NEOX = KeyMap(
    "gpt_neox",
    (
        *embeddings("gpt_neox.embed_in"),
        *dense(f"{_LAYER}attention.query_key_value", f"{_LAYER}mlp.dense_h_to_4h", axes=FROM),
        *dense(f"{_LAYER}attention.dense", f"{_LAYER}mlp.dense_4h_to_h", axes=INTO),
        *norms(f"{_LAYER}input_layernorm", f"{_LAYER}post_attention_layernorm", "gpt_neox.final_layer_norm"),
        *dense("embed_out", bias=False),
    ),
    output="embed_out",
    order=(
        *("gpt_neox", "embed_out", "embed_in", "layers", "attention", "query_key_value", "dense"),
        *("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    same=("m",),
    tied=(("embed_out.weight", "gpt_neox.embed_in.weight"),),
    buffers=tuple(
        _LAYER + name for name in ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    ),
    spellings=bare("gpt_neox."),
)
