"""BERT and RoBERTa of keras-hub, with the names of keras-hub 0.32. XLM-RoBERTa has RoBERTa's. Heads are separate axes.

The heads of `BertTextClassifier` and `RobertaTextClassifier` are mapped, the heads of masked language models are not.

ELECTRA's backbone has BERT's leaves, and one layer more if its embeddings have another width than its layers. So a
`BertBackbone` without a head is not recognized: pass `keymap="keras:bert"`. PyTorch's ELECTRA has no pooler.

RoBERTa's embedding of positions has no entry. PyTorch's has two more rows, and PyTorch adds a token type, which
keras-hub lacks. Adapters are saved and loaded, but whole models cannot be exported or imported.
"""

from jaxadapt.keymaps.families import KeyMap, Weight, bare

_OURS = "transformer_layer_{l}."
_AFFINE = (("gamma", "weight"), ("beta", "bias"))
_HEADS = ("query", "key", "value")


def _layers(prefix: str) -> tuple[Weight, ...]:
    """Return the entries of the encoder's layers and of the norm before them; `prefix` is that of PyTorch's names."""
    layer = f"{prefix}encoder.layer.{{l}}."
    dense = (
        ("feedforward_intermediate_dense", "intermediate.dense", "i o -> o i"),
        ("feedforward_output_dense", "output.dense", "i o -> o i"),
        ("self_attention_layer.attention_output", "attention.output.dense", "n h d -> d (n h)"),
    )
    norms = (
        (f"{_OURS}self_attention_layer_norm", f"{layer}attention.output.LayerNorm"),
        (f"{_OURS}feedforward_layer_norm", f"{layer}output.LayerNorm"),
        ("embeddings_layer_norm", f"{prefix}embeddings.LayerNorm"),
    )
    attention = tuple((f"{_OURS}self_attention_layer.{p}", f"{layer}attention.self.{p}") for p in _HEADS)
    return (
        *(Weight(f"{a}.kernel", f"{b}.weight", "d n h -> (n h) d") for a, b in attention),
        *(Weight(f"{a}.bias", f"{b}.bias", "n h -> (n h)") for a, b in attention),
        *(Weight(f"{_OURS}{a}.kernel", f"{layer}{b}.weight", pattern) for a, b, pattern in dense),
        *(Weight(f"{_OURS}{a}.bias", f"{layer}{b}.bias", "o -> o") for a, b, _ in dense),
        *(Weight(f"{a}.{x}", f"{b}.{y}", "d -> d") for a, b in norms for x, y in _AFFINE),
    )


def _dense(leaf: str, module: str) -> tuple[Weight, ...]:
    return Weight(f"{leaf}.kernel", f"{module}.weight", "i o -> o i"), Weight(
        f"{leaf}.bias", f"{module}.bias", "o -> o"
    )


def _embedding(leaf: str, key: str) -> Weight:
    return Weight(f"{leaf}.embeddings", f"{key}_embeddings.weight", "v d -> v d", kind="embedding")


def _keymap(name: str, weights: tuple[Weight, ...], needs: tuple[str, ...], proved: bool = True) -> KeyMap:
    return KeyMap(
        f"keras:{name}",
        (*_layers(f"{name}."), *weights),
        order=(
            *(
                name,
                "classifier",
                "embeddings",
                "embeddings_project",
                "encoder",
                "pooler",
                "layer",
                "word_embeddings",
                "attention",
                "self",
            ),
            *("query", "key", "value", "intermediate", "output", "dense", "out_proj"),
        ),
        proved=proved,
        needs=(f"{_OURS}self_attention_layer.query.kernel", *needs),
        buffers=(f"{name}.embeddings.position_ids", "embeddings.position_ids"),
        spellings=bare(f"{name}."),
    )


_BERT_NEEDS = ("token_embedding.embeddings", "segment_embedding.embeddings", "pooled_dense.kernel")


def _bert_embeddings(prefix: str) -> tuple[Weight, ...]:
    names = (("token", "word"), ("position", "position"), ("segment", "token_type"))
    return tuple(_embedding(f"{ours}_embedding", f"{prefix}embeddings.{theirs}") for ours, theirs in names)


BERT = _keymap(
    "bert",
    (*_bert_embeddings("bert."), *_dense("pooled_dense", "bert.pooler.dense"), *_dense("logits", "classifier")),
    _BERT_NEEDS,
)
ROBERTA = _keymap(
    "roberta",
    (
        _embedding("embeddings.token_embedding", "roberta.embeddings.word"),
        *_dense("pooled_dense", "classifier.dense"),
        *_dense("logits", "classifier.out_proj"),
    ),
    ("embeddings.token_embedding.embeddings",),
)
ELECTRA = _keymap(
    "electra",
    (
        *_bert_embeddings("electra."),
        *_dense("embeddings_projection", "electra.embeddings_project"),
        Weight("pooled_dense.kernel", "electra.pooler.dense.weight", "i o -> o i", kind="other"),
        Weight("pooled_dense.bias", "electra.pooler.dense.bias", "o -> o"),
    ),
    _BERT_NEEDS,
    proved=False,
)
