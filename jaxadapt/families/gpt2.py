"""GPT-2 under Hugging Face's names, with the transposed Conv1D kernel (out, in) of transformers' Flax classes.

PyTorch's Conv1D stores (in, out), so PEFT sets `fan_in_fan_out`; its LoRA files keep A (r, in), B (out, r). A model
with these names and `nn.Dense` holds the kernels the other way round, and is none of this family: `same` tells.
"""

from jaxadapt.families.spellings import bare
from jaxadapt.keymap import KeyMap
from jaxadapt.weight import Weight

_LAYER = "transformer.h.{l}."
_CONV = {"attn.c_attn": "o d -> d o", "attn.c_proj": "d o -> o d", "mlp.c_fc": "f d -> d f", "mlp.c_proj": "d f -> f d"}
_NORMS = ("ln_1", "ln_2")

GPT2 = KeyMap(
    "gpt2",
    (
        Weight("transformer.wte.embedding", "transformer.wte.weight", "v d -> v d", kind="embedding"),
        Weight("transformer.wpe.embedding", "transformer.wpe.weight", "p d -> p d", kind="embedding"),
        *(Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", p, fan_in_fan_out=True) for m, p in _CONV.items()),
        *(Weight(f"{_LAYER}{m}.bias", f"{_LAYER}{m}.bias", "o -> o") for m in (*_CONV, *_NORMS)),
        *(Weight(f"{_LAYER}{m}.scale", f"{_LAYER}{m}.weight", "d -> d") for m in _NORMS),
        Weight("transformer.ln_f.scale", "transformer.ln_f.weight", "d -> d"),
        Weight("transformer.ln_f.bias", "transformer.ln_f.bias", "d -> d"),
        Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
    ),
    output="lm_head",
    needs=(f"{_LAYER}attn.c_attn.kernel",),  # the others may be square
    same=("d",),
    tied=(("lm_head.weight", "transformer.wte.weight"),),
    buffers=("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias"),
    spellings=bare("transformer."),
)
