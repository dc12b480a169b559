"""ViT: transformers' Flax classes, and PyTorch's names since transformers 5; "vit/v4" has the names before.

Files of whole models keep the older names, also those that transformers 5 writes; adapters have those of the
transformers they were made with.
"""

from collections.abc import Iterator

from jaxadapt.keymaps.families.lines import convs, dense, norms
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_MODULES = (
    *((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_NORMS = tuple((name, name) for name in ("layernorm_before", "layernorm_after"))


def _encoder(at: str) -> Iterator[Weight]:
    """With "vit." in front under a head, without in a model that has none."""
    for old, new in _MODULES:
        ours, theirs = f"{at}encoder.layer.{{l}}.{old}", f"{at}layers.{{l}}.{new}"
        yield Weight(f"{ours}.kernel", f"{theirs}.weight", "i m -> m i" if "output" in old else "m o -> o m")
        yield Weight(f"{ours}.bias", f"{theirs}.bias", "o -> o")
    for name, _ in _NORMS:
        ours, theirs = f"{at}encoder.layer.{{l}}.{name}", f"{at}layers.{{l}}.{name}"
        yield Weight(f"{ours}.scale", f"{theirs}.weight", "d -> d")
        yield Weight(f"{ours}.bias", f"{theirs}.bias", "d -> d")
    yield from norms(f"{at}layernorm")
    yield from convs(f"{at}embeddings.patch_embeddings.projection")
    yield Weight(f"{at}embeddings.cls_token", f"{at}embeddings.cls_token", "a b d -> a b d")
    yield Weight(f"{at}embeddings.position_embeddings", f"{at}embeddings.position_embeddings", "a p d -> a p d")


def _renames(at: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{at}layers.{{l}}.{new}.", f"{at}encoder.layer.{{l}}.{old}.") for old, new in _MODULES + _NORMS)


VIT = KeyMap(
    "vit",
    (*_encoder("vit."), *_encoder(""), *dense("pooler.dense", "vit.pooler.dense", "classifier")),
    whole=True,  # BEiT, DINOv2 and others call their attention alike, and PyTorch calls theirs otherwise
    same=("m",),
    spellings=(("v4", (*_renames("vit."), *_renames(""))),),
)
