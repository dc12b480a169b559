"""Routed experts that a configuration leaves out although its targets name their matrices.

transformers 5 holds all experts of a layer in parameters, (experts, out, in), which no module's name selects:
`target_modules=["up_proj"]` reaches the shared experts and the dense layers of such a model, or nothing. PEFT says
nothing of it. Only `target_parameters` reaches them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import errors, paths
from jaxadapt.core.name_groups import group_names
from jaxadapt.keymaps.keymap import KeyMap

_MATRICES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
"""The last parts of the names of an expert's matrices, in transformers 4 and 5."""
_IN_FILES = re.compile(r"(.+\.experts)(?:\.\d+)?\.((?:gate_up|gate|up|down)_proj|w[123])(?:\.weight)?")


def list_parameters(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the parameters of all experts among a model's leaves, under PyTorch's names.

    >>> from jaxadapt.keymaps.families.moe import LLAMA4
    >>> list_parameters(LLAMA4, {"model.layers.3.feed_forward.experts.down_proj": (4, 6, 2), "model.norm.weight": (2,)})
    ['model.layers.3.feed_forward.experts.down_proj']
    """
    if not any(weight.kind == "experts" for weight in keymap.weights):
        return []
    from jaxadapt.keymaps import plan  # it imports arrays, which `jaxadapt verify` does without

    matches = ((keymap.match(leaf), shape) for leaf, shape in shapes.items())
    found = ((match, shape) for match, shape in matches if match is not None and match.weight.kind == "experts")
    names = (match.parameters(plan.axis_sizes(match, shape)).values() for match, shape in found)
    return list(dict.fromkeys(paths.join(*name) for own in names for name in own))


def list_in_files(keys: Iterable[str]) -> list[str]:
    """Return the same of a base's tensors in files, which may hold each expert by itself.

    >>> list_in_files(["model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.experts.down_proj"])
    ['model.layers.0.mlp.experts.gate_up_proj', 'model.layers.1.mlp.experts.down_proj']
    """
    found = filter(None, map(_IN_FILES.fullmatch, keys))
    joint = {"down_proj": "down_proj", "w2": "down_proj"}
    return list(dict.fromkeys(f"{each[1]}.{joint.get(each[2], 'gate_up_proj')}" for each in found))


def left_out(config: Config, chosen: Collection[str], parameters: Collection[str]) -> list[str]:
    """Return a warning if the targets name a routed expert's matrices, or all layers, and reach no routed expert.

    Targets name them if they would select them as modules: `"up_proj"` does, `"shared_experts.up_proj"` does not.

    Args:
        config: the configuration.
        chosen: the modules and parameters that are adapted.
        parameters: the parameters of all experts.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> config = LoraConfig(target_modules=["q_proj", "up_proj"])
    >>> text = left_out(config, ["0.q_proj", "0.shared_experts.up_proj"], ["0.experts.down_proj"])[0]
    >>> text.partition(": ")[0], text.rpartition(". ")[2]
    ('target_modules adapts no routed expert', "Name them too: target_parameters=['experts.down_proj']")
    """
    targets: str | Collection[str] | None = config.get("target_modules")
    if not parameters or targets is None or any(".experts." in f"{name}." for name in chosen):
        return []
    if not matching.is_all_linear(config) and not _names_matrices(config, parameters):
        return []
    others = [name for name in chosen if name.rpartition(".")[2] in _MATRICES]
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in parameters))
    reached = f"; its targets reach only {group_names(others)}" if others else ""
    way = (
        f"Name them too: target_parameters={ends}"
        if config.peft_type == "LORA"
        else f"{config.peft_type} adapts modules only; LoRA reaches them by target_parameters={ends}"
    )
    text = "target_modules adapts no routed expert: parameters of all experts of a layer hold them"
    return [f"{text}, {group_names(parameters)}, which no module's name selects{reached}. {way}"]


def _names_matrices(config: Config, parameters: Iterable[str]) -> bool:
    """Return True if the targets would select matrices of routed experts as modules."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    modules = (f"{owner}{end}" for owner in owners for end in ("", *(f".0.{each}" for each in _MATRICES)))
    return any(matching.is_target(config, name) for name in modules)


def warn_of_all_linear(
    config: Config, resolved: Config, chosen: Collection[str], keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Warn that "all-linear" reaches no routed expert, unless the selection of the resolved names warns of it.

    Args:
        config: the configuration as given.
        resolved: the configuration with names.
        chosen: the linear modules.
        keymap, shapes: the model's.
    """
    parameters = list_parameters(keymap, shapes)
    if not left_out(resolved, chosen, parameters):
        for text in left_out(config, chosen, parameters):
            errors.warn(text)
