"""GPT-Neo and GPT-J under Hugging Face's names (transformers' Flax classes)."""

from jaxadapt.keymaps.families import entries
from jaxadapt.keymaps.families.entries import FROM, INTO, bare, dense, embeddings, norms
from jaxadapt.keymaps.keymap import KeyMap

_LAYER = "transformer.h.{l}."
_PROJ = ("q_proj", "k_proj", "v_proj")
_TIED = (("lm_head.weight", "transformer.wte.weight"),)

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
