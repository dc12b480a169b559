"""BERT and RoBERTa under Hugging Face's names, with their heads: transformers' Flax classes.

The encoder lies under "bert." or "roberta." in a model with a head, and at the top in one without.
"""

from collections.abc import Iterator

from jaxadapt.families.spellings import bare
from jaxadapt.keymap import KeyMap
from jaxadapt.weight import Weight

_DENSE = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def _dense(module: str) -> Iterator[Weight]:
    yield Weight(f"{module}.kernel", f"{module}.weight", "i o -> o i")
    yield Weight(f"{module}.bias", f"{module}.bias", "o -> o")


def _norm(module: str) -> Iterator[Weight]:
    yield Weight(f"{module}.scale", f"{module}.weight", "d -> d")
    yield Weight(f"{module}.bias", f"{module}.bias", "d -> d")


def _encoder(prefix: str) -> Iterator[Weight]:
    for name in ("word", "position", "token_type"):
        at = f"{prefix}embeddings.{name}_embeddings"
        yield Weight(f"{at}.embedding", f"{at}.weight", "v d -> v d", kind="embedding")
    yield from _norm(f"{prefix}embeddings.LayerNorm")
    for name in _DENSE:
        yield from _dense(f"{prefix}encoder.layer.{{l}}.{name}")
    for name in ("attention.output", "output"):
        yield from _norm(f"{prefix}encoder.layer.{{l}}.{name}.LayerNorm")
    yield from _dense(f"{prefix}pooler.dense")


def _table(name: str, prefix: str, heads: tuple[Weight, ...], **options: object) -> KeyMap:
    lines = (*_encoder(prefix), *_encoder(""), *heads, *_dense("qa_outputs"))
    position_ids = (f"{prefix}embeddings.position_ids", "embeddings.position_ids")
    rest: dict[str, object] = {"buffers": position_ids, "spellings": bare(prefix), **options}
    return KeyMap(name, lines, **rest)  # pyright: ignore[reportArgumentType]


BERT = _table(
    "bert",
    "bert.",
    (
        *_dense("cls.predictions.transform.dense"),
        *_norm("cls.predictions.transform.LayerNorm"),
        Weight("cls.predictions.bias", "cls.predictions.bias", "v -> v"),
        Weight("cls.predictions.decoder.kernel", "cls.predictions.decoder.weight", "d v -> v d"),
        *_dense("cls.seq_relationship"),
        *_dense("classifier"),
    ),
    output="cls.predictions.decoder",
    tied=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
)

ROBERTA = _table(
    "roberta",
    "roberta.",
    (
        *_dense("lm_head.dense"),
        *_norm("lm_head.layer_norm"),
        Weight("lm_head.bias", "lm_head.bias", "v -> v"),
        Weight("lm_head.decoder.kernel", "lm_head.decoder.weight", "d v -> v d"),
        *_dense("classifier.dense"),
        *_dense("classifier.out_proj"),
        *_dense("classifier"),
    ),
    output="lm_head.decoder",
    tied=(
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ),
)
