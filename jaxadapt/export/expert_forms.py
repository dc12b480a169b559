"""Adapters of experts in the form that vLLM, PEFT and transformers read.

PEFT adapts all experts of a layer in one parameter (`target_parameters`). vLLM 0.32.0 (run; 0.33.0 read) reads this
fused form for GPT-OSS (`is_3d_moe_weight`). For the other models here it reads a LoRA for each expert, and refuses the
fused form. Mixtral's alone loads without a message and has no effect, because the block is called `block_sparse_moe` in
vLLM (`lora/model_manager.py`, `lora/lora_model.py`).

    …mlp.experts(.base_layer).lora_A ──► …block_sparse_moe.experts.3.w1.lora_A     (Mixtral)
                                         …mlp.experts.3.gate_proj.lora_A           (Qwen 3 MoE, DeepSeek V3)
                                         …feed_forward.experts.3.gate_proj.lora_A  (Llama 4)
                                         both parameters of a layer                (GPT-OSS)

Gate and up share an A in PEFT. Each gets a copy here, so the rank stays. vLLM stops at an expert whose gate, up or down
alone has a LoRA. The others get zeros.

PEFT 0.21.2 takes the modules `gate_proj`, `up_proj` and `down_proj` of `target_modules` for routed experts in models
with `mlp.shared_experts` (`utils/transformers_weight_conversion.py`; huggingface/peft#3711). It then warns, and the
LoRAs of shared experts and of dense layers have no effect. `target_parameters` names the weights of the same modules,
with the same keys, and PEFT reads these.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxadapt.adapters import experts
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import matching
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError, raise_listed
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.persistence import expert_keys
from jaxadapt.storage import hf_model, location

_LLAMA4 = f"{families.LAYER}feed_forward."
_TAKEN_FOR_ROUTED = ("gate_proj", "up_proj", "down_proj")
# Linear layers that PEFT reads under their weights' names only (`name_shared`).
_DENSE = tuple(
    (f"{families.LAYER}{module}.weight", (f"{families.LAYER}{module}",))
    for module in (f"mlp.{block}{name}" for block in ("shared_experts.", "") for name in _TAKEN_FOR_ROUTED)
)
_NAMES: Mapping[str, tuple[str, families.Modules]] = {
    "mixtral": ("mixtral", families.EACH_MIXTRAL),
    "qwen3_moe": ("qwen3_moe", families.EACH_QWEN3),
    "deepseek_v3": ("deepseek_v3", (*families.EACH_QWEN3, *_DENSE)),
    "llama4_text": (
        "llama4",
        (
            (f"{_LLAMA4}experts.gate_up_proj", tuple(f"{_LLAMA4}experts.{{e}}.{p}_proj" for p in ("gate", "up"))),
            (f"{_LLAMA4}experts.down_proj", (f"{_LLAMA4}experts.{{e}}.down_proj",)),
            (f"{_LLAMA4}router.weight", (f"{_LLAMA4}router",)),
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        tuple((f"{families.LAYER}mlp.{p}", ()) for p in ("experts.gate_up_proj", "experts.down_proj", "router.weight")),
    ),
}
"""{model_type: (family, parameters and the modules that vLLM reads in their place)}."""
_FUSED = re.compile(r"(?P<owner>.+\.experts)(?P<inner>\.base_layer)?\.lora_A\.weight")
_DOWN = (".down_proj", ".w2")
_MERGE = "Merge it instead: `jaxadapt.export.export_base(MODEL, FOLDER, ADAPTER)` (`jaxadapt merge` for other adapters)"


def to_form(tensors: PeftTensors, program: str, base: str | os.PathLike[str] | None) -> PeftTensors:
    """Return an adapter of experts in the form that a program reads; others unchanged.

    Args:
        tensors: the adapter, under PEFT's names. All its tensors are read if its form changes.
        program: the program, as in `export_adapter`. Only "vllm" has a form of its own.
        base: the base model's folder, or its config.json.

    Raises:
        ConfigError: the base is missing, no form is known to be right for its `model_type`, or it has no parameter of
            an adapted name.

    >>> tensors = PeftTensors(LoraConfig(target_modules=["q_proj"]), {})
    >>> to_form(tensors, "vllm", None) is tensors
    True
    """
    config = tensors.config
    if program != "vllm" or not isinstance(config, LoraConfig):
        return tensors
    modules = expert_keys.list_modules(tensors.tensors)
    if not (config.target_parameters and (expert_keys.has_fused(modules) or expert_keys.has_router(config, modules))):
        # vLLM reads the weights of other linear layers under the same keys.
        changed, arrays = _with_zeros(config, tensors.tensors)
        return tensors if arrays is tensors.tensors else dataclasses.replace(tensors, config=changed, tensors=arrays)
    kind = _read_type(tensors, base)
    if kind not in _NAMES:
        raise ConfigError(
            f"{tensors.source}: target_parameters: the form that vLLM reads is known for {', '.join(_NAMES)}; the base"
            f" is {kind!r}. {_MERGE}"
        )
    family, names = _NAMES[kind]
    keymap = dataclasses.replace(families.get_family(family), expert_modules=names)
    _require_known(tensors, config, kind, keymap)
    arrays: Mapping[str, Any] = dict(tensors.tensors)
    if kind == "gpt_oss":
        changed, arrays = _with_both(config, arrays)
        return dataclasses.replace(tensors, config=changed, tensors=arrays)
    if kind == "llama4_text":
        arrays = _exchanged(config, arrays)
    # A layout without entries: each parameter is (expert, out, in), with gate before up.
    single, arrays = experts.split_experts(config, arrays, keymap, KeyMap("vLLM", ()))
    assert isinstance(single, LoraConfig)
    single, arrays = _with_zeros(single, arrays)
    return dataclasses.replace(tensors, config=single, tensors=arrays)


def _require_known(tensors: PeftTensors, config: LoraConfig, kind: str, keymap: KeyMap) -> None:
    """Raise `ConfigError` for adapted parameters without a place in vLLM's model of this type."""
    known = experts.list_parameters(keymap)
    ends = [".".join(entry.split(".")[-2:]) for entry in config.target_parameters or ()]
    raise_listed(
        ConfigError,
        f"{tensors.source}: target_parameters: vLLM is not known to read these parameters of {kind}. {_MERGE}:",
        [end for end in ends if not any(f".{each.name}".endswith(f".{end}") for each in known)],
    )
    adapted = [
        name
        for name in dict.fromkeys(x.removesuffix(".base_layer") for x in expert_keys.list_modules(tensors.tensors))
        if name.endswith(".experts") or matching.is_parameter(config, f"{name}.weight")
    ]
    raise_listed(
        ConfigError,
        f"{tensors.source}: target_parameters: vLLM's {kind} has no such modules; expected names such as"
        f" {known[0].name}. {_MERGE}:",
        [name for name in adapted if not any(each.in_module(name) for each in known)],
    )


def name_shared(plain: PeftTensors, program: str) -> PeftTensors:
    """Return a plain LoRA whose shared experts PEFT and transformers find, for the program "transformers".

    Raises `ConfigError` for a LoRA of single experts beside them, which PEFT does not read with them.
    """
    config, modules = plain.config, expert_keys.list_modules(plain.tensors)
    parts = expert_keys.list_shared(config, modules) if program == "transformers" else []
    raise_listed(
        ConfigError,
        f"{plain.source}: PEFT reads these modules as parameters only (`target_parameters`), and a LoRA for each routed"
        f" expert as modules only. {_MERGE}:",
        parts if any(map(expert_keys.SINGLE.fullmatch, modules)) else (),
    )
    if not parts:
        return plain
    return dataclasses.replace(
        plain,
        config=config.replace(
            target_modules=[name for name in modules if name not in parts and matching.is_target(config, name)],
            target_parameters=[*(config.get("target_parameters") or ()), *(f"{name}.weight" for name in parts)],
            lora_dropout=0.0,  # PEFT has no dropout for parameters; it does not matter after the training
        ),
    )


def without_parameters(tensors: PeftTensors, program: str) -> PeftTensors:
    """Return an adapter in the form of `to_form` for the rules of the programs, which do not know its base."""
    if program != "vllm" or not isinstance(tensors.config, LoraConfig):
        return tensors
    return dataclasses.replace(tensors, config=tensors.config.replace(target_parameters=None))


def _read_type(tensors: PeftTensors, base: str | os.PathLike[str] | None) -> str:
    """Return the `model_type` of the base."""
    place = None if base is None else location.to_location(base)
    if place is not None and place.name != "config.json":
        place = place / "config.json"
    found = None if place is None else hf_model.read_model_config(place)
    if found is None:
        raise ConfigError(
            f"{tensors.source}: target_parameters: the form that vLLM reads depends on the model. Pass the base's"
            " folder or its config.json (base=, `--base FOLDER`)"
        )
    return str(found.get("model_type"))


def _find_parameters(config: LoraConfig, arrays: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return `{module of the experts: {its adapted parameter: the beginning of the keys}}`."""
    found: dict[str, dict[str, str]] = {}
    for match in filter(None, map(_FUSED.fullmatch, arrays)):
        owner = match["owner"].removeprefix(PEFT_PREFIX)
        adapted = [p for p in ("gate_up_proj", "down_proj") if matching.is_parameter(config, f"{owner}.{p}")]
        # PEFT wraps the first parameter innermost.
        parameter = adapted[0 if match["inner"] else -1]
        found.setdefault(owner, {})[parameter] = match[0].removesuffix("A.weight")
    return found


def _exchanged(config: LoraConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return Llama 4's tensors with A on the inputs and B on the outputs.

    PEFT has A on the outputs: the parameters are (expert, in, out), and PEFT takes the last axis for the inputs.
    A's rows are in the order (expert, rank), B's columns in the order (rank, expert).
    """
    result = dict(arrays)
    for owner, stems in _find_parameters(config, arrays).items():
        for parameter, stem in stems.items():
            a, b = (np.asarray(arrays[f"{stem}{side}.weight"]) for side in "AB")
            rank = config.rank_of(f"{owner}.{parameter}")
            count = a.shape[0] // rank
            result[f"{stem}A.weight"] = b.reshape(-1, rank, count).transpose(2, 1, 0).reshape(count * rank, -1)
            result[f"{stem}B.weight"] = a.reshape(count, rank, -1).transpose(2, 1, 0).reshape(-1, rank * count)
    return result


def _with_both(config: LoraConfig, arrays: Mapping[str, Any]) -> tuple[LoraConfig, dict[str, Any]]:
    """Add zeros for the parameter of the experts that is not adapted, beside one that is."""
    result, added = dict(arrays), list[str]()
    for owner, stems in _find_parameters(config, arrays).items():
        if len(stems) == 2:
            continue
        ((parameter, stem),) = stems.items()
        pair = a, b = tuple(np.asarray(result.pop(f"{stem}{side}.weight")) for side in "AB")
        is_wide = parameter == "gate_up_proj"
        # The outputs of gate and up are two halves; the other parameter has as many inputs as one of them.
        inputs, outputs = (len(b) // 2, a.shape[1]) if is_wide else (len(b), 2 * a.shape[1])
        zeros = np.zeros((len(a), inputs), a.dtype), np.zeros((outputs, b.shape[1]), b.dtype)
        for inner, pair_of in ((".base_layer", pair if is_wide else zeros), ("", zeros if is_wide else pair)):
            for side, x in zip("AB", pair_of, strict=True):
                result[f"{PEFT_PREFIX}{owner}{inner}.lora_{side}.weight"] = x
        added.append(f"{owner}.{'down_proj' if is_wide else 'gate_up_proj'}")
    return config.replace(target_parameters=[*(config.target_parameters or ()), *added]), result


def _with_zeros(config: LoraConfig, arrays: Mapping[str, Any]) -> tuple[LoraConfig, Mapping[str, Any]]:
    """Add zeros for the projections of a single expert that are not adapted, beside one that is."""
    missing = expert_keys.missing_projections(expert_keys.list_modules(arrays))
    if not missing:
        return config, arrays
    result, added = dict(arrays), list[str]()
    for present, names in missing.items():
        a, b = (np.asarray(arrays[f"{PEFT_PREFIX}{present}.lora_{side}.weight"]) for side in "AB")
        for name in names:
            # Gate and up have the same shape, and down has its inputs and outputs exchanged.
            is_alike = present.endswith(_DOWN) == name.endswith(_DOWN)
            inputs, outputs = (a.shape[1], len(b)) if is_alike else (len(b), a.shape[1])
            rank = config.rank_of(name)
            result[f"{PEFT_PREFIX}{name}.lora_A.weight"] = np.zeros((rank, inputs), a.dtype)
            result[f"{PEFT_PREFIX}{name}.lora_B.weight"] = np.zeros((outputs, rank), b.dtype)
            added.append(name)
    targets = config.target_modules
    # An expression does not name the zeros; the plain form lists all modules in its place.
    return config if isinstance(targets, str) else config.replace(target_modules=[*(targets or ()), *added]), result
