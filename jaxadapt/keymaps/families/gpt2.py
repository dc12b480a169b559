"""GPT-2 under Hugging Face's names, with kernels (out, in) as in transformers' Flax classes, or (in, out).

PyTorch's Conv1D stores (in, out), so PEFT sets `fan_in_fan_out`; its LoRA files have A (r, in) and B (out, r). The two
keymaps have the same names. The sizes distinguish a kernel from its transpose: the axis "d" has one size (`same`).
"""

from jaxadapt.keymaps.families import entries
from jaxadapt.keymaps.families.entries import bare
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_LAYER = "transformer.h.{l}."
_TURNED = {"attn.c_attn": "o d", "attn.c_proj": "d o", "mlp.c_fc": "f d", "mlp.c_proj": "d f"}
_DENSE = {module: " ".join(reversed(axes.split())) for module, axes in _TURNED.items()}
_NORMS = ("ln_1", "ln_2")


def _keymap(name: str, kernels: dict[str, str]) -> KeyMap:
    return KeyMap(
        name,
        (
            Weight("transformer.wte.embedding", "transformer.wte.weight", "v d -> v d", kind="embedding"),
            Weight("transformer.wpe.embedding", "transformer.wpe.weight", "p d -> p d", kind="embedding"),
            *(
                Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", f"{axes} -> {_DENSE[m]}", fan_in_fan_out=True)
                for m, axes in kernels.items()
            ),
            *(Weight(f"{_LAYER}{m}.bias", f"{_LAYER}{m}.bias", "o -> o") for m in (*kernels, *_NORMS)),
            *(Weight(f"{_LAYER}{m}.scale", f"{_LAYER}{m}.weight", "d -> d") for m in _NORMS),
            Weight("transformer.ln_f.scale", "transformer.ln_f.weight", "d -> d"),
            Weight("transformer.ln_f.bias", "transformer.ln_f.bias", "d -> d"),
            Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
        ),
        output="lm_head",
        order=entries.GPT_ORDER,
        needs=(f"{_LAYER}attn.c_attn.kernel",),  # the others may be square
        same=("d",),
        tied=(("lm_head.weight", "transformer.wte.weight"),),
        buffers=("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias"),
        spellings=bare("transformer."),
    )


GPT2 = _keymap("gpt2", _TURNED)
GPT2_DENSE = _keymap("gpt2-dense", _DENSE)
