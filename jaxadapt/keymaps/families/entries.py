"""Parts that several families share, so that no family's file imports another's.

The entries are of Flax's built-in layers (kernels, norms, embeddings), for keymaps whose paths are PyTorch's names.
The spellings are other prefixes of the same keys in PyTorch, for `KeyMap.spellings`. The orders are those of the linear
layers and embeddings in PyTorch's classes, for `KeyMap.order`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

# ---------------------------------------------------------------- flax entries


FROM, INTO = "m o", "i m"
"""Axes of kernels that read the residual stream, and of kernels that write to it; `same=("m",)` distinguishes them."""


def dense(*modules: str, bias: bool = True, axes: str = "i o") -> tuple[Weight, ...]:
    """Return the entries of `nn.Dense` modules; with `bias`, the model may have biases or not."""
    inputs, out = axes.split()
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{axes} -> {out} {inputs}") for m in modules)
    return (*kernels, *biases(modules)) if bias else tuple(kernels)


def biases(modules: Iterable[str]) -> tuple[Weight, ...]:
    """Return the entries of the biases of these modules."""
    return tuple(Weight(f"{m}.bias", f"{m}.bias", "o -> o") for m in modules)


def norms(*modules: str) -> tuple[Weight, ...]:
    """Return the entries of `nn.LayerNorm` modules."""
    return (*(Weight(f"{m}.scale", f"{m}.weight", "d -> d") for m in modules), *biases(modules))


def embeddings(*modules: str) -> tuple[Weight, ...]:
    """Return the entries of `nn.Embed` modules."""
    return tuple(Weight(f"{m}.embedding", f"{m}.weight", "v d -> v d", kind="embedding") for m in modules)


def convs(*modules: str, window: str = "h w") -> tuple[Weight, ...]:
    """Return the entries of `nn.Conv` modules, whose window axes are first in Flax and last in PyTorch."""
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{window} i o -> o i {window}", kind="conv") for m in modules)
    return (*kernels, *biases(modules))


# ---------------------------------------------------------------- spellings


VISION_LANGUAGE = (
    ("vl", (("model.", "model.language_model."),)),  # since transformers 4.52, as in Gemma3ForConditionalGeneration
    ("vl4", (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))),  # before transformers 4.52
)
"""The spellings of the language model in a vision-language model."""


def bare(prefix: str) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return the spelling of a model without its head, for which transformers omits the prefix."""
    return (("bare", ((prefix, ""),)),)


# ---------------------------------------------------------------- module orders


DECODER_ORDER = (
    *("model", "lm_head", "embed_tokens", "layers", "self_attn", "mlp"),
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
"""Llama and the models after it."""

KEYS_FIRST_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")
"""Attention layers that create the projection of the keys first."""


# ---------------------------------------------------------------- decoders


LAYER = "model.layers.{l}."
"""The prefix of a layer's names in PyTorch."""

Names = Iterable[tuple[str, str]]
"""Pairs of a module's name in JAX and in PyTorch."""


def layer_kernels(*modules: str) -> tuple[Weight, ...]:
    """Return the kernels of a decoder's layer, which read the residual stream or write to it."""
    axes = {"o_proj": INTO, "down_proj": INTO, "q_b_proj": "r o", "kv_b_proj": "r o"}
    pairs = ((f"{LAYER}{m}", axes.get(m.rpartition(".")[2], FROM)) for m in modules)
    return tuple(kernel for m, pattern in pairs for kernel in dense(m, bias=False, axes=pattern))


def layer_norms(layer: str, names: Names, axis: str = "d", leaf: str = "scale") -> tuple[Weight, ...]:
    """Return the entries of a layer's norms; `layer` is the prefix of its names in JAX."""
    return tuple(Weight(f"{layer}{a}.{leaf}", f"{LAYER}{b}.weight", f"{axis} -> {axis}") for a, b in names)


def decoder_keymap(name: str, weights: Iterable[Weight], **fields: Any) -> KeyMap:
    """Return the keymap of a decoder that has Llama's modules in PyTorch; `fields` are further fields of `KeyMap`."""
    return KeyMap(
        name,
        tuple(weights),
        output="lm_head",
        order=DECODER_ORDER,
        tied=(("lm_head.weight", "model.embed_tokens.weight"),),
        spellings=(*VISION_LANGUAGE, *bare("model.")),
        **fields,
    )


Modules = tuple[tuple[str, tuple[str, ...]], ...]
"""`KeyMap.expert_modules`: parameters of all experts, each with the names of its parts as modules of single experts."""


def single_expert_names(block: str, wide: tuple[str, str], down: str, router: str = "") -> Modules:
    """Return the names of single experts in transformers 4 (gate, up and down of `block`) and of the router."""
    expert = f"{LAYER}{block}.experts.{{e}}."
    names = (
        (f"{LAYER}mlp.experts.gate_up_proj", tuple(expert + name for name in wide)),
        (f"{LAYER}mlp.experts.down_proj", (expert + down,)),
    )
    return (*names, (f"{LAYER}mlp.gate.weight", (f"{LAYER}{router}",))) if router else names


EACH_MIXTRAL = single_expert_names("block_sparse_moe", ("w1", "w3"), "w2", "block_sparse_moe.gate")
EACH_QWEN3 = single_expert_names("mlp", ("gate_proj", "up_proj"), "down_proj", "mlp.gate")
EACH_DEEPSEEK = single_expert_names("mlp", ("gate_proj", "up_proj"), "down_proj")
