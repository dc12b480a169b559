"""Models of EasyDeL (easydel 0.3.0, NNX): Hugging Face's names, except that the scale of a norm is called kernel.

"easydel:llama" is for dense decoders with Llama's layer names: Mistral, Qwen 2 and 3, Gemma, EXAONE 4, SmolLM 3, Phi 3.
"""

from jaxadapt.keymaps.families.entries import FROM, INTO, biases, decoder_keymap, dense, embeddings
from jaxadapt.keymaps.weight import Weight

_LAYER = "model.layers.{l}."
_ATTENTION = tuple(f"{_LAYER}self_attn.{p}_proj" for p in ("q", "k", "v", "qkv", "o"))
_MLP = tuple(f"{_LAYER}mlp.{p}_proj" for p in ("gate", "up", "gate_up", "down"))
_OUT = (f"{_LAYER}self_attn.o_proj", f"{_LAYER}mlp.down_proj")
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    *("self_attn.q_norm", "self_attn.k_norm"),
)


def _norms(*modules: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"{m}.kernel", f"{m}.weight", "d -> d") for m in modules)


_ENTRIES = (
    *embeddings("model.embed_tokens"),
    *dense(*(m for m in (*_ATTENTION, *_MLP) if m not in _OUT), bias=False, axes=FROM),
    *dense(*_OUT, bias=False, axes=INTO),
    *dense("lm_head", bias=False),
    *biases(_ATTENTION),
    *_norms(*(_LAYER + n for n in _NORMS), "model.norm"),
)

LLAMA = decoder_keymap(
    "easydel:llama",
    _ENTRIES,
    complete=True,
    same=("m",),
    needs=("model.norm.kernel",),
)
