"""Experts among the modules of an adapter's file, as far as keys and configuration show them.

"…mlp.experts.lora_A.weight"                  all routed experts of a layer (`target_parameters`)
"…mlp.experts.3.up_proj.lora_A.weight"        a single one
"…mlp.shared_experts.up_proj.lora_A.weight"   shared experts
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.keymaps.keymap import PEFT_PREFIX

SINGLE = re.compile(r"(?P<expert>(?P<owner>.+\.experts)\.\d+\.)(?P<name>\w+)")
"""The module of a single expert."""
_GATED = re.compile(r".+\.(mlp|block_sparse_moe|feed_forward)\.experts\.\d+\.")
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Gate, up and down of a single expert of these blocks. Experts of other blocks may have no gate."""
PROPERTIES = (
    "experts", "router", "parts of experts", "shared experts", "rslora of experts", "half of experts", "single experts"
)  # fmt: skip
"""The properties of `find_properties`."""
CURED = ("shared experts", "parts of experts", "rslora of experts", "half of experts", "single experts")
"""The properties that an export removes."""
WRONG_IN_PEFT = {
    "shared experts": "no effect in DeepSeek, GLM 4 MoE, Qwen 3 Next (read as routed); right in Qwen 2 and 3.5 MoE",
    "rslora of experts": "the change of gate and up is √2 times too large",
}
"""{property: what PEFT 0.21.2 does with it}."""
EXPORTED = frozenset(("parameters", "experts", "router"))
"""The properties that an export to one of `READERS` keeps or brings into a form of the program."""
READERS = ("PEFT", "transformers load_adapter", "vLLM", "llama.cpp", "MLX")
FORMS = {
    "shared experts": "transformers", "experts": "vllm --base BASE", "router": "vllm --base BASE",
    "half of experts": "vllm --base BASE", "parts of experts": "vllm",
}  # fmt: skip
"""{property: the form of an export, if it is not the plain one}."""
FOR_MODEL: Mapping[tuple[str, str | None], Mapping[str, tuple[str, str] | None]] = {
    ("vLLM", "gpt_oss"): {
        "experts": None, "router": None, "half of experts": ("refused", "stops unless gate, up and down have a LoRA"),
    },
    ("vLLM", "mixtral"): dict.fromkeys(("experts", "router"), ("wrong", "without effect")),
    **{
        ("vLLM", kind): {"experts": ("refused", "stops at all experts in one parameter"), "router": None}
        for kind in ("qwen3_moe", "llama4_text", "deepseek_v3")
    },
}  # fmt: skip
"""{(program, model_type of the base): {property: (verdict, effect), or None for "right"}}, where the base decides."""
_WIDE = re.compile(rf"{_GATED.pattern}(gate_proj|up_proj|w1|w3)")
_FUSED = re.compile(r".+\.experts(\.base_layer)?")
_SHARED = re.compile(r".+\.mlp\.shared_experts?\.(gate|up|down)_proj")
_DENSE = re.compile(r".+\.mlp\.(gate|up|down)_proj")


def list_modules(keys: Iterable[str]) -> list[str]:
    """Return the modules of a LoRA file in PEFT's names.

    >>> list_modules(["base_model.model.0.q.lora_A.weight", "base_model.model.0.q.lora_B.weight"])
    ['0.q']
    """
    return list(dict.fromkeys(key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for key in keys if ".lora_" in key))


def has_fused(modules: Iterable[str]) -> bool:
    """Return True if one of the modules holds all routed experts of a layer."""
    return any(map(_FUSED.fullmatch, modules))


def has_router(config: Config, modules: Iterable[str]) -> bool:
    """Return True if a router `mlp.gate` is adapted as a parameter; some programs have another name for it."""
    return any(name.endswith(".mlp.gate") and matching.is_parameter(config, f"{name}.weight") for name in modules)


def list_shared(config: Config, modules: Collection[str]) -> list[str]:
    """Return the shared experts, and dense layers beside them, that PEFT takes for routed experts.

    PEFT 0.21.2 does so if they are modules (`target_modules`); as parameters (`target_parameters`) it finds them.
    Dense layers show it only beside experts: another model may have the same names.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> modules = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj"]
    >>> list_shared(LoraConfig(target_modules=["up_proj"]), modules) == modules
    True
    >>> list_shared(LoraConfig(target_parameters=["up_proj.weight"]), modules)
    []
    """
    if not any(_SHARED.fullmatch(name) or (SINGLE.fullmatch(name) and ".mlp." in name) for name in modules):
        return []
    found = [name for name in modules if _SHARED.fullmatch(name) or _DENSE.fullmatch(name)]
    return [name for name in found if not matching.is_parameter(config, f"{name}.weight")]


def missing_projections(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return `{an adapted projection: the modules of the same single expert that are not adapted}`.

    >>> missing_projections(["0.mlp.experts.3.up_proj", "0.mlp.experts.3.down_proj", "0.mixer.experts.3.up_proj"])
    {'0.mlp.experts.3.up_proj': ['0.mlp.experts.3.gate_proj']}
    """
    present = paths.group((match["expert"], match["name"]) for match in filter(None, map(SINGLE.fullmatch, modules)))
    return {
        f"{expert}{names[0]}": [f"{expert}{name}" for name in own if name not in names]
        for expert, names in present.items()
        for own in _PROJECTIONS
        if set(names) < set(own) and _GATED.fullmatch(expert)
    }


def find_properties(config: Config, keys: Collection[str]) -> dict[str, str]:
    """Return {property: setting} for the rules of the programs (`consumers`); "" for a property that is absent."""
    modules = list_modules(keys)
    by_parameter, fused = bool(config.get("target_parameters")), set(filter(_FUSED.fullmatch, modules))
    texts = (
        "target_parameters" if by_parameter and (not modules or has_fused(modules)) else "",
        "target_parameters" if has_router(config, modules) else "",
        "target_modules of a part of each expert" if missing_projections(modules) else "",
        "target_modules that are shared experts" if list_shared(config, modules) else "",
        "use_rslora" if config.get("use_rslora") and any(map(_WIDE.fullmatch, modules)) else "",
        "target_parameters" if len(fused) < 2 * len({name.removesuffix(".base_layer") for name in fused}) else "",
        "target_modules" if any(map(SINGLE.fullmatch, modules)) else "",
    )
    return dict(zip(PROPERTIES, texts, strict=True))
