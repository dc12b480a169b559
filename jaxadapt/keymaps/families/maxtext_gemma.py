"""Gemma 2 and 3 of MaxText (maxtext 0.2.5). Its norms hold 1 + w, its embeddings √d already.

A layer of its Gemma 2 is two of PyTorch's, a local one and a global one, and its queries hold 1/√head_dim (which the
27B, unlike PyTorch, has of its head_dim too). Gemma 3 stacked lies in blocks of six layers and a rest, whose numbers
follow from how many there are: so it has a table for each size.
"""

from collections.abc import Iterator

from jaxadapt.keymaps.families.maxtext import table
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

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


_OURS = "decoder.layers_{l}."


def _layer(
    kind: str = "",
    every: tuple[int, int] = (1, 0),
    scale: tuple[str, float] | None = None,
    at: str = _OURS,
    to: str = _HF,
) -> Iterator[Weight]:
    attention = f"{at}self_attention{kind}."
    yield Weight(
        f"{attention}query.kernel", f"{to}self_attn.q_proj.weight", "d n h -> (n h) d", scale=scale, layers=every
    )
    for name in ("key", "value"):
        ours, key = f"{attention}{name}.kernel", f"{to}self_attn.{name[0]}_proj.weight"
        yield Weight(ours, key, "d k h -> (k h) d", layers=every)
    yield Weight(f"{attention}out.kernel", f"{to}self_attn.o_proj.weight", "n h d -> d (n h)", layers=every)
    for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        yield Weight(f"{at}mlp{kind}.{a}.kernel", f"{to}mlp.{b}_proj.weight", "i o -> o i", layers=every)
    for a, b in _NORMS:
        yield Weight(f"{at}{a}{kind}.scale", f"{to}{b}.weight", "d -> d", shift=1.0, layers=every)


def _third(every: tuple[int, int] = (1, 0), at: str = _OURS, to: str = _HF) -> Iterator[Weight]:
    """A layer of Gemma 3, which norms queries and keys."""
    yield from _layer("", every, None, at, to)
    for name in ("query", "key"):
        ours, key = f"{at}self_attention.{name}_norm.scale", f"{to}self_attn.{name[0]}_norm.weight"
        yield Weight(ours, key, "h -> h", shift=1.0, layers=every)


_TWO = (*_layer("_local", (2, 0), ("h", -0.5)), *_layer("_global", (2, 1), ("h", -0.5)))
GEMMA2 = table("gemma2", _TWO, needs=tuple(w.leaf for w in _TWO if w.shift), shared=_TOP)
_ONE = tuple(_third())
GEMMA3 = table("gemma3", _ONE, needs=tuple(w.leaf for w in _ONE if w.shift), shared=_TOP)


def _blocks(size: str, layers: int) -> KeyMap:
    """Stacked: one layer for each place in a block of six, and the rest as they are."""
    count, rest = divmod(layers, 6)
    blocks = [tuple(_third((6, place), f"{_OURS}layers_{place}.")) for place in range(6)]
    lines = [w for block in blocks for w in block]
    for place in range(rest):
        to = _HF.replace("{l}", str(6 * count + place))
        lines += _third((1, 0), f"decoder.layers_remainder.layers_{place}.", to)
    needs = tuple(w.leaf for w in lines)
    return table(f"gemma3-{size}", lines, needs, shared=_TOP, counts=tuple((block[0].leaf, count) for block in blocks))


GEMMA3_4B, GEMMA3_12B, GEMMA3_27B = _blocks("4b", 34), _blocks("12b", 48), _blocks("27b", 62)
