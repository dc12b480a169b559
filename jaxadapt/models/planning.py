"""Planning of an adapter: binds a configuration to a model or to a tree of base parameters, for NNX and Linen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt import methods
from jaxadapt.adapters import layer_replication, prompt_sites, selection
from jaxadapt.adapters.adapter import SHARED_NODE, Recipe, is_array
from jaxadapt.adapters.sites import Site, with_copy_entries
from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import contradiction_message, transposed_axes
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, TargetError
from jaxadapt.keymaps import families, generic
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.prompt import PromptMethod
from jaxadapt.methods.prompt.base import BaseSizes
from jaxadapt.models import layers
from jaxadapt.models.linen import collections, wrapper
from jaxadapt.models.nnx import abstract_call, attach, prompt, survey
from jaxadapt.models.prompt.embedding import with_width


@dataclasses.dataclass(frozen=True)
class BaseParams:
    """The base parameters of an NNX model or of a tree, traversed once."""

    tree: Any
    held: Mapping[str, Any]
    """`{path: (module, attribute)}` of a model; `{path: leaf}` of a tree, with boxes (`nn.Partitioned`, …)."""
    target: Any = None
    """The model or variables that the parameters come from, which may have adapters."""
    walked: survey.ModelWalk | None = None
    """The result of the traversal, for a model only."""

    @staticmethod
    def from_tree(tree: Any, target: Any = None) -> BaseParams:
        """Read the base parameters of a model or tree.

        Raises `AttachError` for variables (see `base_params`), and if a leaf of a tree is not an array.
        """
        if isinstance(tree, attach.nnx.Module):
            walked = survey.walk_model(tree)
            return BaseParams(tree, walked.leaves, tree, walked)
        params = attach.nnx.to_pure_dict(tree) if isinstance(tree, attach.nnx.State) else tree
        if not isinstance(params, Mapping):
            raise AttachError(
                f"expected base parameters as nested mappings, or an NNX model, found {type(tree).__name__}"
            )
        if isinstance(params.get("params"), Mapping):
            raise AttachError("expected base parameters, found variables; pass variables['params']")
        base = BaseParams(tree, paths.flatten(params), target)
        odd = [
            f"{path}: {type(leaf).__name__}"
            for path, leaf in base.leaves.items()
            if not (is_array(leaf) or quantized.is_quantized(leaf))
        ]
        if odd:
            raise AttachError(
                'expected base parameters as nested mappings of arrays (a list as {"0": …, "1": …}), found:\n'
                + paths.bullets(odd)
            )
        return base

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """`{path: array or spec}`, without boxes."""
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
        """`{path: sharding}`; None for a leaf without a sharding."""
        model = isinstance(self.tree, attach.nnx.Module)
        return attach.base_shardings(self.held) if model else collections.base_shardings(self.held)


def plan_adapter(
    base: BaseParams,
    config: Config,
    keymap: KeyMap | str | None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    *,
    stored: bool = False,
) -> tuple[Recipe, tuple[Site, ...]]:
    """Return the recipe and sites of a configuration on a model, or on a tree of base parameters.

    `stored` asks for the form of the parameters that a file holds, where a method has two (an encoder of prompts).
    """
    method = methods.get_method(config)
    if isinstance(method, PromptMethod):
        keymap = families.resolve_keymap(keymap, base.shapes)
        sizes = BaseSizes() if example is None else prompt.measure_base(base.tree, example)
        config = method.complete(config, with_width(sizes, keymap, base.shapes))
        return Recipe(config, keymap, 1), prompt_sites.plan_sites(config, stored=stored)
    if base.walked is not None:
        return _plan_on_model(base, base.walked, config, keymap, stack_axes, example)
    keymap = families.resolve_keymap(keymap, base.shapes)
    config = selection.resolve_config(config, keymap, base.shapes)
    sites = selection.select_sites(config, keymap, base.shapes)
    layer_replication.check_values(config, keymap, lambda: base.leaves)
    return Recipe(config, with_copy_entries(keymap, sites), len(sites)), sites


def check_kernels(base: BaseParams, sites: Sequence[Site]) -> None:
    """Raise `AttachError` if a keymap takes the outputs of a kernel for its inputs.

    Parameters without a model have no layers that define the layout, so every kernel is assumed to be one of Flax's,
    which are (in, out). A layer with another layout declares it in the collection that `adapt` creates.
    """
    sites = [site for site in sites if site.leaf != SHARED_NODE]
    if base.walked is not None:
        if problems := attach.list_contradictions(sites, base.walked.leaves):
            raise AttachError("these layers cannot carry the adapter:\n" + paths.bullets(problems))
        return
    attached = _attached_keymap(base.target)
    reverse: list[str] = []
    for site in sites:
        weight, known = site.match.weight, None if attached is None else attached.match(site.leaf)
        named = site.leaf.rpartition(".")[2] == "kernel" and weight.kind == "linear" and not weight.fan_in_fan_out
        if not named or site.method.copies or site.axes.rank != 2 or (known is not None and known.axes == site.axes):
            continue
        shape = [size for axis, size in enumerate(base.shapes[site.leaf]) if axis not in site.match.stack]
        if (own := transposed_axes(site.axes, [layers.DENSE], shape)) is not None:
            reverse.append(f"{site.leaf}: {contradiction_message(site.axes, own)}")
    if reverse:
        raise AttachError(
            "these weights cannot carry the adapter if they belong to Flax's own layers:\n"
            + paths.bullets(reverse)
            + "\nFor custom layers, create the collection with the adapted module, which records their layout:"
            + generic.LINEN_EXAMPLE
        )


def _plan_on_model(
    base: BaseParams,
    walked: survey.ModelWalk,
    config: Config,
    keymap: KeyMap | str | None,
    stack_axes: Sequence[int] | None,
    example: Sequence[Any] | None,
) -> tuple[Recipe, tuple[Site, ...]]:
    given: Any = example
    if given is not None and not isinstance(given, list | tuple):
        raise AttachError(
            f"example: expected a list of the inputs of one call, as in example=[x], found {type(given).__name__}"
        )
    model, owners, shapes = base.tree, walked.leaves, base.shapes
    keymap = families.resolve_keymap(keymap, shapes)
    all_linear = matching.is_all_linear(config)
    if all_linear:
        shapes = {leaf: shape for leaf, shape in shapes.items() if not survey.is_never_linear(owners[leaf])}
    entries, traced = survey.class_entries(owners, keymap, stack_axes), {}
    if example is not None:
        # A trace is more reliable than the generic keymap, and a family's keymap is more reliable than a trace.
        known = dataclasses.replace(GENERIC, weights=()) if keymap == GENERIC else keymap
        wanted = survey.custom_leaves(owners, selection.uncovered_leaves(config, known.with_entries(entries), shapes))
        traced, others = abstract_call.trace_axes(model, walked, example, wanted, required=not all_linear)
        shapes = {leaf: shape for leaf, shape in shapes.items() if leaf not in others}
        entries = survey.class_entries(owners, keymap, stack_axes, traced)
    full = keymap.with_entries(entries)
    known_leaves = {entry.leaf for entry in entries}
    # The generic keymap holds for Flax's own layers; a custom layer may transpose its kernel.
    unsure = frozenset(survey.custom_leaves(owners, shapes)) - known_leaves if keymap == GENERIC else selection.NONE
    config = selection.resolve_config(config, full, shapes, unsure)
    _check_traceable(walked, dataclasses.replace(config, target_modules=".*") if all_linear else config)
    try:
        sites = selection.select_sites(config, full, shapes, unsure)
    except TargetError as error:
        _raise_for_qwix(model, error)
        raise
    selected = {site.leaf for site in sites}
    if traced.keys() - selected and not all_linear:
        missed = [leaf for leaf in traced if leaf not in selected]
        raise TargetError(
            "target_modules is ambiguous: several weights share a module. Give the full names of the weights"
            " to adapt:\n" + paths.bullets(missed)
        )
    keymap = with_copy_entries(keymap.with_entries(entry for entry in entries if entry.leaf in selected), sites)
    recipe = Recipe(config, keymap, len(sites))
    layer_replication.check_values(config, full, lambda: base.leaves)
    if example is not None:
        dropped = [site.leaf for site in sites if site.method.dropout(site.hparams)]
        hooks = {site.leaf: methods.AppliedMethod(site.method, site.hparams, {}, site.axes) for site in sites}
        forward = [leaf for leaf, hook in hooks.items() if hook.forward]
        abstract_call.check_calls(model, hooks, dropped, forward, example)
    return recipe, sites


def _check_traceable(walked: survey.ModelWalk, config: Any) -> None:
    matrices = [leaf for leaf, shape in walked.unowned.items() if len(shape) > 1]
    targeted = [leaf for leaf in matrices if matching.is_target(config, leaf.rpartition(".")[0])]
    if targeted:
        raise AttachError(
            "cannot adapt these parameters: they are not direct attributes of an nnx.Module (for example"
            " inside a dict), so their use cannot be traced. Store each in a module, or leave it out of target_modules,"
            " or pass exclude_modules:\n" + paths.bullets(targeted)
        )


def _raise_for_qwix(model: Any, error: TargetError) -> None:
    """Raise `AttachError` if `error` comes from a model whose weights Qwix holds."""
    nodes = (node for _, node in attach.nnx.iter_graph(model) if isinstance(node, attach.nnx.Module))
    if any(quantized.is_qwix_parameter(x) for node in nodes for x in vars(node).values()):
        raise AttachError(
            f"{error}\nQwix intercepts the calls of this model, and would also quantise the adapter's inputs."
            " Convert the model with jaxadapt.models.from_qwix(model), which keeps the quantised weights"
        ) from error


def base_arrays(tree: Any) -> dict[str, Any]:
    """Return `{path: array or spec}` of the base parameters of an NNX model, Linen variables or a tree."""
    return BaseParams.from_tree(base_params(tree)).leaves


def base_params(tree: Any) -> Any:
    """Return the "params" of Linen variables or of a state; any other tree or model unchanged."""
    return tree["params"] if isinstance(tree, Mapping | attach.nnx.State) and "params" in tree else tree


def target_base(target: Any) -> BaseParams:
    """Return the base parameters of the target of a load; raise `AttachError` if it has none."""
    if isinstance(target, wrapper.Adapted | wrapper.nn.Module):
        raise AttachError(
            "cannot use a Linen module as the target: it holds no parameters; pass the variables, {'params': …}"
        )
    if not isinstance(target, attach.nnx.Module | attach.nnx.State | Mapping):
        raise AttachError(f"expected an NNX model or Linen variables as the target, found {type(target).__name__}")
    return BaseParams.from_tree(base_params(target), target)


def target_keymap(base: BaseParams, keymap: KeyMap | str | None, keys: Sequence[str]) -> KeyMap:
    """Return the keymap of a target, in the spelling of a file's `keys` (without PEFT's prefix)."""
    keymap = _attached_keymap(base.target) if keymap is None else keymap
    return families.resolve_keymap(keymap, base.shapes).spelling_for(keys, base.shapes)


def _attached_keymap(target: Any) -> KeyMap | None:
    if isinstance(target, attach.nnx.Module):
        known = [v for by_path in attach.adapter_variables(target).values() for v in by_path.values()]
        return known[0].get_metadata()["adapter"].recipe.keymap if known else None
    for collection in collections.adapter_collections(target).values():
        for name, tree in collection.items():
            return collections.read_adapter(tree, name).keymap
    return None
