"""A configuration bound to a model, or to a tree of base parameters: one road for both APIs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt import (
    bind,
    families,
    linen,
    linen_tree,
    methods,
    nnx,
    nnx_calls,
    nnx_survey,
    paths,
    quantized,
    replication,
    targets,
)
from jaxadapt.adapter import Recipe, is_array
from jaxadapt.configs import Config
from jaxadapt.errors import AttachError, TargetError
from jaxadapt.generic import GENERIC
from jaxadapt.keymap import KeyMap


def on_model(
    model: Any,
    config: Config,
    keymap: KeyMap | str | None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    owners: Mapping[str, nnx_survey.Owner] | None = None,
) -> tuple[Recipe, tuple[bind.Bound, ...]]:
    """The recipe and sites of a configuration on an NNX model, whose `owners` may be at hand."""
    owners = nnx_survey.base_leaves(model) if owners is None else owners
    shapes = nnx_survey.base_shapes(owners)
    table = families.resolve(keymap, shapes)
    all_linear = targets.is_all_linear(config)
    if all_linear:
        shapes = {leaf: shape for leaf, shape in shapes.items() if not nnx_survey.never_linear(owners[leaf])}
    lines, traced = nnx_survey.class_lines(owners, table, stack_axes), {}
    if example is not None:
        # What a layer computes says more of its axes than the generic map, and less than a family's table.
        known = dataclasses.replace(GENERIC, weights=()) if table == GENERIC else table
        wanted = nnx_survey.custom(owners, bind.uncovered(config, known.with_lines(lines), shapes))
        traced, others = nnx_calls.traced_axes(model, owners, example, wanted, required=not all_linear)
        shapes = {leaf: shape for leaf, shape in shapes.items() if leaf not in others}
        lines = nnx_survey.class_lines(owners, table, stack_axes, traced)
    full = table.with_lines(lines)
    said = {line.leaf for line in lines}
    # The generic map speaks of Flax's own layers; a custom one may hold its kernel the other way round.
    unsure = frozenset(nnx_survey.custom(owners, shapes)) - said if table == GENERIC else bind.NONE
    config = bind.resolve(config, full, shapes, unsure)
    try:
        bounds = bind.select(config, full, shapes, unsure)
    except TargetError as error:
        _refuse_qwix(model, error)
        raise
    mine = {b.leaf for b in bounds}
    if traced.keys() - mine and not all_linear:
        missed = [leaf for leaf in traced if leaf not in mine]
        raise TargetError("several weights share a module; name those you mean in full:\n" + paths.listing(missed))
    table = bind.tabled(table.with_lines(line for line in lines if line.leaf in mine), bounds)
    recipe = Recipe(config, table, len(bounds))
    replication.check_values(config, full, lambda: nnx_survey.base_values(owners))
    if example is not None:
        dropped = [b.leaf for b in bounds if b.method.dropout(b.static)]
        hooks = {b.leaf: methods.Applied(b.method, b.static, {}, b.axes) for b in bounds}
        nnx_calls.check_calls(model, hooks, dropped, example)
    return recipe, bounds


def _refuse_qwix(model: Any, error: TargetError) -> None:
    """Say why, if a model has no such weights because Qwix keeps them."""
    nodes = (node for _, node in nnx.nnx.iter_graph(model) if isinstance(node, nnx.nnx.Module))
    if any(quantized.is_qwix_parameter(x) for node in nodes for x in vars(node).values()):
        raise AttachError(
            f"{error}\nQwix runs this model, and would quantise what goes through an adapter, too:"
            " jaxadapt.from_qwix(model) keeps its weights and leaves Qwix out"
        ) from error


def on_tree(params: Any, config: Config, keymap: KeyMap | str | None) -> tuple[Recipe, tuple[bind.Bound, ...]]:
    """The recipe and sites of a configuration on a tree of base parameters."""
    shapes = tree_shapes(params)
    table = families.resolve(keymap, shapes)
    config = bind.resolve(config, table, shapes)
    bounds = bind.select(config, table, shapes)
    replication.check_values(config, table, lambda: tree_leaves(params))
    return Recipe(config, bind.tabled(table, bounds), len(bounds)), bounds


def placement(tree: Any) -> dict[str, Any]:
    """`{leaf: sharding}` of the base parameters, as `base_of` has them; None where a leaf has none to follow."""
    if isinstance(tree, nnx.nnx.Module):
        return nnx.placement(nnx_survey.base_leaves(tree))
    base = params_of(tree)
    return linen_tree.placement(nnx.nnx.to_pure_dict(base) if isinstance(base, nnx.nnx.State) else base)


def tree_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of a tree of base parameters, boxes (`nn.Partitioned`, NNX variables) opened."""
    return {path: tuple(leaf.shape) for path, leaf in tree_leaves(params).items()}


def base_of(tree: Any) -> dict[str, Any]:
    """`{path: array or spec}` of the base parameters of an NNX model, Linen variables or a tree of them."""
    if isinstance(tree, nnx.nnx.Module):
        return nnx_survey.base_values(nnx_survey.base_leaves(tree))
    return tree_leaves(params_of(tree))


def params_of(tree: Any) -> Any:
    """The base parameters among Linen variables, or what was given: parameters, a state, a model."""
    return tree["params"] if isinstance(tree, Mapping | nnx.nnx.State) and "params" in tree else tree


def tree_leaves(params: Any) -> dict[str, Any]:
    """`{path: array or spec}` of a tree of base parameters, boxes opened."""
    if isinstance(params, nnx.nnx.State):
        params = nnx.nnx.to_pure_dict(params)
    if isinstance(params.get("params"), Mapping):
        raise AttachError("expected base parameters, found variables; give variables['params']")
    flat = paths.flatten(linen_tree.opened(params))
    odd = [f"{p}: {type(v).__name__}" for p, v in flat.items() if not (is_array(v) or quantized.is_quantized(v))]
    if odd:
        raise AttachError("expected arrays as base parameters, found:\n" + paths.listing(odd))
    return flat


def on_target(
    target: Any, config: Config, keymap: KeyMap | str | None, keys: Sequence[str], stack_axes: Any, example: Any
) -> tuple[Recipe, tuple[bind.Bound, ...]]:
    """The recipe and sites on `target`, with the names spelt as in the file's `keys`."""
    methods.of(config)
    table = table_of(target, keymap, keys)
    if isinstance(target, nnx.nnx.Module):
        return on_model(target, config, table, stack_axes, example)
    return on_tree(params_of(target), config, table)


def check_target(target: Any) -> None:
    """Raise `AttachError` for what holds no base parameters."""
    if isinstance(target, linen.Adapted | linen.nn.Module):
        raise AttachError("a Linen module holds no parameters; give the variables, {'params': …}, as the target")
    if not isinstance(target, nnx.nnx.Module | nnx.nnx.State | Mapping):
        raise AttachError(f"expected an NNX model or Linen variables as the target, found {type(target).__name__}")


def table_of(target: Any, keymap: KeyMap | str | None, keys: Sequence[str]) -> KeyMap:
    """The table of `target`, spelt as a file's `keys` are (without PEFT's prefix)."""
    check_target(target)
    if isinstance(target, nnx.nnx.Module):
        known = [v for by_path in nnx.variables(target).values() for v in by_path.values()]
        if known and keymap is None:
            keymap = known[0].get_metadata()["adapter"].recipe.keymap
        shapes = nnx_survey.base_shapes(nnx_survey.base_leaves(target))
        return families.resolve(keymap, shapes).spelt_as(keys, shapes)
    if keymap is None:
        keymap = _attached_table(target)
    shapes = tree_shapes(params_of(target))
    return families.resolve(keymap, shapes).spelt_as(keys, shapes)


def _attached_table(variables: Any) -> KeyMap | None:
    for collection in linen_tree.collections(variables).values():
        for name, tree in collection.items():
            return linen_tree.read_collection(tree, name).keymap
    return None
