"""Models under Hugging Face's names: those of transformers' Flax classes, and mixtures of experts of others.

Llama's keymap is also for Mistral, Qwen 2, Qwen 3 and similar models.

PyTorch's Conv1D, which GPT-2 uses, stores (in, out), so PEFT sets `fan_in_fan_out`; its LoRA files have A (r, in) and
B (out, r). transformers' Flax classes store its kernels as (out, in), other models as (in, out). The two keymaps have
the same names. The sizes distinguish a kernel from its transpose: the axis "d" has one size (`same`).

The names of BERT's, RoBERTa's and ViT's encoders start with "bert.", "roberta." and "vit." in a model with a head, and
have no prefix in one without. ViT has PyTorch's names since transformers 5; "vit/v4" has the earlier names. Model files
use the earlier names, also when transformers 5 writes them. Adapters use the names of the transformers version that
they were trained with.

In the mixtures of experts (Mixtral, Qwen 3 MoE, GPT-OSS, Llama 4, DeepSeek V3), as in transformers 5, all experts of a
layer are in one array, (expert, in, out), with gate and up concatenated (GPT-OSS: interleaved). PyTorch stores (expert,
out, in), except for GPT-OSS and Llama 4, which store (expert, in, out). PEFT reads this from a module's
`is_transposed`, which only GPT-OSS has. A of a Llama 4 adapter is therefore on the outputs, and the entries follow
PEFT. Routers are parameters of separate classes, not of nn.Linear.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxadapt.keymaps.families.entries import (
    EACH_DEEPSEEK,
    EACH_MIXTRAL,
    EACH_QWEN3,
    FROM,
    INTO,
    KEYS_FIRST_ORDER,
    Modules,
    bare,
    biases,
    convs,
    decoder_keymap,
    dense,
    embeddings,
    norms,
)
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

# ---------------------------------------------------------------- llama


_LAYER = "model.layers.{l}."
_QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")


def _kernels(*modules: str) -> tuple[Weight, ...]:
    """Return the kernels of a decoder's layer, which read the residual stream or write to it."""
    patterns = [
        "i m -> m i"
        if m.endswith((".o_proj", "down_proj"))
        else "r o -> o r"
        if m.endswith("_b_proj")
        else "m o -> o m"
        for m in modules
    ]
    pairs = zip(modules, patterns, strict=True)
    return tuple(Weight(f"{_LAYER}{m}.kernel", f"{_LAYER}{m}.weight", pattern) for m, pattern in pairs)


def _layer_norms(*modules: str, axis: str = "d") -> tuple[Weight, ...]:
    return tuple(Weight(f"{_LAYER}{m}.weight", f"{_LAYER}{m}.weight", f"{axis} -> {axis}") for m in modules)


_LAYER_MODULES = (*_QKVO, *(f"mlp.{p}" for p in _MLP))
_TOKENS = embeddings("model.embed_tokens")
_BLOCK_NORMS = _layer_norms("input_layernorm", "post_attention_layernorm")
_ENDS = (
    Weight("model.norm.weight", "model.norm.weight", "d -> d"),
    Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
)

LLAMA = decoder_keymap(
    "llama",
    (
        *_TOKENS,
        *_kernels(*_LAYER_MODULES),
        *biases(f"{_LAYER}{m}" for m in _LAYER_MODULES),
        *_BLOCK_NORMS,
        *_layer_norms(*_QK_NORMS, axis="h"),
        *_ENDS,
    ),
    same=("m",),
)

# ---------------------------------------------------------------- gpt


_GPT = "transformer.h.{l}."
_GPT_FIELDS: dict[str, Any] = {
    "output": "lm_head",
    "order": (
        *("transformer", "lm_head", "wte", "wpe", "h", "attn", "mlp"),
        *("c_attn", *KEYS_FIRST_ORDER, "c_fc", "c_proj", "fc_in", "fc_out"),
    ),
    "tied": (("lm_head.weight", "transformer.wte.weight"),),
    "spellings": bare("transformer."),
}
_TURNED = {"attn.c_attn": "o d", "attn.c_proj": "d o", "mlp.c_fc": "f d", "mlp.c_proj": "d f"}
_STRAIGHT = {module: " ".join(reversed(axes.split())) for module, axes in _TURNED.items()}
_GPT_PROJ = ("q_proj", "k_proj", "v_proj")


def _buffers(attention: str) -> tuple[str, ...]:
    return (f"{_GPT}{attention}.bias", f"{_GPT}{attention}.masked_bias")


def _gpt2(name: str, kernels: dict[str, str]) -> KeyMap:
    layer_norms = ("ln_1", "ln_2")
    return KeyMap(
        name,
        (
            Weight("transformer.wte.embedding", "transformer.wte.weight", "v d -> v d", kind="embedding"),
            Weight("transformer.wpe.embedding", "transformer.wpe.weight", "p d -> p d", kind="embedding"),
            *(
                Weight(f"{_GPT}{m}.kernel", f"{_GPT}{m}.weight", f"{axes} -> {_STRAIGHT[m]}", fan_in_fan_out=True)
                for m, axes in kernels.items()
            ),
            *biases(f"{_GPT}{m}" for m in (*kernels, *layer_norms)),
            *(Weight(f"{_GPT}{m}.scale", f"{_GPT}{m}.weight", "d -> d") for m in layer_norms),
            Weight("transformer.ln_f.scale", "transformer.ln_f.weight", "d -> d"),
            Weight("transformer.ln_f.bias", "transformer.ln_f.bias", "d -> d"),
            Weight("lm_head.kernel", "lm_head.weight", "d v -> v d"),
        ),
        needs=(f"{_GPT}attn.c_attn.kernel",),  # the others may be square
        same=("d",),
        buffers=_buffers("attn"),
        **_GPT_FIELDS,
    )


GPT2 = _gpt2("gpt2", _TURNED)
GPT2_DENSE = _gpt2("gpt2-dense", _STRAIGHT)

GPT_NEO = KeyMap(
    "gpt_neo",
    (
        *embeddings("transformer.wte", "transformer.wpe"),
        *dense(*(f"{_GPT}attn.attention.{p}" for p in _GPT_PROJ), bias=False, axes=FROM),
        *dense(f"{_GPT}mlp.c_fc", axes=FROM),
        *dense(f"{_GPT}attn.attention.out_proj", f"{_GPT}mlp.c_proj", axes=INTO),
        *norms(f"{_GPT}ln_1", f"{_GPT}ln_2", "transformer.ln_f"),
        *dense("lm_head", bias=False),
    ),
    same=("m",),
    needs=(f"{_GPT}attn.attention.q_proj.kernel",),  # the other names of a layer are those of GPT-2 with nn.Dense
    buffers=_buffers("attn.attention"),
    **_GPT_FIELDS,
)

GPTJ = KeyMap(
    "gptj",
    (
        *embeddings("transformer.wte"),
        *dense(*(f"{_GPT}attn.{p}" for p in _GPT_PROJ), bias=False, axes=FROM),
        *dense(f"{_GPT}attn.out_proj", bias=False, axes=INTO),
        *dense(f"{_GPT}mlp.fc_in", axes=FROM),
        *dense(f"{_GPT}mlp.fc_out", axes=INTO),
        *norms(f"{_GPT}ln_1", "transformer.ln_f"),
        *dense("lm_head"),
    ),
    same=("m",),
    buffers=_buffers("attn"),
    **_GPT_FIELDS,
)

# ---------------------------------------------------------------- bert


def _bert_encoder(prefix: str) -> tuple[Weight, ...]:
    layer = f"{prefix}encoder.layer.{{l}}."
    outputs = (f"{layer}attention.output", f"{layer}output")
    return (
        *embeddings(*(f"{prefix}embeddings.{p}_embeddings" for p in ("word", "position", "token_type"))),
        *dense(
            *(f"{layer}attention.self.{p}" for p in ("query", "key", "value")), f"{layer}intermediate.dense", axes=FROM
        ),
        *dense(*(f"{m}.dense" for m in outputs), axes=INTO),
        *dense(f"{prefix}pooler.dense"),
        *norms(*(f"{m}.LayerNorm" for m in (f"{prefix}embeddings", *outputs))),
    )


def _bert(name: str, heads: tuple[Weight, ...], output: str, bias: str) -> KeyMap:
    prefix = f"{name}."
    return KeyMap(
        name,
        (*_bert_encoder(prefix), *_bert_encoder(""), *heads, *dense("qa_outputs")),
        output=output,
        order=(
            *("bert", "roberta", "cls", "lm_head", "classifier", "qa_outputs", "embeddings", "encoder", "pooler"),
            *("layer", "word_embeddings", "attention", "self", "query", "key", "value"),
            *("intermediate", "output", "dense", "transform", "out_proj", "decoder"),
        ),
        same=("m",),
        tied=((f"{output}.weight", f"{prefix}embeddings.word_embeddings.weight"), (f"{output}.bias", bias)),
        buffers=(f"{prefix}embeddings.position_ids", "embeddings.position_ids"),
        spellings=bare(prefix),
    )


BERT = _bert(
    "bert",
    (
        *dense("cls.predictions.transform.dense"),
        *norms("cls.predictions.transform.LayerNorm"),
        Weight("cls.predictions.bias", "cls.predictions.bias", "v -> v"),
        Weight("cls.predictions.decoder.kernel", "cls.predictions.decoder.weight", "d v -> v d"),
        *dense("cls.seq_relationship"),
        *dense("classifier"),
    ),
    "cls.predictions.decoder",
    "cls.predictions.bias",
)

ROBERTA = _bert(
    "roberta",
    (
        *dense("lm_head.dense"),
        *norms("lm_head.layer_norm"),
        Weight("lm_head.bias", "lm_head.bias", "v -> v"),
        Weight("lm_head.decoder.kernel", "lm_head.decoder.weight", "d v -> v d"),
        *dense("classifier.dense"),
        *dense("classifier.out_proj"),
        *dense("classifier"),
    ),
    "lm_head.decoder",
    "lm_head.bias",
)

# ---------------------------------------------------------------- t5, v1.1 and mt5


_T5_LAYERS = (
    ("encoder.block.{l}.layer.0", "SelfAttention", "qkvo"),
    ("encoder.block.{l}.layer.1", "DenseReluDense", ("wi", "wi_0", "wi_1", "wo")),
    ("decoder.block.{l}.layer.0", "SelfAttention", "qkvo"),
    ("decoder.block.{l}.layer.1", "EncDecAttention", "qkvo"),
    ("decoder.block.{l}.layer.2", "DenseReluDense", ("wi", "wi_0", "wi_1", "wo")),
)
_T5_NORMS = (
    *(f"{layer}.layer_norm" for layer, _, _ in _T5_LAYERS),
    "encoder.final_layer_norm",
    "decoder.final_layer_norm",
)

T5 = KeyMap(
    "t5",
    (
        *embeddings(
            "shared",
            "encoder.block.{l}.layer.0.SelfAttention.relative_attention_bias",
            "decoder.block.{l}.layer.0.SelfAttention.relative_attention_bias",
        ),
        *(
            entry
            for layer, module, parts in _T5_LAYERS
            for p in parts
            for entry in dense(f"{layer}.{module}.{p}", bias=False, axes=INTO if p.endswith("o") else FROM)
        ),
        *(Weight(f"{m}.weight", f"{m}.weight", "d -> d") for m in _T5_NORMS),
        *dense("lm_head", bias=False),
    ),
    output="lm_head",
    order=(
        *(
            "shared",
            "encoder",
            "decoder",
            "lm_head",
            "embed_tokens",
            "block",
            "layer",
            "SelfAttention",
            "EncDecAttention",
        ),
        *("DenseReluDense", "q", "k", "v", "o", "relative_attention_bias", "wi", "wi_0", "wi_1", "wo"),
    ),
    same=("m",),
    relative_positions=True,
    tied=tuple((f"{m}.weight", "shared.weight") for m in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
)

# ---------------------------------------------------------------- vit


_VIT_MODULES = (
    *((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_VIT_NORMS = ("layernorm_before", "layernorm_after")


def _vit_encoder(prefix: str) -> tuple[Weight, ...]:
    ours, theirs, patches = f"{prefix}encoder.layer.{{l}}.", f"{prefix}layers.{{l}}.", f"{prefix}embeddings."
    modules = [
        (f"{ours}{old}", f"{theirs}{new}", "i m -> m i" if "output" in old else "m o -> o m")
        for old, new in _VIT_MODULES
    ]
    return (
        *(
            entry
            for a, b, pattern in modules
            for entry in (Weight(f"{a}.kernel", f"{b}.weight", pattern), Weight(f"{a}.bias", f"{b}.bias", "o -> o"))
        ),
        *(
            Weight(f"{ours}{name}.{a}", f"{theirs}{name}.{b}", "d -> d")
            for name in _VIT_NORMS
            for a, b in (("scale", "weight"), ("bias", "bias"))
        ),
        *norms(f"{prefix}layernorm"),
        *convs(f"{patches}patch_embeddings.projection"),
        Weight(f"{patches}cls_token", f"{patches}cls_token", "a b d -> a b d"),
        Weight(f"{patches}position_embeddings", f"{patches}position_embeddings", "a p d -> a p d"),
    )


VIT = KeyMap(
    "vit",
    (*_vit_encoder("vit."), *_vit_encoder(""), *dense("pooler.dense", "vit.pooler.dense", "classifier")),
    complete=True,  # BEiT, DINOv2 and others have the same attention names, but other names in PyTorch
    same=("m",),
    order=(
        *("vit", "classifier", "embeddings", "layers", "encoder", "layer", "pooler"),
        *(
            "attention",
            "intermediate",
            "output",
            "mlp",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "query",
            "key",
            "value",
        ),
        *("dense", "fc1", "fc2"),
    ),
    spellings=(
        (
            "v4",
            tuple(
                (f"{prefix}layers.{{l}}.{new}.", f"{prefix}encoder.layer.{{l}}.{old}.")
                for prefix in ("vit.", "")
                for old, new in (*_VIT_MODULES, *((name, name) for name in _VIT_NORMS))
            ),
        ),
    ),
)

# ---------------------------------------------------------------- clip, both towers


def _tower(name: str, *final_norms: str) -> tuple[Weight, ...]:
    layer, width = f"{name}.encoder.layers.{{l}}.", name.partition("_")[0]  # each tower has its own width
    return (
        *dense(*(f"{layer}self_attn.{p}_proj" for p in "qkv"), f"{layer}mlp.fc1", axes=f"{width} o"),
        *dense(f"{layer}self_attn.out_proj", f"{layer}mlp.fc2", axes=f"i {width}"),
        *norms(f"{layer}layer_norm1", f"{layer}layer_norm2", *(f"{name}.{m}" for m in final_norms)),
    )


CLIP = KeyMap(
    "clip",
    (
        Weight("logit_scale", "logit_scale", "->"),
        *_tower("text_model", "final_layer_norm"),
        *_tower("vision_model", "pre_layrnorm", "post_layernorm"),
        *embeddings(*(f"text_model.embeddings.{p}_embedding" for p in ("token", "position"))),
        *embeddings("vision_model.embeddings.position_embedding"),
        *convs("vision_model.embeddings.patch_embedding"),
        Weight("vision_model.embeddings.class_embedding", "vision_model.embeddings.class_embedding", "d -> d"),
        *dense("text_projection", "visual_projection", bias=False),
    ),
    same=("text", "vision"),
    order=(
        *(
            "text_model",
            "vision_model",
            "visual_projection",
            "text_projection",
            "embeddings",
            "encoder",
            "self_attn",
            "mlp",
        ),
        *(*KEYS_FIRST_ORDER, "fc1", "fc2", "token_embedding", "patch_embedding", "position_embedding"),
    ),
    buffers=tuple(f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")),
)

# ---------------------------------------------------------------- whisper


def _stack(name: str, *attentions: str) -> tuple[Weight, ...]:
    layer = f"model.{name}.layers.{{l}}."
    return (
        *dense(*(f"{layer}{a}.{p}_proj" for a in attentions for p in "qkv"), f"{layer}fc1", axes=FROM),
        *dense(*(f"{layer}{a}.out_proj" for a in attentions), f"{layer}fc2", axes=INTO),
        *norms(*(f"{layer}{a}_layer_norm" for a in (*attentions, "final")), f"model.{name}.layer_norm"),
        *embeddings(f"model.{name}.embed_positions"),
    )


WHISPER = KeyMap(
    "whisper",
    (
        *convs("model.encoder.conv1", "model.encoder.conv2", window="w"),
        *_stack("encoder", "self_attn"),
        *_stack("decoder", "self_attn", "encoder_attn"),
        *embeddings("model.decoder.embed_tokens"),
        *dense("proj_out", bias=False),
    ),
    output="proj_out",
    order=(
        *("model", "proj_out", "encoder", "decoder", "conv1", "conv2", "embed_tokens", "embed_positions", "layers"),
        *("self_attn", "encoder_attn", *KEYS_FIRST_ORDER, "fc1", "fc2"),
    ),
    same=("m",),
    tied=(("proj_out.weight", "model.decoder.embed_tokens.weight"),),
    spellings=bare("model."),
)

# ---------------------------------------------------------------- mixtures of experts


def _router(module: str) -> Weight:
    return Weight(f"{_LAYER}{module}.kernel", f"{_LAYER}{module}.weight", "d e -> e d", kind="parameter")


def _experts(block: str, torch: str, turned: bool = False) -> tuple[Weight, ...]:
    """Return the entries of a layer's experts; `torch` has PyTorch's axes of each."""
    module = f"{_LAYER}{block}.experts."
    return tuple(
        Weight(
            f"{module}{p}",
            f"{module}{p}",
            f"e {i} {o} -> {torch.translate({ord('i'): i, ord('o'): o})}",
            kind="experts",
            fan_in_fan_out=turned,
        )
        for p, i, o in (("gate_up_proj", "m", "f"), ("down_proj", "f", "m"))
    )


def _sparse(name: str, weights: Iterable[Weight], needs: Sequence[str], expert_modules: Modules = ()) -> KeyMap:
    return decoder_keymap(
        name,
        (*_TOKENS, *_BLOCK_NORMS, *_ENDS, *weights),
        same=("m",),
        needs=tuple(_LAYER + leaf for leaf in needs),
        expert_modules=expert_modules,
    )


_MIXTRAL = (*_kernels(*_QKVO), _router("mlp.gate"), *_experts("mlp", "e o i"))
MIXTRAL = _sparse("mixtral", _MIXTRAL, ("mlp.gate.kernel", "mlp.experts.gate_up_proj"), EACH_MIXTRAL)
QWEN3_MOE = _sparse(
    "qwen3_moe",
    (*_MIXTRAL, *_layer_norms(*_QK_NORMS), *_kernels(*(f"mlp.{p}" for p in _MLP))),
    ("mlp.gate.kernel", "mlp.experts.gate_up_proj", "self_attn.q_norm.weight"),
    EACH_QWEN3,
)
GPT_OSS = _sparse(
    "gpt_oss",
    (
        *_kernels(*_QKVO),
        *biases(f"{_LAYER}{m}" for m in (*_QKVO, "mlp.router")),
        Weight(f"{_LAYER}self_attn.sinks", f"{_LAYER}self_attn.sinks", "n -> n"),
        _router("mlp.router"),
        *_experts("mlp", "e i o", turned=True),
        *(
            Weight(f"{_LAYER}mlp.experts.{p}_bias", f"{_LAYER}mlp.experts.{p}_bias", "e o -> e o", kind="other")
            for p in ("gate_up_proj", "down_proj")
        ),
    ),
    ("mlp.router.kernel", "mlp.experts.gate_up_proj", "self_attn.sinks"),
)
LLAMA4 = _sparse(
    "llama4",
    (
        *_kernels(*_QKVO, *(f"feed_forward.{prefix}{p}" for prefix in ("", "shared_expert.") for p in _MLP)),
        _router("feed_forward.router"),
        *_experts("feed_forward", "e i o"),
    ),
    ("feed_forward.router.kernel", "feed_forward.experts.gate_up_proj"),
)
DEEPSEEK_V3 = _sparse(
    "deepseek_v3",
    (
        *_kernels(*(f"self_attn.{p}_proj" for p in ("q", "q_a", "q_b", "kv_b", "o")), "self_attn.kv_a_proj_with_mqa"),
        *_layer_norms("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
        *_kernels(*(f"mlp.{prefix}{p}" for prefix in ("", "shared_experts.") for p in _MLP)),
        _router("mlp.gate"),
        Weight(f"{_LAYER}mlp.gate.e_score_correction_bias", f"{_LAYER}mlp.gate.e_score_correction_bias", "e -> e"),
        *_experts("mlp", "e o i"),
    ),
    ("mlp.gate.kernel", "mlp.experts.gate_up_proj", "self_attn.kv_b_proj.kernel"),
    EACH_DEEPSEEK,
)
