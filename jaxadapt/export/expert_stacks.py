"""Routed experts in the form of mlx-lm and llama.cpp: one pair of stacks for all experts of a layer.

    PEFT's parameters     "…experts.base_layer.lora_A.weight" (e·r, in)  ──split──►  single experts, gate and up joint
    single experts        "…experts.3.up_proj.lora_A.weight" (r, in)
        ──plain_lora──►  one rank  ──stack──►  "…experts.up_proj.lora_A.weight" (e, r, in), B (e, out, r)

transformers 5 holds gate and up of all experts in one parameter, as halves of the outputs or interleaved (GPT-OSS).
PEFT's A of Llama 4 reads the outputs, because this module lacks `is_transposed`. The programs hold gate, up and down
apart, which share A if PEFT adapts gate and up together. The tensors are stacked and cut when they are read.

DeepSeek V3 has no form for llama.cpp: a tiny base alone differs from transformers by 0.3 in log-probability there.

The names in mlx-lm are those of 0.32.2 (`models/*.py`), and llama.cpp's those of its converter (`gguf_files`). Both
multiply a stack's entry of an expert by the inputs of that expert (`LoRASwitchLinear`, `build_lora_mm_id`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxadapt.adapters import experts
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import TensorSource, as_source, combine, cut, rename
from jaxadapt.arrays.tensor_source import stack as stack_tensors
from jaxadapt.configs import lora
from jaxadapt.core.errors import ConfigError, MismatchError, raise_listed
from jaxadapt.export import gguf_files
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.weight import Weight
from jaxadapt.merging.pairs import MAGNITUDE, PairKeys, lora_pairs
from jaxadapt.storage import hf_model, location

LAYER = "model.layers.{l}."


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
        owner = f"{LAYER}{self.block}."
        wide, down = (f"{owner}experts.{name}" for name in ("gate_up_proj", "down_proj"))
        entries = [
            Weight(name, name, f"e i o -> {self.axes}", kind="experts", fan_in_fan_out=self.turned)
            for name in (wide, down)
        ]
        modules = [(name, (name.replace("experts.", "experts.{e}.").removesuffix("_proj"),)) for name in (wide, down)]
        if self.router:
            modules.append((f"{owner}{self.router}.weight", (f"{owner}{self.router}",)))
        # PEFT reads some shared experts under the names of their weights only (`expert_forms`).
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
    config: lora.LoraConfig


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
    config, names = tensors.config, _text_model(lora_pairs(tensors.tensors))
    if not isinstance(config, lora.LoraConfig) or style not in ("mlx", "gguf"):
        return None
    by_parameter = bool(config.target_parameters)
    has_experts = by_parameter or any(map(_SINGLE.fullmatch, names.values()))
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
        f" {', '.join(FAMILIES)}. For another, {lora.merge_advice(config)}"
    )


def _read_base(place: location.Location) -> tuple[str, int | None]:
    """Return the model type of a base and the number of its experts, None if it has no experts."""
    if place.suffix == ".gguf":
        file = gguf_files.File(place)
        name = str(file.value("general.architecture"))
        return _TYPES.get(name, name), file.value(f"{name}.expert_count")
    place = place if place.name == "config.json" else place / "config.json"
    config = hf_model.read_model_config(place)
    if config is None:
        return "", None
    text: Any = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, Mapping) else config
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
        f" of the base; {lora.merge_advice(stacks.config)}:",
        config.get("target_parameters") or (),
    )
    return dataclasses.replace(tensors, config=config.replace(target_parameters=None), tensors=single), stacks


def stack(tensors: PeftTensors, stacks: Stacks | None) -> PeftTensors:
    """Return an adapter of single experts in its plain form with stacks, under the program's names of modules.

    A is (expert, r, in) and B (expert, out, r). The other modules stay as they are.

    Raises `MismatchError` if experts are missing, or the program has no place for a module.
    """
    if stacks is None:
        return tensors
    arrays = as_source(tensors.tensors)
    names = {key: f"{PEFT_PREFIX}{_name(stacks, key.removeprefix(PEFT_PREFIX))}" for key in arrays}
    layers: dict[str, dict[int, PairKeys]] = {}
    for module, keys in lora_pairs(arrays).items():
        if match := _SINGLE.fullmatch(module):
            layers.setdefault(f"{match[1]}{stacks.family.block}.experts.{match[3]}", {})[int(match[2])] = keys
            for key in keys:
                del names[key]
    _refuse_modules(tensors, stacks, arrays, layers)
    rows: dict[str, list[list[str]]] = {}
    parts: dict[str, tuple[str, tuple[slice, ...]]] = {}
    for module, single in layers.items():
        both = [f"{PEFT_PREFIX}{module}.lora_{side}.weight" for side in "AB"]
        rows |= {key: [[single[e][i]] for e in range(stacks.count)] for i, key in enumerate(both)}
        parts |= _place_parts(stacks, module, both, arrays.specs[single[0].b].shape[0])
    stacked = cut(stack_tensors(arrays, rows, {}), parts)
    own = rename(arrays, {name: key for key, name in names.items()})
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
    count, parts = len(names), dict[str, tuple[str, tuple[slice, ...]]]()
    for i, name in enumerate(names):
        new, size = f"{PEFT_PREFIX}{_name(stacks, f'{owner}.{name}')}.lora_", outputs // count
        rows = slice(i, None, count) if stacks.family.interleaved else slice(i * size, (i + 1) * size)
        parts |= {f"{new}A.weight": (keys[0], ()), f"{new}B.weight": (keys[1], (slice(None), rows))}
    return parts


def _refuse_modules(
    tensors: PeftTensors, stacks: Stacks, arrays: TensorSource, layers: Mapping[str, Mapping[int, PairKeys]]
) -> None:
    problems = [
        f"{module}: mlx-lm splits its weight, and neither part takes a LoRA"
        for module in lora_pairs(arrays)
        if stacks.style == "mlx" and module.endswith("kv_b_proj")
    ]
    problems += [
        f"{module}: expected all {stacks.count} experts of the base, found {len(single)}"
        for module, single in layers.items()
        if sorted(single) != list(range(stacks.count))
    ]
    ends = (key.removeprefix(PEFT_PREFIX).removesuffix(MAGNITUDE) for key in arrays if key.endswith(MAGNITUDE))
    dora = [module for module in ends if _SINGLE.fullmatch(module)]
    unknown = [module for module in layers if module.rpartition(".")[2] not in _LABELS]
    problems += [f"{module}: expected a LoRA of gate, up or down, without DoRA" for module in (*unknown, *dora)]
    raise_listed(
        MismatchError,
        f"{tensors.source}: the program has no form for these modules; {lora.merge_advice(stacks.config)}:",
        problems,
    )


def _name(stacks: Stacks, module: str) -> str:
    """Return the program's name of a module."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if stacks.style != "mlx" or match is None:
        return module
    before, after = next((pair for pair in stacks.family.mlx.items() if match[2].startswith(pair[0])), ("", ""))
    return f"{stacks.family.in_mlx}{match[1]}.{after}{match[2].removeprefix(before)}"
