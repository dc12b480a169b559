"""ViT of transformers' Flax classes, with PyTorch's names since transformers 5; "vit/v4" has the earlier names.

Model files use the earlier names, also when transformers 5 writes them. Adapters use the names of the transformers
version that they were trained with.
"""

from jaxadapt.keymaps.families import KeyMap, Weight, convs, dense, norms

_MODULES = (
    *((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_NORMS = ("layernorm_before", "layernorm_after")


def _encoder(prefix: str) -> tuple[Weight, ...]:
    ours, theirs, patches = f"{prefix}encoder.layer.{{l}}.", f"{prefix}layers.{{l}}.", f"{prefix}embeddings."
    modules = [
        (f"{ours}{old}", f"{theirs}{new}", "i m -> m i" if "output" in old else "m o -> o m") for old, new in _MODULES
    ]
    return (
        *(
            entry
            for a, b, pattern in modules
            for entry in (Weight(f"{a}.kernel", f"{b}.weight", pattern), Weight(f"{a}.bias", f"{b}.bias", "o -> o"))
        ),
        *(
            Weight(f"{ours}{name}.{a}", f"{theirs}{name}.{b}", "d -> d")
            for name in _NORMS
            for a, b in (("scale", "weight"), ("bias", "bias"))
        ),
        *norms(f"{prefix}layernorm"),
        *convs(f"{patches}patch_embeddings.projection"),
        Weight(f"{patches}cls_token", f"{patches}cls_token", "a b d -> a b d"),
        Weight(f"{patches}position_embeddings", f"{patches}position_embeddings", "a p d -> a p d"),
    )


VIT = KeyMap(
    "vit",
    (*_encoder("vit."), *_encoder(""), *dense("pooler.dense", "vit.pooler.dense", "classifier")),
    complete=True,  # BEiT, DINOv2 and others have the same attention names, but other names in PyTorch
    same=("m",),
    order=(
        *("vit", "classifier", "embeddings", "layers", "encoder", "layer", "pooler"),
        *("attention", "intermediate", "output", "mlp"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value"),
        *("dense", "fc1", "fc2"),
    ),
    spellings=(
        (
            "v4",
            tuple(
                (f"{prefix}layers.{{l}}.{new}.", f"{prefix}encoder.layer.{{l}}.{old}.")
                for prefix in ("vit.", "")
                for old, new in (*_MODULES, *((name, name) for name in _NORMS))
            ),
        ),
    ),
)
