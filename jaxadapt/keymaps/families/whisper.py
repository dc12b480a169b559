"""Whisper under Hugging Face's names (transformers' Flax classes)."""

from jaxadapt.keymaps.families import (
    FROM,
    INTO,
    KEYS_FIRST_ORDER,
    KeyMap,
    Weight,
    bare,
    convs,
    dense,
    embeddings,
    norms,
)


def _stack(name: str, *attentions: str) -> tuple[Weight, ...]:
    layer = f"model.{name}.layers.{{l}}."
    return (
        *dense(*(f"{layer}{a}.{p}_proj" for a in attentions for p in "qkv"), f"{layer}fc1", axes=FROM),
        *dense(*(f"{layer}{a}.out_proj" for a in attentions), f"{layer}fc2", axes=INTO),
        *norms(*(f"{layer}{a}_layer_norm" for a in (*attentions, "final")), f"model.{name}.layer_norm"),
        *embeddings(f"model.{name}.embed_positions"),
    )


WHISPER = KeyMap(
    "whisper",
    (
        *convs("model.encoder.conv1", "model.encoder.conv2", window="w"),
        *_stack("encoder", "self_attn"),
        *_stack("decoder", "self_attn", "encoder_attn"),
        *embeddings("model.decoder.embed_tokens"),
        *dense("proj_out", bias=False),
    ),
    output="proj_out",
    order=(
        *("model", "proj_out", "encoder", "decoder", "conv1", "conv2", "embed_tokens", "embed_positions", "layers"),
        *("self_attn", "encoder_attn", *KEYS_FIRST_ORDER, "fc1", "fc2"),
    ),
    same=("m",),
    tied=(("proj_out.weight", "model.decoder.embed_tokens.weight"),),
    spellings=bare("model."),
)
