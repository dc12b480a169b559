"""The leaves of a model that a configuration selects by target_modules, target_parameters and modules_to_save.

Selection starts from a model's shapes, for attaching and loading. `sites.sites_from_shapes` finds the same sites in an
adapter without its model.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

from jaxadapt import methods
from jaxadapt.adapters import full_copies, layer_replication, selection_warnings, target_parameters, tied
from jaxadapt.adapters.sites import (
    FileShapes,
    Shape,
    Site,
    Sites,
    bind_shared,
    bind_site,
    single_entry_sizes,
    targeted_entries,
    wrapper_counts,
)
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, TargetError, raise_listed, warn
from jaxadapt.keymaps import generic, plan
from jaxadapt.keymaps.generic import MAIN_WEIGHT_NAMES, with_layout
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.methods.prompt import PromptMethod

Mapped = dict[str, tuple[Match, dict[str, int], dict[tuple[int, ...], str]]]
"""`{leaf: (match, sizes, names of its modules by index)}`."""

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
    for leaf, (*other_names, parent) in list(unmapped.items()):
        if parent in covered:
            unmapped[leaf] = tuple(other_names)
    return mapped, {leaf: names for leaf, names in unmapped.items() if names}


def _module_names(mapped: Mapped, unmapped: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the names of all modules and possible modules, each once."""
    mapped_names = [name for _, _, modules in mapped.values() for name in modules.values()]
    return list(dict.fromkeys([*mapped_names, *(name for names in unmapped.values() for name in names)]))


def _linear_modules(method: methods.Method, mapped: Mapped) -> frozenset[str]:
    """Return the modules with a linear weight that the method can adapt."""
    kinds = method.kinds & {"linear"}
    return frozenset(
        name for match, _, modules in mapped.values() if match.weight.kind in kinds for name in modules.values()
    )


def resolve_config(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], unsure: frozenset[str] = NONE
) -> Config:
    """Return the configuration with "all-linear" spelled out, and with the fields that PEFT sets from task and layers.

    Raises `KeyMapError` if "all-linear" meets weights that may or may not be linear.
    """
    if methods.get_method(config).scope == "model":
        return matching.with_task_heads(config)
    config = tied.resolve_tying(config, keymap, shapes)
    config = matching.with_default_targets(matching.with_task_heads(config), keymap.name)
    if not matching.is_all_linear(config) and not any(w.fan_in_fan_out for w in keymap.weights):
        return config
    mapped, unmapped = _inventory(keymap, shapes, unsure)
    linear = _linear_modules(methods.get_method(config), mapped)
    if matching.is_all_linear(config):
        all_modules = config.replace(target_modules=".*")  # minus exclude_modules and modules_to_save
        raise_listed(
            KeyMapError,
            'target_modules="all-linear" is ambiguous for these weights, which may or may not be linear:',
            [
                f"{leaf} {shapes[leaf]}"
                for leaf, possible_names in unmapped.items()
                if (leaf in unsure or len(shapes[leaf]) > 2)
                and all(matching.is_target(all_modules, name) for name in possible_names)
            ],
            generic.layout_advice(config, "name them in exclude_modules"),
        )
    config = matching.resolve_targets(config, _module_names(mapped, unmapped), linear=linear, output=keymap.output)
    selected = [
        match
        for match, _, modules in mapped.values()
        if any(matching.is_target(config, name) for name in modules.values())
    ]
    return with_layout(config, keymap, selected)


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
    in_file = None if found is None else tuple(found.items())
    sites, warnings = _select_sites(config, keymap, tuple(shapes.items()), unsure, in_file)
    if config.get("modules_to_save"):  # not cached: it depends on the task, which equality of configurations ignores
        saved = [name for site in sites if site.method.copies for name in site.modules]
        warnings += tuple(selection_warnings.unmatched_modules_to_save(config, saved, tied.tied_heads(keymap, shapes)))
    for warning in warnings:
        warn(warning)
    return sites


@functools.lru_cache(maxsize=16)  # a server that loads hundreds of adapters has few models and configurations
def _select_sites(
    config: Config,
    keymap: KeyMap,
    leaves: tuple[tuple[str, Shape], ...],
    unsure: frozenset[str],
    in_file: tuple[tuple[str, Shape], ...] | None,
) -> tuple[Sites, tuple[str, ...]]:
    """Return the sites of `select_sites`, and its warnings.

    The cache compares configurations by equality, so the result must not depend on fields that equality ignores.
    """
    method, shapes = methods.get_method(config), dict(leaves)
    found = FileShapes(in_file or (), keymap.prefix)
    if method.scope == "model":
        return _select_for_model(config, method, keymap, shapes, in_file), ()
    mapped, unmapped = _inventory(keymap, shapes, unsure)
    names = _module_names(mapped, unmapped)
    layer_replication.check_layers(config, names)
    selected = matching.select_names(config, names, linear=_linear_modules(method, mapped), output=keymap.output)
    parameter_sites = _bind_parameters(config, method, keymap, shapes)
    warnings = selection_warnings.doubtful_selection(
        config, names, (*selected, *(name for site in parameter_sites for name in site.modules))
    )
    if config.get("target_parameters"):
        matches = (match for leaf in shapes if (match := keymap.match(leaf)) is not None)
        known_parameters = [
            name
            for match in matches
            for name in target_parameters.parameter_names(match, single_entry_sizes(match)).values()
        ]
        unmatched = selection_warnings.unmatched_parameters(
            config, dict.fromkeys((*known_parameters, *(name for site in parameter_sites for name in site.modules)))
        )
        if unmatched and not parameter_sites and not selected:
            raise TargetError("\n".join(unmatched))
        warnings += unmatched
    selected_names = set(selected)
    if method.scope == "copies":
        return Sites(_bind_copies(config, keymap, shapes, ()), (), method, keymap), tuple(warnings)

    sites: list[Site] = []
    refused = [
        f"{leaf}: kind {match.weight.kind!r}, {method.peft_type} adapts {sorted(method.kinds)}"
        for leaf, (match, _, module_names) in mapped.items()
        if match.weight.kind not in method.kinds and selected_names & set(module_names.values())
    ]
    named_leaves = {
        leaf: set(possible_names) for leaf, possible_names in unmapped.items() if selected_names & set(possible_names)
    }
    matrices = {
        name for leaf, possible_names in named_leaves.items() if len(shapes[leaf]) >= 2 for name in possible_names
    }
    refused += [
        f"{leaf} {shapes[leaf]}: not a matrix"
        for leaf, possible_names in named_leaves.items()
        if not possible_names & matrices
    ]
    raise_listed(TargetError, "target_modules selects weights that this method cannot adapt:", refused)
    raise_listed(
        KeyMapError,
        "which axes of these weights are inputs, and which are outputs, is not known (target_modules selects them; the"
        f" keymap {keymap.name!r} does not define their layout):",
        [f"{leaf} {shapes[leaf]}" for leaf in named_leaves if len(shapes[leaf]) >= 2],
        generic.layout_advice(config, "leave them out of target_modules"),
    )
    for match, sizes, module_names in mapped.values():
        if not selected_names & set(module_names.values()):
            continue
        indices = [index for index, name in module_names.items() if name in selected_names]
        match, modules = targeted_entries(match, sizes, module_names, indices)
        has_bias = paths.join(match.leaf.rpartition(".")[0], "bias") in shapes
        sites.append(bind_site(config, method, keymap, match, sizes, modules, found.of(modules), has_bias))
    raise_listed(
        TargetError,
        "target_modules and target_parameters both select these weights; name each in one of them:",
        {site.leaf for site in sites} & {site.leaf for site in parameter_sites},
    )
    sites += parameter_sites
    warnings += method.warnings({site.leaf: site.hparams for site in sites})
    shared = bind_shared(config, method, sites, found.shared)
    copies = _bind_copies(config, keymap, shapes, sites)
    return Sites((*sites, *copies), shared, method, keymap), tuple(warnings)


def _select_for_model(
    config: Config,
    method: methods.Method,
    keymap: KeyMap,
    shapes: Mapping[str, Shape],
    in_file: tuple[tuple[str, Shape], ...] | None,
) -> Sites:
    """Return the tensors of a method on the model, and the sites of the copies beside it."""
    read: list[Site] = []
    found = FileShapes(in_file or (), keymap.prefix).shared
    if isinstance(method, PromptMethod):
        found = method.names_in_file(dict(in_file or ()))
        for match, sizes, names in _inventory(keymap, shapes, NONE)[0].values():
            if indices := [index for index, name in names.items() if method.reads(config, name)]:
                match, modules = targeted_entries(match, sizes, names, indices)
                read.append(bind_site(config, method, keymap, match, sizes, modules))
        method.check_targets(config, [site.target for site in read], found)
    return Sites(_bind_copies(config, keymap, shapes, ()), bind_shared(config, method, read, found), method)


def _bind_parameters(config: Config, method: methods.Method, keymap: KeyMap, shapes: Mapping[str, Shape]) -> list[Site]:
    """Return the sites that `target_parameters` names."""
    selected = target_parameters.select_parameters(config, keymap, shapes)
    depths = target_parameters.wrapper_depths(keymap, (match for match, _, _ in selected))
    sites: list[Site] = []
    for match, sizes, names in selected:
        indices = [index for index, name in names.items() if matching.is_parameter(config, name)]
        match, modules = targeted_entries(match, sizes, names, indices)
        sites.append(bind_site(config, method.for_parameter(depths[match.leaf]), keymap, match, sizes, modules))
    return sites


def _bind_copies(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Sequence[Site]) -> list[Site]:
    """Return the sites of full and partial copies."""
    adapted_leaves = {site.leaf for site in adapted}
    sites: list[Site] = []
    for match, sizes, copied_entries in full_copies.select_copies(config, keymap, shapes, wrapper_counts(adapted)):
        names = target_parameters.parameter_names(match, sizes)
        match, modules = targeted_entries(match, sizes, names, copied_entries)
        method = next(iter(copied_entries.values()))
        sites.append(bind_site(config, method, keymap, match, sizes, modules))
    raise_listed(
        KeyMapError,
        f"the keymap {keymap.name!r} does not define the PyTorch layout of weights that modules_to_save selects:"
        " its entry has another number of axes (a convolution's kernel has more than a Linear's):",
        [
            f"{site.leaf} {shapes[site.leaf]}"
            for site in sites
            if (mapped_match := keymap.match(site.leaf)) is not None
            and len(mapped_match.weight.left) != len(shapes[site.leaf])
        ],
        generic.layout_advice(config, "leave them out"),
    )
    raise_listed(
        TargetError,
        "target_modules selects weights that modules_to_save or trainable_token_indices copies; name each in one of"
        " them:",
        [site.leaf for site in sites if site.leaf in adapted_leaves],
    )
    return sites


def uncovered_leaves(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """Return the matrices that the configuration may name and the keymap has no entry for."""
    _, unmapped = _inventory(keymap, shapes, NONE)
    matrices = {leaf: names for leaf, names in unmapped.items() if len(shapes[leaf]) >= 2}
    if matching.is_all_linear(config):
        return tuple(matrices)
    return tuple(leaf for leaf, names in matrices.items() if any(matching.is_target(config, name) for name in names))


def unselected_matrices(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Collection[str]
) -> tuple[str, ...]:
    """Return the matrices that the configuration names and that are not among the adapted leaves."""
    mapped, unmapped = _inventory(keymap, shapes, NONE)
    names = {leaf: tuple(modules.values()) for leaf, (_, _, modules) in mapped.items()} | unmapped
    others = {
        leaf: possible_names for leaf, possible_names in names.items() if len(shapes[leaf]) >= 2 and leaf not in adapted
    }
    return tuple(
        leaf
        for leaf, possible_names in others.items()
        if any(matching.is_target(config, name) for name in possible_names)
    )
