"""The parameters that a configuration adapts by their own names: PEFT's `target_parameters`.

PEFT wraps the module that holds such a parameter. If a module holds several, the wrappers nest: the first parameter in
the module's own order is innermost. With two parameters, `experts.base_layer.lora_A.weight` belongs to the first and
`experts.lora_A.weight` to the second. A keymap's entries are in that order. Nothing here reads a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, TargetError, raise_listed
from jaxadapt.keymaps import generic, plan
from jaxadapt.keymaps.keymap import KeyMap, Match

Shape = tuple[int, ...]
Index = tuple[int, ...]
KINDS = ("linear", "parameter", "experts")


def parameter_names(match: Match, sizes: Mapping[str, int]) -> dict[Index, str]:
    """Return the full names of a leaf's PyTorch parameters, by index over its braced axes."""
    return {index: paths.join(*name) for index, name in match.parameters(sizes).items()}


def select_parameters(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]
) -> list[tuple[Match, dict[str, int], dict[Index, str]]]:
    """Return `(match, sizes, names of all its parameters)` for every leaf that the configuration names by a parameter.

    Raises `KeyMapError` for a named leaf without an entry in the keymap, or with an ambiguous layout. Raises
    `TargetError` for a leaf that PEFT cannot adapt by its name, or whose PyTorch layout PEFT would misread.
    """
    if not config.get("target_parameters"):
        return []
    selected: list[tuple[Match, dict[str, int], dict[Index, str]]] = []
    unmapped: list[str] = []
    refused: list[str] = []
    ambiguous: list[str] = []
    for leaf, shape in shapes.items():
        match = keymap.match(leaf)
        if match is None or len(match.weight.left) != len(shape):
            unmapped += [f"{leaf} {shape}"] if matching.is_parameter(config, leaf) else []
            continue
        sizes = plan.axis_sizes(match, shape)
        names = parameter_names(match, sizes)
        if not any(matching.is_parameter(config, name) for name in names.values()):
            continue
        kind = match.weight.kind
        if kind not in KINDS:
            refused.append(f"{leaf} {shape}: kind {kind!r}")
        elif kind == "linear" and match.weight.fan_in_fan_out:
            refused.append(f"{leaf} {shape}: PyTorch stores it (in, out), and PEFT would read it as (out, in)")
        elif generic.is_guess(keymap, leaf, shape) and generic.is_square(match, shape):
            ambiguous.append(f"{leaf} {shape}")
        selected.append((match, sizes, names))
    raise_listed(
        KeyMapError,
        f"target_parameters names weights without an entry in the keymap {keymap.name!r}. Name the family with"
        " keymap=, or pass a KeyMap with an entry for each, such as Weight(leaf, key, 'e i o -> e o i',"
        " kind='experts'):",
        unmapped,
    )
    raise_listed(
        KeyMapError,
        "target_parameters names square weights with an ambiguous layout: PyTorch may store them (out, in), as"
        " nn.Linear does, or (in, out), as Conv1D of transformers does, and A and B would fit either way. Name the"
        " modules in target_modules, or pass a KeyMap with an entry for each, such as Weight(leaf, key, 'i o -> o"
        " i'):",
        ambiguous,
    )
    raise_listed(
        TargetError,
        "target_parameters names weights that cannot be adapted by their own names; name their modules in"
        " target_modules if they are matrices, or leave them out:",
        refused,
    )
    return selected


def wrapper_depths(keymap: KeyMap, matches: Iterable[Match]) -> dict[str, int]:
    """Return `{leaf: number of PEFT's wrappers outside its own}` for the leaves that one adapter adapts by name."""
    order = {weight.leaf: i for i, weight in enumerate(keymap.weights)}
    positions: dict[str, dict[str, int]] = {}  # parameters of each module, in the keymap's order; leaves may share one
    names: dict[str, tuple[str, str]] = {}
    for match in matches:
        owner, name = names[match.leaf] = match.parameter({axis.strip("{}"): axis for axis in match.braced})
        positions.setdefault(owner, {})[name] = order[match.weight.leaf]
    ranked = {owner: sorted(parameters, key=parameters.__getitem__) for owner, parameters in positions.items()}
    return {leaf: len(ranked[owner]) - 1 - ranked[owner].index(name) for leaf, (owner, name) in names.items()}
