"""Llama, Mistral, Qwen 2 and 3, and the mixtures of experts of keras-hub, with the names of keras-hub 0.32.

A leaf is the `path` of a variable, with dots in place of slashes. Heads are separate axes. `load`, `merge` and
`import_base` accept such a tree.

All experts of a layer are in one array. Mixtral has gate and up in two arrays, Qwen in one. keras-hub gives the block
of experts no name, so Keras numbers all blocks of a process: "mixtral_sparse_moe_block", "mixtral_sparse_moe_block_1",
and so on, also in the next model. `{path}` in an entry stands for the end of this name.
"""

from collections.abc import Iterable

from jaxadapt.keymaps.families import (
    EACH_MIXTRAL,
    EACH_QWEN3,
    LAYER,
    KeyMap,
    Modules,
    Weight,
    decoder_keymap,
    layer_norms,
)

_OURS = "transformer_layer_{l}."
_HEADS = ("query", "key", "value")
_MLP = (("gate", "gate"), ("intermediate", "up"), ("output", "down"))


def _mlp(ours: str = "", theirs: str = "mlp.") -> Iterable[Weight]:
    """Return the kernels of a feed-forward block, with the prefixes of its names."""
    return (
        Weight(f"{_OURS}{ours}feedforward_{a}_dense.kernel", f"{LAYER}{theirs}{b}_proj.weight", "i o -> o i")
        for a, b in _MLP
    )


def _experts(model: str, leaf: str, parameter: str, axes: str = "m f") -> Weight:
    """Return the entry of one array of experts; `axes` are the inputs and the outputs."""
    inputs, out = axes.split()
    return Weight(
        f"{_OURS}{model}_sparse_moe_{{path}}.experts.expert_feedforward_{leaf}_dense",
        f"{LAYER}mlp.experts.{parameter}",
        f"e {inputs} {out} -> e {out} {inputs}",
        kind="experts",
    )


def _router(model: str) -> Weight:
    leaf = f"{_OURS}{model}_sparse_moe_{{path}}.sparse_feedforward_gate_dense.kernel"
    return Weight(leaf, f"{LAYER}mlp.gate.weight", "d e -> e d", kind="parameter")


def _qwen_experts(model: str) -> tuple[Weight, ...]:
    return (
        _router(model),
        _experts(model, "gate", "gate_up_proj"),
        _experts(model, "output", "down_proj", "f m"),
    )


def _keymap(
    name: str, mlp: Iterable[Weight], own: Iterable[Weight] = (), needs: str = "", expert_modules: Modules = ()
) -> KeyMap:
    """Return the keymap of a model.

    Args:
        name: the model.
        mlp: the entries of its feed-forward layers.
        own: further entries, which a model must have to be recognized.
        needs: the model's name in the blocks of experts, if it must have them.
        expert_modules: the names of single experts.
    """
    norms = (("self_attention_layernorm", "input_layernorm"), ("feedforward_layernorm", "post_attention_layernorm"))
    own = (*layer_norms(_OURS, norms), *own)
    entries = (
        Weight("token_embedding.embeddings", "model.embed_tokens.weight", "v d -> v d", kind="embedding"),
        *(
            Weight(f"{_OURS}self_attention.{p}.kernel", f"{LAYER}self_attn.{p[0]}_proj.weight", "d n h -> (n h) d")
            for p in _HEADS
        ),
        Weight(f"{_OURS}self_attention.attention_output.kernel", f"{LAYER}self_attn.o_proj.weight", "n h d -> d (n h)"),
        *mlp,
        *own,
        Weight("token_embedding.reverse_embeddings", "lm_head.weight", "d v -> v d"),
        Weight("sequence_output_layernorm.scale", "model.norm.weight", "d -> d"),
    )
    needed = (*own, *((_experts(needs, "output", "down_proj", "f m"),) if needs else ()))
    needed_leaves = tuple(w.leaf for w in needed)
    return decoder_keymap(f"keras:{name}", entries, complete=True, needs=needed_leaves, expert_modules=expert_modules)


_NORMS = layer_norms(
    _OURS, ((f"self_attention.{p}_dense_layernorm", f"self_attn.{p[0]}_norm") for p in ("query", "key")), "h"
)
_BIASES = tuple(
    Weight(f"{_OURS}self_attention.{p}.bias", f"{LAYER}self_attn.{p[0]}_proj.bias", "n h -> (n h)") for p in _HEADS
)

LLAMA = _keymap("llama", _mlp())
QWEN2 = _keymap("qwen2", _mlp(), _BIASES)
QWEN3 = _keymap("qwen3", _mlp(), _NORMS)
MIXTRAL = _keymap(
    "mixtral",
    (
        _router("mixtral"),
        _experts("mixtral", "gate", "gate_up_proj[f 0/2]"),
        _experts("mixtral", "intermediate", "gate_up_proj[f 1/2]"),
        _experts("mixtral", "output", "down_proj", "f m"),
    ),
    needs="mixtral",
    expert_modules=EACH_MIXTRAL,
)
QWEN_MOE = _keymap(
    "qwen_moe",
    (
        *_qwen_experts("qwen"),
        *_mlp("qwen_sparse_moe_{path}.shared_expert_dense.", "mlp.shared_expert."),
        Weight(
            f"{_OURS}qwen_sparse_moe_{{path}}.shared_expert_gate_dense.kernel",
            f"{LAYER}mlp.shared_expert_gate.weight",
            "i o -> o i",
        ),
    ),
    _BIASES,
    needs="qwen",
    expert_modules=EACH_QWEN3,
)
QWEN3_MOE = _keymap(
    "qwen3_moe",
    (*_qwen_experts("qwen3"), *_mlp("qwen3_moe_{path}.")),  # some layers may have no experts
    _NORMS,
    needs="qwen3",
    expert_modules=EACH_QWEN3,
)
