"""The leaves of a model that a configuration selects by target_modules, target_parameters and modules_to_save.

Selection starts from a model's shapes, for attaching and loading. `sites.sites_from_shapes` finds the same sites in an
adapter without its model.

`make_recipe` resolves a new adapter's configuration and its keymap from the shapes of a base. A likely mistake that
PEFT accepts is a warning. `rename_targets` returns the configuration of an adapter under another keymap's names.

With `layer_replication`, PEFT builds a model from a base by repeating layers, each repetition with its own adapter.
Here the model comes with its layers already repeated, so the adapter fits it as any other, and fits the base in PEFT.
This module checks that the model has as many layers, and that layers which repeat one layer of the base are equal.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import (
    Covered,
    FileShapes,
    Index,
    Recipe,
    Shape,
    Site,
    Sites,
    adapted_modules,
    bind_shared,
    bind_site,
)
from jaxadapt.adapters.sites import bind_copies, expert_parameters, parameter_names, resolve_tying, wrapper_depths
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.frozen import matching_patterns
from jaxadapt.core import errors, paths
from jaxadapt.core.errors import ConfigError, KeyMapError, TargetError, raise_listed, warn
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import (
    MAIN_WEIGHT_NAMES,
    KeyMap,
    advise_stacked,
    is_guess,
    is_square,
    layout_advice,
    leaves_left_out,
    tied_heads,
    with_layout,
)
from jaxadapt.keymaps.pytorch import routed_left_out
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods.base import Method, get_method
from jaxadapt.methods.prompt import PromptMethod

# ---------------------------------------------------------------- layer replication


_LAYER = re.compile(r"(?:^|\.)(?:layers|encoder\.layer|h)\.(\d+)\.")  # the names that PEFT's replicate_layers knows


def base_layers(config: Config) -> list[int]:
    """Return for each layer of the model the layer of the base that it repeats; empty without `layer_replication`."""
    return [layer for start, end in config.get("layer_replication") or () for layer in range(start, end)]


def check_layers(config: Config, modules: Iterable[str]) -> None:
    """Raise `ConfigError` if a model with these modules lacks the layers that the configuration makes."""
    order = base_layers(config)
    if not order:
        return
    layers = {int(match[1]) for name in modules if (match := _LAYER.search(name))}
    if layers != set(range(len(order))):
        raise ConfigError(
            f"layer_replication: expected a model of {len(order)} layers, found {len(layers)}."
            f" Build it with the base's layers in this order: {order}. (Layers are recognized as in PEFT, below"
            ' "layers", "encoder.layer" or "h".)'
        )


def check_values(config: Config, keymap: KeyMap, base: Callable[[], Mapping[str, Any]]) -> None:
    """Raise `ConfigError` if layers that repeat one layer of the base differ.

    Args:
        base: a function that returns `{leaf: array or spec}` of the base parameters.
    """
    order = base_layers(config)
    if not order:
        return
    first: dict[str, Any] = {}
    different: list[str] = []
    without_values = False
    for leaf, array in base().items():
        match = keymap.match(leaf)
        if match is None or len(match.weight.left) != len(array.shape):
            continue
        if not isinstance(array, np.ndarray | jax.Array) or isinstance(array, Tracer):
            without_values = True
            continue
        for index, parameter in match.parameters(plan.axis_sizes(match, array.shape)).items():
            name, position = paths.join(*parameter), dict(zip(match.braced, index, strict=True))
            layer = _LAYER.search(name)
            if layer is None or int(layer[1]) >= len(order):
                continue
            value = array[tuple(position.get(axis, slice(None)) for axis in match.weight.left)]
            base_name = f"{name[: layer.start(1)]}{order[int(layer[1])]}{name[layer.end(1) :]}"
            if not np.array_equal(np.asarray(first.setdefault(base_name, value)), np.asarray(value)):
                different.append(name)
    raise_listed(
        ConfigError,
        f"layer_replication repeats layers of the base ({order}), and these parameters differ from those of the"
        " layer they repeat. Build the model with copies of the base's layers:",
        different,
    )
    if without_values:
        warn("layer_replication: the base has only shapes here, so the repeated layers could not be compared")


# ---------------------------------------------------------------- selection warnings


_LIMIT = 8
"""The number of entries of one field that are reported one by one."""


def unmatched_targets(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Return the entries of `target_modules` that select none of `names`: misspelt, excluded, or for another model.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> unmatched_targets(LoraConfig(target_modules=["q", "qq"]), ["a.q", "a.k"])
    ('qq',)
    """
    targets: str | tuple[str, ...] | None = config.get("target_modules")
    if targets is None or matching.is_all_linear(config):
        return ()
    chosen = [name for name in names if matching.is_target(config, name)]
    if isinstance(targets, str):
        return () if chosen else (targets,)
    matched = {*chosen, *_with_ends(name for name in chosen if matching.in_layers(config, name))}
    return tuple(entry for entry in targets if entry not in matched)


def _with_ends(names: Iterable[str]) -> set[str]:
    """Return names and their ends after each dot: all that an entry of a list may be."""
    return {name[start:] for name in names for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == "."))}


def doubtful_selection(config: Config, names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Return warnings about a selection that may be a mistake, where PEFT says nothing.

    Args:
        names: the modules that could be adapted.
        chosen: the modules that are adapted.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> doubtful_selection(LoraConfig(target_modules=["q", "vv"], rank_pattern={"k": 2}), ["a.q", "a.v"], ["a.q"])
    ["target_modules: 'vv' matches no module; near misses: v", "rank_pattern: 'k' matches none of the targets"]
    """
    # "all-linear" becomes a list of all linear modules; modules_to_save and exclude_modules may name some of them.
    rules = (field for field in ("modules_to_save", "exclude_modules") if config.get(field))
    unmatched = unmatched_targets(config.replace(**dict.fromkeys(rules)), names)
    warnings = [
        *(f"target_modules: {entry!r} matches no module" + _near_misses(entry, names) for entry in unmatched[:_LIMIT]),
        *_remaining(unmatched, "target_modules: {} more entries match no module"),
    ]
    if containers := _selected_containers(config, names):
        warnings.append(
            "target_modules also selects modules that contain modules, which PEFT refuses:"
            f" {errors.quote_list(containers)}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if field == "rank_pattern" and any(isinstance(value, tuple) for value in patterns.values()):
            masked = {f"{name}.lora_E" for name in chosen}  # AdaLoRA's masks by the tensor's full name, not patterns
            warnings += [f"{field}: {key!r} matches none of the targets" for key in patterns if key not in masked]
            continue
        warnings += _patterns(field, patterns, chosen)
    return warnings


def _selected_containers(config: Config, names: Sequence[str]) -> list[str]:
    """Return the modules that contain `names` and that an expression selects."""
    if not isinstance(config.get("target_modules"), str):
        return []
    parents = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    return [name for name in sorted(parents.difference(names)) if matching.is_target(config, name)]


def unmatched_parameters(config: Config, names: Iterable[str]) -> list[str]:
    """Return a warning for each entry of `target_parameters` that names none of the parameters `names`."""
    names = list(names)
    ends = _with_ends(names)
    return [
        f"target_parameters: {entry!r} matches no parameter" + _near_misses(entry, names)
        for entry in config.get("target_parameters") or ()
        if entry not in ends
    ]


def unmatched_modules_to_save(config: Config, copied: Sequence[str], tied: Iterable[str]) -> list[str]:
    """Return a warning for each entry of `modules_to_save` that copies nothing, so that its module is not trained.

    Args:
        copied: the modules that are copied, with their parameters' names.
        tied: the heads that the model ties to its token embedding, so that it has none of its own.

    The heads that PEFT adds for a task (`matching.HEADS`) are guesses, reported only if no entry copies a module.
    """
    entries: tuple[str, ...] = config.get("modules_to_save") or ()
    used = set[str]().union(*(matching.saving_entries(config, name) for name in copied))
    of_tied = set[str]().union(*(matching.saving_entries(config, head) for head in tied))
    heads = matching.HEADS.get(config.task_type or "", ())
    warnings = [
        f"modules_to_save: {entry!r} matches no module"
        + (" of its own, only a tied head; set ensure_weight_tying=True, or leave it out" if entry in of_tied else "")
        for entry in entries
        if entry not in used and entry not in heads
    ]
    if not used and not set(heads).isdisjoint(entries):
        warnings.append(
            f"task_type: {config.task_type} trains its head, {' or '.join(heads)}, in full, and the model has none"
        )
    return warnings


def _near_misses(entry: str, names: Sequence[str]) -> str:
    """Return a suggestion of similar names, empty if there are none."""
    near_misses = [
        name for name in errors.close_matches((entry,), names) if name != entry and not name.endswith(f".{entry}")
    ]
    return f"; near misses: {errors.quote_list(near_misses)}" if near_misses else ""


def _patterns(field: str, patterns: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    """Return warnings for patterns of one field that match no target, or the same target as another pattern."""
    keys_of = {name: matching_patterns(patterns, name) for name in chosen}
    used = {key for keys in keys_of.values() for key in keys}
    unmatched = [f"{field}: {key!r} matches none of the targets" for key in patterns if key not in used]
    pairs: dict[tuple[str, str], str] = {}
    for name, keys in keys_of.items():
        for key in keys[1:]:
            pairs.setdefault((keys[0], key), name)
    ambiguous = [f"{field}: {a!r} and {b!r} both match {name}, where the first wins" for (a, b), name in pairs.items()]
    return [
        *(*unmatched[:_LIMIT], *_remaining(unmatched, field + ": {} more match none of the targets")),
        *(*ambiguous[:_LIMIT], *_remaining(ambiguous, field + ": {} more pairs match one module")),
    ]


def _remaining(warnings: Sequence[str], template: str) -> list[str]:
    """Return one line for the warnings beyond the limit: a tower may be named layer by layer."""
    return [template.format(len(warnings) - _LIMIT)] if len(warnings) > _LIMIT else []


# ---------------------------------------------------------------- selection


Mapped = dict[str, Covered]

NONE: frozenset[str] = frozenset()


def _inventory(
    keymap: KeyMap, shapes: Mapping[str, Shape], unsure: frozenset[str]
) -> tuple[Mapped, dict[str, tuple[str, ...]]]:
    """Return the weights that a keymap covers, with their modules, and `{leaf: its possible names}` for the others.

    Leaves in `unsure` count as not covered: for a custom layer's axes, the generic keymap could only guess.
    """
    mapped: Mapped = {}
    unmapped: dict[str, tuple[str, ...]] = {}
    for leaf, shape in shapes.items():
        match = keymap.match(leaf)
        if match is None or leaf in unsure or len(match.weight.left) != len(shape):
            parent, _, name = leaf.rpartition(".")
            is_matrix = len(shape) >= 2 and name not in (*MAIN_WEIGHT_NAMES, "bias")
            unmapped[leaf] = (leaf, parent) if is_matrix else (parent,)
        elif match.weight.adaptable:
            sizes = plan.axis_sizes(match, shape)
            mapped[leaf] = (match, sizes, match.modules(sizes))
    # If a module has a mapped weight, its name selects that weight; other leaves need names of their own.
    covered = {leaf.rpartition(".")[0] for leaf in mapped}
    named = {leaf: tuple(name for name in names if name not in covered) for leaf, names in unmapped.items()}
    return mapped, {leaf: names for leaf, names in named.items() if names}


def _module_names(mapped: Mapped, unmapped: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the names of all modules and possible modules, each once."""
    mapped_names = [name for _, _, modules in mapped.values() for name in modules.values()]
    return list(dict.fromkeys([*mapped_names, *(name for names in unmapped.values() for name in names)]))


def _linear_modules(method: Method, mapped: Mapped, never_linear: Collection[str]) -> frozenset[str]:
    """Return the linear modules, for a method that adapts such ones; fused ones are refused later if it cannot."""
    kinds = {"linear", "fused"} if "linear" in method.kinds else ()
    chosen = [leaf for leaf, (match, _, _) in mapped.items() if match.weight.kind in kinds and leaf not in never_linear]
    return frozenset(name for leaf in chosen for name in mapped[leaf][2].values())


def _may_be_linear(
    config: Config,
    shapes: Mapping[str, Shape],
    unmapped: Mapping[str, tuple[str, ...]],
    unsure: Collection[str],
    never_linear: Collection[str],
) -> list[str]:
    """Return the leaves without a known layout that "all-linear" may select."""
    every = config.replace(target_modules=".*")  # minus exclude_modules and modules_to_save
    doubtful = [leaf for leaf in unmapped if leaf not in never_linear and (leaf in unsure or len(shapes[leaf]) > 2)]
    return [leaf for leaf in doubtful if all(matching.is_target(every, name) for name in unmapped[leaf])]


def resolve_config(
    config: Config,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    unsure: frozenset[str] = NONE,
    never_linear: Collection[str] = NONE,
) -> Config:
    """Return the configuration with "all-linear" spelled out, and with the fields that PEFT sets from task and layers.

    `never_linear` are leaves that "all-linear" does not select, whatever the keymap says of them.

    Raises `KeyMapError` if "all-linear" meets weights that may or may not be linear.
    """
    if get_method(config).scope == "model":
        return matching.with_task_heads(config)
    if config.get("ensure_weight_tying"):
        config = resolve_tying(config, keymap, shapes)
    config = matching.with_default_targets(matching.with_task_heads(config), keymap.name)
    if not matching.is_all_linear(config) and not any(w.fan_in_fan_out for w in keymap.weights):
        return config
    mapped, unmapped = _inventory(keymap, shapes, unsure)
    linear = _linear_modules(get_method(config), mapped, never_linear)
    if matching.is_all_linear(config):
        raise_listed(
            KeyMapError,
            'target_modules="all-linear" is ambiguous for these weights, which may or may not be linear:',
            [f"{leaf} {shapes[leaf]}" for leaf in _may_be_linear(config, shapes, unmapped, unsure, never_linear)],
            layout_advice(config, "name them in exclude_modules"),
        )
    resolved = matching.resolve_targets(config, _module_names(mapped, unmapped), linear=linear, output=keymap.output)
    _warn_of_all_linear(config, resolved, sorted(linear), expert_parameters(keymap, shapes))
    selected = [
        match
        for match, _, modules in mapped.values()
        if any(matching.is_target(resolved, name) for name in modules.values())
    ]
    return with_layout(resolved, keymap, selected)


def _warn_of_all_linear(config: Config, resolved: Config, linear: Collection[str], routed: Collection[str]) -> None:
    """Warn that "all-linear" reaches no routed expert, unless the selection of the resolved names warns of it."""
    if not routed_left_out(resolved, linear, routed):
        for text in routed_left_out(config, linear, routed):
            warn(text)


def select_sites(
    config: Config,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    unsure: frozenset[str] = NONE,
    found: Mapping[str, Shape] | None = None,
) -> Sites:
    """Return the sites of a model that a configuration names.

    Args:
        shapes: `{dotted path: shape}` of the base model's leaves.
        found: the shapes of the tensors of an adapter file, by key, if the sites are for a file.

    Raises `TargetError` if nothing matches, or if a match cannot be adapted. Raises `KeyMapError` if a matching weight
    has no entry in the keymap, so that no target is left out silently.
    """
    sites, warnings = _select_sites(config, keymap, tuple(shapes.items()), unsure, tuple((found or {}).items()))
    if config.get("modules_to_save"):  # not cached: it depends on the task, which equality of configurations ignores
        saved = [name for site in sites if site.method.copies for name in site.modules]
        warnings += tuple(unmatched_modules_to_save(config, saved, tied_heads(keymap, shapes)))
    for warning in warnings:
        warn(warning)
    return sites


@functools.lru_cache(maxsize=16)  # a server that loads hundreds of adapters has few models and configurations
def _select_sites(
    config: Config,
    keymap: KeyMap,
    leaves: tuple[tuple[str, Shape], ...],
    unsure: frozenset[str],
    in_file: tuple[tuple[str, Shape], ...],
) -> tuple[Sites, tuple[str, ...]]:
    """Return the sites of `select_sites`, and its warnings.

    The cache compares configurations by equality, so the result must not depend on fields that equality ignores.
    """
    method, shapes = get_method(config), dict(leaves)
    found = FileShapes(in_file, keymap.prefix)
    if method.scope == "model":
        return _select_for_model(config, method, keymap, shapes, dict(in_file), found.shared), ()
    mapped, unmapped = _inventory(keymap, shapes, unsure)
    names = _module_names(mapped, unmapped)
    check_layers(config, names)
    routed = expert_parameters(keymap, shapes)
    selected = dict.fromkeys(
        matching.select_names(
            config, names, advice=lambda: "".join(routed_left_out(config, (), routed)) or advise_stacked(keymap, shapes)
        )
    )
    parameter_sites, unmatched = (
        _bind_parameters(config, method, keymap, shapes) if config.get("target_parameters") else ([], [])
    )
    chosen = (*selected, *adapted_modules(parameter_sites))
    warnings = [*doubtful_selection(config, names, chosen), *routed_left_out(config, chosen, routed), *unmatched]
    if unmatched and not parameter_sites and not selected:
        raise TargetError("\n".join(unmatched))
    if method.scope == "copies":
        return Sites(bind_copies(config, keymap, shapes, ()), (), method, keymap), tuple(warnings)

    _refuse_selected(set(selected), method, keymap, mapped, unmapped, shapes, config)
    sites: list[Site] = []
    for leaf, covered in mapped.items():
        targeted = [index for index, name in covered[2].items() if name in selected]
        if targeted:
            has_bias = paths.join(leaf.rpartition(".")[0], "bias") in shapes
            sites.append(bind_site(config, method, keymap, covered, targeted, found=found, has_bias=has_bias))
    raise_listed(
        TargetError,
        "target_modules and target_parameters both select these weights; name each in one of them:",
        {site.leaf for site in sites} & {site.leaf for site in parameter_sites},
    )
    sites += parameter_sites
    warnings += method.warnings({site.leaf: site.hparams for site in sites})
    shared = bind_shared(config, method, sites, found.shared)
    sites += bind_copies(config, keymap, shapes, sites)
    return Sites(sites, shared, method, keymap), tuple(warnings)


def _refuse_selected(
    selected: set[str],
    method: Method,
    keymap: KeyMap,
    mapped: Mapped,
    unmapped: Mapping[str, tuple[str, ...]],
    shapes: Mapping[str, Shape],
    config: Config,
) -> None:
    """Raise `TargetError` for selected weights that the method cannot adapt, `KeyMapError` for unknown layouts."""
    refused = [
        f"{leaf}: kind {match.weight.kind!r}, {method.peft_type} adapts {sorted(method.kinds)}"
        + ("; if it is a convolution, its keymap entry needs kind='conv'" if match.weight.kind == "other" else "")
        for leaf, (match, _, module_names) in mapped.items()
        if match.weight.kind not in method.kinds and selected & set(module_names.values())
    ]
    named_leaves = {
        leaf: set(possible_names) for leaf, possible_names in unmapped.items() if selected & set(possible_names)
    }
    matrices = {name for leaf, names in named_leaves.items() if len(shapes[leaf]) >= 2 for name in names}
    refused += [
        f"{leaf} {shapes[leaf]}: not a matrix"
        for leaf, possible_names in named_leaves.items()
        if not possible_names & matrices
    ]
    raise_listed(
        TargetError,
        "target_modules selects weights that this method cannot adapt:",
        refused,
        "\nLeave them out of target_modules, or name them in exclude_modules",
    )
    raise_listed(
        KeyMapError,
        "which axes of these weights are inputs, and which are outputs, is not known (target_modules selects them; the"
        f" keymap {keymap.name!r} does not define their layout):",
        [f"{leaf} {shapes[leaf]}" for leaf in named_leaves if len(shapes[leaf]) >= 2],
        layout_advice(config, "leave them out of target_modules"),
    )


def _select_for_model(
    config: Config,
    method: Method,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    in_file: Mapping[str, Shape],
    found: Mapping[str, Shape],
) -> Sites:
    """Return the tensors of a method on the model, and the sites of the copies beside it.

    `found` are the shared tensors of the file `in_file`, by name.
    """
    read: list[Site] = []
    if isinstance(method, PromptMethod):
        found = method.names_in_file(in_file)
        for covered in _inventory(keymap, shapes, NONE)[0].values():
            targeted = [index for index, name in covered[2].items() if method.reads(config, name)]
            read += [bind_site(config, method, keymap, covered, targeted)] if targeted else []
        method.check_targets(config, [site.target for site in read], found)
    return Sites(bind_copies(config, keymap, shapes, ()), bind_shared(config, method, read, found), method)


def _bind_parameters(
    config: Config, method: Method, keymap: KeyMap, shapes: Mapping[str, Shape]
) -> tuple[list[Site], list[str]]:
    """Return the sites of the leaves that `target_parameters` names by a parameter, and warnings of unused entries.

    Raises `KeyMapError` for a named leaf without an entry in the keymap, or with an ambiguous layout. Raises
    `TargetError` for a leaf that PEFT cannot adapt by its name, or whose PyTorch layout PEFT would misread.
    """
    selected: list[tuple[Covered, list[Index]]] = []
    known: dict[str, None] = {}
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
        known |= dict.fromkeys(names.values())
        targeted = [index for index, name in names.items() if matching.is_parameter(config, name)]
        if not targeted:
            continue
        kind = match.weight.kind
        if kind not in ("linear", "parameter", "experts"):
            refused.append(f"{leaf} {shape}: kind {kind!r}")
        elif kind == "linear" and match.weight.fan_in_fan_out:
            refused.append(f"{leaf} {shape}: PyTorch stores it (in, out), and PEFT would read it as (out, in)")
        elif is_guess(keymap, leaf, shape) and is_square(match, shape):
            ambiguous.append(f"{leaf} {shape}")
        selected.append(((match, sizes, names), targeted))
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
    depths = wrapper_depths(keymap, (covered[0] for covered, _ in selected))
    return [
        bind_site(config, method.for_parameter(depths[covered[0].leaf]), keymap, covered, targeted)
        for covered, targeted in selected
    ], unmatched_parameters(config, known)


def unselected_matrices(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Collection[str] | None = None
) -> tuple[str, ...]:
    """Return the matrices that the configuration may name and that are not among these leaves.

    Args:
        adapted: the adapted leaves; by default those that the keymap has an entry for.
    """
    mapped, unmapped = _inventory(keymap, shapes, NONE)
    others = {leaf: tuple(modules.values()) for leaf, (_, _, modules) in mapped.items()} | unmapped
    return tuple(
        leaf
        for leaf, names in others.items()
        if len(shapes[leaf]) >= 2
        and leaf not in (mapped if adapted is None else adapted)
        and (matching.is_all_linear(config) or any(matching.is_target(config, name) for name in names))
    )


# ---------------------------------------------------------------- recipes


def make_recipe(
    config: Config,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    entries: Collection[Weight] = (),
    *,
    unsure: frozenset[str] = NONE,
    never_linear: Collection[str] = NONE,
    found: Mapping[str, Shape] | None = None,
    check: Callable[[Config, KeyMap], None] | None = None,
    weights: Callable[[], Mapping[str, Any]] | None = None,
) -> tuple[Recipe, Sites]:
    """Resolve a configuration on a base, select its sites, and return the recipe and the sites.

    Args:
        shapes: `{dotted path: shape}` of the base leaves.
        entries: the model's own entries, which come before those of the keymap. The recipe stores those of the sites.
        unsure: leaves for whose axes the keymap could only guess.
        never_linear: as in `resolve_config`.
        found: the shapes of the tensors of an adapter file, by key, if the sites are for a file.
        check: called with the resolved configuration and the keymap with `entries`, before the selection.
        weights: returns the base weights, whose values replicated layers are compared by.

    Raises `TargetError`, `KeyMapError` or `ConfigError`, as `selection.resolve_config` and `select_sites` do, and
    `KeyMapError` for layers of a new adapter that a complete keymap has no entry for.
    """
    full = keymap.with_entries(entries)
    config = resolve_config(config, full, shapes, unsure, never_linear)
    if check is not None:
        check(config, full)
    sites = select_sites(config, full, shapes, unsure, found)
    if weights is not None:
        check_values(config, full, weights)
    selected = {site.leaf for site in sites}
    if keymap.complete and found is None:
        raise_listed(
            KeyMapError,
            f"the keymap {keymap.name!r} has no entry for these weights, although it has one for adapted weights with"
            " the same last names, as in a stacked model whose last layers fill no block. Build the model with unrolled"
            " layers, or pass a KeyMap with an entry for each, or name their modules in exclude_modules:",
            (
                f"{leaf} {shapes[leaf]}"
                for leaf in leaves_left_out(keymap, shapes, selected)
                if not matching.is_excluded(config, name := leaf.rpartition(".")[0])
                and matching.in_layers(config, name)
            ),
        )
    used = keymap.with_entries(entry for entry in entries if entry.leaf in selected)
    copied = used.with_entries(  # entries for copies that the keymap lacks: an adapter is saved without its model
        site.match.weight
        for site in sites
        if site.method.copies and (used.match(site.leaf) is None or site.match.weight.kind == "lookup")
    )
    return Recipe(config, copied, len(sites)), sites


# ---------------------------------------------------------------- renaming


def rename_targets(config: Config, sites: Sequence[Site], keymap: KeyMap) -> Config:
    """Return the configuration for the same sites under another keymap's module names.

    Without this, a model adapted under its JAX names and saved under PyTorch's would give a file whose `target_modules`
    match nothing. PEFT loads such a file without an effect.

    Raises `ConfigError` if other fields use the old names, and `KeyMapError` for a leaf without an entry in the keymap.
    """
    matches = [(site, keymap.match(site.leaf)) for site in sites]
    raise_listed(
        KeyMapError,
        f"cannot rename the targets: the keymap {keymap.name!r} has no entry for these adapted weights. Add entries"
        " for them:",
        [site.leaf for site, match in matches if match is None],
    )
    old_modules: list[str] = []
    new_names: list[str] = []
    renamed: list[str] = []
    for site, match in matches:
        assert match is not None
        pairs = zip(site.match.weight.left, match.weight.left, strict=True)  # the keymaps' letters for the same axes
        stored = {new: site.axis_sizes.get(old, 0) for old, new in pairs}
        sizes = {axis: len(match.weight.index_names(axis) or ()) or stored[axis] for axis in match.braced}
        parameters, modules = parameter_names(match, sizes).values(), [*match.modules(sizes).values()]
        if site.method.copies:
            renamed += [name for name in site.modules if name not in parameters]
        elif site.method.on_parameters:
            renamed += [name for name in parameters if not matching.is_parameter(config, name)]
        else:
            old_modules += site.modules
            old_names = site.named.names if len(modules) == len(site.named.names) else modules
            new_names += [name for name, old_name in zip(modules, old_names, strict=True) if old_name is not None]
    raise_listed(
        ConfigError,
        f"cannot rename the targets: in the keymap {keymap.name!r} these parameters have other names, and"
        " modules_to_save, target_parameters or bias use the old ones. Pass"
        " jaxadapt.models.LoraTree(tree, config=…) with the new names:",
        renamed,
    )
    if set(old_modules) == set(new_names):
        return config
    stale = [
        name
        for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "feedforward_modules")
        if config.get(name)
    ]
    if stale:
        raise ConfigError(
            f"cannot rename the targets: in the keymap {keymap.name!r} the modules are called"
            f" {', '.join(sorted(new_names)[:3])}, …, and {', '.join(stale)} of the configuration use the old names"
            f" {', '.join(sorted(old_modules)[:3])}, …. Pass"
            " jaxadapt.models.LoraTree(tree, config=…) with the new names"
        )
    if all(matching.is_target(config, name) for name in new_names):
        return config
    return config.replace(target_modules=sorted(set(new_names)))  # full names: a suffix could match further modules
