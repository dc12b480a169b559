"""GPT-2, GPT-Neo and GPT-J under Hugging Face's names (transformers' Flax classes).

PyTorch's Conv1D, which GPT-2 uses, stores (in, out), so PEFT sets `fan_in_fan_out`; its LoRA files have A (r, in) and
B (out, r). transformers' Flax classes store its kernels as (out, in), other models as (in, out). The two keymaps have
the same names. The sizes distinguish a kernel from its transpose: the axis "d" has one size (`same`).
"""

from jaxadapt.keymaps.families import entries
from jaxadapt.keymaps.families.entries import FROM, INTO, bare, dense, embeddings, norms
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_LAYER = "transformer.h.{l}."
_TIED = (("lm_head.weight", "transformer.wte.weight"),)

# ---------------------------------------------------------------- gpt-2


_TURNED = {"attn.c_attn": "o d", "attn.c_proj": "d o", "mlp.c_fc": "f d", "mlp.c_proj": "d f"}
_STRAIGHT = {module: " ".join(reversed(axes.split())) for module, axes in _TURNED.items()}
_GPT2_NORMS = ("ln_1", "ln_2")


def _gpt2(name: str, kernels: dict[str, str]) -> KeyMap:
    return KeyMap(
        name,
        (
            Weight("transformer.wte.embedding", "transformer.wte.weight", "v d -> v d", kind="embedding"),
            Weight("transformer.wpe.embedding", "transformer.wpe.weight", "p d -> p d", kind="embedding"),
            *(
                Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", f"{axes} -> {_STRAIGHT[m]}", fan_in_fan_out=True)
                for m, axes in kernels.items()
            ),
            *(Weight(f"{_LAYER}{m}.bias", f"{_LAYER}{m}.bias", "o -> o") for m in (*kernels, *_GPT2_NORMS)),
            *(Weight(f"{_LAYER}{m}.scale", f"{_LAYER}{m}.weight", "d -> d") for m in _GPT2_NORMS),
            Weight("transformer.ln_f.scale", "transformer.ln_f.weight", "d -> d"),
            Weight("transformer.ln_f.bias", "transformer.ln_f.bias", "d -> d"),
            Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
        ),
        output="lm_head",
        order=entries.GPT_ORDER,
        needs=(f"{_LAYER}attn.c_attn.kernel",),  # the others may be square
        same=("d",),
        tied=_TIED,
        buffers=("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias"),
        spellings=bare("transformer."),
    )


GPT2 = _gpt2("gpt2", _TURNED)
GPT2_DENSE = _gpt2("gpt2-dense", _STRAIGHT)

# ---------------------------------------------------------------- gpt-neo and gpt-j

_PROJ = ("q_proj", "k_proj", "v_proj")

GPT_NEO = KeyMap(
    "gpt_neo",
    (
        *embeddings("transformer.wte", "transformer.wpe"),
        *dense(*(f"{_LAYER}attn.attention.{p}" for p in _PROJ), bias=False, axes=FROM),
        *dense(f"{_LAYER}mlp.c_fc", axes=FROM),
        *dense(f"{_LAYER}attn.attention.out_proj", f"{_LAYER}mlp.c_proj", axes=INTO),
        *norms(f"{_LAYER}ln_1", f"{_LAYER}ln_2", "transformer.ln_f"),
        *dense("lm_head", bias=False),
    ),
    output="lm_head",
    order=entries.GPT_ORDER,
    same=("m",),
    needs=(f"{_LAYER}attn.attention.q_proj.kernel",),  # the other names of a layer are those of GPT-2 with nn.Dense
    tied=_TIED,
    buffers=("transformer.h.{l}.attn.attention.bias", "transformer.h.{l}.attn.attention.masked_bias"),
    spellings=bare("transformer."),
)

GPTJ = KeyMap(
    "gptj",
    (
        *embeddings("transformer.wte"),
        *dense(*(f"{_LAYER}attn.{p}" for p in _PROJ), bias=False, axes=FROM),
        *dense(f"{_LAYER}attn.out_proj", bias=False, axes=INTO),
        *dense(f"{_LAYER}mlp.fc_in", axes=FROM),
        *dense(f"{_LAYER}mlp.fc_out", axes=INTO),
        *norms(f"{_LAYER}ln_1", "transformer.ln_f"),
        *dense("lm_head"),
    ),
    output="lm_head",
    order=entries.GPT_ORDER,
    same=("m",),
    tied=_TIED,
    buffers=("transformer.h.{l}.attn.bias", "transformer.h.{l}.attn.masked_bias"),
    spellings=bare("transformer."),
)
