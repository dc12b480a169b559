"""A configuration bound to shapes: which leaves are adapted, and by tensors of what shape.

`sites_from_shapes` starts from an adapter alone (saving); `selection.select_sites` from a model (attaching, loading).
Both give the
same `Site` values, from which the specs of the parameters and the plan of the file follow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt import methods
from jaxadapt.adapters import full_copies, target_parameters
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.arrays.axes import Axes
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, MismatchError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules

Shape = tuple[int, ...]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One site under one configuration: its tensors, and what the arithmetic needs besides arrays.

    `method` is the configuration's own, or `Copied` where the adapter holds the whole leaf; `named` are the
    PyTorch modules of the leaf's entries, or the parameters that it has by their own names; `static` is the method's
    own (a scale, a flag).
    """

    match: Match
    method: methods.Method
    named: Modules
    tensors: tuple[MethodTensor, ...]
    hparams: Any
    entries: tuple[plan.PlanEntry, ...]
    fan_in: int

    @property
    def leaf(self) -> str:
        return self.match.leaf

    @property
    def axes(self) -> Axes:
        return self.match.axes

    @functools.cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules (or parameters) that it adapts."""
        return tuple(self.named)

    @functools.cached_property
    def layers(self) -> dict[str, int]:
        """`{module: the number of its layer among those that the leaf stacks}`."""
        each = self.named.per_layer
        return {name: i // each for i, name in enumerate(self.named.names) if name is not None}

    @functools.cached_property
    def stack_sizes(self) -> tuple[int, ...]:
        """How many layers each stacked axis has."""
        form = self.entries[0].form
        sizes = dict(zip(form.left, form.shape, strict=True))
        return tuple(sizes[name] for name in self.match.roles["stack"])

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        """`{name: array}` that the arithmetic needs besides the parameters: the layers' numbers, where they differ."""
        if not methods.needs_layer(self.hparams):
            return {}
        return {methods.LAYER: np.arange(math.prod(self.stack_sizes), dtype=np.int32).reshape(self.stack_sizes)}

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """`{tensor name: shape in the model}`, stacked axes included."""
        return {t.name: e.shape for t, e in zip(self.tensors, self.entries, strict=True)}


def bind_site(
    config: Config,
    method: methods.Method,
    keymap: KeyMap,
    site: Match,
    sizes: Mapping[str, int],
    modules: Modules,
) -> Site:
    """One site under a configuration; `sizes` are those of the leaf's axes, by name."""
    tensors = method.tensors(config, site, modules)
    entries = tuple(plan.plan_entry(keymap, site, t, sizes) for t in tensors)
    fan_in = math.prod(sizes.get(n, 1) for n in site.roles["in"])
    return Site(site, method, modules, tensors, method.hparams(config, site, modules), entries, fan_in)


def targeted_entries(
    site: Match, sizes: Mapping[str, int], names: Mapping[Index, str], hit: Collection[Index]
) -> tuple[Match, Modules]:
    """A leaf with those of its fused parts that are adapted in any layer, and the modules of its entries.

    Args:
        names: of all entries, by index over the braced axes.
        hit: the entries that are adapted; without any, all are.
    """
    hit = set(hit) or set(names)
    fused = site.roles["fused"]
    if fused:
        site = dataclasses.replace(site, parts=_some(site, {index[-1] for index in hit}))
    kept = {i: n for i, n in names.items() if site.parts is None or i[-1] in site.parts}
    inner = site.braced[len(site.stack) :]
    counts = tuple(len(site.parts) if axis in fused and site.parts else sizes[axis] for axis in inner)
    order = tuple(inner.index(axis) if axis in inner else -1 for axis in site.roles["batch"])
    return site, Modules(tuple(n if i in hit else None for i, n in kept.items()), counts, order)


def with_copy_entries(keymap: KeyMap, bounds: Sequence[Site]) -> KeyMap:
    """The table with the lines of copies it had none for, so that an adapter alone can be saved."""
    return keymap.with_entries(
        b.match.weight
        for b in bounds
        if b.method.copies and (keymap.match(b.leaf) is None or b.match.weight.kind == full_copies.LOOKUP)
    )


def sites_from_shapes(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> tuple[Site, ...]:
    """The sites of an adapter, from its own tensors: `{base leaf: {tensor: shape}}`.

    Raises `KeyMapError` for a leaf without a line, `MismatchError` if shapes contradict each other or
    the configuration.
    """
    return _sites_and_untargeted(config, keymap, _as_key(leaves))[0]


def sites_of(adapter: Adapter) -> tuple[Site, ...]:
    """The sites of an adapter: `sites_from_shapes` of its tensors."""
    return sites_from_shapes(adapter.config, adapter.keymap, adapter.shapes)


Tensors = tuple[tuple[str, tuple[tuple[str, Shape], ...]], ...]


def _as_key(leaves: Mapping[str, Mapping[str, Shape]]) -> Tensors:
    return tuple((leaf, tuple(shapes.items())) for leaf, shapes in leaves.items())


@functools.lru_cache(maxsize=16)  # every save of a run asks for the same
def _sites_and_untargeted(config: Config, keymap: KeyMap, tensors: Tensors) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """`sites_from_shapes`, and `untargeted`."""
    bounds = _recover(config, keymap, tensors)
    astray = tuple(
        name
        for b in bounds
        if not b.method.copies
        for name in b.modules
        if not (matching.matches if b.method.wrapper_depth is None else matching.is_parameter)(config, name)
    )
    return bounds, astray


def _recover(config: Config, keymap: KeyMap, tensors: Tensors) -> tuple[Site, ...]:
    method, leaves = methods.get_method(config), {leaf: dict(shapes) for leaf, shapes in tensors}
    bounds: list[Site] = []
    copied: list[tuple[Match, Mapping[str, Shape]]] = []
    adapting: list[tuple[Match, Mapping[str, Shape]]] = []
    unmapped: list[str] = []
    for leaf, shapes in leaves.items():
        site = keymap.match(leaf)
        if site is None:
            unmapped.append(leaf)
        elif not full_copies.TENSORS.isdisjoint(shapes):
            copied.append((site, shapes))
        else:
            adapting.append((site, shapes))
    depths = target_parameters.wrapper_depths(
        keymap, (site for site, ts in adapting if _by_name(config, method, site, ts))
    )
    for site, shapes in adapting:
        depth = depths.get(site.leaf)
        of = method if depth is None else method.on_parameter(depth)
        bounds.append(_recovered(config, of, keymap, site, shapes))
    adapted = {m for b in bounds for m in b.modules}
    for site, shapes in copied:
        # A file's list of tokens is of the table that carries their rows.
        inputs = site.module({}) if "copy" not in shapes and not site.braced else None
        which = functools.partial(full_copies.copied_entries, config, site, adapted=adapted, inputs=inputs)
        sizes = single_entry_sizes(site)
        if "copy" in shapes and len(shapes["copy"]) == len(site.weight.left):
            held = dict(zip(site.weight.left, shapes["copy"], strict=True))
            sizes |= {axis: held[axis] for axis in site.braced if site.weight.names(axis) is None}
        found = which(sizes)
        if not found:
            raise MismatchError(
                f"{site.leaf!r}: the adapter holds {', '.join(shapes)} of it, which none of modules_to_save, bias and"
                " trainable_token_indices asks for"
            )
        one = next(iter(found.values()))
        names = {index: paths.join(*name) for index, name in site.parameters(sizes).items()}
        site, modules = targeted_entries(site, sizes, names, found)
        sizes |= plan.axis_sizes_from_tensors(site, one.tensors(config, site, modules), shapes)
        bounds.append(bind_site(config, one, keymap, site, sizes, modules))
    if unmapped:
        raise KeyMapError(
            f"the table {keymap.name!r} has no line for these adapted leaves:\n"
            + paths.bullets(unmapped)
            + "\nGive the very module that was adapted (no part of it, nor what it is a part of), or its keymap=,"
            " which extract(model).keymap is"
        )
    return tuple(bounds)


def single_entry_sizes(site: Match) -> dict[str, int]:
    """Sizes of the braced axes that name every fused part, and of the layers the first."""
    fused = {axis: len(site.weight.names(axis) or ()) for axis in site.roles["fused"]}
    return {**dict.fromkeys(site.braced, 1), **fused}


def _stacked(config: Config, method: methods.Method, site: Match, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Sizes of all braced axes, as the tensors' shapes have the numbered ones."""
    sizes = single_entry_sizes(site)
    # Whatever a module makes of the other axes, the stacked ones are at the same place.
    names = list(site.modules(sizes).values())
    probed = [name for name in names if matching.matches(config, name)] or names
    probe = [t for name in probed for t in method.tensors(config, site, Modules((name,)))]
    return sizes | plan.stack_sizes(site, probe, shapes)


def _by_name(config: Config, method: methods.Method, site: Match, shapes: Mapping[str, Shape]) -> bool:
    if not config.get("target_parameters"):
        return False
    names = target_parameters.parameter_names(site, _stacked(config, method, site, shapes))
    return any(matching.is_parameter(config, name) for name in names.values())


def _some(site: Match, parts: Collection[int]) -> tuple[int, ...] | None:
    """These entries of a fused axis, None if there is none or they are all."""
    count = math.prod(len(site.weight.names(axis) or ()) for axis in site.roles["fused"])
    return tuple(sorted(parts)) if site.roles["fused"] and 0 < len(parts) < count else None


def _recovered(
    config: Config, method: methods.Method, keymap: KeyMap, site: Match, shapes: Mapping[str, Shape]
) -> Site:
    # Which entries are targeted decides the tensors' sizes, and sizes decide the entries: names first.
    called, matches = _names_of(method), matching.matches if method.wrapper_depth is None else matching.is_parameter
    sizes = _stacked(config, method, site, shapes)
    names = called(site, sizes)
    site, modules = targeted_entries(site, sizes, names, [index for index, m in names.items() if matches(config, m)])
    sizes |= plan.axis_sizes_from_tensors(site, method.tensors(config, site, modules), shapes)
    return bind_site(config, method, keymap, site, sizes, modules)


def _names_of(method: methods.Method) -> Any:
    """`f(site, sizes)`: what PyTorch calls the entries of a leaf that this method adapts."""
    return Match.modules if method.wrapper_depth is None else target_parameters.parameter_names


def untargeted(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> tuple[str, ...]:
    """The modules and parameters of an adapter that its own configuration does not name; arguments as in
    `sites_from_shapes`.
    """
    return _sites_and_untargeted(config, keymap, _as_key(leaves))[1]


def map_stack(bound: Site, change: Any, params: Mapping[str, Any], w: Any) -> Any:
    """`change(Applied, w)` for each layer stacked in one leaf, as its module would see it."""
    params = {**params, **bound.data}
    return map_layers(bound.match.stack, bound.method, bound.hparams, bound.axes, change, params, w)


def map_layers(
    stack: Sequence[int],
    method: methods.Method,
    static: Any,
    axes: Axes,
    change: Any,
    params: Mapping[str, Any],
    w: Any,
) -> Any:
    """The same for what a site is, whatever its leaf is called; `params` are with its `Bound.data`."""
    import jax

    def one(params: Mapping[str, Any], w: Any) -> Any:
        return change(methods.AppliedMethod(method, static, params, axes), w)

    run: Any = one
    for i, axis in enumerate(stack):  # ascending, so the outermost vmap takes the last axis and moves no other
        cut = {name: i if name == methods.LAYER else axis for name in params}
        run = jax.vmap(run, in_axes=(cut, axis), out_axes=axis)
    return run(dict(params), w)


def make_file_plan(bounds: Sequence[Site]) -> plan.Plan:
    """The plan of the file that holds these sites' tensors."""
    return plan.make_plan([e for b in bounds for e in b.entries])
