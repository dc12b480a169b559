"""A configuration bound to shapes: the adapted leaves, and the shapes of their tensors.

`sites_from_shapes` starts from an adapter without a model (saving), `selection.select_sites` from a model (attaching,
loading). Both return the same `Site` values, which define the parameters' specs and the plan of the file.

A configuration adapts some parameters by their own names: PEFT's `target_parameters`. PEFT wraps the module that holds
such a parameter. If a module holds several, the wrappers nest: the first parameter in the module's own order is
innermost. With two parameters, `experts.base_layer.lora_A.weight` belongs to the first and `experts.lora_A.weight` to
the second. A keymap's entries are in that order. `rename_targets` gives the configuration under another keymap's
names. Nothing here reads a model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxadapt.adapters import full_copies
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter
from jaxadapt.adapters.site import (
    BoundTensor,
    Index,
    Shape,
    Site,
    Sites,
    bind_shared,
    bind_site,
    entry_shapes,
    single_entry_sizes,
)
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, KeyMapError, MismatchError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import Modules
from jaxadapt.methods.base import Method, Target
from jaxadapt.methods.registry import get_method

# ---------------------------------------------------------------- target parameters


def parameter_names(match: Match, sizes: Mapping[str, int]) -> dict[Index, str]:
    """Return the full names of a leaf's PyTorch parameters, by index over its braced axes."""
    return {index: paths.join(*name) for index, name in match.parameters(sizes).items()}


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


# ---------------------------------------------------------------- sites


def wrapper_counts(sites: Iterable[Site]) -> Counter[str]:
    """Return the number of PEFT's wrappers around each adapted module: one, or one for each adapted parameter."""
    modules = {name for site in sites if not site.method.on_parameters for name in site.modules}
    parameters = {name for site in sites if site.method.on_parameters for name in site.modules}
    return Counter(modules) | Counter(name.rpartition(".")[0] for name in parameters)


def sites_from_shapes(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> Sites:
    """Return the sites of an adapter from its own tensors, `{base leaf: {tensor: shape}}`.

    The leaf "~shared" has the tensors of the whole adapter.

    Raises `KeyMapError` for a leaf without an entry. Raises `MismatchError` if shapes contradict each other or the
    configuration.
    """
    return _recover_sites(config, keymap, tuple((leaf, tuple(shapes.items())) for leaf, shapes in leaves.items()))


def sites_of(adapter: Adapter) -> Sites:
    """Return the sites of an adapter, with its shared tensors."""
    return sites_from_shapes(adapter.config, adapter.keymap, adapter.shapes)


Tensors = tuple[tuple[str, tuple[tuple[str, Shape], ...]], ...]


@functools.lru_cache(maxsize=16)  # every save of a run needs the same sites
def _recover_sites(config: Config, keymap: KeyMap, tensors: Tensors) -> Sites:
    """Return the sites of an adapter's leaves: adapted ones first, then copies."""
    method, leaves = get_method(config), {leaf: dict(shapes) for leaf, shapes in tensors}
    found_shared = leaves.pop(SHARED_NODE, {})
    sites: list[Site] = []
    copied: list[tuple[Match, Mapping[str, Shape]]] = []
    adapting: list[tuple[Match, Mapping[str, Shape]]] = []
    unmapped: list[str] = []
    for leaf, shapes in leaves.items():
        match = keymap.match(leaf)
        if match is None:
            unmapped.append(leaf)
        elif not full_copies.TENSORS.isdisjoint(shapes):
            copied.append((match, shapes))
        else:
            adapting.append((match, shapes))
    named: list[Match] = []  # the leaves with a parameter in target_parameters
    for match, shapes in adapting if config.get("target_parameters") else ():
        names = parameter_names(match, _stacked_sizes(config, method, match, shapes)).values()
        if any(matching.is_parameter(config, name) for name in names):
            named.append(match)
    depths = wrapper_depths(keymap, named)
    for match, shapes in adapting:
        depth = depths.get(match.leaf)
        site_method = method if depth is None else method.for_parameter(depth)
        sites.append(_recover_site(config, site_method, keymap, match, shapes))
    adapted = wrapper_counts(sites)
    sites += [_recover_copy(config, keymap, match, shapes, adapted) for match, shapes in copied]
    raise_listed(
        KeyMapError,
        f"the keymap {keymap.name!r} has no entry for these adapted leaves:",
        unmapped,
        "\nPass the same module that was adapted (neither a part of it nor a module around it), or its keymap=,"
        " extract(model).keymap",
    )
    shared = bind_shared(config, method, sites, found_shared) if found_shared else ()
    raise_listed(
        MismatchError,
        "the adapter's shared tensors contradict its configuration:",
        _wrong_shared(shared, found_shared),
    )
    untargeted = (
        name
        for site in sites
        if not site.method.copies
        for name in site.modules
        if not _is_targeted(config, site.method, name)
    )
    return Sites(sites, shared, method, keymap, untargeted)


def _recover_copy(
    config: Config, keymap: KeyMap, match: Match, shapes: Mapping[str, Shape], adapted: Mapping[str, int]
) -> Site:
    """Return the site of one leaf that is copied in full or in part; raise `MismatchError` if nothing asks for it."""
    # A bare list of tokens is for the leaf that holds their rows.
    inputs = match.module({}) if "copy" not in shapes and not match.braced else None
    sizes = single_entry_sizes(match)
    if "copy" in shapes and len(shapes["copy"]) == len(match.weight.left):
        leaf_sizes = dict(zip(match.weight.left, shapes["copy"], strict=True))
        sizes |= {axis: leaf_sizes[axis] for axis in match.braced if match.weight.index_names(axis) is None}
    entries = full_copies.copied_entries(config, match, sizes, adapted, inputs)
    if not entries:
        raise MismatchError(
            f"{match.leaf!r}: the adapter holds {', '.join(shapes)}, which the configuration does not ask for: none"
            " of modules_to_save, bias and trainable_token_indices names it"
        )
    covered = match, sizes, parameter_names(match, sizes)
    return bind_site(config, next(iter(entries.values())), keymap, covered, entries, shapes=shapes)


def require_complete(leaves: Mapping[str, Any], sites: Sites) -> None:
    """Raise `AttachError` if an adapter's `{path: array}` lacks tensors, as a state with only the trained ones does."""
    missing = [entry.path for site in sites for entry in site.entries if entry.path not in leaves]
    method = sites.method
    if method is not None and method.has_shared and not sites.shared:
        missing.append(f"{SHARED_NODE}: the tensors of the whole adapter")
    missing += [each.entry.path for each in sites.shared if each.entry.path not in leaves]
    if method is not None and method.scope == "site" and not sites:
        missing.append("the tensors of its modules")
    raise_listed(
        AttachError,
        "this adapter lacks tensors, as a tree with only the trained parameters does; pass the model or all its"
        " variables:",
        missing,
    )


def _wrong_shared(shared: Sequence[BoundTensor], found: Mapping[str, Shape]) -> list[str]:
    """Return a line for each shared tensor that is missing, unknown or wrongly shaped.

    A tree of the trained parameters lacks those that are not trained.
    """
    fixed = {each.tensor.name for each in shared if not each.tensor.trained}
    expected = {each.tensor.name: each.entry.shape for each in shared}
    return [
        f"{name}: expected {list(expected[name]) if name in expected else 'no such tensor'},"
        f" found {list(found[name]) if name in found else 'none'}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name) and not (name in fixed and name not in found)
    ]


def _stacked_sizes(config: Config, method: Method, match: Match, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the sizes of all braced axes; those of numbered axes come from the tensors' shapes."""
    sizes = single_entry_sizes(match)
    # Modules may differ in other axes; the stacked axes are in the same place for all.
    names = list(match.modules(sizes).values())
    probed = [name for name in names if matching.is_target(config, name)] or names
    found = entry_shapes(match, shapes)
    probe = [
        tensor for name in probed for tensor in method.tensors(config, Target(match, Modules((name,)), found=found))
    ]
    return sizes | plan.stack_sizes(match, probe, shapes)


def _recover_site(config: Config, method: Method, keymap: KeyMap, match: Match, shapes: Mapping[str, Shape]) -> Site:
    """Return the site of one adapted leaf, from the shapes of its tensors."""
    # The sizes depend on which entries are targeted, and the entries on the sizes, so names come first.
    sizes = _stacked_sizes(config, method, match, shapes)
    names = parameter_names(match, sizes) if method.on_parameters else match.modules(sizes)
    targeted = [index for index, name in names.items() if _is_targeted(config, method, name)]
    return bind_site(config, method, keymap, (match, sizes, names), targeted, shapes=shapes)


def _is_targeted(config: Config, method: Method, name: str) -> bool:
    """Return True if the configuration selects a module, or a parameter of a method that adapts these."""
    return matching.is_parameter(config, name) if method.on_parameters else matching.is_target(config, name)


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
        f"cannot rename the targets: the keymap {keymap.name!r} has no entry for these adapted leaves. Add entries"
        " for them:",
        [site.leaf for site, match in matches if match is None],
    )
    old_modules: list[str] = []
    new_names: list[str] = []
    renamed: list[str] = []
    for site, match in matches:
        assert match is not None
        if not site.method.on_parameters and not site.method.copies:
            old_modules += site.modules
            new_names += _renamed_modules(site, match)
            continue
        names = parameter_names(match, _braced_sizes(site, match)).values()
        if site.method.copies:
            renamed += [name for name in site.modules if name not in names]
        else:
            renamed += [name for name in names if not matching.is_parameter(config, name)]
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


def _renamed_modules(site: Site, match: Match) -> list[str]:
    """Return the modules that a site adapts under the names of another keymap's entry."""
    names, old_names = [*match.modules(_braced_sizes(site, match)).values()], site.named.names
    if len(names) != len(old_names):
        return names
    return [name for name, old_name in zip(names, old_names, strict=True) if old_name is not None]


def _braced_sizes(site: Site, match: Match) -> dict[str, int]:
    """Return the sizes of the braced axes of another keymap's entry for the same leaf, axis by axis."""
    sizes = {
        new_axis: site.axis_sizes.get(old_axis, 0)
        for old_axis, new_axis in zip(site.match.weight.left, match.weight.left, strict=True)
    }
    return {axis: len(match.weight.index_names(axis) or ()) or sizes[axis] for axis in match.braced}
