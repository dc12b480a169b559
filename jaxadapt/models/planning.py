"""Planning of an adapter: binds a configuration to a model or to a tree of base parameters, for NNX and Linen.

`BaseParams` has the base parameters of a model or of a tree by dotted path, traversed once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.adapters import selection
from jaxadapt.adapters.adapter import Recipe, Site, Sites, is_array
from jaxadapt.arrays import quantized
from jaxadapt.arrays.products import contradiction_message, transposed_axes
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, TargetError, raise_listed
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import GENERIC, KeyMap, linen_example
from jaxadapt.methods.applied import AppliedMethod
from jaxadapt.methods.prompt import BaseSizes, PromptMethod
from jaxadapt.methods.registry import get_method
from jaxadapt.models import call
from jaxadapt.models.attention_calls import with_width
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach, graph, layer

# ---------------------------------------------------------------- base params


@dataclasses.dataclass(frozen=True)
class BaseParams:
    """Base parameters from a tree, and the model or variables that hold them."""

    held: Mapping[str, Any]
    """`{path: leaf}` with boxes (`nn.Partitioned`, …); of a model `{path: (module, attribute)}`."""
    target: Any
    """The model or variables, which may have adapters."""
    walked: graph.ModelWalk | None = None
    """The result of the traversal, for a model only."""

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """`{path: array or spec}`, without boxes."""
        if self.walked is not None:
            return graph.base_values(self.held)
        return {path: collections.unbox_tree(leaf) for path, leaf in self.held.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}`."""
        return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}

    @functools.cached_property
    def shardings(self) -> dict[str, Any]:
        """`{path: sharding}`; None for a leaf without a sharding."""
        return (collections if self.walked is None else graph).base_shardings(self.held)

    @functools.cached_property
    def keymap(self) -> KeyMap | None:
        """The keymap of an adapter that the model or the variables have, if any."""
        if self.walked is not None:
            known = (var for by_path in self.walked.adapters.values() for var in by_path.values())
            return next((var.get_metadata()["adapter"].recipe.keymap for var in known), None)
        found = collections.variable_adapters(self.target)
        return next((collections.read_adapter(tree, name).keymap for name, tree in found), None)


def read_params(params: Any, target: Any = None) -> BaseParams:
    """Return the base parameters in nested mappings. Raises `AttachError` if a leaf is not an array."""
    base = BaseParams(paths.flatten(params), target)
    raise_listed(
        AttachError,
        'expected base parameters as nested mappings of arrays (a list as {"0": …, "1": …}), found:',
        [
            f"{path}: {type(leaf).__name__}"
            for path, leaf in base.leaves.items()
            if not (is_array(leaf) or quantized.is_quantized(leaf))
        ],
    )
    return base


# ---------------------------------------------------------------- planning


def plan_adapter(
    base: BaseParams,
    config: Config,
    keymap: KeyMap | str | None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    found: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Recipe, Sites]:
    """Return the recipe and sites of a configuration on a model, or on a tree of base parameters.

    `found` are the shapes of the tensors of an adapter file, by key, if the sites are for a file.
    """
    if example is not None and not isinstance(example, list | tuple):
        raise AttachError(
            f"example: expected a list of the inputs of one call, as in example=[x], found {type(example).__name__}"
        )
    keymap, method = families.resolve_keymap(keymap, base.shapes), get_method(config)
    if isinstance(method, PromptMethod):
        sizes = BaseSizes() if example is None else attach.measure_base(base.target, example)
        config = method.complete(config, with_width(sizes, keymap, base.shapes))
        return selection.make_recipe(config, keymap, base.shapes, found=found)
    if base.walked is not None:
        return _plan_on_model(base, base.walked, config, keymap, stack_axes, example, found)
    return selection.make_recipe(config, keymap, base.shapes, found=found, weights=lambda: base.leaves)


def check_kernels(config: Config, base: BaseParams, sites: Sequence[Site]) -> None:
    """Raise `AttachError` if a keymap takes the outputs of a kernel for its inputs.

    Parameters without a model have no layers that define the layout, so every kernel is assumed to be one of Flax's,
    which are (in, out). A layer with another layout declares it in the collection that `adapt` creates.
    """
    if base.walked is not None:
        problems = layer.list_contradictions(sites, base.walked.leaves)
        raise_listed(AttachError, "these layers cannot carry the adapter:", problems)
        return
    attached = base.keymap
    reverse: list[str] = []
    for site in sites:
        weight, known = site.match.weight, None if attached is None else attached.match(site.leaf)
        named = site.leaf.rpartition(".")[2] == "kernel" and weight.kind == "linear" and not weight.fan_in_fan_out
        if not named or site.method.copies or site.axes.rank != 2 or (known is not None and known.axes == site.axes):
            continue
        shape = [size for axis, size in enumerate(base.shapes[site.leaf]) if axis not in site.match.stack]
        if (own := transposed_axes(site.axes, [call.DENSE], shape)) is not None:
            reverse.append(f"{site.leaf}: {contradiction_message(site.axes, own)}")
    raise_listed(
        AttachError,
        "these weights cannot carry the adapter if they belong to Flax's own layers:",
        reverse,
        "\nFor custom layers, create the collection with the adapted module, which records their layout:"
        + linen_example(config),
    )


def _plan_on_model(
    base: BaseParams,
    walked: graph.ModelWalk,
    config: Config,
    keymap: KeyMap,
    stack_axes: Sequence[int] | None,
    example: Sequence[Any] | None,
    found: Mapping[str, tuple[int, ...]] | None,
) -> tuple[Recipe, Sites]:
    owners, shapes = walked.leaves, base.shapes
    all_linear = matching.is_all_linear(config)
    if all_linear:
        shapes = {leaf: shape for leaf, shape in shapes.items() if not layer.is_never_linear(owners[leaf])}
    entries, traced = layer.class_entries(owners, base.shapes, keymap, stack_axes), {}
    if example is not None:
        # A trace is more reliable than the generic keymap, and a family's keymap is more reliable than a trace.
        known = dataclasses.replace(keymap, weights=()) if keymap == GENERIC else keymap
        wanted = layer.custom_leaves(owners, selection.unselected_matrices(config, known.with_entries(entries), shapes))
        traced, others = attach.trace_axes(base.target, walked, example, wanted, required=not all_linear)
        shapes = {leaf: shape for leaf, shape in shapes.items() if leaf not in others}
        entries = layer.class_entries(owners, base.shapes, keymap, stack_axes, traced)
    # The generic keymap holds for Flax's own layers; a custom layer may transpose its kernel.
    unsure = frozenset(layer.custom_leaves(owners, shapes)) if keymap == GENERIC else selection.NONE

    def check(config: Config, _: KeyMap) -> None:
        _check_traceable(walked, dataclasses.replace(config, target_modules=".*") if all_linear else config)

    try:
        recipe, sites = selection.make_recipe(
            config,
            keymap,
            shapes,
            entries,
            unsure=unsure - {entry.leaf for entry in entries},
            found=found,
            check=check,
            weights=lambda: base.leaves,
        )
    except TargetError as error:
        _raise_for_qwix(walked, error)
        raise
    adapted = {site.leaf for site in sites}
    raise_listed(
        TargetError,
        "target_modules is ambiguous: several weights share a module. Give the full names of the weights to adapt:",
        [leaf for leaf in traced if not all_linear and leaf not in adapted],
    )
    _check_calls(base.target, sites, example)
    return recipe, sites


def _check_calls(model: Any, sites: Sites, example: Sequence[Any] | None) -> None:
    """Raise `AttachError` for uses of the sites' weights, in a call with these inputs, that no adapter can follow."""
    if example is None:
        return
    dropped = [site.leaf for site in sites if site.method.drops == "input" and site.method.dropout(site.hparams)]
    hooks = {site.leaf: AppliedMethod(site.method, site.hparams, {}, site.axes) for site in sites}
    attach.check_calls(model, hooks, dropped, [leaf for leaf, hook in hooks.items() if hook.forward], example)


def _check_traceable(walked: graph.ModelWalk, config: Any) -> None:
    matrices = [leaf for leaf, shape in walked.unowned.items() if len(shape) > 1]
    raise_listed(
        AttachError,
        "cannot adapt these parameters: they are not direct attributes of an nnx.Module (for example"
        " inside a dict), so their use cannot be traced. Store each in a module, or leave it out of target_modules,"
        " or pass exclude_modules:",
        [leaf for leaf in matrices if matching.is_target(config, leaf.rpartition(".")[0])],
    )


def _raise_for_qwix(walked: graph.ModelWalk, error: TargetError) -> None:
    """Raise `AttachError` if `error` comes from a model whose weights Qwix holds."""
    if any(quantized.is_qwix_parameter(x) for _, node in walked.modules for x in vars(node).values()):
        raise AttachError(
            f"{error}\nQwix intercepts the calls of this model, and would also quantize the adapter's inputs."
            " Convert the model with jaxadapt.models.from_qwix(model), which keeps the quantized weights"
        ) from error


def target_keymap(base: BaseParams, keymap: KeyMap | str | None, keys: Sequence[str]) -> KeyMap:
    """Return the keymap of a target, in the spelling of a file's `keys` (without PEFT's prefix)."""
    keymap = base.keymap if keymap is None else keymap
    return families.resolve_keymap(keymap, base.shapes).spelling_for(keys, base.shapes)
