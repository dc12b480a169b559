"""The expert parameters of a keymap, and the modules of single experts that their parts correspond to."""

from __future__ import annotations

import dataclasses
import re

from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.plan import part_key
from jaxadapt.keymaps.weight import Weight, name_regex


@dataclasses.dataclass(frozen=True)
class ExpertParameter:
    """One parameter that holds all experts of a layer, and the modules of single experts that its parts correspond to.

    If a module has several parameters, PEFT wraps the first in `order` innermost. `parts` are the modules' places in
    the parameter. `split`: each part is a leaf of its own. `turned`: PEFT's A is a single expert's B (`is_transposed`).
    """

    name: str
    modules: tuple[str, ...]
    order: int
    parts: tuple[str, ...]
    split: bool
    turned: bool = False

    def keys(self, side: str) -> list[str]:
        """Return the suffix of A's or B's key for each part."""
        return [part_key("", None if side == "A" else 0, part) for part in self.parts]

    @property
    def owner(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    def find(self, module: str) -> tuple[str, int, int] | None:
        """Return the full name of the parameter, the part and the expert's number for a single expert's module."""
        for part, template in enumerate(self.modules):
            match = re.fullmatch(name_regex(template), module)
            if match:
                texts = match.groupdict()
                return self.name.format(**texts), part, int(texts.get("e", 0))
        return None

    def texts(self, name: str) -> dict[str, str] | None:
        """Return the texts that fill the placeholders of the parameter's name; None for another parameter's name."""
        match = re.fullmatch(name_regex(self.name), name)
        return None if match is None else match.groupdict()

    def in_module(self, module: str) -> str | None:
        """Return the full name of this parameter in a module; None if the module is of another kind."""
        match = re.fullmatch(name_regex(self.owner), module)
        return None if match is None else self.name.format(**match.groupdict())

    def in_module_of(self, name: str) -> str:
        """Return the full name of this parameter in the module of the parameter `name`."""
        return f"{name.rpartition('.')[0]}.{self.name.rpartition('.')[2]}"


def list_parameters(keymap: KeyMap, layout: KeyMap | None = None) -> list[ExpertParameter]:
    """Return the expert parameters of a keymap.

    Args:
        layout: the keymap that tells the parts of the leaves, `keymap` by default.
    """
    parts: dict[str, list[str]] = {}
    for entry in (layout or keymap).weights:
        if entry.part and entry.kind == "experts":
            parts.setdefault(entry.file_key, []).append(entry.part)
    parameters: list[ExpertParameter] = []
    for i, (name, modules) in enumerate(keymap.expert_modules):
        default_parts = [f"{part}/{len(modules)}" for part in range(len(modules))]
        turned = any(entry.file_key == name and is_transposed(entry) for entry in (layout or keymap).weights)
        parameters.append(
            ExpertParameter(name, modules, i, tuple(sorted(parts.get(name, default_parts))), name in parts, turned)
        )
    return parameters


def is_transposed(entry: Weight) -> bool:
    """Return True if an entry of experts has its A on the outputs: Llama 4's, as PEFT adapts it."""
    roles = entry.torch_roles
    return entry.kind == "experts" and (roles["out"], roles["in"]) == tuple((axis,) for axis in entry.left[-2:])
