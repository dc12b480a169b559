"""BERT and RoBERTa with their heads, under Hugging Face's names (transformers' Flax classes).

The encoder's names start with "bert." or "roberta." in a model with a head, and have no prefix in one without.
"""

from jaxadapt.keymaps.families import FROM, INTO, KeyMap, Weight, bare, dense, embeddings, norms


def _encoder(prefix: str) -> tuple[Weight, ...]:
    layer = f"{prefix}encoder.layer.{{l}}."
    outputs = (f"{layer}attention.output", f"{layer}output")
    return (
        *embeddings(*(f"{prefix}embeddings.{p}_embeddings" for p in ("word", "position", "token_type"))),
        *dense(
            *(f"{layer}attention.self.{p}" for p in ("query", "key", "value")), f"{layer}intermediate.dense", axes=FROM
        ),
        *dense(*(f"{m}.dense" for m in outputs), axes=INTO),
        *dense(f"{prefix}pooler.dense"),
        *norms(*(f"{m}.LayerNorm" for m in (f"{prefix}embeddings", *outputs))),
    )


def _keymap(name: str, heads: tuple[Weight, ...], output: str, bias: str) -> KeyMap:
    prefix = f"{name}."
    return KeyMap(
        name,
        (*_encoder(prefix), *_encoder(""), *heads, *dense("qa_outputs")),
        output=output,
        order=(
            *("bert", "roberta", "cls", "lm_head", "classifier", "qa_outputs", "embeddings", "encoder", "pooler"),
            *("layer", "word_embeddings", "attention", "self", "query", "key", "value"),
            *("intermediate", "output", "dense", "transform", "out_proj", "decoder"),
        ),
        same=("m",),
        tied=((f"{output}.weight", f"{prefix}embeddings.word_embeddings.weight"), (f"{output}.bias", bias)),
        buffers=(f"{prefix}embeddings.position_ids", "embeddings.position_ids"),
        spellings=bare(prefix),
    )


BERT = _keymap(
    "bert",
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
