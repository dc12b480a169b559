"""One tiny model for every table: which PyTorch class it is, and how the JAX side is built. Plain values.

Weights are made from their PyTorch names, so that both sides have the same ones wherever they are built, and nothing
but shapes and logits needs to be kept (`recorded/`, written by `record.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).parent / "recorded"
IDS = np.random.RandomState(0).randint(1, 32, (2, 6))
IMAGE = 31  # the token of an image's part, which stands four times in each row
INPUTS = {
    "input_ids": IDS,
    "input_ids/image": np.array([[3, IMAGE, IMAGE, IMAGE, IMAGE, 5], [IMAGE, IMAGE, IMAGE, IMAGE, 7, 2]]),
    "token_type_ids": np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]),
    "decoder_input_ids": np.random.RandomState(1).randint(1, 32, (2, 5)),
    "pixel_values": np.random.RandomState(2).standard_normal((2, 3, 8, 8)).astype("float32"),
    "input_features": np.random.RandomState(3).standard_normal((2, 8, 12)).astype("float32"),
}
PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A tiny random model in PyTorch and in JAX.

    Args:
        table: the table that has to be recognized, by its name.
        torch, config: the class in transformers, and its configuration.
        side: the function of `sides.py` that builds the JAX model, with `options`.
        unused: keys of the state dict that the JAX model lacks (they are tied to others).
        copies: keys of the state dict that are tied to others, and have a leaf of their own in the JAX model.
        rivals: the tables an error has to name, where names do not tell.
        unmapped: `(leaf, (key, key))` of leaves without an entry: rows of the first tensor, to which the library adds
            the second one; `(leaf, (key,))` of a number that is a tensor of one entry in PyTorch.
        joined: `(leaf, ((key, key), …))` of leaves that hold rows of two modules in PyTorch, for each stacked layer: no
            adapter can have them, and the check complains of them.
        double: True if PyTorch's logits are computed in float64, because those in float32 are rounded by about 1e-4.
        inputs: which of `INPUTS` the model takes; a "/" and what follows it belong to no name of PyTorch.
    """

    name: str
    table: str
    torch: str
    config: Mapping[str, Any]
    side: str
    options: Mapping[str, Any]
    targets: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("input_ids",)
    parameters: tuple[str, ...] = ()
    unmapped: tuple[tuple[str, tuple[str, ...]], ...] = ()
    joined: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    double: bool = False

    @property
    def keymap(self) -> str | None:
        return self.table if self.rivals else None

    def __str__(self) -> str:
        return self.name

    @property
    def lora(self) -> dict[str, Any]:
        """Fields of the adapter's configuration, PEFT's and ours alike."""
        named = {"target_parameters": list(self.parameters)} if self.parameters else {}
        return {"r": 3, "lora_alpha": 5, "target_modules": list(self.targets), **named}


_DEEP = re.compile(r"layers\.(\d+)\.post_")
_PER_LAYER = re.compile(r"layers\.([3-9]|\d\d)\.post_per_layer_input_norm\.weight$")


def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight (or adapter tensor) of this PyTorch name.

    Embeddings are numbers that bfloat16 has: MaxText rounds a tied one to that for its logits, whatever the dtype is.
    The norm in front of Gemma 4's experts is one number: gemma 4.0.1 and google-tunix 0.1.7 route what it gives, and
    transformers what it takes; they agree where it changes no direction. Layers beyond the sixth of a deep model add
    little (Gemma's norms multiply by 1 + w): rounding grows with what each adds. Gemma 4's inputs of each layer are
    divided by their own size, which may be small: with ten layers that all add as much, the logits of transformers in
    float32 and float64 differ by 3e-4. From the fourth layer on they add little here.
    """
    if key.endswith("pre_feedforward_layernorm_2.weight"):
        return np.full(shape, 1.25, "float32")
    x = np.asarray(np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape), "float32")
    if _PER_LAYER.search(key):
        return 0.05 + 0.01 * x
    norm = key.endswith("weight") and any(word in key.lower() for word in ("norm", "ln_"))
    if norm and (deep := _DEEP.search(key)) and int(deep[1]) >= 6:
        return 0.02 * x - 0.94
    if norm:
        return 1 + 0.2 * x
    x *= 0.35
    return (x.view("uint32") & 0xFFFF0000).view("float32") if key.endswith("embed_tokens.weight") else x


def recorded(name: str) -> dict[str, Any]:
    found = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    found["leaves"] = {path: tuple(shape) for path, shape in found["leaves"].items()}
    return found


D, F, V, LAYERS, HEADS, KV = 16, 24, 32, 3, 4, 2
PROJ = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
}
DECODER = {**SIZES, "num_key_value_heads": KV, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 0}
HEAD = "lm_head.weight"
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def rope(theta: float = 10000.0) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _tunix(name: str, torch: str, theta: float, tied: bool) -> Specimen:
    config = {**DECODER, **rope(theta), "head_dim": 6, "tie_word_embeddings": tied}
    if torch == "Qwen2ForCausalLM":
        config["head_dim"] = 4  # transformers' Qwen2 has no head_dim of its own
    options = {"model": name, "head_dim": config["head_dim"], "rope_theta": theta, "tied": tied}
    unused = (HEAD,) if tied else ()
    label = f"tunix-{name}" + ("-tied" if tied else "")
    return Specimen(label, f"tunix:{name}", torch, config, "tunix", options, PROJ, unused=unused)


GEMMA: dict[str, Any] = {**DECODER, **rope(), "head_dim": 6, "tie_word_embeddings": True}
GEMMA2 = {
    **GEMMA,
    "query_pre_attn_scalar": 6,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
}
GEMMA3 = {
    **{k: v for k, v in GEMMA2.items() if "softcapping" not in k},
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}


def _gemma(generation: int, table: str, side: str, kv: int) -> Specimen:
    version = "" if generation == 1 else str(generation)
    config = {**{1: GEMMA, 2: GEMMA2, 3: GEMMA3}[generation], "num_key_value_heads": kv}
    name = table.replace(":", "-") + {1: "-mqa", KV: "", HEADS: "-mha"}[kv]
    options = {"generation": generation, "kv": kv}
    return Specimen(name, table, f"Gemma{version}ForCausalLM", config, side, options, PROJ, unused=(HEAD,))


_KINDS = ["sliding_attention", "full_attention", "full_attention"]
GEMMA4 = {
    **{k: v for k, v in GEMMA.items() if k != "rope_parameters"},
    "sliding_window": 4,
    "layer_types": _KINDS,
    "final_logit_softcapping": 8.0,
    "global_head_dim": 8,
}
_GEMMA4: dict[str, dict[str, Any]] = {  # what the small models have, the large ones, and the one with experts
    "e": {"hidden_size_per_layer_input": 5, "vocab_size_per_layer_input": V},
    "large": {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
}
_GEMMA4["moe"] = {
    **_GEMMA4["large"], "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8,
    "experts_implementation": "eager",
}  # fmt: skip


def _gemma4(table: str, size: str) -> Specimen:
    more = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection") if size == "e" else ()
    name, side = f"{table.replace(':', '-')}-{size}", "tunix_gemma4" if table.startswith("tunix") else "gemma4"
    config, options = {**GEMMA4, **_GEMMA4[size]}, {"large": size != "e", "moe": size == "moe"}
    named = _EXPERTS if size == "moe" else ()
    table += "-moe" if size == "moe" and side == "gemma4" else ""
    targets = (*PROJ, *more)
    return Specimen(name, table, "Gemma4ForCausalLM", config, side, options, targets, unused=(HEAD,), parameters=named)


_3N = {
    **GEMMA3, "final_logit_softcapping": 8.0, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 5,
    "laurel_rank": 3, "altup_num_inputs": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0, 0.0],
}  # fmt: skip
GEMMA3N = Specimen(
    "gemma-gemma3n", "gemma:gemma3n", "Gemma3nForCausalLM", {k: v for k, v in _3N.items() if "pre_attn" not in k},
    "gemma3n", {}, (*PROJ, "per_layer_input_gate", "per_layer_projection", "linear_left", "modality_router"),
    unused=(HEAD,),
)  # fmt: skip


_LLAMAS = ("maxtext:llama3.1", "maxtext:llama3", "maxtext:mistral")


def _maxtext(model: str, torch: str, scan: int | None, head_dim: int = 6, tied: bool = False) -> Specimen:
    config = {**DECODER, **rope(), "head_dim": head_dim, "tie_word_embeddings": tied}
    suffix = "" if scan is None else f"/scan{scan}"
    options = {"model": model, "scan": scan, "head_dim": head_dim, "tied": tied}
    rivals = tuple(f"{name}{suffix}" for name in _LLAMAS) if model in ("llama3.1", "llama3", "mistral") else ()
    name = f"maxtext-{model}{suffix.replace('/', '-')}" + (f"-h{head_dim}" if head_dim != 6 else "")
    unused = (HEAD,) if tied else ()
    name += "-tied" if tied else ""
    return Specimen(name, f"maxtext:{model}{suffix}", torch, config, "maxtext", options, PROJ, rivals, unused)


def _maxtext_gemma(generation: int, scan: int | None, head_dim: int = 6, size: str = "", count: int = 0) -> Specimen:
    """Layers as its pattern has them: local and global in turns, or every sixth global."""
    count = count or {2: 4, 3: 6}[generation]
    full = [at % 2 if generation == 2 else at % 6 == 5 for at in range(count)]
    kinds = ["full_attention" if yes else "sliding_attention" for yes in full]
    config = {**{2: GEMMA2, 3: GEMMA3}[generation], "num_hidden_layers": count, "layer_types": kinds}
    config |= {"head_dim": head_dim, "query_pre_attn_scalar": head_dim}
    options = {"model": f"gemma{generation}", "scan": scan, "head_dim": head_dim, "tied": True, "layers": count}
    suffix, torch = "" if scan is None else f"/scan{scan}", f"Gemma{generation}ForCausalLM"
    table = f"maxtext:gemma{generation}{size}{suffix}"
    name = table.replace(":", "-").replace("/", "-") + ("" if head_dim == 6 else f"-h{head_dim}")
    return Specimen(name, table, torch, config, "maxtext", options, PROJ, unused=(HEAD,))


def _maxtext_of(
    model: str,
    torch: str,
    config: Mapping[str, Any],
    scan: int | None = None,
    targets: tuple[str, ...] = PROJ,
    parameters: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
    blocks: bool = False,
    rivals: tuple[str, ...] = (),
    **options: Any,
) -> Specimen:
    """A model of MaxText that has a file of its own; `options` are fields of MaxText's configuration."""
    config = {**DECODER, "head_dim": 6, "tie_word_embeddings": bool(unused), **config}
    layers = config["num_hidden_layers"]
    suffix = ("-blocks" if blocks else "") + ("" if scan is None else f"/scan{scan}")
    made = {"model": model.partition("-")[0], "scan": scan, "head_dim": config["head_dim"], "tied": bool(unused)}
    return Specimen(
        f"maxtext-{model}{suffix.replace('/', '-')}", f"maxtext:{made['model']}{suffix}", torch, config, "maxtext",
        {**made, "layers": layers, "more": options}, targets, rivals, unused=unused, parameters=parameters,
    )  # fmt: skip


_FULL_SIXTH = [*["sliding_attention"] * 5, "full_attention"]
_LARGE4 = {**GEMMA4, **_GEMMA4["large"]}
_GLOBAL = {"global_head_dim": 8, "global_num_kv_heads": 1, "share_kv_projections": True}
_QWEN3_NEXT = {
    **rope(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8,
    "shared_expert_intermediate_size": 8, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "norm_topk_prob": True, "experts_implementation": "eager",
}  # fmt: skip
_LLAMA4 = {
    **rope(), "num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1, 3],
    "intermediate_size": 8, "intermediate_size_mlp": F, "use_qk_norm": False, "experts_implementation": "eager",
    "attention_chunk_size": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip
_DEEPSEEK2 = {
    **rope(), "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
    "n_shared_experts": 2, "q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 5, "head_dim": 4, "num_key_value_heads": HEADS, "experts_implementation": "eager",
}  # fmt: skip
_OLMO3 = {**rope(), "head_dim": 4, "sliding_window": 4, "pad_token_id": 0}
_GPT3 = {"head_dim": 4, "activation_function": "gelu_new", "n_inner": F, "layer_norm_epsilon": 1e-6}
# (PEFT takes the names gate_proj, up_proj, down_proj and gate for the routed experts, also at the end of a name.)
_HYBRID = (*PROJ[:4], "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate")
_MLA = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def _maxtext_families() -> tuple[Specimen, ...]:
    gemma4 = {"torch": "Gemma4ForCausalLM", "unused": (HEAD,)}
    made: list[Specimen] = []
    for scan in (None, 0, 1):
        blocks, count = scan is not None, 1 if scan is None else 2  # (two blocks)
        kinds = {"num_hidden_layers": 6 * count, "layer_types": _FULL_SIXTH * count}
        made.append(
            _maxtext_of("gemma4-31b", config={**_LARGE4, **kinds}, scan=scan, blocks=blocks, **gemma4, **_GLOBAL)
        )
        if scan == 0:
            continue
        made += [
            _maxtext_of(
                "gemma4-26b", config={**_LARGE4, **_GEMMA4["moe"], **kinds}, scan=scan, targets=(*PROJ, "proj"),
                parameters=_EXPERTS, blocks=blocks, **gemma4, **_GLOBAL,
            ),
            _maxtext_of("olmo3", "Olmo3ForCausalLM", {**_OLMO3, "num_hidden_layers": 4 * count}, scan, blocks=blocks),
        ]  # fmt: skip
    small = {"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": V, "num_kv_shared_layers": 5}
    small |= {"use_double_wide_mlp": True}
    kinds = {"num_hidden_layers": 10, "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 2}
    names = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
    made.append(
        _maxtext_of(
            "gemma4-e2b", config={**GEMMA4, **kinds, **small}, targets=(*PROJ, *names), **gemma4, **small,
            global_head_dim=8, decoder_block="gemma4_small",
        )
    )  # fmt: skip
    for scan, sizes, rivals in (
        (None, {"num_hidden_layers": 4}, ("maxtext:qwen3_next", "maxtext:qwen3_5")),
        (1, {"num_hidden_layers": 8, "linear_key_head_dim": 8}, ()),  # (keys of 4 numbers round more)
    ):
        next_ = _maxtext_of(
            "qwen3_next", "Qwen3NextForCausalLM", {**_QWEN3_NEXT, **sizes}, scan, _HYBRID,
            (*_EXPERTS, "mlp.gate.weight"), blocks=scan is not None, rivals=rivals,
        )  # fmt: skip
        made.append(dataclasses.replace(next_, double=True))
        rivals = ("maxtext:qwen3_next", "maxtext:qwen3_5") if scan is None else ()
        made.append(_maxtext_qwen3_5({**_QWEN3_NEXT, **sizes}, scan, rivals))
    for scan in (None, 1):
        blocks = scan is not None
        two_blocks = {"num_hidden_layers": 8 if blocks else 4}
        made += [
            _maxtext_of(
                "llama4", "Llama4ForCausalLM", {**_LLAMA4, **two_blocks, "moe_layers": [1, 3, 5, 7]}, scan,
                parameters=(*_EXPERTS, "router.weight"), blocks=blocks, interleave_moe_layer_step=2,
            ),
            _maxtext_of("deepseek2", "DeepseekV2ForCausalLM", _DEEPSEEK2, scan, _MLA, _EXPERTS),
            _maxtext_of("gpt3", "GPT2LMHeadModel", _GPT3, scan, ("c_attn", "c_proj", "c_fc")),
        ]  # fmt: skip
    scout = {**_LLAMA4, "moe_layers": [0, 1, 2, 3], "use_qk_norm": True, "intermediate_size": F}
    made.append(_maxtext_of("llama4-scout", "Llama4ForCausalLM", scout, parameters=_EXPERTS))
    return tuple(made)


def _maxtext_qwen3_5(config: Mapping[str, Any], scan: int | None, rivals: tuple[str, ...]) -> Specimen:
    """Qwen 3.5, whose layers with a delta net have two leaves with rows of two modules each."""
    made = _maxtext_of(
        "qwen3_5", "Qwen3_5MoeForCausalLM", config, scan, (*PROJ, "out_proj", "shared_expert_gate"),
        (*_EXPERTS, "mlp.gate.weight"), blocks=scan is not None, rivals=rivals,
    )  # fmt: skip
    layers, joined = config["num_hidden_layers"], list[tuple[str, tuple[tuple[str, str], ...]]]()
    for at in (at for at in range(4) if at % 4 != 3):
        leaf = f"decoder.layers_{at}." if scan is None else f"decoder.layers.layer_{at}."
        numbers = (at,) if scan is None else range(at, layers, 4)
        for name, parts in (("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")), ("in_proj_ba", ("in_proj_b", "in_proj_a"))):
            keys = ((f"model.layers.{n}.linear_attn.{a}.weight" for a in parts) for n in numbers)
            joined.append((f"{leaf}attention.{name}.kernel", tuple((one, two) for one, two in keys)))
    return dataclasses.replace(made, double=True, joined=tuple(joined))


_BERT = ("query", "key", "value", "dense")
_TIED_BERT = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
_ROBERTA_POSITIONS = (
    "roberta.embeddings.position_embeddings.weight", "roberta.embeddings.token_type_embeddings.weight",
)  # fmt: skip
_TIED_ROBERTA = ("lm_head.decoder.weight", "lm_head.decoder.bias")


def _keras(model: str, torch: str, targets: tuple[str, ...] = PROJ, **config: Any) -> Specimen:
    config = {**DECODER, **rope(), **config}
    experts = "experts_implementation" in config
    return Specimen(
        f"keras-{torch.removesuffix('ForCausalLM').lower()}",
        f"keras:{model}",
        torch,
        config,
        "keras",
        {},
        targets,
        unused=(HEAD,) if config["tie_word_embeddings"] else (),
        parameters=(*_EXPERTS, "gate.weight") if experts else (),
    )


def _keras_old(
    model: str, torch: str, targets: tuple[str, ...], config: dict[str, Any], unused: tuple[str, ...] = ()
) -> Specimen:
    """The models before Llama."""
    return Specimen(f"keras-{model}", f"keras:{model}", torch, config, "keras", {}, targets, unused=unused)


def _keras_gemma4(size: str) -> Specimen:
    one = _gemma4("keras:gemma4", size)
    scalars = ((f"decoder_block_{i}.layer_scalar", (f"model.layers.{i}.layer_scalar",)) for i in range(LAYERS))
    return dataclasses.replace(one, table="keras:gemma4", side="keras", options={"size": size}, unmapped=tuple(scalars))


def _easydel(model: str, torch: str, targets: tuple[str, ...] = PROJ, **config: Any) -> Specimen:
    config = {**DECODER, **rope(), "tie_word_embeddings": False, **config}
    unused = (HEAD,) if config["tie_word_embeddings"] else ()
    options = {"model": model}
    return Specimen(f"easydel-{model}", "easydel:llama", torch, config, "easydel", options, targets, unused=unused)


_STACKS = ("encoder", "decoder")
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, **_ENDS}
_TOWER = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
_VISION = {**_TOWER, "image_size": 8, "patch_size": 4}
BASES: dict[str, dict[str, Any]] = {
    "llama": {**DECODER, **rope(), "head_dim": 4},
    "gpt2": _GPT2,
    "gpt_neo": {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_layers": 4,
        "num_heads": HEADS,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 4,
        "max_position_embeddings": 32,
        **_ENDS,
    },
    "gptj": {**_GPT2, "n_inner": F, "rotary_dim": 2},
    "bert": {**SIZES, "pad_token_id": 0},
    "roberta": {**SIZES, "pad_token_id": 0},
    "t5": {
        "vocab_size": V,
        "d_model": D,
        "d_kv": 6,
        "d_ff": F,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "decoder_start_token_id": 0,
    },
    "vit": {**_VISION, "num_labels": 5},
    "clip": {
        "text_config": {**_TOWER, "vocab_size": V, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 2},
        "vision_config": _VISION,
        "projection_dim": 8,
    },
    "whisper": {
        "vocab_size": V,
        "d_model": D,
        **{f"{stack}_layers": LAYERS for stack in _STACKS},
        **{f"{stack}_attention_heads": HEADS for stack in _STACKS},
        **{f"{stack}_ffn_dim": F for stack in _STACKS},
        "num_mel_bins": 8,
        "max_source_positions": 6,
        "max_target_positions": 32,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        **_ENDS,
    },
}
_TAKES = {
    "t5": ("input_ids", "decoder_input_ids"),
    "vit": ("pixel_values",),
    "clip": ("input_ids", "pixel_values"),
    "whisper": ("input_features", "decoder_input_ids"),
}


def _flax(
    name: str, table: str, torch: str, targets: tuple[str, ...], unused: tuple[str, ...] = (), **more: Any
) -> Specimen:
    config, options = {**BASES[table], **more}, {"class": f"Flax{torch}"}
    inputs = _TAKES.get(table, ("input_ids",))
    return Specimen(f"flax-{name}", table, torch, config, "flax", options, targets, unused=unused, inputs=inputs)


GPT2_DENSE = Specimen(
    "gpt2-dense", "gpt2-dense", "GPT2LMHeadModel", _GPT2, "gpt2_dense", {}, ("c_attn", "c_proj", "c_fc"), unused=(HEAD,)
)

_T5 = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_T5_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_WHISPER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

_MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": [1], "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["full_attention"] * LAYERS},
    "llama4": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [0, 2], "intermediate_size_mlp": 20,
    },
    "deepseek_v3": {
        "n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "q_lora_rank": 8, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 5, "head_dim": 4, "num_key_value_heads": HEADS, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
_DENSE_LAYERS = {"qwen3_moe": (1,), "llama4": (1,), "deepseek_v3": (0,)}


def _moe(kind: str, torch: str) -> Specimen:
    config = {
        **DECODER, **rope(), "head_dim": 6, "num_experts_per_tok": 2, "tie_word_embeddings": False,
        "experts_implementation": "eager", **_MOE[kind],
    }  # fmt: skip
    options = {
        **config, "kind": kind, "experts": 4, "expert_size": config.get("moe_intermediate_size", F), "theta": 10000.0,
        "dense": _DENSE_LAYERS.get(kind, ()), "dense_size": config.get("intermediate_size_mlp", F),
    }  # fmt: skip
    # (DeepSeek's router breaks in PEFT: its wrapper hides the correction bias.)
    routers = {"gpt_oss": ("router.weight",), "llama4": ("router.weight",), "deepseek_v3": ()}
    named = (*_EXPERTS, *routers.get(kind, ("gate.weight",)))
    targets = ("q_b_proj", "kv_a_proj_with_mqa", "o_proj") if kind == "deepseek_v3" else PROJ[:4]
    return Specimen(kind, kind, torch, config, "moe", options, targets, parameters=named)


_PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention", "full_attention"], "mlp_only_layers": [1],
    "num_experts": 4, "shared_expert_intermediate_size": 8, "norm_topk_prob": True,
}  # fmt: skip
_MAMBA = {
    "layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 6,
    "ssm_state_size": 4, "n_groups": 2, "n_routed_experts": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 8, "layer_norm_epsilon": 1e-6, "head_dim": 6,
}  # fmt: skip
_GROUPED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 2.5,
}  # fmt: skip


def _twin(
    name: str, torch: str, targets: tuple[str, ...], table: str = "", side: str = "decoders", **more: Any
) -> Specimen:
    """A decoder that no JAX library has under Hugging Face's names."""
    kind = name.partition("-")[0]
    config = {**DECODER, **rope(), "tie_word_embeddings": False, **more}
    part = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    options = {**config, "kind": kind, "theta": 10000.0, "rotary": part, "tied": config["tie_word_embeddings"]}
    unused = (HEAD,) if options["tied"] else ()
    return Specimen(name, table or kind, torch, config, side, options, targets, unused=unused)


# (PEFT 0.21.2 takes gate_proj, up_proj and down_proj of these models for their experts, as in transformers 4.)
def _twin_with_experts(
    kind: str, torch: str, side: str, targets: tuple[str, ...], parameters: tuple[str, ...], **more: Any
) -> Specimen:
    one = _twin(
        kind, torch, targets, side=side, num_experts_per_tok=2, moe_intermediate_size=8, experts_implementation="eager",
        **more,
    )  # fmt: skip
    size = F if kind == "minimax_m2" else 8
    options = {**one.options, "experts": 4, "expert_size": size, "dense": (0,) if kind == "glm4_moe" else ()}
    return dataclasses.replace(one, options={**options, "dense_size": F}, parameters=parameters)


_KERAS_EXPERTS: dict[str, Any] = {
    "num_experts_per_tok": 2, "experts_implementation": "eager", "tie_word_embeddings": False,
}  # fmt: skip
_DENSE_FIRST = {"maxtext:deepseek_v3": 3, "maxtext:kimi_k2": 1}


def _moe_of(
    library: str, kind: str, torch: str, scan: int | None = None, table: str = "", layers: int = LAYERS
) -> Specimen:
    """The same model of another library, all of whose layers have experts (of DeepSeek's, those behind the first)."""
    one, table = _moe(kind, torch), table or kind
    theta = 1e6 if library == "tunix" else 1e4
    config = {**one.config, **rope(theta), "mlp_only_layers": [], "num_hidden_layers": layers}
    first = _DENSE_FIRST.get(f"{library}:{table}", 0)
    if first:
        config["first_k_dense_replace"] = first
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1] * layers
    size = one.options["expert_size"]
    if library == "tunix":  # whose experts are as wide as the other layers' MLPs would be
        size = config["moe_intermediate_size"] = F
    options = {"model": kind, "scan": scan, "head_dim": 6, "tied": False, "rope_theta": theta, "expert_size": size}
    options |= {"layers": layers, "dense": first}
    suffix = "" if scan is None else f"/scan{scan}"
    # More dense layers than the other has tell them apart; fewer do not.
    rivals = tuple(_DENSE_FIRST) if first == min(_DENSE_FIRST.values()) and scan is None else ()
    name = f"{library}-{table}{suffix.replace('/', '-')}"
    return Specimen(
        name, f"{library}:{table}{suffix}", torch, config, library, options, one.targets, rivals,
        parameters=one.parameters,
    )  # fmt: skip


_GEMMA3_VISION = {
    "text_config": {k: v for k, v in GEMMA3.items() if k != "tie_word_embeddings"},
    "vision_config": {**_VISION, "vision_use_head": False},
    "mm_tokens_per_image": 4,
    "image_token_id": IMAGE,
    "tie_word_embeddings": True,
}
_DINO = {**_VISION, "num_register_tokens": 2}
_UNGATED = tuple(name for name in PROJ if name != "gate_proj")


def _bonsai(
    model: str,
    torch: str,
    config: Mapping[str, Any],
    targets: tuple[str, ...],
    unused: tuple[str, ...] = (),
    copies: tuple[str, ...] = (),
    inputs: tuple[str, ...] = ("pixel_values",),
    **options: Any,
) -> Specimen:
    name = f"bonsai-{model}" + ("-gated" if options.get("gated") else "")
    options["model"] = model
    return Specimen(
        name, f"bonsai:{model}", torch, config, "bonsai", options, targets, unused=unused, copies=copies, inputs=inputs
    )


SPECIMENS = (
    _flax("llama", "llama", "LlamaForCausalLM", PROJ, tie_word_embeddings=False),
    # Without a sliding window FlaxMistral (transformers 4.57) lets every token see itself alone.
    _flax("mistral", "llama", "MistralForCausalLM", PROJ, tie_word_embeddings=False, sliding_window=32),
    _flax("gpt2", "gpt2", "GPT2LMHeadModel", ("c_attn", "c_proj", "c_fc"), (HEAD,)),
    GPT2_DENSE,
    _flax("bert", "bert", "BertForMaskedLM", _BERT, _TIED_BERT),
    _flax("bert-classifier", "bert", "BertForSequenceClassification", _BERT),
    _flax("bert-bare", "bert", "BertModel", _BERT),
    _flax("roberta", "roberta", "RobertaForMaskedLM", _BERT, _TIED_ROBERTA),
    _flax("roberta-classifier", "roberta", "RobertaForSequenceClassification", _BERT),
    _flax("gpt-neo", "gpt_neo", "GPTNeoForCausalLM", ("k_proj", "v_proj", "q_proj", "out_proj", "c_fc"), (HEAD,)),
    _flax("gptj", "gptj", "GPTJForCausalLM", ("q_proj", "v_proj", "out_proj", "fc_in", "fc_out")),
    _flax("t5", "t5", "T5ForConditionalGeneration", (*"qkvo", "wi", "wo"), (*_T5, HEAD), tie_word_embeddings=True),
    _flax("t5-v1.1", "t5", "T5ForConditionalGeneration", (*"qv", "wi_0", "wi_1"), _T5, **_T5_1),
    _flax("vit", "vit", "ViTForImageClassification", ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")),
    _flax("clip", "clip", "CLIPModel", ("q_proj", "v_proj", "out_proj", "fc1", "visual_projection")),
    _flax("whisper", "whisper", "WhisperForConditionalGeneration", _WHISPER, ("proj_out.weight",)),
    # Tunix's Llama 3 and Qwen 3 turn by 1e6 whatever `rope_theta` says (google-tunix 0.1.7), so PyTorch does here.
    _tunix("llama3", "LlamaForCausalLM", 1e6, tied=False),
    _tunix("llama3", "LlamaForCausalLM", 1e6, tied=True),
    _tunix("qwen2", "Qwen2ForCausalLM", 1e4, tied=False),
    _tunix("qwen3", "Qwen3ForCausalLM", 1e6, tied=True),
    _gemma(1, "tunix:gemma", "tunix_gemma", 1),
    _gemma(1, "tunix:gemma", "tunix_gemma", HEADS),
    _gemma(2, "tunix:gemma2", "tunix_gemma", KV),
    _gemma(3, "tunix:gemma3", "tunix_gemma3", KV),
    _gemma(3, "tunix:gemma3", "tunix_gemma3", HEADS),
    *(_gemma(1, "gemma:gemma", "gemma", heads) for heads in (1, HEADS)),
    _gemma(2, "gemma:gemma2-2b", "gemma", KV),
    _gemma(2, "gemma:gemma2", "gemma", KV),
    _gemma(3, "gemma:gemma3", "gemma", KV),
    _gemma(3, "gemma:gemma3", "gemma", HEADS),
    GEMMA3N,
    *(_gemma4(table, size) for table in ("tunix:gemma4", "gemma:gemma4") for size in _GEMMA4),
    _moe("mixtral", "MixtralForCausalLM"),
    _moe("qwen3_moe", "Qwen3MoeForCausalLM"),
    _moe("gpt_oss", "GptOssForCausalLM"),
    _moe("llama4", "Llama4ForCausalLM"),
    _moe("deepseek_v3", "DeepseekV3ForCausalLM"),
    _twin("olmo3", "Olmo3ForCausalLM", PROJ, "llama"),
    _twin(
        "phi3", "Phi3ForCausalLM", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "llama", pad_token_id=0, **_PART
    ),
    _twin("gpt_neox", "GPTNeoXForCausalLM", _FUSED, num_key_value_heads=HEADS, **_PART),
    _twin(
        "falcon", "FalconForCausalLM", _FUSED, new_decoder_architecture=True, num_kv_heads=KV, tie_word_embeddings=True
    ),
    _twin("falcon-7b", "FalconForCausalLM", _FUSED, num_key_value_heads=1),
    _twin("stablelm", "StableLmForCausalLM", PROJ, use_qkv_bias=True, **_PART),
    _twin("stablelm-12b", "StableLmForCausalLM", PROJ, qk_layernorm=True, **_PART),
    _twin_with_experts("glm4_moe", "Glm4MoeForCausalLM", "moe", PROJ[:4], _EXPERTS, head_dim=8, **_GROUPED, **_PART),
    _twin_with_experts(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        "moe",
        PROJ[:4],
        (*_EXPERTS, "gate.weight"),
        head_dim=8,
        num_local_experts=4,
        **_PART,
    ),
    _twin_with_experts(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        "recurrent",
        (*PROJ[:4], "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"),
        (*_EXPERTS, "gate.weight"),
        head_dim=8,
        **_LINEAR_ATTENTION,
        **_PART,
    ),
    _twin_with_experts(
        "nemotron_h",
        "NemotronHForCausalLM",
        "recurrent",
        (*PROJ[:4], *PROJ[5:], "in_proj"),
        ("experts.up_proj", "experts.down_proj"),
        **_MAMBA,
    ),
    *(_maxtext("llama3.1", "LlamaForCausalLM", scan) for scan in (None, 0, 1)),
    _maxtext("llama3.1", "LlamaForCausalLM", None, head_dim=16),
    *(_maxtext("llama3", "LlamaForCausalLM", scan) for scan in (None, 1)),
    *(_maxtext("mistral", "MistralForCausalLM", scan) for scan in (None, 1)),
    *(_maxtext("qwen2", "Qwen2ForCausalLM", scan, head_dim=4) for scan in (None, 1)),
    *(_maxtext("qwen3", "Qwen3ForCausalLM", scan) for scan in (None, 0, 1)),
    _maxtext("qwen3", "Qwen3ForCausalLM", None, tied=True),
    *(_maxtext_gemma(2, scan, h) for scan, h in ((None, 6), (1, 16))),
    _maxtext_gemma(3, None),
    *(_maxtext_gemma(3, 1, size=size, count=count) for size, count in (("-4b", 34), ("-12b", 48), ("-27b", 62))),
    *_maxtext_families(),
    _moe_of("tunix", "qwen3_moe", "Qwen3MoeForCausalLM"),
    *(_moe_of("maxtext", "mixtral", "MixtralForCausalLM", scan) for scan in (None, 1)),
    *(_moe_of("maxtext", "qwen3_moe", "Qwen3MoeForCausalLM", scan) for scan in (None, 0, 1)),
    _moe_of("maxtext", "gpt_oss", "GptOssForCausalLM"),
    _easydel("llama", "LlamaForCausalLM", head_dim=4),
    _easydel("mistral", "MistralForCausalLM", head_dim=4, sliding_window=32),
    _easydel("qwen2", "Qwen2ForCausalLM"),
    _easydel("qwen3", "Qwen3ForCausalLM", head_dim=6),
    _easydel("gemma", "GemmaForCausalLM", head_dim=6),
    _easydel("exaone4", "Exaone4ForCausalLM", head_dim=4),
    _easydel("smollm3", "SmolLM3ForCausalLM", pad_token_id=0),
    _easydel("phi3", "Phi3ForCausalLM", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), pad_token_id=0),
    _moe_of("maxtext", "gpt_oss", "GptOssForCausalLM", 1, "gpt_oss-blocks", 4),
    _moe_of("maxtext", "deepseek_v3", "DeepseekV3ForCausalLM", None, layers=4),
    _moe_of("maxtext", "deepseek_v3", "DeepseekV3ForCausalLM", None, "kimi_k2"),
    _moe_of("maxtext", "deepseek_v3", "DeepseekV3ForCausalLM", 1, layers=5),
    _moe_of("maxtext", "deepseek_v3", "DeepseekV3ForCausalLM", 0, "kimi_k2"),
    _keras("llama", "LlamaForCausalLM", tie_word_embeddings=False),
    _keras("llama", "MistralForCausalLM", tie_word_embeddings=False),
    _keras("qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True, head_dim=6),
    _keras("gemma3", "Gemma3ForCausalLM", **{**GEMMA3, "layer_types": ["sliding_attention"] * LAYERS}),
    _keras("gemma", "GemmaForCausalLM", **GEMMA),
    _keras("gemma2", "Gemma2ForCausalLM", **GEMMA2),
    _keras("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    _keras("mixtral", "MixtralForCausalLM", PROJ[:4], **_KERAS_EXPERTS, num_local_experts=4),
    _keras(
        "qwen_moe", "Qwen2MoeForCausalLM", (*PROJ, "shared_expert_gate"), **_KERAS_EXPERTS, num_experts=4,
        moe_intermediate_size=8, shared_expert_intermediate_size=20, norm_topk_prob=False,
    ),
    _keras(
        "qwen3_moe", "Qwen3MoeForCausalLM", PROJ[:4], **_KERAS_EXPERTS, num_experts=4, moe_intermediate_size=8,
        head_dim=6, mlp_only_layers=[1], norm_topk_prob=True,
    ),
    _keras_old("gpt2", "GPT2LMHeadModel", ("c_attn", "c_proj", "c_fc"), _GPT2, unused=(HEAD,)),
    _keras(
        "phi3", "Phi3ForCausalLM", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), tie_word_embeddings=False,
        num_key_value_heads=HEADS, pad_token_id=0,
    ),
    # keras-hub's BERT has the approximate GELU.
    _keras_old("bert", "BertForSequenceClassification", _BERT, {**SIZES, "pad_token_id": 0, "hidden_act": "gelu_new"}),
    dataclasses.replace(
        _keras_old(
            "roberta", "RobertaForSequenceClassification", (*_BERT, "out_proj"),
            {**SIZES, "pad_token_id": 0, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        ),
        unmapped=(("embeddings.position_embedding.embeddings", _ROBERTA_POSITIONS),),
    ),
    *map(_keras_gemma4, _GEMMA4),
    # Bonsai's Qwen 3 turns by 1e6 whatever `rope_theta` says.
    _bonsai(
        "qwen3", "Qwen3ForCausalLM", {**DECODER, **rope(1e6), "head_dim": 6, "tie_word_embeddings": False}, PROJ,
        inputs=("input_ids",),
    ),
    _bonsai(
        "gemma3", "Gemma3ForConditionalGeneration", _GEMMA3_VISION, (*PROJ, "out_proj", "fc1", "fc2"), (HEAD,),
        inputs=("input_ids/image", "pixel_values", "token_type_ids"),
    ),
    _bonsai(
        "vit", "ViTForImageClassification", {**BASES["vit"], "hidden_act": "gelu_pytorch_tanh"},
        (*PROJ[:4], "fc1", "fc2"),
    ),
    _bonsai("dinov3", "DINOv3ViTModel", {**_DINO, "hidden_act": "gelu_pytorch_tanh"}, _UNGATED, gated=False),
    _bonsai("dinov3", "DINOv3ViTModel", {**_DINO, "hidden_act": "silu", "use_gated_mlp": True}, PROJ, gated=True),
    _bonsai(
        "whisper", "WhisperForConditionalGeneration", BASES["whisper"], _WHISPER, ("proj_out.weight",),
        inputs=_TAKES["whisper"],
    ),
    _bonsai(
        "umt5", "UMT5ForConditionalGeneration",
        {**BASES["t5"], "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        (*"qkvo", "wi_0", "wi_1", "wo"), (_T5[0],), (_T5[1],), inputs=_TAKES["t5"],
    ),
)  # fmt: skip
BY_NAME = {s.name: s for s in SPECIMENS}
