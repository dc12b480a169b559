"""BERT and RoBERTa with their heads, under Hugging Face's names (transformers' Flax classes).

The encoder's names start with "bert." or "roberta." in a model with a head, and have no prefix in one without.
"""

from collections.abc import Iterator

from jaxadapt.keymaps.families.entries import BERT_ORDER, FROM, INTO, bare, dense, embeddings, norms
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_FROM = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
_INTO = ("attention.output.dense", "output.dense")


def _encoder(prefix: str) -> Iterator[Weight]:
    yield from embeddings(*(f"{prefix}embeddings.{p}_embeddings" for p in ("word", "position", "token_type")))
    layer = f"{prefix}encoder.layer.{{l}}."
    yield from dense(*(f"{layer}{m}" for m in _FROM), axes=FROM)
    yield from dense(*(f"{layer}{m}" for m in _INTO), axes=INTO)
    yield from dense(f"{prefix}pooler.dense")
    outputs = (f"{layer}attention.output", f"{layer}output")
    yield from norms(*(f"{m}.LayerNorm" for m in (f"{prefix}embeddings", *outputs)))


def _keymap(name: str, prefix: str, heads: tuple[Weight, ...], output: str, bias: str) -> KeyMap:
    return KeyMap(
        name,
        (*_encoder(prefix), *_encoder(""), *heads, *dense("qa_outputs")),
        output=output,
        order=BERT_ORDER,
        same=("m",),
        tied=((f"{output}.weight", f"{prefix}embeddings.word_embeddings.weight"), (f"{output}.bias", bias)),
        buffers=(f"{prefix}embeddings.position_ids", "embeddings.position_ids"),
        spellings=bare(prefix),
    )


BERT = _keymap(
    "bert",
    "bert.",
    (
        *dense("cls.predictions.transform.dense"),
        *norms("cls.predictions.transform.LayerNorm"),
        Weight("cls.predictions.bias", "cls.predictions.bias", "v -> v"),
        Weight("cls.predictions.decoder.kernel", "cls.predictions.decoder.weight", "d v -> v d"),
        *dense("cls.seq_relationship"),
        *dense("classifier"),
    ),
    "cls.predictions.decoder",
    "cls.predictions.bias",
)

ROBERTA = _keymap(
    "roberta",
    "roberta.",
    (
        *dense("lm_head.dense"),
        *norms("lm_head.layer_norm"),
        Weight("lm_head.bias", "lm_head.bias", "v -> v"),
        Weight("lm_head.decoder.kernel", "lm_head.decoder.weight", "d v -> v d"),
        *dense("classifier.dense"),
        *dense("classifier.out_proj"),
        *dense("classifier"),
    ),
    "lm_head.decoder",
    "lm_head.bias",
)
