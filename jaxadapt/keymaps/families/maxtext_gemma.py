"""Gemma 2 and 3 of MaxText (maxtext 0.2.5). Its norms store 1 + w, and its embeddings include the factor √d.

A layer of its Gemma 2 is two PyTorch layers, a local one and a global one, and its queries include the factor
1/√head_dim (also in the 27B, where PyTorch uses another factor). A stacked Gemma 3 has blocks of six layers and a
remainder. The layer numbers of the remainder depend on the number of blocks, so each size has its own keymap.
"""

from collections.abc import Iterator

from jaxadapt.keymaps.families.maxtext import make_keymap
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
    layers: tuple[int, int] = (1, 0),
    scale: tuple[str, float] | None = None,
    prefix: str = _OURS,
    torch_prefix: str = _HF,
) -> Iterator[Weight]:
    attention = f"{prefix}self_attention{kind}."
    query, q_proj = f"{attention}query.kernel", f"{torch_prefix}self_attn.q_proj.weight"
    yield Weight(query, q_proj, "d n h -> (n h) d", scale=scale, layers=layers)
    for name in ("key", "value"):
        ours, key = f"{attention}{name}.kernel", f"{torch_prefix}self_attn.{name[0]}_proj.weight"
        yield Weight(ours, key, "d k h -> (k h) d", layers=layers)
    yield Weight(f"{attention}out.kernel", f"{torch_prefix}self_attn.o_proj.weight", "n h d -> d (n h)", layers=layers)
    for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        yield Weight(f"{prefix}mlp{kind}.{a}.kernel", f"{torch_prefix}mlp.{b}_proj.weight", "i o -> o i", layers=layers)
    for a, b in _NORMS:
        yield Weight(f"{prefix}{a}{kind}.scale", f"{torch_prefix}{b}.weight", "d -> d", shift=1.0, layers=layers)


def _gemma3_layer(layers: tuple[int, int] = (1, 0), prefix: str = _OURS, torch_prefix: str = _HF) -> Iterator[Weight]:
    """Yield the entries of a Gemma 3 layer, which also has norms of queries and keys."""
    yield from _layer("", layers, None, prefix, torch_prefix)
    for name in ("query", "key"):
        ours, key = f"{prefix}self_attention.{name}_norm.scale", f"{torch_prefix}self_attn.{name[0]}_norm.weight"
        yield Weight(ours, key, "h -> h", shift=1.0, layers=layers)


_GEMMA2_LAYERS = (*_layer("_local", (2, 0), ("h", -0.5)), *_layer("_global", (2, 1), ("h", -0.5)))
GEMMA2 = make_keymap("gemma2", _GEMMA2_LAYERS, needs=tuple(w.leaf for w in _GEMMA2_LAYERS if w.shift), shared=_TOP)
_GEMMA3_LAYER = tuple(_gemma3_layer())
GEMMA3 = make_keymap("gemma3", _GEMMA3_LAYER, needs=tuple(w.leaf for w in _GEMMA3_LAYER if w.shift), shared=_TOP)


def _blocks(size: str, layers: int) -> KeyMap:
    """Return the keymap of a stacked Gemma 3: one layer for each position in a block of six, and the remainder."""
    count, remainder = divmod(layers, 6)
    blocks = [tuple(_gemma3_layer((6, place), f"{_OURS}layers_{place}.")) for place in range(6)]
    entries = [w for block in blocks for w in block]
    for place in range(remainder):
        torch_prefix = _HF.replace("{l}", str(6 * count + place))
        entries += _gemma3_layer((1, 0), f"decoder.layers_remainder.layers_{place}.", torch_prefix)
    needs = tuple(w.leaf for w in entries)
    counts = tuple((block[0].leaf, count) for block in blocks)
    return make_keymap(f"gemma3-{size}", entries, needs, shared=_TOP, counts=counts)


GEMMA3_4B, GEMMA3_12B, GEMMA3_27B = _blocks("4b", 34), _blocks("12b", 48), _blocks("27b", 62)
