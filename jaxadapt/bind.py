"""A configuration bound to a model's shapes: which leaves are adapted, and by tensors of what shape.

`select` starts from a model (attaching, loading), `recover` from an adapter alone (saving). Both give
the same `Bound` values, from which the specs of the parameters and the plan of the file follow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt import methods, paths, plan, targets
from jaxadapt.axes import Axes
from jaxadapt.configs import Config
from jaxadapt.errors import ConfigError, KeyMapError, TargetError
from jaxadapt.generic import PLAIN
from jaxadapt.keymap import KeyMap, Site
from jaxadapt.weight import Tensor

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bound:
    """One site under one configuration: its tensors, and what the arithmetic needs besides arrays.

    `modules` are the PyTorch modules it adapts; `static` is the method's own (a scale, a flag).
    """

    site: Site
    modules: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    static: Any
    entries: tuple[plan.Entry, ...]
    fan_in: int

    @property
    def leaf(self) -> str:
        return self.site.leaf

    @property
    def axes(self) -> Axes:
        return self.site.axes

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """`{tensor name: shape in the model}`, stacked axes included."""
        return {t.name: e.shape for t, e in zip(self.tensors, self.entries, strict=True)}


def _bind(
    config: Config, keymap: KeyMap, site: Site, sizes: Mapping[str, int], modules: tuple[str, ...]
) -> Bound:
    method = methods.of(config)
    tensors = method.tensors(config, site, modules)
    entries = tuple(plan.entry(keymap, site, t, sizes) for t in tensors)
    fan_in = math.prod(sizes.get(n, 1) for n in site.roles["inn"])
    return Bound(site, modules, tensors, method.static(config, modules), entries, fan_in)


Found = dict[str, tuple[Site, dict[str, int], dict[tuple[int, ...], str]]]


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
        site = keymap.site(leaf)
        if site is None or leaf in unsure or len(site.weight.left) != len(shape):
            parent, _, last = leaf.rpartition(".")
            matrix = len(shape) >= 2 and last not in (*PLAIN, "bias")
            unmapped[leaf] = (leaf, parent) if matrix else (parent,)
        elif site.weight.key.rpartition(".")[2] == "weight":
            sizes = plan.sizes_of(site, shape)
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
    return frozenset(
        m for s, _, mods in found.values() if s.weight.kind in method.kinds for m in mods.values()
    )


def resolve(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], unsure: frozenset[str] = NONE
) -> Config:
    """The configuration with "all-linear" spelled out, and what PEFT sets from the model's own layers.

    Raises `KeyMapError` where "all-linear" meets weights that may be linear and nobody can tell.
    """
    found, unmapped = _inventory(keymap, shapes, unsure)
    linear = _linear(methods.of(config), found)
    if targets.is_all_linear(config):
        open_ = [f"{leaf} {shapes[leaf]}" for leaf in unmapped if leaf in unsure or len(shapes[leaf]) > 2]
        if open_:
            what = '"all-linear" meets weights that may or may not be linear:\n'
            raise KeyMapError(what + paths.listing(open_) + _WAYS)
    config = targets.resolve(config, _names(found, unmapped), linear=linear, output=keymap.output)
    if config.get("fan_in_fan_out") is False and any(
        site.weight.fan_in_fan_out and any(targets.matches(config, m) for m in mods.values())
        for site, _, mods in found.values()
    ):
        config = config.replace(fan_in_fan_out=True)  # PEFT does, and warns, for Conv1D
    return config


_WAYS = (
    "\nName the modules in target_modules, name the family with keymap=, give a KeyMap with a line for each, or adapt"
    " the model with example inputs (example=) so that its own computation tells"
)


def select(
    config: Config, keymap: KeyMap, shapes: Mapping[str, Shape], unsure: frozenset[str] = NONE
) -> tuple[Bound, ...]:
    """The sites of a model that a configuration names.

    Args:
        shapes: `{dotted path: shape}` of the base model's leaves.

    Raises `TargetError` if nothing matches, or what matches cannot be adapted; `KeyMapError` if a
    matching weight has no line, so that nothing targeted is ever left out silently.
    """
    method = methods.of(config)
    found, unmapped = _inventory(keymap, shapes, unsure)
    names = _names(found, unmapped)
    wanted = set(targets.select(config, names, linear=_linear(method, found), output=keymap.output))

    bounds: list[Bound] = []
    refused = [
        f"{leaf}: kind {site.weight.kind!r}, {method.peft_type} here adapts {sorted(method.kinds)}"
        for leaf, (site, _, mods) in found.items()
        if site.weight.kind not in method.kinds and wanted & set(mods.values())
    ]
    named = {leaf: set(called) for leaf, called in unmapped.items() if wanted & set(called)}
    matrices = {name for leaf, called in named.items() if len(shapes[leaf]) >= 2 for name in called}
    refused += [f"{leaf} {shapes[leaf]}: no matrix" for leaf, called in named.items() if not called & matrices]
    if refused:
        raise TargetError("target_modules names weights this method cannot adapt:\n" + paths.listing(refused))
    lost = [f"{leaf} {shapes[leaf]}" for leaf in named if len(shapes[leaf]) >= 2]
    if lost:
        raise KeyMapError(
            f"target_modules names weights whose axis roles the table {keymap.name!r} does not know:\n"
            + paths.listing(lost)
            + _WAYS
        )
    for site, sizes, mods in found.values():
        if not wanted & set(mods.values()):
            continue
        parts = _targeted(site, mods, wanted)
        chosen = tuple(m for index, m in mods.items() if parts is None or index[-1] in parts)
        bounds.append(_bind(config, keymap, dataclasses.replace(site, parts=parts), sizes, chosen))
    return tuple(bounds)


def uncovered(config: Config, keymap: KeyMap, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The leaves that the configuration may name and the table has no line for."""
    _, unmapped = _inventory(keymap, shapes, NONE)
    matrices = {leaf: called for leaf, called in unmapped.items() if len(shapes[leaf]) >= 2}
    if targets.is_all_linear(config):
        return tuple(matrices)
    return tuple(leaf for leaf, called in matrices.items() if any(targets.matches(config, m) for m in called))


def _targeted(site: Site, modules: Mapping[tuple[int, ...], str], wanted: set[str]) -> tuple[int, ...] | None:
    """The targeted entries of a fused axis, None if all (or none) of the leaf is targeted."""
    hit = {index for index, module in modules.items() if module in wanted}
    if not hit or len(hit) == len(modules):
        return None
    parts = sorted({index[-1] for index in hit}) if site.roles["batch"] else []
    whole = {index for index in modules if parts and index[-1] in parts}
    if hit != whole:
        some = sorted(modules[i] for i in set(modules) - hit)[:3]
        raise TargetError(
            f"leaf {site.leaf!r} stacks several layers in one array, and only some are targeted"
            f" (not {', '.join(some)}, …); target all of them, or use the unrolled model"
        )
    return tuple(parts)


def recover(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> tuple[Bound, ...]:
    """The sites of an adapter, from its own tensors: `{base leaf: {tensor: shape}}`.

    Raises `KeyMapError` for a leaf without a line, `MismatchError` if shapes contradict each other or
    the configuration.
    """
    method = methods.of(config)
    bounds: list[Bound] = []
    unmapped: list[str] = []
    for leaf, shapes in leaves.items():
        site = keymap.site(leaf)
        if site is None:
            unmapped.append(leaf)
            continue
        modules: tuple[str, ...] = ()
        # Which parts are targeted decides the tensors' sizes, and sizes decide the modules: names first.
        batch = {axis: len(site.weight.names(axis) or ()) for axis in site.roles["batch"]}
        if batch:
            one = dict.fromkeys(site.roles["stack"], 1)
            mods = site.modules({**one, **batch})
            parts = tuple(index[-1] for index, m in mods.items() if targets.matches(config, m))
            site = dataclasses.replace(site, parts=None if len(parts) in (0, len(mods)) else parts)
            modules = tuple(m for index, m in mods.items() if site.parts is None or index[-1] in site.parts)
        else:
            modules = tuple(site.modules(dict.fromkeys(site.roles["stack"], 1)).values())
        sizes = plan.sizes_from_tensors(site, method.tensors(config, site, modules), shapes)
        every = site.modules({**sizes, **batch})
        modules = tuple(m for index, m in every.items() if site.parts is None or index[-1] in site.parts)
        bounds.append(_bind(config, keymap, site, sizes, modules))
    if unmapped:
        raise KeyMapError(
            f"the table {keymap.name!r} has no line for these adapted leaves:\n"
            + paths.listing(unmapped)
            + "\nPass the keymap= that the model was adapted with"
        )
    return tuple(bounds)


def renamed(config: Config, before: Sequence[Bound], table: KeyMap) -> Config:
    """The configuration for the same sites under another table's module names.

    A model adapted under its JAX names and saved under PyTorch's would otherwise give a file whose
    `target_modules` match nothing there: PEFT loads such a file as a no-op. Raises `ConfigError` where
    further fields speak of the old names, and `KeyMapError` for a leaf the table has no line for.
    """
    new: list[str] = []
    unmapped: list[str] = []
    for bound in before:
        site = table.site(bound.leaf)
        if site is None:
            unmapped.append(bound.leaf)
        else:
            new += site.modules(_braced_sizes(bound, site)).values()
    if unmapped:
        raise KeyMapError(
            f"the table {table.name!r} has no line for these adapted leaves:\n" + paths.listing(unmapped)
        )
    old = [m for b in before for m in b.modules]
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
    if all(targets.matches(config, m) for m in new):
        return config
    return config.replace(target_modules=sorted(set(new)))  # in full: a suffix might mean further modules there


def _braced_sizes(bound: Bound, site: Site) -> dict[str, int]:
    """Sizes of the braced axes of another table's line for the same leaf, axis by axis."""
    known = {name: n for e in bound.entries for name, n in zip(e.left, e.shape, strict=True)}
    sizes = {new: known.get(old, 0) for old, new in zip(bound.site.weight.left, site.weight.left, strict=True)}
    return {axis: len(site.weight.names(axis) or ()) or sizes[axis] for axis in site.braced}


def fresh(
    config: Config, bounds: Sequence[Bound], key: Any, dtype: Any = None, abstract: bool = False
) -> dict[str, Any]:
    """Initial parameters, `{path: array}`, each from its own fold of `key`; specs only if `abstract`.

    float32 unless `dtype` says otherwise, whatever the base's dtype is (PEFT's `autocast_adapter_dtype`).
    """
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    out: dict[str, Any] = {}
    for bound in bounds:
        for tensor, entry in zip(bound.tensors, bound.entries, strict=True):
            if abstract:
                out[entry.path] = jax.ShapeDtypeStruct(entry.shape, dtype)
            else:
                make = _initial(config, tensor, entry.shape, bound.fan_in, dtype)
                out[entry.path] = make(key, np.uint32(zlib.crc32(entry.path.encode())))
    return out


@functools.lru_cache(maxsize=1024)
def _initial(config: Config, tensor: Tensor, shape: Shape, fan_in: int, dtype: Any) -> Any:
    """`(key, word) -> array`, compiled once for all tensors alike: a model has hundreds, of a few shapes."""
    import jax

    method = methods.of(config)

    def initial(key: Any, word: Any) -> Any:
        return method.fresh(config, tensor, jax.random.fold_in(key, word), shape, fan_in).astype(dtype)

    return jax.jit(initial)


def file_plan(bounds: Sequence[Bound]) -> plan.Plan:
    """The plan of the file that holds these sites' tensors."""
    return plan.plan([e for b in bounds for e in b.entries])
