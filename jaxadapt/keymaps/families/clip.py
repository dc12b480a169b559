"""Both towers of CLIP under Hugging Face's names (transformers' Flax classes)."""

from collections.abc import Iterator

from jaxadapt.keymaps.families import entries
from jaxadapt.keymaps.families.entries import convs, dense, embeddings, norms
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_FROM = (*(f"self_attn.{p}_proj" for p in "qkv"), "mlp.fc1")
_INTO = ("self_attn.out_proj", "mlp.fc2")


def _tower(name: str, *final_norms: str) -> Iterator[Weight]:
    layer = f"{name}.encoder.layers.{{l}}."
    width = name.partition("_")[0]  # each tower has its own width
    yield from dense(*(f"{layer}{m}" for m in _FROM), axes=f"{width} o")
    yield from dense(*(f"{layer}{m}" for m in _INTO), axes=f"i {width}")
    yield from norms(f"{layer}layer_norm1", f"{layer}layer_norm2", *(f"{name}.{m}" for m in final_norms))


CLIP = KeyMap(
    "clip",
    (
        Weight("logit_scale", "logit_scale", "->"),
        *_tower("text_model", "final_layer_norm"),
        *_tower("vision_model", "pre_layrnorm", "post_layernorm"),
        *embeddings(*(f"text_model.embeddings.{p}_embedding" for p in ("token", "position"))),
        *embeddings("vision_model.embeddings.position_embedding"),
        *convs("vision_model.embeddings.patch_embedding"),
        Weight("vision_model.embeddings.class_embedding", "vision_model.embeddings.class_embedding", "d -> d"),
        *dense("text_projection", "visual_projection", bias=False),
    ),
    same=("text", "vision"),
    order=entries.CLIP_ORDER,
    buffers=tuple(f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")),
)
