"""What a configuration selects in a model: which leaves its target_modules, target_parameters and modules_to_save name.

From a model's shapes, for attaching and loading; `sites.sites_from_shapes` finds the same sites in an adapter alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

from jaxadapt import methods
from jaxadapt.adapters import full_copies, layer_replication, selection_warnings, target_parameters, tied
from jaxadapt.adapters import sites as bind
from jaxadapt.adapters.sites import Shape, Site
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, TargetError, warn
from jaxadapt.keymaps import generic, plan
from jaxadapt.keymaps.generic import PLAIN, with_layout
from jaxadapt.keymaps.keymap import KeyMap, Match

Found = dict[str, tuple[Match, dict[str, int], dict[tuple[int, ...], str]]]


NONE: frozenset[str] = frozenset()


def _inventory(
    keymap: KeyMap, shapes: Mapping[str, Shape], unsure: frozenset[str]
) -> tuple[Found, dict[str, tuple[str, ...]]]:
    """The weights a table covers, with their modules, and `{leaf: what it may be called}` of those it does not.

    `unsure` leaves count as not covered: the generic map would only be guessing at a custom layer's axes.
    """
    found: Found = {}
    unmapped: dict[str, tuple[str, ...]] = {}
    for leaf, shape in shapes.items():
        site = keymap.match(leaf)
        if site is None or leaf in unsure or len(site.weight.left) != len(shape):
            parent, _, last = leaf.rpartition(".")
            matrix = len(shape) >= 2 and last not in (*PLAIN, "bias")
            unmapped[leaf] = (leaf, parent) if matrix else (parent,)
        elif site.weight.adaptable:
            sizes = plan.axis_sizes(site, shape)
            found[leaf] = (site, sizes, site.modules(sizes))
    # A module with a known weight means that one; others in it (a bias) only under a name of their own.
    covered = {leaf.rpartition(".")[0] for leaf in found}
    for leaf, (*own, parent) in list(unmapped.items()):
        if parent in covered:
            unmapped[leaf] = tuple(own)
    return found, {leaf: called for leaf, called in unmapped.items() if called}


def _names(found: Found, unmapped: Mapping[str, tuple[str, ...]]) -> list[str]:
    called = [m for _, _, mods in found.values() for m in mods.values()]
    return list(dict.fromkeys([*called, *(name for names in unmapped.values() for name in names)]))


def _linear(method: methods.Method, found: Found) -> frozenset[str]:
    kinds = method.kinds & {"linear"}
    return frozenset(m for s, _, mods in found.values() if s.weight.kind in kinds for m in mods.values())


def resolve_config(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], unsure: frozenset[str] = NONE
) -> Config:
    """The configuration with "all-linear" spelled out, and what PEFT sets from the task and the model's own layers.

    Raises `KeyMapError` where "all-linear" meets weights that may be linear and nobody can tell.
    """
    config = tied.resolve_tying(config, keymap, shapes)
    config = matching.with_default_targets(matching.with_task_heads(config), keymap.name)
    if not matching.is_all_linear(config) and not any(w.fan_in_fan_out for w in keymap.weights):
        return config
    found, unmapped = _inventory(keymap, shapes, unsure)
    linear = _linear(methods.get_method(config), found)
    if matching.is_all_linear(config):
        every = config.replace(target_modules=".*")  # of which exclude_modules and modules_to_save leave out some
        open_ = [
            f"{leaf} {shapes[leaf]}"
            for leaf, called in unmapped.items()
            if (leaf in unsure or len(shapes[leaf]) > 2) and all(matching.matches(every, name) for name in called)
        ]
        if open_:
            what = '"all-linear" meets weights that may or may not be linear:\n'
            raise KeyMapError(what + paths.bullets(open_) + generic.ways_out("name them in exclude_modules"))
    config = matching.resolve_targets(config, _names(found, unmapped), linear=linear, output=keymap.output)
    chosen = [s for s, _, mods in found.values() if any(matching.matches(config, m) for m in mods.values())]
    return with_layout(config, keymap, chosen)


def select_sites(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], unsure: frozenset[str] = NONE
) -> tuple[Site, ...]:
    """The sites of a model that a configuration names.

    Args:
        shapes: `{dotted path: shape}` of the base model's leaves.

    Raises `TargetError` if nothing matches, or what matches cannot be adapted; `KeyMapError` if a
    matching weight has no line, so that nothing targeted is ever left out silently.
    """
    bounds, warned = _select_sites(config, keymap, tuple(shapes.items()), unsure)
    if config.get("modules_to_save"):  # not kept: it depends on the task, by which configurations are not told apart
        saved = [name for b in bounds if b.method.copies for name in b.modules]
        warned += tuple(selection_warnings.unmatched_modules_to_save(config, saved, tied.tied_heads(keymap, shapes)))
    for line in warned:
        warn(line)
    return bounds


@functools.lru_cache(maxsize=16)  # a server that loads adapters by the hundred has few models, and few configurations
def _select_sites(
    config: Config, keymap: KeyMap, leaves: tuple[tuple[str, Shape], ...], unsure: frozenset[str]
) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """`select_sites`, and what it warns of. Of the configuration only what takes part in its equality may matter."""
    method, shapes = methods.get_method(config), dict(leaves)
    found, unmapped = _inventory(keymap, shapes, unsure)
    names = _names(found, unmapped)
    layer_replication.check_layers(config, names)
    chosen = matching.select_names(config, names, linear=_linear(method, found), output=keymap.output)
    own = _parameters(config, method, keymap, shapes)
    warned = selection_warnings.doubtful_selection(config, names, (*chosen, *(name for b in own for name in b.modules)))
    if config.get("target_parameters"):
        sites = (site for leaf in shapes if (site := keymap.match(leaf)) is not None)
        known = [
            name
            for site in sites
            for name in target_parameters.parameter_names(site, bind.single_entry_sizes(site)).values()
        ]
        missed = selection_warnings.unmatched_parameters(
            config, dict.fromkeys((*known, *(n for b in own for n in b.modules)))
        )
        if missed and not own and not chosen:
            raise TargetError("\n".join(missed))
        warned += missed
    wanted = set(chosen)

    bounds: list[Site] = []
    refused = [
        f"{leaf}: kind {site.weight.kind!r}, {method.peft_type} here adapts {sorted(method.kinds)}"
        for leaf, (site, _, mods) in found.items()
        if site.weight.kind not in method.kinds and wanted & set(mods.values())
    ]
    named = {leaf: set(called) for leaf, called in unmapped.items() if wanted & set(called)}
    matrices = {name for leaf, called in named.items() if len(shapes[leaf]) >= 2 for name in called}
    refused += [f"{leaf} {shapes[leaf]}: no matrix" for leaf, called in named.items() if not called & matrices]
    if refused:
        raise TargetError("target_modules names weights this method cannot adapt:\n" + paths.bullets(refused))
    lost = [f"{leaf} {shapes[leaf]}" for leaf in named if len(shapes[leaf]) >= 2]
    if lost:
        raise KeyMapError(
            f"target_modules names weights whose axis roles the table {keymap.name!r} does not know:\n"
            + paths.bullets(lost)
            + generic.ways_out("leave them out of target_modules")
        )
    for site, sizes, mods in found.values():
        if not wanted & set(mods.values()):
            continue
        hit = [index for index, m in mods.items() if m in wanted]
        site, modules = bind.targeted_entries(site, sizes, mods, hit)
        bounds.append(bind.bind_site(config, method, keymap, site, sizes, modules))
    twice = {b.leaf for b in bounds} & {b.leaf for b in own}
    if twice:
        raise TargetError("target_modules and target_parameters both name these weights:\n" + paths.bullets(twice))
    bounds += own
    return (*bounds, *_copies(config, keymap, shapes, bounds)), tuple(warned)


def _parameters(config: Config, method: methods.Method, keymap: KeyMap, shapes: Mapping[str, Shape]) -> list[Site]:
    """The sites that `target_parameters` names."""
    found = target_parameters.select_parameters(config, keymap, shapes)
    depths = target_parameters.wrapper_depths(keymap, (site for site, _, _ in found))
    bounds: list[Site] = []
    for site, sizes, names in found:
        hit = [index for index, n in names.items() if matching.is_parameter(config, n)]
        site, modules = bind.targeted_entries(site, sizes, names, hit)
        bounds.append(bind.bind_site(config, method.on_parameter(depths[site.leaf]), keymap, site, sizes, modules))
    return bounds


def _copies(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Sequence[Site]) -> list[Site]:
    """The sites of which the adapter holds a full copy."""
    own = {b.leaf for b in adapted}
    bounds: list[Site] = []
    for site, sizes, found in full_copies.select_copies(
        config, keymap, shapes, {m for b in adapted for m in b.modules}
    ):
        names = {index: paths.join(*name) for index, name in site.parameters(sizes).items()}
        site, modules = bind.targeted_entries(site, sizes, names, found)
        copied = next(iter(found.values()))
        bounds.append(bind.bind_site(config, copied, keymap, site, sizes, modules))
    unknown = [
        f"{b.leaf} {shapes[b.leaf]}"
        for b in bounds
        if (line := keymap.match(b.leaf)) is not None and len(line.weight.left) != len(shapes[b.leaf])
    ]
    if unknown:
        raise KeyMapError(
            f"modules_to_save names weights whose layout in PyTorch the table {keymap.name!r} does not know (its line"
            " is for another number of axes; a convolution's kernel has more than a Linear's):\n"
            + paths.bullets(unknown)
            + generic.ways_out("leave them out")
        )
    twice = [b.leaf for b in bounds if b.leaf in own]
    if twice:
        raise TargetError(
            "modules_to_save or trainable_token_indices takes these weights, and target_modules would adapt them as"
            " well:\n" + paths.bullets(twice)
        )
    return bounds


def uncovered_leaves(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The leaves that the configuration may name and the table has no line for."""
    _, unmapped = _inventory(keymap, shapes, NONE)
    matrices = {leaf: called for leaf, called in unmapped.items() if len(shapes[leaf]) >= 2}
    if matching.is_all_linear(config):
        return tuple(matrices)
    return tuple(leaf for leaf, called in matrices.items() if any(matching.matches(config, m) for m in called))


def unselected_matrices(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], adapted: Collection[str]
) -> tuple[str, ...]:
    """The matrices that the configuration names and that are not among the adapted leaves."""
    found, unmapped = _inventory(keymap, shapes, NONE)
    names = {leaf: tuple(mods.values()) for leaf, (_, _, mods) in found.items()} | unmapped
    rest = {leaf: called for leaf, called in names.items() if len(shapes[leaf]) >= 2 and leaf not in adapted}
    return tuple(leaf for leaf, called in rest.items() if any(matching.matches(config, m) for m in called))
