"""T5, T5 v1.1 and mT5 under Hugging Face's names (transformers' Flax classes)."""

from jaxadapt.keymaps.families import FROM, INTO, KeyMap, Weight, dense, embeddings

_SUBLAYERS = (
    ("encoder.block.{l}.layer.0", "SelfAttention", "qkvo"),
    ("encoder.block.{l}.layer.1", "DenseReluDense", ("wi", "wi_0", "wi_1", "wo")),
    ("decoder.block.{l}.layer.0", "SelfAttention", "qkvo"),
    ("decoder.block.{l}.layer.1", "EncDecAttention", "qkvo"),
    ("decoder.block.{l}.layer.2", "DenseReluDense", ("wi", "wi_0", "wi_1", "wo")),
)
_NORMS = (
    *(f"{sublayer}.layer_norm" for sublayer, _, _ in _SUBLAYERS),
    "encoder.final_layer_norm",
    "decoder.final_layer_norm",
)

T5 = KeyMap(
    "t5",
    (
        *embeddings(
            "shared",
            "encoder.block.{l}.layer.0.SelfAttention.relative_attention_bias",
            "decoder.block.{l}.layer.0.SelfAttention.relative_attention_bias",
        ),
        *(
            entry
            for sublayer, module, parts in _SUBLAYERS
            for p in parts
            for entry in dense(f"{sublayer}.{module}.{p}", bias=False, axes=INTO if p.endswith("o") else FROM)
        ),
        *(Weight(f"{m}.weight", f"{m}.weight", "d -> d") for m in _NORMS),
        *dense("lm_head", bias=False),
    ),
    output="lm_head",
    order=(
        *("shared", "encoder", "decoder", "lm_head", "embed_tokens", "block", "layer"),
        *("SelfAttention", "EncDecAttention"),
        *("DenseReluDense", "q", "k", "v", "o", "relative_attention_bias", "wi", "wi_0", "wi_1", "wo"),
    ),
    same=("m",),
    relative_positions=True,
    tied=tuple((f"{m}.weight", "shared.weight") for m in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
)
