"""Gemma 1, 2 and 3 of keras-hub, with the names of keras-hub 0.32. Heads are the first axis of the attention kernels.

Gemma 2 and 3 have norms after the attention and the feed-forward layer. The norm before the feed-forward layer has
another name in PyTorch's Gemma 1. Gemma 3 also has norms of queries and keys, and its keymap needs them.
"""

from jaxadapt.keymaps.families import LAYER, KeyMap, Names, Weight, decoder_keymap, layer_norms

_BLOCK = "decoder_block_{l}."
_FFW = (("ffw_gating", "gate"), ("ffw_gating_2", "up"), ("ffw_linear", "down"))


def _keymap(name: str, norms: Names) -> KeyMap:
    norms = tuple(norms)
    entries = (
        Weight("token_embedding.embeddings", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(
            Weight(f"{_BLOCK}attention.{p}.kernel", f"{LAYER}self_attn.{p[0]}_proj.weight", "n d h -> (n h) d")
            for p in ("query", "key", "value")
        ),
        Weight(f"{_BLOCK}attention.attention_output.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *(Weight(f"{_BLOCK}{a}.kernel", f"{LAYER}mlp.{b}_proj.weight", "i o -> o i") for a, b in _FFW),
        *layer_norms(_BLOCK, norms),
        Weight("final_normalization.scale", "model.norm.weight", "d -> d"),
    )
    return decoder_keymap(f"keras:{name}", entries, complete=True, needs=tuple(f"{_BLOCK}{a}.scale" for a, _ in norms))


_BOTH_SIDES = (
    ("pre_attention_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("pre_ffw_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
GEMMA = _keymap("gemma", (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm")))
GEMMA2 = _keymap("gemma2", _BOTH_SIDES)
GEMMA3 = _keymap(
    "gemma3",
    (*_BOTH_SIDES, ("attention.query_norm", "self_attn.q_norm"), ("attention.key_norm", "self_attn.k_norm")),
)
