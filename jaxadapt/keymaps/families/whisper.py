"""Whisper under Hugging Face's names (transformers' Flax classes)."""

from collections.abc import Iterator

from jaxadapt.keymaps.families import entries
from jaxadapt.keymaps.families.entries import FROM, INTO, bare, convs, dense, embeddings, norms
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_FROM = ("q_proj", "k_proj", "v_proj")


def _stack(name: str, *attentions: str) -> Iterator[Weight]:
    layer = f"model.{name}.layers.{{l}}."
    yield from dense(*(f"{layer}{a}.{p}" for a in attentions for p in _FROM), f"{layer}fc1", axes=FROM)
    yield from dense(*(f"{layer}{a}.out_proj" for a in attentions), f"{layer}fc2", axes=INTO)
    yield from norms(*(f"{layer}{a}_layer_norm" for a in (*attentions, "final")), f"model.{name}.layer_norm")
    yield from embeddings(f"model.{name}.embed_positions")


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
    order=entries.WHISPER_ORDER,
    same=("m",),
    tied=(("proj_out.weight", "model.decoder.embed_tokens.weight"),),
    spellings=bare("model."),
)
