"""Which parameters a configuration adapts by their own names: PEFT's `target_parameters`.

PEFT wraps the module that holds such a parameter. Where a module holds several, the wrappers nest, the first of the
module's own order innermost: with two of them `experts.base_layer.lora_A.weight` is the first one's and
`experts.lora_A.weight` the second's. A table's lines are in that order. Nothing here looks at a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, TargetError
from jaxadapt.keymaps import generic, plan
from jaxadapt.keymaps.keymap import KeyMap, Match

Shape = tuple[int, ...]
Index = tuple[int, ...]
KINDS = ("linear", "parameter", "experts")


def parameter_names(site: Match, sizes: Mapping[str, int]) -> dict[Index, str]:
    """The PyTorch parameters of a leaf in full, by index over its braced axes."""
    return {index: paths.join(*name) for index, name in site.parameters(sizes).items()}


def select_parameters(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]
) -> list[tuple[Match, dict[str, int], dict[Index, str]]]:
    """`(site, sizes, all its parameters' names)` of every leaf of which the configuration names some.

    Raises `KeyMapError` for a named leaf that the table has no line for, `TargetError` for one that PEFT itself
    cannot adapt by its name, or whose PyTorch layout makes something else of it there.
    """
    if not config.get("target_parameters"):
        return []
    found: list[tuple[Match, dict[str, int], dict[Index, str]]] = []
    lost: list[str] = []
    refused: list[str] = []
    unknown: list[str] = []
    for leaf, shape in shapes.items():
        site = keymap.match(leaf)
        if site is None or len(site.weight.left) != len(shape):
            lost += [f"{leaf} {shape}"] if matching.is_parameter(config, leaf) else []
            continue
        sizes = plan.axis_sizes(site, shape)
        mine = parameter_names(site, sizes)
        if not any(matching.is_parameter(config, name) for name in mine.values()):
            continue
        kind = site.weight.kind
        if kind not in KINDS:
            refused.append(f"{leaf} {shape}: kind {kind!r}")
        elif kind == "linear" and site.weight.fan_in_fan_out:
            refused.append(f"{leaf} {shape}: PyTorch stores it (in, out), which PEFT would take for (out, in)")
        elif generic.is_guess(keymap, leaf, shape) and generic.is_square(site, shape):
            unknown.append(f"{leaf} {shape}")
        found.append((site, sizes, mine))
    if lost:
        raise KeyMapError(
            f"target_parameters names weights that the table {keymap.name!r} has no line for; name the family with"
            " keymap=, or give a KeyMap with a line for each, such as Weight(leaf, key, 'e i o -> e o i',"
            " kind='experts'):\n" + paths.bullets(lost)
        )
    if unknown:
        raise KeyMapError(
            "target_parameters names square weights of which no table says whether PyTorch stores them (out, in), as"
            " nn.Linear does, or (in, out), as Conv1D of transformers does: A and B would fit either way. Name the"
            " modules in target_modules, or give a KeyMap with a line for each, such as Weight(leaf, key, 'i o -> o"
            " i'):\n" + paths.bullets(unknown)
        )
    if refused:
        raise TargetError(
            "target_parameters names what can only be adapted as a module (target_modules), or not at all:\n"
            + paths.bullets(refused)
        )
    return found


def wrapper_depths(keymap: KeyMap, sites: Iterable[Match]) -> dict[str, int]:
    """`{leaf: how many wrappers lie around its own}` of all leaves that one adapter has by their names."""
    order = {weight.leaf: i for i, weight in enumerate(keymap.weights)}
    held: dict[str, dict[str, int]] = {}  # the parameters of a module, in the table's order; several leaves may be one
    called: dict[str, tuple[str, str]] = {}
    for site in sites:
        owner, name = called[site.leaf] = site.parameter({axis.strip("{}"): axis for axis in site.braced})
        held.setdefault(owner, {})[name] = order[site.weight.leaf]
    ranked = {owner: sorted(mine, key=mine.__getitem__) for owner, mine in held.items()}
    return {leaf: len(ranked[owner]) - 1 - ranked[owner].index(name) for leaf, (owner, name) in called.items()}
