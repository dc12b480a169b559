"""The configuration for the same sites under another table's names."""

from __future__ import annotations

from collections.abc import Sequence

from jaxadapt.adapters import target_parameters
from jaxadapt.adapters.sites import Site
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, KeyMapError
from jaxadapt.keymaps.keymap import KeyMap, Match


def rename_targets(config: Config, before: Sequence[Site], table: KeyMap) -> Config:
    """The configuration for the same sites under another table's module names.

    A model adapted under its JAX names and saved under PyTorch's would otherwise give a file whose
    `target_modules` match nothing there: PEFT loads such a file as a no-op. Raises `ConfigError` where
    further fields speak of the old names, and `KeyMapError` for a leaf the table has no line for.
    """
    new: list[str] = []
    moved: list[str] = []
    unmapped: list[str] = []
    for bound in before:
        site = table.match(bound.leaf)
        if site is None:
            unmapped.append(bound.leaf)
        elif bound.method.wrapper_depth is not None:
            names = target_parameters.parameter_names(site, _braced_sizes(bound, site)).values()
            moved += [name for name in names if not matching.is_parameter(config, name)]
        elif bound.method.copies:
            names = [paths.join(*name) for name in site.parameters(_braced_sizes(bound, site)).values()]
            moved += [name for name in bound.modules if name not in names]
        else:
            names = tuple(site.modules(_braced_sizes(bound, site)).values())
            mine = bound.named.names
            new += (
                [n for n, old in zip(names, mine, strict=True) if old is not None] if len(names) == len(mine) else names
            )
    if unmapped:
        raise KeyMapError(f"the table {table.name!r} has no line for these adapted leaves:\n" + paths.bullets(unmapped))
    old = [m for b in before if not b.method.copies and b.method.wrapper_depth is None for m in b.modules]
    if moved:
        raise ConfigError(
            f"under the table {table.name!r} these parameters have other names, and modules_to_save, target_parameters"
            " or bias speak of the old ones; pass config= that speaks of the new names:\n" + paths.bullets(moved)
        )
    if set(old) == set(new):
        return config
    stale = [
        name
        for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "feedforward_modules")
        if config.get(name)
    ]
    if stale:
        raise ConfigError(
            f"under the table {table.name!r} the modules are called {', '.join(sorted(new)[:3])}, …, and"
            f" {', '.join(stale)} of the configuration speak of {', '.join(sorted(old)[:3])}, …; pass config= that"
            " speaks of the new names"
        )
    if all(matching.matches(config, m) for m in new):
        return config
    return config.replace(target_modules=sorted(set(new)))  # in full: a suffix might mean further modules there


def _braced_sizes(bound: Site, site: Match) -> dict[str, int]:
    """Sizes of the braced axes of another table's line for the same leaf, axis by axis."""
    known = {name: n for e in bound.entries for name, n in zip(e.form.left, e.form.shape, strict=True)}
    sizes = {new: known.get(old, 0) for old, new in zip(bound.match.weight.left, site.weight.left, strict=True)}
    return {axis: len(site.weight.names(axis) or ()) or sizes[axis] for axis in site.braced}
