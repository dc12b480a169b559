"""ViT of transformers' Flax classes, with PyTorch's names since transformers 5; "vit/v4" has the earlier names.

Model files use the earlier names, also when transformers 5 writes them. Adapters use the names of the transformers
version that they were trained with.
"""

from collections.abc import Iterator

from jaxadapt.keymaps.families import entries
from jaxadapt.keymaps.families.entries import convs, dense, norms
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_MODULES = (
    *((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_NORMS = tuple((name, name) for name in ("layernorm_before", "layernorm_after"))


def _encoder(prefix: str) -> Iterator[Weight]:
    """Yield the encoder's entries; the prefix is "vit." in a model with a head, and empty in one without."""
    for old, new in _MODULES:
        ours, theirs = f"{prefix}encoder.layer.{{l}}.{old}", f"{prefix}layers.{{l}}.{new}"
        yield Weight(f"{ours}.kernel", f"{theirs}.weight", "i m -> m i" if "output" in old else "m o -> o m")
        yield Weight(f"{ours}.bias", f"{theirs}.bias", "o -> o")
    for name, _ in _NORMS:
        ours, theirs = f"{prefix}encoder.layer.{{l}}.{name}", f"{prefix}layers.{{l}}.{name}"
        yield Weight(f"{ours}.scale", f"{theirs}.weight", "d -> d")
        yield Weight(f"{ours}.bias", f"{theirs}.bias", "d -> d")
    yield from norms(f"{prefix}layernorm")
    yield from convs(f"{prefix}embeddings.patch_embeddings.projection")
    yield Weight(f"{prefix}embeddings.cls_token", f"{prefix}embeddings.cls_token", "a b d -> a b d")
    yield Weight(f"{prefix}embeddings.position_embeddings", f"{prefix}embeddings.position_embeddings", "a p d -> a p d")


def _renames(prefix: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"{prefix}layers.{{l}}.{new}.", f"{prefix}encoder.layer.{{l}}.{old}.") for old, new in _MODULES + _NORMS
    )


VIT = KeyMap(
    "vit",
    (*_encoder("vit."), *_encoder(""), *dense("pooler.dense", "vit.pooler.dense", "classifier")),
    complete=True,  # BEiT, DINOv2 and others have the same attention names, but other names in PyTorch
    same=("m",),
    order=entries.VIT_ORDER,
    spellings=(("v4", (*_renames("vit."), *_renames(""))),),
)
