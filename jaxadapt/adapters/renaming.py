"""The configuration of an adapter under another keymap's names."""

from __future__ import annotations

from collections.abc import Sequence

from jaxadapt.adapters.site import Site
from jaxadapt.adapters.sites import parameter_names
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import ConfigError, KeyMapError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap, Match


def rename_targets(config: Config, sites: Sequence[Site], keymap: KeyMap) -> Config:
    """Return the configuration for the same sites under another keymap's module names.

    Without this, a model adapted under its JAX names and saved under PyTorch's would give a file whose `target_modules`
    match nothing. PEFT loads such a file without an effect.

    Raises `ConfigError` if other fields use the old names, and `KeyMapError` for a leaf without an entry in the keymap.
    """
    new_names: list[str] = []
    renamed: list[str] = []
    unmapped: list[str] = []
    for site in sites:
        match = keymap.match(site.leaf)
        if match is None:
            unmapped.append(site.leaf)
        elif site.method.on_parameters:
            names = parameter_names(match, _braced_sizes(site, match)).values()
            renamed += [name for name in names if not matching.is_parameter(config, name)]
        elif site.method.copies:
            names = parameter_names(match, _braced_sizes(site, match)).values()
            renamed += [name for name in site.modules if name not in names]
        else:
            names = tuple(match.modules(_braced_sizes(site, match)).values())
            old_names = site.named.names
            new_names += (
                [name for name, old_name in zip(names, old_names, strict=True) if old_name is not None]
                if len(names) == len(old_names)
                else names
            )
    raise_listed(
        KeyMapError,
        f"cannot rename the targets: the keymap {keymap.name!r} has no entry for these adapted leaves. Add entries"
        " for them:",
        unmapped,
    )
    old_modules = [
        name for site in sites if not site.method.copies and not site.method.on_parameters for name in site.modules
    ]
    raise_listed(
        ConfigError,
        f"cannot rename the targets: in the keymap {keymap.name!r} these parameters have other names, and"
        " modules_to_save, target_parameters or bias use the old ones. Pass config= with the new names:",
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
            f" {', '.join(sorted(old_modules)[:3])}, …. Pass config= with the new names"
        )
    if all(matching.is_target(config, name) for name in new_names):
        return config
    return config.replace(target_modules=sorted(set(new_names)))  # full names: a suffix could match further modules


def _braced_sizes(site: Site, match: Match) -> dict[str, int]:
    """Return the sizes of the braced axes of another keymap's entry for the same leaf, axis by axis."""
    sizes = {
        new_axis: site.axis_sizes.get(old_axis, 0)
        for old_axis, new_axis in zip(site.match.weight.left, match.weight.left, strict=True)
    }
    return {axis: len(match.weight.index_names(axis) or ()) or sizes[axis] for axis in match.braced}
