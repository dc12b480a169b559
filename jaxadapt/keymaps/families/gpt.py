"""GPT-2, GPT-Neo and GPT-J under Hugging Face's names (transformers' Flax classes).

PyTorch's Conv1D, which GPT-2 uses, stores (in, out), so PEFT sets `fan_in_fan_out`; its LoRA files have A (r, in) and
B (out, r). transformers' Flax classes store its kernels as (out, in), other models as (in, out). The two keymaps have
the same names. The sizes distinguish a kernel from its transpose: the axis "d" has one size (`same`).
"""

from jaxadapt.keymaps.families import (
    FROM,
    INTO,
    KEYS_FIRST_ORDER,
    KeyMap,
    Weight,
    bare,
    biases,
    dense,
    embeddings,
    norms,
)

_LAYER = "transformer.h.{l}."
_TURNED = {"attn.c_attn": "o d", "attn.c_proj": "d o", "mlp.c_fc": "f d", "mlp.c_proj": "d f"}
_STRAIGHT = {module: " ".join(reversed(axes.split())) for module, axes in _TURNED.items()}
_PROJ = ("q_proj", "k_proj", "v_proj")


def _keymap(
    name: str, weights: tuple[Weight, ...], same: str = "m", attention: str = "attn", needs: tuple[str, ...] = ()
) -> KeyMap:
    return KeyMap(
        name,
        weights,
        output="lm_head",
        order=(
            *("transformer", "lm_head", "wte", "wpe", "h", "attn", "mlp"),
            *("c_attn", *KEYS_FIRST_ORDER, "c_fc", "c_proj", "fc_in", "fc_out"),
        ),
        needs=needs,
        same=(same,),
        tied=(("lm_head.weight", "transformer.wte.weight"),),
        buffers=(f"{_LAYER}{attention}.bias", f"{_LAYER}{attention}.masked_bias"),
        spellings=bare("transformer."),
    )


def _gpt2(name: str, kernels: dict[str, str]) -> KeyMap:
    layer_norms = ("ln_1", "ln_2")
    return _keymap(
        name,
        (
            Weight("transformer.wte.embedding", "transformer.wte.weight", "v d -> v d", kind="embedding"),
            Weight("transformer.wpe.embedding", "transformer.wpe.weight", "p d -> p d", kind="embedding"),
            *(
                Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", f"{axes} -> {_STRAIGHT[m]}", fan_in_fan_out=True)
                for m, axes in kernels.items()
            ),
            *biases(f"{_LAYER}{m}" for m in (*kernels, *layer_norms)),
            *(Weight(f"{_LAYER}{m}.scale", f"{_LAYER}{m}.weight", "d -> d") for m in layer_norms),
            Weight("transformer.ln_f.scale", "transformer.ln_f.weight", "d -> d"),
            Weight("transformer.ln_f.bias", "transformer.ln_f.bias", "d -> d"),
            Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
        ),
        needs=(f"{_LAYER}attn.c_attn.kernel",),  # the others may be square
        same="d",
    )


GPT2 = _gpt2("gpt2", _TURNED)
GPT2_DENSE = _gpt2("gpt2-dense", _STRAIGHT)

GPT_NEO = _keymap(
    "gpt_neo",
    (
        *embeddings("transformer.wte", "transformer.wpe"),
        *dense(*(f"{_LAYER}attn.attention.{p}" for p in _PROJ), bias=False, axes=FROM),
        *dense(f"{_LAYER}mlp.c_fc", axes=FROM),
        *dense(f"{_LAYER}attn.attention.out_proj", f"{_LAYER}mlp.c_proj", axes=INTO),
        *norms(f"{_LAYER}ln_1", f"{_LAYER}ln_2", "transformer.ln_f"),
        *dense("lm_head", bias=False),
    ),
    attention="attn.attention",
    needs=(f"{_LAYER}attn.attention.q_proj.kernel",),  # the other names of a layer are those of GPT-2 with nn.Dense
)

GPTJ = _keymap(
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
)
