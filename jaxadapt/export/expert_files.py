"""Adapters of experts in the forms of other programs: a LoRA for each expert (vLLM, PEFT, transformers), or stacks of
all experts of a layer (mlx-lm, llama.cpp).

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

mlx-lm and llama.cpp have one pair of stacks for all experts of a layer:

    PEFT's parameters     "…experts.base_layer.lora_A.weight" (e·r, in)  ──split──►  single experts, gate and up joint
    single experts        "…experts.3.up_proj.lora_A.weight" (r, in)
        ──plain_lora──►  one rank  ──stack_experts──►  "…experts.up_proj.lora_A.weight" (e, r, in), B (e, out, r)

transformers 5 holds gate and up of all experts in one parameter, as halves of the outputs or interleaved (GPT-OSS).
PEFT's A of Llama 4 reads the outputs, because this module lacks `is_transposed`. The programs hold gate, up and down
apart, which share A if PEFT adapts gate and up together. The tensors are stacked and cut when they are read.

DeepSeek V3 has no form for llama.cpp: a tiny base alone differs from transformers by 0.3 in log-probability there.

The names in mlx-lm are those of 0.32.2 (`models/*.py`), and llama.cpp's those of its converter (`gguf_files`). Both
multiply a stack's entry of an expert by the inputs of that expert (`LoRASwitchLinear`, `build_lora_mm_id`).
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt.adapters import experts
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import TensorSource, as_source, combine, cut, rename, stack
from jaxadapt.configs import matching
from jaxadapt.configs.lora import LoraConfig, merge_advice
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, MismatchError, raise_listed
from jaxadapt.export import gguf_files
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.merging.pairs import MAGNITUDE, lora_pairs
from jaxadapt.persistence import expert_keys
from jaxadapt.storage import hf_model, location

# ---------------------------------------------------------------- a LoRA for each expert


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
    found = None if base is None else hf_model.read_model_config(location.to_location(base))
    if found is None:
        raise ConfigError(
            f"{tensors.source}: target_parameters: the form that vLLM reads depends on the model. Pass the base's"
            " folder or its config.json (base=, `--base FOLDER`)"
        )
    kind = str(found.get("model_type"))
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
    # Each parameter as PyTorch has it, with gate before up.
    single, arrays = experts.split_experts(config, arrays, keymap, FAMILIES[kind.removesuffix("_text")].keymap)
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


def _find_parameters(config: LoraConfig, arrays: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return `{module of the experts: {its adapted parameter: the beginning of the keys}}`."""
    found: dict[str, dict[str, str]] = {}
    for match in filter(None, map(_FUSED.fullmatch, arrays)):
        owner = match["owner"].removeprefix(PEFT_PREFIX)
        adapted = [p for p in ("gate_up_proj", "down_proj") if matching.is_parameter(config, f"{owner}.{p}")]
        # PEFT wraps the first parameter innermost.
        found.setdefault(owner, {})[adapted[0 if match["inner"] else -1]] = match[0].removesuffix("A.weight")
    return found


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


# ---------------------------------------------------------------- stacks


@dataclasses.dataclass(frozen=True)
class Family:
    """The routed experts of one model type.

    Attributes:
        block: the module of a layer that holds the router and the experts.
        router: the router's module in the block; "" if PEFT cannot adapt it.
        axes: PyTorch's axes of a parameter of all experts: (expert, out, in) or (expert, in, out).
        turned: True if the module has `is_transposed`, from which PEFT reads that the inputs come first.
        interleaved: True if gate and up alternate in their joint parameter; else they are its halves.
        mlx: the names in mlx-lm that differ, `{beginning after the layer: another}`.
        in_mlx: the beginning of a layer in mlx-lm.
    """

    block: str = "mlp"
    router: str = "gate"
    axes: str = "e o i"
    turned: bool = False
    interleaved: bool = False
    mlx: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"mlp.experts.": "mlp.switch_mlp."})
    in_mlx: str = "model.layers."

    @property
    def keymap(self) -> KeyMap:
        """The parameters of all experts, and the modules of single experts that `split` writes."""
        owner = f"{families.LAYER}{self.block}."
        wide, down = (f"{owner}experts.{name}" for name in ("gate_up_proj", "down_proj"))
        entries = [
            Weight(name, name, f"e i o -> {self.axes}", kind="experts", fan_in_fan_out=self.turned)
            for name in (wide, down)
        ]
        modules = [(name, (name.replace("experts.", "experts.{e}.").removesuffix("_proj"),)) for name in (wide, down)]
        if self.router:
            modules.append((f"{owner}{self.router}.weight", (f"{owner}{self.router}",)))
        # PEFT reads some shared experts under the names of their weights only (`name_shared`).
        shared = ("shared_experts.", "shared_expert.", "")
        dense = [f"{owner}{block}{name}_proj" for block in shared for name in ("gate", "up", "down")]
        modules += [(f"{module}.weight", (module,)) for module in dense]
        return KeyMap("routed experts", tuple(entries), expert_modules=tuple(modules))


_IN_MIXTRAL = {"mlp.experts.": "block_sparse_moe.switch_mlp.", "mlp.gate": "block_sparse_moe.gate"}
FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(mlx=_IN_MIXTRAL),
    "qwen3_moe": Family(),
    "gpt_oss": Family(router="router", axes="e i o", turned=True, interleaved=True, mlx={}),
    "llama4": Family("feed_forward", "router", "e i o", mlx={}, in_mlx="language_model.model.layers."),
    "deepseek_v3": Family(router=""),
}
"""{model_type of config.json: its experts}."""

_TYPES = {"llama": "mixtral", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}
"""{general.architecture of GGUF: model_type}, where they differ."""
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_SINGLE = re.compile(r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe|feed_forward)\.experts\.(0|[1-9]\d*)\.(\w+)")
_LABELS = {
    "gate_up": "", "down": "down_proj", "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj",
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip
"""{last part of a single expert's module: the stack}; "gate_up" becomes two."""
_TEXT_MODEL = re.compile(r"\b(model\.language_model|language_model\.model)\.")


@dataclasses.dataclass(frozen=True)
class Stacks:
    """The base, the program and the configuration for which an adapter's experts are stacked.

    Attributes:
        family: the base's experts.
        count: their number in each layer.
        style: the program's files, "mlx" or "gguf".
        config: the adapter's configuration, for messages.
    """

    family: Family
    count: int
    style: str
    config: LoraConfig


def find_stacks(tensors: PeftTensors, style: str, base: Any) -> Stacks | None:
    """Return the base, program and configuration of the stacks; None if an adapter needs no stacks.

    It needs none without routed experts, and if the program reads PEFT's form.

    Args:
        tensors: the adapter.
        style: that of the program's files.
        base: the base model: its folder, its config.json or a GGUF file.

    Raises:
        ConfigError: the base is not given.
        MismatchError: the form of this model's experts is not known.
    """
    config = tensors.config
    if not isinstance(config, LoraConfig) or style not in ("mlx", "gguf"):
        return None
    by_parameter = bool(config.target_parameters)
    has_experts = by_parameter or any(map(_SINGLE.fullmatch, _text_model(lora_pairs(tensors.tensors)).values()))
    if has_experts and base is None:
        raise ConfigError(
            f"{tensors.source}: the adapter has routed experts, whose form depends on the base model: pass base="
            " (`--base`), the model's folder or its config.json"
        )
    kind, count = ("", None) if base is None else _read_base(location.to_location(base))
    if kind in FAMILIES and count:  # a dense model, such as one of `llama4_text`, has other names
        return Stacks(FAMILIES[kind], count, style, config)
    if not has_experts or (style == "gguf" and by_parameter):  # the weights of linear modules, by their names
        return None
    raise MismatchError(
        f"{tensors.source}: no form for the routed experts or parameters of a {kind!r} model is known; expected one of"
        f" {', '.join(FAMILIES)}. For another, {merge_advice(config)}"
    )


def _read_base(place: location.Location) -> tuple[str, int | None]:
    """Return the model type of a base and the number of its experts, None if it has no experts."""
    if place.suffix == ".gguf":
        file = gguf_files.File(place)
        name = str(file.value("general.architecture"))
        return _TYPES.get(name, name), file.value(f"{name}.expert_count")
    config = hf_model.read_model_config(place)
    if config is None:
        return "", None
    inner = hf_model.text_fields(config)
    counts = (inner.get(name) for name in _COUNTS if inner.get("moe_layers") != [])
    kind = str(config.get("model_type")).removesuffix("_text")
    return kind, next((count for count in counts if isinstance(count, int)), None)


def _text_model(names: Iterable[str]) -> dict[str, str]:
    """Return {name: its name in the text model alone}, for a model with images."""
    return {name: _TEXT_MODEL.sub("model.", name) for name in names}


def split(tensors: PeftTensors, style: str, base: Any) -> tuple[PeftTensors, Stacks | None]:
    """Return an adapter of expert parameters as one of the modules of single experts, and what determines its stacks.

    Raises what `find_stacks` raises, and `MismatchError` for adapted parameters other than experts and routers.
    """
    stacks = find_stacks(tensors, style, base)
    if stacks is None:
        return tensors, None
    arrays = as_source(tensors.tensors)
    arrays = rename(arrays, {new: key for key, new in _text_model(arrays).items()})
    parameters = tuple(_text_model(stacks.config.target_parameters or ()).values())
    config = stacks.config.replace(target_parameters=parameters or None)
    if not parameters:
        return dataclasses.replace(tensors, config=config, tensors=arrays), stacks
    config, single = experts.split_experts(config, {key: arrays[key] for key in arrays}, stacks.family.keymap)
    raise_listed(
        MismatchError,
        f"{tensors.source}: the program adapts modules, and these parameters (target_parameters) are no routed experts"
        f" of the base; {merge_advice(stacks.config)}:",
        config.get("target_parameters") or (),
    )
    return dataclasses.replace(tensors, config=config.replace(target_parameters=None), tensors=single), stacks


def stack_experts(tensors: PeftTensors, stacks: Stacks | None) -> PeftTensors:
    """Return an adapter of single experts in its plain form with stacks, under the program's names of modules.

    A is (expert, r, in) and B (expert, out, r). The other modules stay as they are.

    Raises `MismatchError` if experts are missing, or the program has no place for a module.
    """
    if stacks is None:
        return tensors
    arrays = as_source(tensors.tensors)
    names = {key: f"{PEFT_PREFIX}{_name(stacks, key.removeprefix(PEFT_PREFIX))}" for key in arrays}
    single_pairs = [(match, keys) for m, keys in lora_pairs(arrays).items() if (match := _SINGLE.fullmatch(m))]
    layers = paths.nest(
        (f"{match[1]}{stacks.family.block}.experts.{match[3]}", int(match[2]), keys) for match, keys in single_pairs
    )
    joined = {key for _, keys in single_pairs for key in keys}
    _refuse_modules(tensors, stacks, arrays, layers)
    rows: dict[str, list[list[str]]] = {}
    parts: dict[str, tuple[str, tuple[slice, ...]]] = {}
    for module, single in layers.items():
        both = [f"{PEFT_PREFIX}{module}.lora_{side}.weight" for side in "AB"]
        rows |= {key: [[single[e][i]] for e in range(stacks.count)] for i, key in enumerate(both)}
        parts |= _place_parts(stacks, module, both, arrays.specs[single[0].b].shape[0])
    stacked = cut(stack(arrays, rows, {}), parts)
    own = rename(arrays, {name: key for key, name in names.items() if key not in joined})
    return dataclasses.replace(
        tensors,
        config=tensors.config.replace(target_parameters=stacks.config.target_parameters),  # for advice in messages
        tensors=combine(tensors.source, [rename(stacked, {key: key for key in parts}), own]),
    )


def _place_parts(
    stacks: Stacks, module: str, keys: Sequence[str], outputs: int
) -> dict[str, tuple[str, tuple[slice, ...]]]:
    """Return {key in the program's names: (key of the stack, its part)}; gate and up become two, which share A."""
    owner, _, label = module.rpartition(".")
    names = [_LABELS[label]] if _LABELS[label] else ["gate_proj", "up_proj"]
    parts: dict[str, tuple[str, tuple[slice, ...]]] = {}
    for i, name in enumerate(names):
        new = f"{PEFT_PREFIX}{_name(stacks, f'{owner}.{name}')}.lora_"
        size = outputs // len(names)
        rows = slice(i, None, len(names)) if stacks.family.interleaved else slice(i * size, (i + 1) * size)
        parts |= {f"{new}A.weight": (keys[0], ()), f"{new}B.weight": (keys[1], (slice(None), rows))}
    return parts


def _refuse_modules(
    tensors: PeftTensors, stacks: Stacks, arrays: TensorSource, layers: Mapping[str, Mapping[int, Any]]
) -> None:
    ends = (key.removeprefix(PEFT_PREFIX).removesuffix(MAGNITUDE) for key in arrays if key.endswith(MAGNITUDE))
    dora = [module for module in ends if _SINGLE.fullmatch(module)]
    unknown = [module for module in layers if module.rpartition(".")[2] not in _LABELS]
    problems = [
        f"{module}: mlx-lm splits its weight, and neither part takes a LoRA"
        for module in lora_pairs(arrays)
        if stacks.style == "mlx" and module.endswith("kv_b_proj")
    ] + [
        f"{module}: expected all {stacks.count} experts of the base, found {len(single)}"
        for module, single in layers.items()
        if sorted(single) != list(range(stacks.count))
    ]
    raise_listed(
        MismatchError,
        f"{tensors.source}: the program has no form for these modules; {merge_advice(stacks.config)}:",
        [
            *problems,
            *(f"{module}: expected a LoRA of gate, up or down, without DoRA" for module in (*unknown, *dora)),
        ],
    )


def _name(stacks: Stacks, module: str) -> str:
    """Return the program's name of a module."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if stacks.style != "mlx" or match is None:
        return module
    before, after = next((pair for pair in stacks.family.mlx.items() if match[2].startswith(pair[0])), ("", ""))
    return f"{stacks.family.in_mlx}{match[1]}.{after}{match[2].removeprefix(before)}"
