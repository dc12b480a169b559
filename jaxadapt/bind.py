"""A configuration bound to shapes: which leaves are adapted, and by tensors of what shape.

`recover` starts from an adapter alone (saving); `selecting.select` from a model (attaching, loading). Both give the
same `Bound` values, from which the specs of the parameters and the plan of the file follow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxadapt import copies, methods, parameters, paths, plan, targets
from jaxadapt.adapter import Adapter
from jaxadapt.axes import Axes
from jaxadapt.configs import Config
from jaxadapt.errors import KeyMapError, MismatchError
from jaxadapt.keymap import KeyMap, Site
from jaxadapt.tensor import Tensor

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bound:
    """One site under one configuration: its tensors, and what the arithmetic needs besides arrays.

    `method` is the configuration's own, or `Copied` where the adapter holds the whole leaf; `modules` are the
    PyTorch modules it adapts, or the parameters that it has by their own names; `static` is the method's own (a scale,
    a flag).
    """

    site: Site
    method: methods.Method
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


def at(
    config: Config,
    method: methods.Method,
    keymap: KeyMap,
    site: Site,
    sizes: Mapping[str, int],
    modules: tuple[str, ...],
) -> Bound:
    """One site under a configuration; `sizes` are those of the leaf's axes, by name."""
    tensors = method.tensors(config, site, modules)
    entries = tuple(plan.entry(keymap, site, t, sizes) for t in tensors)
    fan_in = math.prod(sizes.get(n, 1) for n in site.roles["inn"])
    return Bound(site, method, modules, tensors, method.static(config, site, modules), entries, fan_in)


def tabled(keymap: KeyMap, bounds: Sequence[Bound]) -> KeyMap:
    """The table with the lines of copies it had none for, so that an adapter alone can be saved."""
    return keymap.with_lines(
        b.site.weight
        for b in bounds
        if b.method.copies and (keymap.site(b.leaf) is None or b.site.weight.kind == copies.LOOKUP)
    )


def recover(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> tuple[Bound, ...]:
    """The sites of an adapter, from its own tensors: `{base leaf: {tensor: shape}}`.

    Raises `KeyMapError` for a leaf without a line, `MismatchError` if shapes contradict each other or
    the configuration.
    """
    return _recovered_once(config, keymap, _as_key(leaves))[0]


def of(adapter: Adapter) -> tuple[Bound, ...]:
    """The sites of an adapter: `recover` of its tensors."""
    return recover(adapter.config, adapter.keymap, adapter.shapes)


Tensors = tuple[tuple[str, tuple[tuple[str, Shape], ...]], ...]


def _as_key(leaves: Mapping[str, Mapping[str, Shape]]) -> Tensors:
    return tuple((leaf, tuple(shapes.items())) for leaf, shapes in leaves.items())


@functools.lru_cache(maxsize=16)  # every save of a run asks for the same
def _recovered_once(config: Config, keymap: KeyMap, tensors: Tensors) -> tuple[tuple[Bound, ...], tuple[str, ...]]:
    """`recover`, and `strays`."""
    bounds = _recover(config, keymap, tensors)
    astray = tuple(
        name
        for b in bounds
        if not b.method.copies
        for name in b.modules
        if not (targets.matches if b.method.depth is None else targets.is_parameter)(config, name)
    )
    return bounds, astray


def _recover(config: Config, keymap: KeyMap, tensors: Tensors) -> tuple[Bound, ...]:
    method, leaves = methods.of(config), {leaf: dict(shapes) for leaf, shapes in tensors}
    bounds: list[Bound] = []
    copied: list[tuple[Site, Mapping[str, Shape]]] = []
    adapting: list[tuple[Site, Mapping[str, Shape]]] = []
    unmapped: list[str] = []
    for leaf, shapes in leaves.items():
        site = keymap.site(leaf)
        if site is None:
            unmapped.append(leaf)
        elif not copies.TENSORS.isdisjoint(shapes):
            copied.append((site, shapes))
        else:
            adapting.append((site, shapes))
    depths = parameters.depths(keymap, (site for site, _ in adapting if _by_name(config, site)))
    for site, shapes in adapting:
        depth = depths.get(site.leaf)
        of = method if depth is None else method.on_parameter(depth)
        bounds.append(_recovered(config, of, keymap, site, shapes))
    adapted = {m for b in bounds for m in b.modules}
    for site, shapes in copied:
        # A file's list of tokens is of the table that carries their rows.
        inputs = site.module({}) if "copy" not in shapes and not site.braced else None
        which = functools.partial(copies.of_site, config, site, adapted=adapted, inputs=inputs)
        found = which(one_each(site))
        if not found:
            raise MismatchError(
                f"{site.leaf!r}: the adapter holds {', '.join(shapes)} of it, which none of modules_to_save, bias and"
                " trainable_token_indices asks for"
            )
        parts = {index[-1] for index in found} if site.roles["fused"] else ()
        site = dataclasses.replace(site, parts=_some(site, parts))
        one = next(iter(found.values()))
        sizes = plan.sizes_from_tensors(site, one.tensors(config, site, ()), shapes)
        names = [paths.join(*site.parameters(sizes)[index]) for index in which(sizes)]
        bounds.append(at(config, one, keymap, site, sizes, tuple(names)))
    if unmapped:
        raise KeyMapError(
            f"the table {keymap.name!r} has no line for these adapted leaves:\n"
            + paths.listing(unmapped)
            + "\nGive the very module that was adapted (no part of it, nor what it is a part of), or its keymap=,"
            " which extract(model).keymap is"
        )
    return tuple(bounds)


def one_each(site: Site) -> dict[str, int]:
    """Sizes of the braced axes that name every fused part, and of the layers the first."""
    fused = {axis: len(site.weight.names(axis) or ()) for axis in site.roles["fused"]}
    return {**dict.fromkeys(site.braced, 1), **fused}


def _by_name(config: Config, site: Site) -> bool:
    return any(targets.is_parameter(config, name) for name in parameters.names(site, one_each(site)).values())


def _some(site: Site, parts: Collection[int]) -> tuple[int, ...] | None:
    """These entries of a fused axis, None if there is none or they are all."""
    count = math.prod(len(site.weight.names(axis) or ()) for axis in site.roles["fused"])
    return tuple(sorted(parts)) if site.roles["fused"] and 0 < len(parts) < count else None


def _recovered(
    config: Config, method: methods.Method, keymap: KeyMap, site: Site, shapes: Mapping[str, Shape]
) -> Bound:
    # Which parts are targeted decides the tensors' sizes, and sizes decide the modules: names first.
    sizes = one_each(site)
    called, names = _names_of(method), targets.matches if method.depth is None else targets.is_parameter
    mods = called(site, sizes)
    if site.roles["fused"]:
        parts = {index[-1] for index, m in mods.items() if names(config, m)}
        site = dataclasses.replace(site, parts=_some(site, parts))
    modules = tuple(m for index, m in mods.items() if site.parts is None or index[-1] in site.parts)
    sizes = {**sizes, **plan.sizes_from_tensors(site, method.tensors(config, site, modules), shapes)}
    every = called(site, sizes)
    modules = tuple(m for index, m in every.items() if site.parts is None or index[-1] in site.parts)
    return at(config, method, keymap, site, sizes, modules)


def _names_of(method: methods.Method) -> Any:
    """`f(site, sizes)`: what PyTorch calls the entries of a leaf that this method adapts."""
    return Site.modules if method.depth is None else parameters.names


def strays(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> tuple[str, ...]:
    """The modules and parameters of an adapter that its own configuration does not name; arguments as in `recover`."""
    return _recovered_once(config, keymap, _as_key(leaves))[1]


def over_stack(bound: Bound, change: Any, params: Mapping[str, Any], w: Any) -> Any:
    """`change(Applied, w)` for each layer stacked in one leaf, as its module would see it."""
    return over_layers(bound.site.stack, bound.method, bound.static, bound.axes, change, params, w)


def over_layers(
    stack: Sequence[int],
    method: methods.Method,
    static: Any,
    axes: Axes,
    change: Any,
    params: Mapping[str, Any],
    w: Any,
) -> Any:
    """The same for what a site is, whatever its leaf is called."""
    import jax

    def one(params: Mapping[str, Any], w: Any) -> Any:
        return change(methods.Applied(method, static, params, axes), w)

    run: Any = one
    for axis in stack:  # ascending, so the outermost vmap takes the last axis and moves no other
        run = jax.vmap(run, in_axes=axis, out_axes=axis)
    return run(dict(params), w)


def file_plan(bounds: Sequence[Bound]) -> plan.Plan:
    """The plan of the file that holds these sites' tensors."""
    return plan.plan([e for b in bounds for e in b.entries])
