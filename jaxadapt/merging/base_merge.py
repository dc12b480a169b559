"""Merge adapters into the base weights, and unmerge them, as PEFT calls it.

A `ChangedLeaf` computes one changed leaf on demand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import Adapter, Site, Sites, map_layers, not_an_adapter
from jaxadapt.adapters.sites import require_complete, sites_of
from jaxadapt.arrays import quantized, regions
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import LAYER
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    AttachError,
    MismatchError,
    Progress,
    byte_counter,
    no_report,
    raise_listed,
    reporter,
    warn,
)
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import GENERIC, tied_heads
from jaxadapt.methods.applied import AppliedMethod, weight_order
from jaxadapt.methods.base import Effects, Method, as_computable, at_least_float32, require_weights
from jaxadapt.models import nnx_adapters
from jaxadapt.models.carriers import Carrier, Model, Module, Tree, Variables, carrier

# ---------------------------------------------------------------- changed leaf


Change = Callable[[AppliedMethod, Any], Any]
"""A function of a method and an array that returns the changed array."""


@functools.lru_cache(maxsize=1 << 10)
def _program(
    change: Change,
    method: Method,
    hparams: Any,
    axes: Axes,
    stack: tuple[int, ...],
    shared: tuple[str, ...],
    place: Any,
    donate: bool,
) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Return the change of a leaf without its name, so that leaves of one kind and shape are compiled once.

    It is one program, so that no intermediate has the weight's size unless a method makes one.
    """

    def run(w: Any, params: Mapping[str, Any]) -> Any:
        # Add in float32 even where weight and adapter both have 16 bits.
        widened = {name: x if name == LAYER else at_least_float32(x) for name, x in params.items()}
        changed = map_layers(stack, method, hparams, axes, change, widened, as_computable(w), shared).astype(w.dtype)
        return changed if place is None else jax.lax.with_sharding_constraint(changed, place)

    return jax.jit(run, donate_argnums=(0,) if donate else ())


@dataclasses.dataclass(frozen=True)
class ChangedLeaf:
    """A leaf as an adapter changes it, computed on demand; its base may be a `ChangedLeaf` too."""

    site: Site
    params: Mapping[str, Any]
    base: Any
    change: Change

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """The leaf's shape and dtype."""
        return (
            self.base.spec
            if isinstance(self.base, ChangedLeaf)
            else jax.ShapeDtypeStruct(self.base.shape, self.base.dtype)
        )

    @property
    def nbytes(self) -> int:
        """The size of the leaf in bytes."""
        return self.spec.size * self.spec.dtype.itemsize

    def with_base(self, base: Any) -> ChangedLeaf:
        """Return the same change of another base, including the changes before it."""
        return dataclasses.replace(self, base=self.base.with_base(base) if isinstance(self.base, ChangedLeaf) else base)

    def program(
        self, place: Any = None, single: bool = False, donate: bool = False
    ) -> Callable[[Any, Mapping[str, Any]], Any]:
        """Return the change as a function of the base and the tensors; `single` for one layer of each stacked axis."""
        site = self.site
        stack = () if single else site.match.stack
        shared = tuple(name for name in self.params if name not in site.shapes)
        return _program(self.change, site.method, site.hparams, site.axes, stack, shared, place, donate)

    def value(self, at: Mapping[int, int | slice] | None = None, donate: bool = False, unrounded: bool = False) -> Any:
        """Return the leaf, or its part at `{axis: index or slice}`: one layer of each stacked axis, some outputs.

        With `donate`, the result takes the memory of the base, whose array is then deleted. With `unrounded`, it is
        float32 where the base is narrower.
        """
        at = at or {}
        base, site = self.base, self.site
        w = base.value(at, donate, unrounded) if isinstance(base, ChangedLeaf) else _slice(base, range(base.ndim), at)
        w = w.astype("float32") if unrounded and w.dtype.itemsize < 4 else w
        slices = {site.match.weight.left[axis]: position for axis, position in at.items()}
        params = (
            {tensor.name: _slice(self.params[tensor.name], entry.form.left, slices) for tensor, entry in site.bound}
            | {name: _slice(x, site.match.stack, at) for name, x in site.data.items()}
            | {name: x for name, x in self.params.items() if name not in site.shapes}
        )
        single = all(isinstance(at.get(axis), int) for axis in site.match.stack)
        host = isinstance(w, np.ndarray)
        place = None if isinstance(w, Tracer) else regions.sharding_of(w)
        changed = self.program(place, single, donate and not host)(w, params)
        return np.array(changed) if host else changed  # a copy, since numpy arrays are writable

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes that can be computed slice by slice: each output has a sum of its own."""
        entry = self.site.match.weight
        return () if entry.groups > 1 else tuple(entry.left.index(name) for name in entry.roles["out"])


def refuse_dependent(adapters: Mapping[str, Adapter]) -> None:
    """Raise `AttachError` unless merging one adapter after the other gives the outputs of all of them active.

    It does if each of them scales the outputs or adds to a weight that it does not read, or if all change the weight in
    the same way and each changes what the one before it gives.
    """
    by_leaf = paths.nest(
        (site.leaf, name, site)
        for name, adapter in adapters.items()
        for site in sites_of(adapter)
        if not site.method.copies
    )
    dependent: list[str] = []
    for leaf, found in by_leaf.items():
        effects = {(site.method.peft_type, site.effects) for site in found.values()}
        from_base = any(one.weight == "adds" and one.reads for _, one in effects)
        apart = all(one.weight == "adds" or one.bias == "scales" for _, one in effects)
        if len(found) > 1 and (from_base or not (apart or len(effects) == 1)):
            dependent.append(f"{leaf}: " + ", ".join(f"{name} ({x.method.peft_type})" for name, x in found.items()))
    raise_listed(
        AttachError,
        "cannot merge several active adapters: on these weights an adapter's change depends on the weight, or changes"
        " the input that another adapter gets, so merging one after the other need not give the model's outputs."
        " Activate one of them, and merge it:",
        dependent,
    )


def _slice(x: Any, axes: Sequence[Any], at: Mapping[Any, int | slice]) -> Any:
    """Return the part at `{axis: index or slice}` of an array with these axes."""
    if not at or isinstance(x, np.ndarray):
        return x[tuple(at.get(axis, slice(None)) for axis in axes)] if at else x
    index = [at.get(axis, slice(None)) for axis in axes]
    spans = [slice(i, i + 1) if isinstance(i, int) else i for i in index]
    ranges = [span.indices(size) for span, size in zip(spans, x.shape, strict=True)]
    # Plain indexing would compile anew for each position.
    part = jax.lax.dynamic_slice(x, [first for first, _, _ in ranges], [last - first for first, last, _ in ranges])
    return part.reshape([size for size, i in zip(part.shape, index, strict=True) if not isinstance(i, int)])


# ---------------------------------------------------------------- base merge


def merge(
    model: Any,
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
        model: nested mappings of base parameters, for which a new tree is returned (FrozenDicts, boxes such as
            `nn.Partitioned` and numpy arrays keep their types); or Linen variables, likewise, returned without the
            adapter; or an NNX model, for which a new model is returned, without the merged adapters. It shares all
            arrays that do not change with the given model, which keeps its adapters.
        adapter: by default the model's active adapters, or the only one in the variables.
        in_place: change the given NNX model and return it, so that the weights before the merge are not kept.
        safe: raise before any change if a sum is too large for the weight's dtype: a NaN or an infinity.
        donate: reuse the memory of the weights, one by one (on devices; numpy arrays are kept), so that at most one
            weight is held beside the model. Afterwards the arrays in `model` cannot be used any more, not even
            through other references. After an interruption, some are deleted and the rest are not merged. An NNX model
            is then changed in place.
        dequantize: make all quantized weights of the base dense first, as `jaxadapt.models.dequantize` does. Without it
            merging into them is refused, since quantizing the sum again would change the trained result.
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
    >>> adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["q"]), key=jax.random.key(0))
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
    given = carrier(model)
    if isinstance(given, Module):
        raise given.unsupported("base parameters, Linen variables or an NNX model")
    held = carrier(given.to_change(in_place, donate))
    selected = _select_held(held, adapter) if held.has_base else {}
    chosen: tuple[Any, ...] = tuple(selected.values()) or (adapter,)
    if chosen[0] is None:
        raise AttachError("cannot merge: these parameters contain no adapter; pass one: merge(params, adapter)")
    refuse_dependent(selected)
    if not selected:
        mergeable(held.tree)
    elif isinstance(held, Model):
        nnx_adapters.require_current_trace(layer for _, layer in held.walked.adapted)
    merged = _apply_changes(held, chosen, *options)
    for name in selected:
        merged = carrier(merged).delete(name)
    is_base = isinstance(held, Tree) and selected and not carrier(merged).names()
    return carrier(merged).detach() if is_base else merged


def _select_held(held: Carrier, adapter: Adapter | None) -> dict[str, Adapter]:
    """Return those adapters of a model, or of variables, that a merge of `adapter` (None: of the active ones) removes.

    Empty if `adapter` is a value of another model, or one of several that are active.
    """
    found = {name: held.extract(name) for name in held.active()}
    selected = {name: each for name, each in found.items() if _is_selected(each, adapter)}
    if not isinstance(held, Variables) and not found and adapter is None:
        raise AttachError(
            "cannot merge: this model has no active adapter; it has"
            f" {held.names() or 'none'}. Activate one, or pass an adapter"
        )
    if isinstance(held, Variables) and len(selected) != 1 and (found or adapter is None):
        raise AttachError(
            f"cannot merge: these variables have the adapters {list(found) or 'none'}, but {len(selected)} are"
            " selected; expected one. Call merge(variables, jaxadapt.extract(variables, name=name)), or pass"
            " variables['params'] and an adapter"
        )
    return {} if not isinstance(held, Variables) and len(selected) < len(found) else selected


def _is_selected(held: Adapter, adapter: Any) -> bool:
    """Return True if two adapters hold the same array objects, as when one was extracted, or if `adapter` is None."""
    if not isinstance(adapter, Adapter):
        return adapter is None
    arrays, other_arrays = held.flat(), adapter.flat()
    return arrays.keys() == other_arrays.keys() and all(other_arrays[path] is x for path, x in arrays.items())


_unmerged_bias = functools.partial(AppliedMethod.merged_bias, sign=-1)  # each new function would be compiled again


def unmerge(
    model: Any,
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
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> back = unmerge(jaxadapt.merge(base, adapter), adapter)
    >>> bool((back["q"]["kernel"] == 1).all())
    True
    """
    return _apply_changes(
        mergeable(carrier(model).to_change(in_place, donate)),
        (adapter,),
        (AppliedMethod.unweight, _unmerged_bias),
        ("unmerge", progress),
        donate=donate,
        allow_nan=allow_nan,
    )


def _apply_changes(
    held: Carrier,
    adapters: Sequence[Adapter],
    change: tuple[Change, Change],
    task: tuple[str, Progress],
    safe: bool = False,
    donate: bool = False,
    dequantize: bool = False,
    allow_nan: bool = False,
) -> Any:
    """Apply the changes of several adapters to a base; `task` is the name and the receiver of progress."""
    name, progress = task
    base = held.leaves()
    values = {path: quantized.to_dense(x) for path, x in base.items() if dequantize and quantized.is_quantized(x)}
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
    return held.replace(values)


def mergeable(params: Any) -> Carrier:
    """Return the carrier of base parameters for a merge; raise `AttachError` if the model has active adapters."""
    held = carrier(params)
    if (held.in_place or isinstance(held, Tree)) and held.active():
        raise AttachError(
            "cannot merge another adapter: this model has active adapters, which would count twice. Merge these with"
            " merge(model), or deactivate them with activate(model) or detach(model)"
        )
    return Carrier(params) if isinstance(held, Variables) else held  # variables are refused by their paths


def refuse_nan(base: Mapping[str, Any], adapter: Adapter, changed: Iterable[str]) -> None:
    """Raise `MismatchError` if an adapter, or a base weight that it changes, holds a NaN or an infinity."""
    arrays = {
        f"adapter: {paths.join(leaf, name)}": x for leaf, site in adapter.sites.items() for name, x in site.items()
    } | {f"base: {leaf}": base[leaf] for leaf in changed}
    regions.require_finite(arrays, "allow_nan=True merges them nevertheless")


def _check_finite(values: Mapping[str, Callable[[], Any]]) -> None:
    """Raise `AttachError` for values that are not finite."""
    raise_listed(
        AttachError,
        "cannot merge: the merged values of these weights are not finite:",
        [path for path, value in values.items() if not bool(jnp.isfinite(value()).all())],
    )


def plan_changes(
    base: Mapping[str, Any],
    adapter: Adapter,
    weight: Change = AppliedMethod.merged,
    bias: Change = AppliedMethod.merged_bias,
) -> dict[str, ChangedLeaf]:
    """Return the leaves that an adapter changes; all checks are made now, values are computed on demand.

    Args:
        weight, bias: the change of a weight and of a bias. By default the adapter is merged.

    Raises `AttachError` if `adapter` is not an `Adapter`, or does not fit.
    """
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise not_an_adapter(adapter)
    sites = sites_of(adapter)
    _check_fit(sites, base, adapter)
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
    for change, leaf in {leaf.program(): leaf for leaf in changes.values()}.items():
        try:  # a method's errors are raised before any change
            arrays = {**leaf.params, **leaf.site.data}
            jax.eval_shape(
                change, leaf.spec, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
            )
        except AttachError as error:
            raise AttachError(f"{leaf.site.leaf}: {error}") from error
    return changes


def _check_fit(sites: Sites, base: Mapping[str, Any], adapter: Adapter) -> None:
    """Raise an error unless an adapter can be merged into these weights; warn of doubtful ties."""
    require_complete(adapter.flat(), sites)
    require_weights(sites.method)
    missing = [site.leaf for site in sites if site.leaf not in base]
    are_variables = any(f"params.{leaf}" in base for leaf in missing)
    raise_listed(
        MismatchError,
        "cannot merge: the adapter adapts weights that these parameters lack:",
        missing,
        '\nThese are Linen variables; pass variables["params"] as the parameters' if are_variables else "",
    )
    raise_listed(
        MismatchError,
        "cannot merge: the adapter does not fit these parameters:",
        [
            f"{site.leaf} {list(base[site.leaf].shape)}: {finding}"
            for site in sites
            for sizes in (plan.axis_sizes(site.match, base[site.leaf].shape),)
            for finding in paths.compare(
                {tensor.name: paths.Spec(plan.model_shape(site.match, tensor, sizes)) for tensor in site.tensors},
                {name: paths.Spec(shape) for name, shape in site.shapes.items()},
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
    _check_ties(sites, base, adapter)


def _check_ties(sites: Sequence[Site], base: Mapping[str, Any], adapter: Adapter) -> None:
    """Raise `AttachError` for token embeddings that are the head too; warn if no keymap tells whether one is."""
    if adapter.config.get("ensure_weight_tying"):
        return
    tied = set(tied_heads(adapter.keymap, base).values())
    embeddings = [site for site in sites if site.match.weight.kind == "embedding"]
    raise_listed(
        AttachError,
        "cannot merge: these weights are both the token embedding and the head, and the adapter changes the lookup"
        " of tokens only, so no single sum is right for both. Build the model with a separate head, or train with"
        " ensure_weight_tying:",
        [site.leaf for site in embeddings if not tied.isdisjoint(site.modules)],
    )
    if adapter.keymap.name != GENERIC.name:
        return
    shapes = {path: np.shape(leaf) for path, leaf in base.items()}
    lookup_only = [
        f"{site.leaf} ({site.fan_in} tokens)"
        for site in embeddings
        if not site.method.copies
        and not any(site.fan_in in shape and len(shape) > 1 for path, shape in shapes.items() if path != site.leaf)
    ]
    if lookup_only:
        warn(
            "no other weight has as many rows or columns as this token embedding, so the model may compute its logits"
            " with the embedding too (`attend`). As in PEFT, the adapter changes only the lookup, but the merged"
            " embedding also changes those logits. Give the model a separate head, or do not merge the adapter:\n"
            + paths.bullets(lookup_only)
        )
