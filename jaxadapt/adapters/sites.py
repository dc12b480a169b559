"""A configuration bound to shapes: the adapted leaves, and the shapes of their tensors.

`sites_from_shapes` starts from an adapter without a model (saving), `selection.select_sites` from a model (attaching,
loading). Both return the same `Site` values, which define the parameters' specs and the plan of the file.
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
from jaxadapt.adapters.adapter import SHARED_NODE, Adapter
from jaxadapt.arrays.axes import Axes
from jaxadapt.arrays.layout import FileLayout
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, MismatchError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods.prompt import PromptMethod

Shape = tuple[int, ...]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted leaf under one configuration: its tensors, and the hyperparameters of its arithmetic.

    `method` is the configuration's own, or `FullCopy` or `TrainableTokens` where the adapter holds a copy. `named` has
    the PyTorch modules of the leaf's entries, or its parameters if they are adapted by name. `hparams` are the method's
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
        """`{module: index of its layer among those that the leaf stacks}`."""
        per_layer = self.named.per_layer
        return {name: i // per_layer for i, name in enumerate(self.named.names) if name is not None}

    @functools.cached_property
    def stack_sizes(self) -> tuple[int, ...]:
        """The number of layers on each stacked axis."""
        form = self.entries[0].form
        sizes = dict(zip(form.left, form.shape, strict=True))
        return tuple(sizes[name] for name in self.match.roles["stack"])

    @functools.cached_property
    def data(self) -> dict[str, np.ndarray]:
        """`{name: array}` of the arithmetic's inputs besides the parameters: the layers' indices, if layers differ."""
        if not methods.needs_layer_number(self.hparams):
            return {}
        return {methods.LAYER: np.arange(math.prod(self.stack_sizes), dtype=np.int32).reshape(self.stack_sizes)}

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """`{tensor name: shape in the model}`, stacked axes included."""
        return {tensor.name: entry.shape for tensor, entry in zip(self.tensors, self.entries, strict=True)}


def bind_site(
    config: Config,
    method: methods.Method,
    keymap: KeyMap,
    match: Match,
    sizes: Mapping[str, int],
    modules: Modules,
) -> Site:
    """Return the site of one leaf under a configuration; `sizes` are those of the leaf's axes, by name."""
    tensors = method.tensors(config, match, modules)
    entries = tuple(plan.plan_entry(keymap, match, tensor, sizes) for tensor in tensors)
    fan_in = math.prod(sizes.get(name, 1) for name in match.roles["in"])
    return Site(match, method, modules, tensors, method.hparams(config, match, modules), entries, fan_in)


def bind_shared(method: PromptMethod, shapes: Mapping[str, Shape]) -> Site:
    """Return the site of tensors that belong to the whole adapter; the file has them under their own names."""
    tensors: list[MethodTensor] = []
    entries: list[plan.PlanEntry] = []
    for name, shape in shapes.items():
        axes = tuple(f"a{i}" for i in range(len(shape)))
        groups = tuple((axis,) for axis in axes)
        tensors.append(MethodTensor(name, name, axes, groups, tuple(zip(axes, shape, strict=True))))
        entries.append(plan.PlanEntry(paths.join(SHARED_NODE, name), FileLayout(shape, axes, groups, ()), (name,)))
    match = Match(SHARED_NODE, Weight(SHARED_NODE, f"{SHARED_NODE}.weight", "n -> n", kind="shared"))
    hparams = method.hparams(None, match, Modules(()))
    return Site(match, method, Modules(()), tuple(tensors), hparams, tuple(entries), 1)


def targeted_entries(
    match: Match, sizes: Mapping[str, int], names: Mapping[Index, str], targeted: Collection[Index]
) -> tuple[Match, Modules]:
    """Return a leaf's match with only the fused parts that are adapted in any layer, and the modules of its entries.

    Args:
        names: the names of all entries, by index over the braced axes.
        targeted: the indices of the adapted entries; empty means all.
    """
    targeted = set(targeted) or set(names)
    fused = match.roles["fused"]
    if fused:
        match = dataclasses.replace(match, parts=_adapted_parts(match, {index[-1] for index in targeted}))
    kept = {index: name for index, name in names.items() if match.parts is None or index[-1] in match.parts}
    inner = match.braced[len(match.stack) :]
    counts = tuple(len(match.parts) if axis in fused and match.parts else sizes[axis] for axis in inner)
    order = tuple(inner.index(axis) if axis in inner else -1 for axis in match.roles["batch"])
    return match, Modules(tuple(name if index in targeted else None for index, name in kept.items()), counts, order)


def with_copy_entries(keymap: KeyMap, sites: Sequence[Site]) -> KeyMap:
    """Return the keymap with entries for copies that it lacks, so that an adapter can be saved without its model."""
    return keymap.with_entries(
        site.match.weight
        for site in sites
        if site.method.copies and (keymap.match(site.leaf) is None or site.match.weight.kind == full_copies.LOOKUP)
    )


def sites_from_shapes(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> tuple[Site, ...]:
    """Return the sites of an adapter from its own tensors, `{base leaf: {tensor: shape}}`.

    Raises `KeyMapError` for a leaf without an entry. Raises `MismatchError` if shapes contradict each other or the
    configuration.
    """
    return _sites_and_untargeted(config, keymap, _as_key(leaves))[0]


def sites_of(adapter: Adapter) -> tuple[Site, ...]:
    """Return the sites of an adapter."""
    return sites_from_shapes(adapter.config, adapter.keymap, adapter.shapes)


Tensors = tuple[tuple[str, tuple[tuple[str, Shape], ...]], ...]


def _as_key(leaves: Mapping[str, Mapping[str, Shape]]) -> Tensors:
    return tuple((leaf, tuple(shapes.items())) for leaf, shapes in leaves.items())


@functools.lru_cache(maxsize=16)  # every save of a run needs the same sites
def _sites_and_untargeted(config: Config, keymap: KeyMap, tensors: Tensors) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """Return the results of `sites_from_shapes` and `untargeted`."""
    sites = _recover_sites(config, keymap, tensors)
    untargeted_names = tuple(
        name
        for site in sites
        if not site.method.copies
        for name in site.modules
        if not (matching.is_target if site.method.wrapper_depth is None else matching.is_parameter)(config, name)
    )
    return sites, untargeted_names


def _recover_sites(config: Config, keymap: KeyMap, tensors: Tensors) -> tuple[Site, ...]:
    """Return the sites of an adapter's leaves: adapted ones first, then copies."""
    method, leaves = methods.get_method(config), {leaf: dict(shapes) for leaf, shapes in tensors}
    sites: list[Site] = []
    if isinstance(method, PromptMethod) and SHARED_NODE in leaves:
        sites.append(bind_shared(method, leaves.pop(SHARED_NODE)))
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
    depths = target_parameters.wrapper_depths(
        keymap, (match for match, shapes in adapting if _is_adapted_by_name(config, method, match, shapes))
    )
    for match, shapes in adapting:
        depth = depths.get(match.leaf)
        site_method = method if depth is None else method.on_parameter(depth)
        sites.append(_recover_site(config, site_method, keymap, match, shapes))
    adapted = {module for site in sites for module in site.modules}
    for match, shapes in copied:
        # A bare list of tokens is for the leaf that holds their rows.
        inputs = match.module({}) if "copy" not in shapes and not match.braced else None
        copies_of = functools.partial(full_copies.copied_entries, config, match, adapted=adapted, inputs=inputs)
        sizes = single_entry_sizes(match)
        if "copy" in shapes and len(shapes["copy"]) == len(match.weight.left):
            leaf_sizes = dict(zip(match.weight.left, shapes["copy"], strict=True))
            sizes |= {axis: leaf_sizes[axis] for axis in match.braced if match.weight.index_names(axis) is None}
        copied_entries = copies_of(sizes)
        if not copied_entries:
            raise MismatchError(
                f"{match.leaf!r}: the adapter holds {', '.join(shapes)}, which the configuration does not ask for: none"
                " of modules_to_save, bias and trainable_token_indices names it"
            )
        copy_method = next(iter(copied_entries.values()))
        names = {index: paths.join(*name) for index, name in match.parameters(sizes).items()}
        match, modules = targeted_entries(match, sizes, names, copied_entries)
        sizes |= plan.axis_sizes_from_tensors(match, copy_method.tensors(config, match, modules), shapes)
        sites.append(bind_site(config, copy_method, keymap, match, sizes, modules))
    if unmapped:
        raise KeyMapError(
            f"the keymap {keymap.name!r} has no entry for these adapted leaves:\n"
            + paths.bullets(unmapped)
            + "\nPass the same module that was adapted (neither a part of it nor a module around it), or its keymap=,"
            " extract(model).keymap"
        )
    return tuple(sites)


def single_entry_sizes(match: Match) -> dict[str, int]:
    """Return sizes of the braced axes that cover every fused part, of the first layer only."""
    fused = {axis: len(match.weight.index_names(axis) or ()) for axis in match.roles["fused"]}
    return {**dict.fromkeys(match.braced, 1), **fused}


def _stacked_sizes(config: Config, method: methods.Method, match: Match, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the sizes of all braced axes; those of numbered axes come from the tensors' shapes."""
    sizes = single_entry_sizes(match)
    # Modules may differ in other axes; the stacked axes are in the same place for all.
    names = list(match.modules(sizes).values())
    probed = [name for name in names if matching.is_target(config, name)] or names
    probe = [tensor for name in probed for tensor in method.tensors(config, match, Modules((name,)))]
    return sizes | plan.stack_sizes(match, probe, shapes)


def _is_adapted_by_name(config: Config, method: methods.Method, match: Match, shapes: Mapping[str, Shape]) -> bool:
    """Return True if the configuration's `target_parameters` names a parameter of the leaf."""
    if not config.get("target_parameters"):
        return False
    names = target_parameters.parameter_names(match, _stacked_sizes(config, method, match, shapes))
    return any(matching.is_parameter(config, name) for name in names.values())


def _adapted_parts(match: Match, parts: Collection[int]) -> tuple[int, ...] | None:
    """Return these parts of a fused axis, sorted; None if there is no such axis or they are all of it."""
    count = math.prod(len(match.weight.index_names(axis) or ()) for axis in match.roles["fused"])
    return tuple(sorted(parts)) if match.roles["fused"] and 0 < len(parts) < count else None


def _recover_site(
    config: Config, method: methods.Method, keymap: KeyMap, match: Match, shapes: Mapping[str, Shape]
) -> Site:
    # The sizes depend on which entries are targeted, and the entries on the sizes, so names come first.
    """Return the site of one adapted leaf, from the shapes of its tensors."""
    names_of, is_targeted = (
        _names_function(method),
        matching.is_target if method.wrapper_depth is None else matching.is_parameter,
    )
    sizes = _stacked_sizes(config, method, match, shapes)
    names = names_of(match, sizes)
    match, modules = targeted_entries(
        match, sizes, names, [index for index, name in names.items() if is_targeted(config, name)]
    )
    sizes |= plan.axis_sizes_from_tensors(match, method.tensors(config, match, modules), shapes)
    return bind_site(config, method, keymap, match, sizes, modules)


def _names_function(method: methods.Method) -> Any:
    """Return `f(match, sizes)`, the function for the PyTorch names of the entries that this method adapts."""
    return Match.modules if method.wrapper_depth is None else target_parameters.parameter_names


def untargeted(config: Config, keymap: KeyMap, leaves: Mapping[str, Mapping[str, Shape]]) -> tuple[str, ...]:
    """Return the modules and parameters of an adapter that its own configuration does not name.

    The arguments are those of `sites_from_shapes`.
    """
    return _sites_and_untargeted(config, keymap, _as_key(leaves))[1]


def map_stack(site: Site, change: Any, params: Mapping[str, Any], w: Any) -> Any:
    """Return `change(AppliedMethod, w)`, computed layer by layer for the layers that the leaf stacks."""
    params = {**params, **site.data}
    return map_layers(site.match.stack, site.method, site.hparams, site.axes, change, params, w)


def map_layers(
    stack: Sequence[int],
    method: methods.Method,
    hparams: Any,
    axes: Axes,
    change: Any,
    params: Mapping[str, Any],
    w: Any,
) -> Any:
    """Compute `map_stack` from the fields of a site, without its leaf; `params` include `Site.data`."""
    import jax

    def apply_change(params: Mapping[str, Any], w: Any) -> Any:
        return change(methods.AppliedMethod(method, hparams, params, axes), w)

    mapped: Any = apply_change
    for position, axis in enumerate(stack):  # ascending: the outermost vmap takes the last axis and moves no other
        in_axes = {name: position if name == methods.LAYER else axis for name in params}
        mapped = jax.vmap(mapped, in_axes=(in_axes, axis), out_axes=axis)
    return mapped(dict(params), w)


def make_file_plan(sites: Sequence[Site]) -> plan.Plan:
    """Return the plan of the file that holds these sites' tensors."""
    return plan.make_plan([entry for site in sites for entry in site.entries])
