"""Merge adapters into the base weights, and unmerge them, as PEFT calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.full_copies import tied_heads
from jaxadapt.adapters.sites import Site, require_complete, sites_of
from jaxadapt.arrays import finite, quantized
from jaxadapt.core import paths
from jaxadapt.core.compare import Spec, compare
from jaxadapt.core.errors import AttachError, MismatchError, raise_listed, warn
from jaxadapt.core.progress import Progress, byte_counter, no_report, reporter
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.merging.changed_leaf import Change, ChangedLeaf, refuse_dependent, spec_of
from jaxadapt.methods import AppliedMethod, Effects, require_weights, weight_order
from jaxadapt.models.carriers import Carrier, Module, carrier
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach, graph


def merge(
    params: Any,
    adapter: Adapter | None = None,
    *,
    in_place: bool = False,
    safe: bool = False,
    donate: bool = False,
    dequantize: bool = False,
    allow_nan: bool = False,
    progress: Progress = None,
) -> Any:
    """Return the base parameters with the adapter added: W + s·B·A for LoRA, W·l (and bias·l) for IA3.

    Args:
        params: nested mappings of base parameters, for which a new tree is returned (FrozenDicts, boxes such as
            `nn.Partitioned` and numpy arrays keep their types); or Linen variables, likewise, returned without the
            adapter; or an NNX model, for which a new model is returned, without the merged adapters. It shares all
            arrays that do not change with the given model, which keeps its adapters.
        adapter: by default the model's active adapters, or the only one in the variables.
        in_place: change the given NNX model and return it, so that the weights before the merge are not kept.
        safe: raise before any change if a sum is too large for the weight's dtype: a NaN or an infinity.
        donate: reuse the memory of the weights, one by one (on devices; numpy arrays are kept), so that at most one
            weight is held beside the model. Afterwards the arrays in `params` cannot be used any more, not even
            through other references. After an interruption, some are deleted and the rest are not merged. An NNX model
            is then changed in place.
        dequantize: make all quantised weights of the base dense first, as `jaxadapt.models.dequantize` does. Without it
            merging into them is refused, since quantising the sum again would change the trained result.
        allow_nan: merge even if the adapter, or a weight that it changes, holds a NaN or an infinity, which is refused
            otherwise. Under `jax.jit` arrays have no values, and the check is skipped.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("merge", bytes of weights done,
            bytes in total). With progress, the call waits for each weight.

    The sum is computed in float32 and rounded once to the weight's dtype.

    Raises `MismatchError` if the adapter does not fit or holds a NaN. Raises `AttachError` if a weight cannot hold the
    sum: integers, grouped convolutions, and a token embedding that is the head as well, if the adapter is for the
    lookup only. (`ensure_weight_tying` makes it one adapter for both. PEFT's merge changes both in either case.
    `jaxadapt merge` of files gives the head its own tensor.) Warns if no keymap lists the tied weights and there may
    be some.

    >>> import numpy as np, jax, jaxadapt
    >>> base = {"q": {"kernel": np.ones((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> bool((merge(base, adapter)["q"]["kernel"] == 1).all())
    True
    """
    options = (
        (AppliedMethod.merged, AppliedMethod.merged_bias),
        ("merge", progress),
        safe,
        donate,
        dequantize,
        allow_nan,
    )
    given = carrier(params)
    if isinstance(given, Module):
        raise given.unsupported("base parameters, Linen variables or an NNX model")
    params = given.to_change(in_place, donate)
    held = carrier(params)
    if held.in_place:
        active = held.active()
        active_adapters = {name: held.extract(name) for name in active}
        selected = (
            active_adapters
            if adapter is None
            else {name: x for name, x in active_adapters.items() if _are_same(x, adapter)}
        )
        if not active and adapter is None:
            raise AttachError(
                "cannot merge: this model has no active adapter; it carries"
                f" {held.names() or 'none'}. Activate one, or pass an adapter"
            )
        if active and selected == active_adapters:
            return _merge_and_detach(params, active_adapters, options)
    elif held.has_base:
        variables_adapter, others = _take_from_variables(params, adapter)
        return {**others, "params": _apply_changes(params["params"], (variables_adapter,), *options)}
    if adapter is None:
        raise AttachError("cannot merge: these parameters contain no adapter; pass one: merge(params, adapter)")
    return _apply_changes(params, (adapter,), *options)


def _take_from_variables(variables: Mapping[str, Any], adapter: Adapter | None) -> tuple[Adapter, dict[str, Any]]:
    """Return the adapter to merge, and the Linen variables without it."""
    names = collections.adapter_names(variables)
    trees = {name: tree for name in names if (tree := collections.adapter_tree(variables, name)) is not None}
    adapters = {name: collections.read_adapter(tree, name) for name, tree in trees.items()}
    selected = [name for name, stored in adapters.items() if adapter is None or _are_same(stored, adapter)]
    if len(selected) != 1 and (adapters or adapter is None):
        raise AttachError(
            f"cannot merge: these variables carry the adapters {names or 'none'}, but {len(selected)} are selected;"
            " expected one. Call merge(variables, jaxadapt.extract(variables, name)), or pass variables['params'] and"
            " an adapter"
        )
    others: dict[str, Any] = {}
    held = variables.keys() - collections.without_adapters(variables).keys()
    for collection, tree in variables.items():
        has_selected = collection in held and isinstance(tree, Mapping) and not tree.keys().isdisjoint(selected)
        remaining = {name: stored for name, stored in tree.items() if name not in selected} if has_selected else tree
        others |= {} if has_selected and not remaining else {collection: remaining}
    return adapter or adapters[selected[0]], others


def _are_same(first: Adapter, other: Any) -> bool:
    """Return True if two adapters hold the same array objects, as when one was extracted from the other's model."""
    if not isinstance(other, Adapter):
        return False
    arrays, other_arrays = first.flat(), other.flat()
    return arrays.keys() == other_arrays.keys() and all(other_arrays[path] is x for path, x in arrays.items())


def _merge_and_detach(model: Any, adapters: Mapping[str, Adapter], options: Any) -> Any:
    """Merge a model's active adapters and remove them; on failure the model stays unchanged."""
    refuse_dependent(adapters)
    walked = graph.walk_if_model(model)
    attach.require_current_trace(layer for _, layer in attach.adapted_layers(walked))
    attach.activate(walked, ())
    try:
        _apply_changes(model, tuple(adapters.values()), *options)
    except BaseException:
        attach.activate(walked, tuple(adapters))
        raise
    attach.delete(walked, *adapters)
    return model


def _unmerge_bias(applied: AppliedMethod, bias: Any) -> Any:
    """Return a bias without an adapter's change; one function, since each new one would be compiled again."""
    return applied.merged_bias(bias, -1)


def unmerge(
    params: Any,
    adapter: Adapter,
    *,
    in_place: bool = False,
    donate: bool = False,
    allow_nan: bool = False,
    progress: Progress = None,
) -> Any:
    """Undo `merge`, up to the rounding of the weight's dtype.

    The options are those of `merge`. Raises the same errors.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> back = unmerge(jaxadapt.merge(base, adapter), adapter)
    >>> bool((back["q"]["kernel"] == 1).all())
    True
    """
    return _apply_changes(
        carrier(params).to_change(in_place, donate),
        (adapter,),
        (AppliedMethod.unweight, _unmerge_bias),
        ("unmerge", progress),
        donate=donate,
        allow_nan=allow_nan,
    )


def _apply_changes(
    params: Any,
    adapters: Sequence[Adapter],
    change: tuple[Change, Change],
    task: tuple[str, Progress],
    safe: bool = False,
    donate: bool = False,
    dequantize: bool = False,
    allow_nan: bool = False,
) -> Any:
    """Apply the changes of several adapters to a tree or model; `task` is the name and the receiver of progress."""
    name, progress = task
    base: dict[str, Any] = {}
    for adapter in adapters:
        base = mergeable_leaves(params, adapter)
    values: dict[str, Any] = {}
    if dequantize:
        values = {path: quantized.to_dense(leaf) for path, leaf in base.items() if quantized.is_quantized(leaf)}
    by_path: dict[str, list[tuple[bool, Effects, ChangedLeaf]]] = {}
    for adapter in adapters:
        for path, leaf in plan_changes({**base, **values}, adapter, *change).items():
            by_path.setdefault(path, []).append((leaf.site.method.copies, leaf.site.effects, leaf))
    changes = {
        path: functools.reduce(lambda inner, outer: outer.with_base(inner), weight_order(found))
        for path, found in by_path.items()
    }
    if not allow_nan:
        for adapter in adapters:
            refuse_nan({**base, **values}, adapter, changes)
    del base
    if safe and donate:
        _check_finite({path: leaf.value for path, leaf in changes.items()})
    with reporter(progress) as report:
        advance = byte_counter(report, name, sum(leaf.nbytes for leaf in changes.values()))
        for path in list(changes):
            leaf = changes.pop(path)
            values[path] = leaf.value(donate=donate)
            if report is not no_report:
                jax.block_until_ready(values[path])
            advance(leaf.nbytes)
    if safe and not donate:
        _check_finite({path: lambda value=value: value for path, value in values.items()})
    return carrier(params).replace(values)


def mergeable_leaves(params: Any, adapter: Any) -> dict[str, Any]:
    """Return the leaves of base parameters for a merge of an adapter.

    Raises `AttachError` if `adapter` is not an `Adapter`, or if the model has active adapters.
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected an Adapter (from extract, init or from_peft), found {type(adapter).__name__}. For PeftTensors,"
            " jaxadapt.from_peft(tensors, params) makes one"
        )
    held = carrier(params)
    if held.in_place and held.active():
        raise AttachError(
            "cannot merge another adapter: this model has active adapters, which would count twice. Merge these with"
            " merge(model), or deactivate them with activate(model) or detach(model)"
        )
    return held.leaves() if held.in_place else Carrier(params).leaves()  # variables are refused by their paths


def refuse_nan(base: Mapping[str, Any], adapter: Adapter, changed: Iterable[str]) -> None:
    """Raise `MismatchError` if an adapter, or a base weight that it changes, holds a NaN or an infinity."""
    arrays = {
        f"adapter: {paths.join(leaf, name)}": x for leaf, site in adapter.sites.items() for name, x in site.items()
    }
    arrays |= {f"base: {leaf}": base[leaf] for leaf in changed}
    if not_finite := finite.names_not_finite(arrays):
        raise MismatchError(finite.not_finite_message(not_finite, "allow_nan=True merges them nevertheless"))


def _check_finite(values: Mapping[str, Callable[[], Any]]) -> None:
    """Raise `AttachError` for values that are not finite."""
    raise_listed(
        AttachError,
        "cannot merge: the merged values of these weights are not finite:",
        [path for path, value in values.items() if not bool(jnp.isfinite(value()).all())],
    )


def plan_merge(base: Mapping[str, Any], adapter: Adapter) -> dict[str, ChangedLeaf]:
    """Return the leaves that an adapter changes, merged; all checks are made now, values are computed on demand."""
    return plan_changes(base, adapter, AppliedMethod.merged, AppliedMethod.merged_bias)


def plan_changes(base: Mapping[str, Any], adapter: Adapter, weight: Change, bias: Change) -> dict[str, ChangedLeaf]:
    """Return the leaves that an adapter changes, as `plan_merge`; `weight` and `bias` change them."""
    sites = sites_of(adapter)
    require_complete(adapter.flat(), sites)
    require_weights(sites.method)
    missing = [site.leaf for site in sites if site.leaf not in base]
    if missing:
        are_variables = f"params.{missing[0]}" in base
        raise MismatchError(
            "cannot merge: the adapter adapts weights that these parameters lack:\n"
            + paths.bullets(missing)
            + ('\nThese are Linen variables; pass variables["params"] as the parameters' if are_variables else "")
        )
    raise_listed(
        MismatchError,
        "cannot merge: the adapter does not fit these parameters:",
        [
            f"{site.leaf} {list(base[site.leaf].shape)}: {finding}"
            for site in sites
            for finding in compare(
                _expected_specs(site, base[site.leaf].shape), {name: Spec(shape) for name, shape in site.shapes.items()}
            )
        ],
    )
    raise_listed(
        AttachError,
        "cannot merge into quantized weights, which cannot store the sum exactly. merge(…, dequantize=True) makes"
        " the base dense first:",
        [site.leaf for site in sites if quantized.is_quantized(base[site.leaf])],
    )
    raise_listed(
        AttachError,
        "cannot merge into weights of integers, which would round the sum. Dequantize them first:",
        [
            f"{site.leaf}: {base[site.leaf].dtype}"
            for site in sites
            if not site.method.copies and not jnp.issubdtype(base[site.leaf].dtype, jnp.floating)
        ],
    )
    tied = set(tied_heads(adapter.keymap, base).values())
    lookup_only = [
        site.leaf for site in sites if site.match.weight.kind == "embedding" and not tied.isdisjoint(site.modules)
    ]
    raise_listed(
        AttachError,
        "cannot merge: these weights are both the token embedding and the head, and the adapter changes the lookup"
        " of tokens only, so no single sum is right for both. Build the model with a separate head, or train with"
        " ensure_weight_tying:",
        [] if adapter.config.get("ensure_weight_tying") else lookup_only,
    )
    if adapter.keymap.name == GENERIC.name and not adapter.config.get("ensure_weight_tying"):
        _warn_of_unknown_ties(sites, base)
    own, shared = adapter.sites, adapter.shared
    tensors_of = {site.leaf: {**own[site.leaf], **({} if site.method.copies else shared)} for site in sites}
    changes: dict[str, ChangedLeaf] = {}
    without_bias: list[str] = []
    for site in sorted(sites, key=lambda site: not site.method.copies):  # a copied bias comes before an addition to it
        changes[site.leaf] = ChangedLeaf(site, tensors_of[site.leaf], base[site.leaf], weight)
        bias_path = paths.join(site.leaf.rpartition(".")[0], "bias")
        if site.effects.bias is not None:
            if bias_path in base:
                changes[bias_path] = ChangedLeaf(
                    site, tensors_of[site.leaf], changes.get(bias_path, base[bias_path]), bias
                )
            elif site.effects.bias == "adds":
                without_bias.append(site.leaf)
    raise_listed(
        AttachError,
        "cannot merge: the adapter adds a bias to these layers, which have none. Build the model with biases, or keep"
        " the adapter beside it:",
        without_bias,
    )
    for change, leaf in {leaf.leaf_change(): leaf for leaf in changes.values()}.items():
        try:  # a method's errors are raised before any change
            arrays = {**leaf.params, **leaf.site.data}
            jax.eval_shape(change, leaf.spec, {name: spec_of(x) for name, x in arrays.items()})
        except AttachError as error:
            raise AttachError(f"{leaf.site.leaf}: {error}") from error
    return changes


def _warn_of_unknown_ties(sites: Sequence[Site], base: Mapping[str, Any]) -> None:
    """Warn of a token embedding that may be the head too, in a model whose keymap lists no tied weights."""
    shapes = {path: np.shape(leaf) for path, leaf in base.items()}
    lookup_only = [
        f"{site.leaf} ({site.fan_in} tokens)"
        for site in sites
        if site.match.weight.kind == "embedding"
        and not site.method.copies
        and not any(site.fan_in in shape and len(shape) > 1 for path, shape in shapes.items() if path != site.leaf)
    ]
    if lookup_only:
        warn(
            "no other weight has as many rows or columns as this token embedding, so the model may compute its logits"
            " with the embedding too (`attend`). As in PEFT, the adapter changes only the lookup, but the merged"
            " embedding also changes those logits. Give the model a separate head, or do not merge the adapter:\n"
            + paths.bullets(lookup_only)
        )


def _expected_specs(site: Site, shape: Sequence[int]) -> dict[str, Spec]:
    """Return the shapes of a site's tensors on a weight of this shape."""
    sizes = plan.axis_sizes(site.match, tuple(shape))
    return {tensor.name: Spec(plan.model_shape(site.match, tensor, sizes)) for tensor in site.tensors}
