"""Both towers of CLIP under Hugging Face's names (transformers' Flax classes)."""

from jaxadapt.keymaps.families import KEYS_FIRST_ORDER, KeyMap, Weight, convs, dense, embeddings, norms


def _tower(name: str, *final_norms: str) -> tuple[Weight, ...]:
    layer, width = f"{name}.encoder.layers.{{l}}.", name.partition("_")[0]  # each tower has its own width
    return (
        *dense(*(f"{layer}self_attn.{p}_proj" for p in "qkv"), f"{layer}mlp.fc1", axes=f"{width} o"),
        *dense(f"{layer}self_attn.out_proj", f"{layer}mlp.fc2", axes=f"i {width}"),
        *norms(f"{layer}layer_norm1", f"{layer}layer_norm2", *(f"{name}.{m}" for m in final_norms)),
    )


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
    order=(
        *("text_model", "vision_model", "visual_projection", "text_projection"),
        *("embeddings", "encoder", "self_attn", "mlp"),
        *(*KEYS_FIRST_ORDER, "fc1", "fc2", "token_embedding", "patch_embedding", "position_embedding"),
    ),
    buffers=tuple(f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")),
)
