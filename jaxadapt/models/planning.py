"""A configuration bound to a model, or to a tree of base parameters: one road for both APIs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt import methods
from jaxadapt.adapters import layer_replication, selection, sites
from jaxadapt.adapters.adapter import Recipe, is_array
from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import find_contradiction, transposed_axes
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, TargetError
from jaxadapt.keymaps import families, generic
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models import layers
from jaxadapt.models.linen import collections, wrapper
from jaxadapt.models.nnx import abstract_call, attach, survey


@dataclasses.dataclass(frozen=True)
class BaseParams:
    """The base parameters of an NNX model, or a tree of them, walked once."""

    tree: Any
    held: Mapping[str, Any]
    """Who holds each leaf of a model; each leaf of a tree, in its box if it has one (`nn.Partitioned`, …)."""
    target: Any = None
    """What the tree is of: variables, with adapters they may carry already."""
    walked: survey.ModelWalk | None = None
    """Of a model."""

    @staticmethod
    def from_tree(tree: Any, target: Any = None) -> BaseParams:
        """Raises `AttachError` for variables (see `base_params`), and where a leaf of a tree is no array."""
        if isinstance(tree, attach.nnx.Module):
            walked = survey.walk_model(tree)
            return BaseParams(tree, walked.leaves, tree, walked)
        params = attach.nnx.to_pure_dict(tree) if isinstance(tree, attach.nnx.State) else tree
        if not isinstance(params, Mapping):
            what = type(tree).__name__
            raise AttachError(f"expected base parameters, as nested mappings, or an NNX model, found {what}")
        if isinstance(params.get("params"), Mapping):
            raise AttachError("expected base parameters, found variables; give variables['params']")
        found = BaseParams(tree, paths.flatten(params), target)
        odd = [
            f"{path}: {type(leaf).__name__}"
            for path, leaf in found.leaves.items()
            if not (is_array(leaf) or quantized.is_quantized(leaf))
        ]
        if odd:
            raise AttachError(
                'expected base parameters as nested mappings of arrays (a list as {"0": …, "1": …}), found:\n'
                + paths.bullets(odd)
            )
        return found

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """`{path: array or spec}`, boxes opened."""
        if isinstance(self.tree, attach.nnx.Module):
            return survey.base_values(self.held)
        return {path: collections.unbox_tree(leaf) for path, leaf in self.held.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}`."""
        if isinstance(self.tree, attach.nnx.Module):
            return survey.base_shapes(self.held)
        return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}

    @functools.cached_property
    def shardings(self) -> dict[str, Any]:
        """`{path: sharding}`; None where a leaf has none to follow."""
        model = isinstance(self.tree, attach.nnx.Module)
        return attach.base_shardings(self.held) if model else collections.base_shardings(self.held)


def plan_adapter(
    base: BaseParams,
    config: Config,
    keymap: KeyMap | str | None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
) -> tuple[Recipe, tuple[sites.Site, ...]]:
    """The recipe and sites of a configuration on a model, or on a tree of base parameters."""
    if base.walked is not None:
        return _on_model(base, base.walked, config, keymap, stack_axes, example)
    table = families.resolve_keymap(keymap, base.shapes)
    config = selection.resolve_config(config, table, base.shapes)
    bounds = selection.select_sites(config, table, base.shapes)
    layer_replication.check_values(config, table, lambda: base.leaves)
    return Recipe(config, sites.with_copy_entries(table, bounds), len(bounds)), bounds


def check_kernels(base: BaseParams, bounds: Sequence[sites.Site]) -> None:
    """Raise `AttachError` where a table takes the outputs of a kernel for its inputs, before a file is held to it.

    Among bare parameters no layer is at hand to tell, so the kernel is taken for one of Flax's, which are (in, out), as
    everywhere without a table. A layer of another layout tells its own in the collection that `adapt` makes.
    """
    if base.walked is not None:
        if problems := attach.contradictions(bounds, base.walked.leaves):
            raise AttachError("these layers cannot carry the adapter:\n" + paths.bullets(problems))
        return
    told = _attached_table(base.target)
    reverse: list[str] = []
    for b in bounds:
        weight, known = b.match.weight, None if told is None else told.match(b.leaf)
        named = b.leaf.rpartition(".")[2] == "kernel" and weight.kind == "linear" and not weight.fan_in_fan_out
        if not named or b.method.copies or b.axes.rank != 2 or (known is not None and known.axes == b.axes):
            continue
        shape = [size for axis, size in enumerate(base.shapes[b.leaf]) if axis not in b.match.stack]
        if (own := transposed_axes(b.axes, [layers.DENSE], shape)) is not None:
            reverse.append(f"{b.leaf}: {find_contradiction(b.axes, own)}")
    if reverse:
        raise AttachError(
            "these weights cannot carry the adapter, if they are Flax's own layers':\n"
            + paths.bullets(reverse)
            + "\nLayers of your own tell how they use theirs, where the adapted module makes the collection:"
            + generic.MADE
        )


def _on_model(
    base: BaseParams,
    walked: survey.ModelWalk,
    config: Config,
    keymap: KeyMap | str | None,
    stack_axes: Sequence[int] | None,
    example: Sequence[Any] | None,
) -> tuple[Recipe, tuple[sites.Site, ...]]:
    given: Any = example
    if given is not None and not isinstance(given, list | tuple):
        raise AttachError(
            f"example: expected the inputs of one call in a list, example=[x], found {type(given).__name__}"
        )
    model, owners, shapes = base.tree, walked.leaves, base.shapes
    table = families.resolve_keymap(keymap, shapes)
    all_linear = matching.is_all_linear(config)
    if all_linear:
        shapes = {leaf: shape for leaf, shape in shapes.items() if not survey.never_linear(owners[leaf])}
    lines, traced = survey.class_entries(owners, table, stack_axes), {}
    if example is not None:
        # What a layer computes says more of its axes than the generic map, and less than a family's table.
        known = dataclasses.replace(GENERIC, weights=()) if table == GENERIC else table
        wanted = survey.custom_leaves(owners, selection.uncovered_leaves(config, known.with_entries(lines), shapes))
        traced, others = abstract_call.trace_axes(model, walked, example, wanted, required=not all_linear)
        shapes = {leaf: shape for leaf, shape in shapes.items() if leaf not in others}
        lines = survey.class_entries(owners, table, stack_axes, traced)
    full = table.with_entries(lines)
    said = {line.leaf for line in lines}
    # The generic map speaks of Flax's own layers; a custom one may hold its kernel the other way round.
    unsure = frozenset(survey.custom_leaves(owners, shapes)) - said if table == GENERIC else selection.NONE
    config = selection.resolve_config(config, full, shapes, unsure)
    _refuse_loose(walked, dataclasses.replace(config, target_modules=".*") if all_linear else config)
    try:
        bounds = selection.select_sites(config, full, shapes, unsure)
    except TargetError as error:
        _refuse_qwix(model, error)
        raise
    mine = {b.leaf for b in bounds}
    if traced.keys() - mine and not all_linear:
        missed = [leaf for leaf in traced if leaf not in mine]
        raise TargetError("several weights share a module; name those you mean in full:\n" + paths.bullets(missed))
    table = sites.with_copy_entries(table.with_entries(line for line in lines if line.leaf in mine), bounds)
    recipe = Recipe(config, table, len(bounds))
    layer_replication.check_values(config, full, lambda: base.leaves)
    if example is not None:
        dropped = [b.leaf for b in bounds if b.method.dropout(b.hparams)]
        hooks = {b.leaf: methods.AppliedMethod(b.method, b.hparams, {}, b.axes) for b in bounds}
        forward = [leaf for leaf, hook in hooks.items() if hook.forward]
        abstract_call.check_calls(model, hooks, dropped, forward, example)
    return recipe, bounds


def _refuse_loose(walked: survey.ModelWalk, config: Any) -> None:
    matrices = [leaf for leaf, shape in walked.loose.items() if len(shape) > 1]
    meant = [leaf for leaf in matrices if matching.matches(config, leaf.rpartition(".")[0])]
    if meant:
        raise AttachError(
            "these weights are meant, and no nnx.Module holds them itself, so that nothing can follow their use; hold"
            " them in one, or leave them out by the names you give, or with exclude_modules:\n" + paths.bullets(meant)
        )


def _refuse_qwix(model: Any, error: TargetError) -> None:
    """Say why, if a model has no such weights because Qwix keeps them."""
    nodes = (node for _, node in attach.nnx.iter_graph(model) if isinstance(node, attach.nnx.Module))
    if any(quantized.is_qwix_parameter(x) for node in nodes for x in vars(node).values()):
        raise AttachError(
            f"{error}\nQwix runs this model, and would quantise what goes through an adapter, too:"
            " jaxadapt.models.from_qwix(model) keeps its weights and leaves Qwix out"
        ) from error


def base_arrays(tree: Any) -> dict[str, Any]:
    """`{path: array or spec}` of the base parameters of an NNX model, Linen variables or a tree of them."""
    return BaseParams.from_tree(base_params(tree)).leaves


def base_params(tree: Any) -> Any:
    """The base parameters among Linen variables, or what was given: parameters, a state, a model."""
    return tree["params"] if isinstance(tree, Mapping | attach.nnx.State) and "params" in tree else tree


def target_base(target: Any) -> BaseParams:
    """The base parameters of what a file is to be loaded into; `AttachError` for what holds none."""
    if isinstance(target, wrapper.Adapted | wrapper.nn.Module):
        raise AttachError("a Linen module holds no parameters; give the variables, {'params': …}, as the target")
    if not isinstance(target, attach.nnx.Module | attach.nnx.State | Mapping):
        raise AttachError(f"expected an NNX model or Linen variables as the target, found {type(target).__name__}")
    return BaseParams.from_tree(base_params(target), target)


def target_keymap(base: BaseParams, keymap: KeyMap | str | None, keys: Sequence[str]) -> KeyMap:
    """The table of a target, spelt as a file's `keys` are (without PEFT's prefix)."""
    keymap = _attached_table(base.target) if keymap is None else keymap
    return families.resolve_keymap(keymap, base.shapes).spelling_for(keys, base.shapes)


def _attached_table(target: Any) -> KeyMap | None:
    if isinstance(target, attach.nnx.Module):
        known = [v for by_path in attach.adapter_variables(target).values() for v in by_path.values()]
        return known[0].get_metadata()["adapter"].recipe.keymap if known else None
    for collection in collections.adapter_collections(target).values():
        for name, tree in collection.items():
            return collections.read_collection(tree, name).keymap
    return None
