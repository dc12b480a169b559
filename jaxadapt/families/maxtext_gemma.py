"""Gemma 2 and 3 of MaxText (maxtext 0.2.5). Its norms hold 1 + w, its embeddings √d already.

A layer of its Gemma 2 is two of PyTorch's, a local one and a global one, and its queries hold 1/√head_dim (which the
27B, unlike PyTorch, has of its head_dim too). Gemma 3 is here unrolled: stacked it lies in blocks of six layers and a
rest, whose numbers follow from how many there are.
"""

from collections.abc import Iterator

from jaxadapt.families.maxtext import NORMS, table
from jaxadapt.weight import Weight

_HF = "model.layers.{l}."
_NORMS = (
    ("pre_self_attention_norm", "input_layernorm"),
    ("post_self_attention_norm", "post_attention_layernorm"),
    ("pre_ffw_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
_TOP = (
    Weight("token_embedder.embedding", "model.embed_tokens.weight", "v d -> v d", kind="embedding", scale=("d", 0.5)),
    Weight("decoder.decoder_norm.scale", "model.norm.weight", "d -> d", shift=1.0),
    Weight("decoder.logits_dense.kernel", "lm_head.weight", "d v -> v d"),
)


def _layer(kind: str = "", every: tuple[int, int] = (1, 0), scale: tuple[str, float] | None = None) -> Iterator[Weight]:
    at, attention = "decoder.layers_{l}.", f"decoder.layers_{{l}}.self_attention{kind}."
    yield Weight(
        f"{attention}query.kernel", f"{_HF}self_attn.q_proj.weight", "d n h -> (n h) d", scale=scale, layers=every
    )
    for name in ("key", "value"):
        ours, key = f"{attention}{name}.kernel", f"{_HF}self_attn.{name[0]}_proj.weight"
        yield Weight(ours, key, "d k h -> (k h) d", layers=every)
    yield Weight(f"{attention}out.kernel", f"{_HF}self_attn.o_proj.weight", "n h d -> d (n h)", layers=every)
    for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        yield Weight(f"{at}mlp{kind}.{a}.kernel", f"{_HF}mlp.{b}_proj.weight", "i o -> o i", layers=every)
    for a, b in _NORMS:
        yield Weight(f"{at}{a}{kind}.scale", f"{_HF}{b}.weight", "d -> d", shift=1.0, layers=every)


_TWO = (*_layer("_local", (2, 0), ("h", -0.5)), *_layer("_global", (2, 1), ("h", -0.5)))
_QK = tuple(Weight(w.leaf, w.key, w.pattern, shift=1.0) for w in NORMS)
GEMMA2 = table("gemma2", _TWO, needs=tuple(w.leaf for w in _TWO if w.shift), shared=_TOP)
_ONE = (*_layer(), *_QK)
GEMMA3 = table("gemma3", _ONE, needs=tuple(w.leaf for w in _ONE if w.shift), shared=_TOP)
