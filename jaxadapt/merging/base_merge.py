"""Adapters into the base weights and out again. PEFT calls it merge and unmerge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import sites as bind
from jaxadapt.adapters import tied as tying
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.arrays import finite, placement, quantized
from jaxadapt.arrays.axes import Axes
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, MismatchError, warn
from jaxadapt.core.progress import Progress, byte_counter, no_report, reporter
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.methods import LAYER, AppliedMethod, Method, as_computable, at_least_float32
from jaxadapt.models.base_params import base_leaves, replace_leaves
from jaxadapt.models.linen import collections, wrapper
from jaxadapt.models.nnx import attach

Change = Callable[[AppliedMethod, Any], Any]


def merge(
    params: Any,
    adapter: Adapter | None = None,
    *,
    safe: bool = False,
    donate: bool = False,
    dequantize: bool = False,
    allow_nan: bool = False,
    progress: Progress = None,
) -> Any:
    """The base parameters with the adapter in them: W + s·B·A for LoRA, W·l (and bias·l) for IA3.

    Args:
        params: nested mappings of base parameters (FrozenDicts, boxes such as `nn.Partitioned` and numpy
            arrays stay what they are), a new tree is returned; Linen variables, likewise, which then lack the adapter;
            or an NNX model, changed in place and returned. An adapter that it carries is taken off it.
        adapter: by default the model's active ones, or the only one in the variables.
        safe: refuse, before anything is changed, where the result has a NaN or an infinity: a sum that is too large for
            the weight's dtype.
        donate: give the weights up: each is changed in its own memory (on devices; numpy arrays stay), so that no more
            than one beside the model is held. The arrays in `params` cannot be used any more then, by nobody who shares
            them either, and after an interruption neither can the rest.
        dequantize: of a base with quantised weights make all of them dense, as `jaxadapt.models.dequantize` does;
            merging
            into them is refused otherwise, since a sum quantised again is another one than was trained.
        allow_nan: merge also where the adapter, or a weight that it changes, holds a NaN or an infinity. It is refused
            otherwise. Under `jax.jit` the arrays have no values, and nothing is looked at.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("merge", bytes of weights done,
            bytes in all); each weight is then waited for.

    The sum is made in float32 and rounded once to the weight's dtype. Raises `MismatchError` if the adapter does not
    fit or holds a NaN, `AttachError` where a weight cannot hold the sum: integers, grouped convolutions, and a table of
    tokens that is the head as well where the adapter is for the lookup alone (`ensure_weight_tying` makes it one for
    both; PEFT's merge changes both in either case; `jaxadapt merge` of files gives the head a tensor of its own). It
    warns where no table of names says what is tied, and that may be so.

    >>> import numpy as np, jax, jaxadapt
    >>> base = {"q": {"kernel": np.ones((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=2, target_modules=["q"]), base, key=jax.random.key(0))
    >>> bool((merge(base, adapter)["q"]["kernel"] == 1).all())
    True
    """
    options = (_weight, _bias), ("merge", progress), safe, donate, dequantize, allow_nan
    if isinstance(params, wrapper.nn.Module | wrapper.Adapted):
        raise AttachError("a Linen module holds no parameters; merge its variables: merge(variables)")
    if isinstance(params, attach.nnx.Module):
        active = attach.active_names(params)
        held = {name: attach.extract(params, name) for name in active}
        mine = held if adapter is None else {name: x for name, x in held.items() if _same(x, adapter)}
        if not active and adapter is None:
            raise AttachError(
                f"this model has no active adapter to merge; it carries {list(attach.adapter_names(params)) or 'none'}"
            )
        if active and mine == held:
            return _merged_off(params, held, options)
    elif isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        own, rest = _from_variables(params, adapter)
        return {**rest, "params": _apply_changes(params["params"], (own,), *options)}
    if adapter is None:
        raise AttachError("there is no adapter in these parameters: merge(params, adapter)")
    return _apply_changes(params, (adapter,), *options)


def _from_variables(variables: Mapping[str, Any], adapter: Adapter | None) -> tuple[Adapter, dict[str, Any]]:
    """The adapter that is meant, and Linen variables without it."""
    names = collections.adapter_names(variables)
    trees = {name: tree for name in names if (tree := collections.adapter_tree(variables, name)) is not None}
    held = {name: collections.read_collection(tree, name) for name, tree in trees.items()}
    mine = [name for name, own in held.items() if adapter is None or _same(own, adapter)]
    if len(mine) != 1 and (held or adapter is None):
        raise AttachError(
            f"these variables carry the adapters {names or 'none'}; say which of them is merged,"
            " merge(variables, jaxadapt.extract(variables, name)), or give variables['params'] and an adapter"
        )
    out: dict[str, Any] = {}
    for collection, tree in variables.items():
        ours = collection in methods.COLLECTIONS and isinstance(tree, Mapping) and not tree.keys().isdisjoint(mine)
        kept = {name: own for name, own in tree.items() if name not in mine} if ours else tree
        out |= {} if ours and not kept else {collection: kept}
    return adapter or held[mine[0]], out


def _same(one: Adapter, other: Any) -> bool:
    """Whether two adapters are the same arrays: the one is what `extract` gave of the other's model."""
    if not isinstance(other, Adapter):
        return False
    mine, theirs = one.flat(), other.flat()
    return mine.keys() == theirs.keys() and all(theirs[path] is x for path, x in mine.items())


def _merged_off(model: Any, held: Mapping[str, Adapter], options: Any) -> Any:
    """A model with its active adapters merged, and taken off it; as it was where that fails."""
    odd = [name for name, x in held.items() if x.config.peft_type != "LORA" or x.config.get("use_dora")]
    if len(held) > 1 and odd:
        raise AttachError(
            f"several adapters are active, {', '.join(map(repr, held))}, and what {odd[0]!r} makes of a weight depends"
            " on the others; activate one of them, and merge that"
        )
    attach.need_own(layer for _, layer in attach.adapted_layers(model))
    attach.activate(model, ())
    try:
        _apply_changes(model, tuple(held.values()), *options)
    except BaseException:
        attach.activate(model, tuple(held))
        raise
    attach.delete(model, *held)
    return model


def _weight(applied: AppliedMethod, w: Any) -> Any:
    return applied.merged(w)


def _bias(applied: AppliedMethod, bias: Any) -> Any:
    return applied.merged_bias(bias, 1)


def remove_from_weight(applied: AppliedMethod, w: Any) -> Any:
    """The change that takes an adapter out of a weight."""
    return applied.unweight(w)


def _unbias(applied: AppliedMethod, bias: Any) -> Any:
    return applied.merged_bias(bias, -1)


def unmerge(
    params: Any, adapter: Adapter, *, donate: bool = False, allow_nan: bool = False, progress: Progress = None
) -> Any:
    """The inverse of `merge`, within the rounding of the weight's dtype. Options and errors as there.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(config, base, key=jax.random.key(0))
    >>> back = unmerge(jaxadapt.merge(base, adapter), adapter)
    >>> bool((back["q"]["kernel"] == 1).all())
    True
    """
    return _apply_changes(
        params, (adapter,), (remove_from_weight, _unbias), ("unmerge", progress), donate=donate, allow_nan=allow_nan
    )


def _apply_changes(
    params: Any,
    adapters: Sequence[Adapter],
    change: tuple[Change, Change],
    said: tuple[str, Progress],
    safe: bool = False,
    donate: bool = False,
    dequantize: bool = False,
    allow_nan: bool = False,
) -> Any:
    what, progress = said
    base: dict[str, Any] = {}
    for adapter in adapters:
        base = mergeable_leaves(params, adapter)
    new: dict[str, Any] = {}
    if dequantize:
        new = {path: quantized.to_dense(leaf) for path, leaf in base.items() if quantized.is_quantized(leaf)}
    made: dict[str, ChangedLeaf] = {}
    for adapter in adapters:
        for path, one in plan_changes({**base, **new}, adapter, *change).items():
            first, then = (one, made.get(path)) if one.site.method.copies else (made.get(path), one)
            made[path] = (
                then.with_base(first) if then and first else one
            )  # what replaces a weight comes before what is added
    if not allow_nan:
        for adapter in adapters:
            refuse_nan({**base, **new}, adapter, made)
    del base
    if safe and donate:
        _need_finite({path: changed.value for path, changed in made.items()})
    with reporter(progress) as report:
        more = byte_counter(report, what, sum(changed.nbytes for changed in made.values()))
        for path in list(made):
            changed = made.pop(path)
            new[path] = changed.value(donate=donate)
            if report is not no_report:
                jax.block_until_ready(new[path])
            more(changed.nbytes)
    if safe and not donate:
        _need_finite({path: lambda value=value: value for path, value in new.items()})
    return replace_leaves(params, new)


def mergeable_leaves(params: Any, adapter: Any) -> dict[str, Any]:
    """The leaves of base parameters that an adapter may be merged into; `AttachError` for what is no such pair."""
    if not isinstance(adapter, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AttachError(
            f"expected an Adapter (from extract, init or from_peft), found {type(adapter).__name__};"
            " jaxadapt.from_peft(tensors, params) makes one of PeftTensors"
        )
    if isinstance(params, attach.nnx.Module) and attach.active_names(params):
        raise AttachError(
            "this model has active adapters, which would count twice: merge(model) merges these; activate(model) with"
            " no name, or detach(model), leaves its base alone, into which another adapter can be merged"
        )
    return base_leaves(params)


def refuse_nan(base: Mapping[str, Any], adapter: Adapter, changed: Iterable[str]) -> None:
    """Raise `MismatchError` where an adapter, or a base weight that it changes, holds a NaN or an infinity."""
    arrays = {
        f"adapter: {paths.join(leaf, name)}": x for leaf, site in adapter.sites.items() for name, x in site.items()
    }
    arrays |= {f"base: {leaf}": base[leaf] for leaf in changed}
    if lost := finite.names_not_finite(arrays):
        raise MismatchError(finite.not_finite_message(lost, "allow_nan=True merges them all the same"))


def _need_finite(values: Mapping[str, Callable[[], Any]]) -> None:
    lost = [path for path, value in values.items() if not bool(jnp.isfinite(value()).all())]
    if lost:
        raise AttachError("merged, these weights are no longer finite:\n" + paths.bullets(lost))


@dataclasses.dataclass(frozen=True)
class _LeafChange:
    """What is done to a leaf, whatever it is called: leaves of one kind and shape are compiled once."""

    change: Change
    method: Method
    hparams: Any
    axes: Axes
    stack: tuple[int, ...]
    place: Any

    def __call__(self, w: Any, params: Mapping[str, Any]) -> Any:
        # The sum is made in float32, also where weight and adapter are both of 16 bits.
        sums = {name: x if name == LAYER else at_least_float32(x) for name, x in params.items()}
        new = bind.map_layers(self.stack, self.method, self.hparams, self.axes, self.change, sums, as_computable(w))
        new = new.astype(w.dtype)
        return new if self.place is None else jax.lax.with_sharding_constraint(new, self.place)


# One program for all of it, so that nothing of the weight's size is made on the way but where a method says so.
_computed = jax.jit(_LeafChange.__call__, static_argnums=0)
_computed_in_place = jax.jit(_LeafChange.__call__, static_argnums=0, donate_argnums=1)


@dataclasses.dataclass(frozen=True)
class ChangedLeaf:
    """A leaf as an adapter leaves it, computed when it is asked for; its base may be one itself."""

    site: bind.Site
    params: Mapping[str, Any]
    base: Any
    change: Change

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """The leaf's shape and dtype."""
        return self.base.spec if isinstance(self.base, ChangedLeaf) else _spec(self.base)

    @property
    def nbytes(self) -> int:
        """The size of the leaf."""
        return math.prod(self.spec.shape) * self.spec.dtype.itemsize

    def with_base(self, base: Any) -> ChangedLeaf:
        """The same change of another base, all that comes before it included."""
        return dataclasses.replace(self, base=self.base.with_base(base) if isinstance(self.base, ChangedLeaf) else base)

    def how(self, place: Any = None, single: bool = False) -> _LeafChange:
        """What is done to it; to a `single` layer of each stacked axis."""
        bound = self.site
        return _LeafChange(
            self.change, bound.method, bound.hparams, bound.axes, () if single else bound.match.stack, place
        )

    def value(self, at: Mapping[int, int | slice] | None = None, donate: bool = False, unrounded: bool = False) -> Any:
        """The leaf; or what is at `{axis: index or slice}` of it: one layer of each stacked axis, some outputs.

        With `donate` in the memory of the base, which is then gone. Unrounded it is float32 where the base is narrower.
        """
        at = at or {}
        base, bound = self.base, self.site
        w = base.value(at, donate, unrounded) if isinstance(base, ChangedLeaf) else _cut(base, range(base.ndim), at)
        w = w.astype("float32") if unrounded and w.dtype.itemsize < 4 else w
        names = {bound.match.weight.left[axis]: where for axis, where in at.items()}
        params = {
            tensor.name: _cut(self.params[tensor.name], entry.form.left, names)
            for tensor, entry in zip(bound.tensors, bound.entries, strict=True)
        } | {name: _cut(x, bound.match.stack, at) for name, x in bound.data.items()}
        single = all(isinstance(at.get(axis), int) for axis in bound.match.stack)
        how = self.how(None if isinstance(w, Tracer) else placement.sharding_of(w), single)
        host = isinstance(w, np.ndarray)
        new = (_computed_in_place if donate and not host else _computed)(how, w, params)
        return np.array(new) if host else new  # a copy: numpy arrays can be written to

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes of which slices can be made one by one: each output has a sum of its own."""
        line = self.site.match.weight
        return () if line.groups > 1 else tuple(line.left.index(name) for name in line.roles["out"])


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _cut(x: Any, axes: Sequence[Any], at: Mapping[Any, int | slice]) -> Any:
    """What is at `{axis: index or slice}` of an array with these axes."""
    if not at or isinstance(x, np.ndarray):
        return x[tuple(at.get(axis, slice(None)) for axis in axes)] if at else x
    index = [at.get(axis, slice(None)) for axis in axes]
    spans = [slice(i, i + 1) if isinstance(i, int) else i for i in index]
    bounds = [span.indices(size) for span, size in zip(spans, x.shape, strict=True)]
    # (Indexing would be compiled anew for each place.)
    piece = jax.lax.dynamic_slice(x, [first for first, _, _ in bounds], [last - first for first, last, _ in bounds])
    return piece.reshape([size for size, i in zip(piece.shape, index, strict=True) if not isinstance(i, int)])


def plan_merge(base: Mapping[str, Any], adapter: Adapter) -> dict[str, ChangedLeaf]:
    """The leaves that an adapter changes, merged; checked now, computed later."""
    return plan_changes(base, adapter, _weight, _bias)


def plan_changes(base: Mapping[str, Any], adapter: Adapter, weight: Change, bias: Change) -> dict[str, ChangedLeaf]:
    """As `plan_merge`, for any change."""
    bounds = bind.sites_of(adapter)
    missing = [b.leaf for b in bounds if b.leaf not in base]
    if missing:
        inside = f"params.{missing[0]}" in base
        raise MismatchError(
            "the adapter adapts weights that these parameters lack:\n"
            + paths.bullets(missing)
            + ('\nThese are Linen variables; the parameters in them are variables["params"]' if inside else "")
        )
    wrong = [
        f"{b.leaf}: for a weight of shape {tuple(base[b.leaf].shape)} expected {want}, found {b.shapes}"
        for b in bounds
        if (want := _expected(b, tuple(base[b.leaf].shape))) != b.shapes
    ]
    if wrong:
        raise MismatchError("the adapter does not fit these parameters:\n" + paths.bullets(wrong))
    small = [b.leaf for b in bounds if quantized.is_quantized(base[b.leaf])]
    if small:
        raise AttachError(
            "these weights are quantised, and cannot hold a sum exactly; merge(…, dequantize=True) makes the"
            " base dense first:\n" + paths.bullets(small)
        )
    odd = [
        f"{b.leaf}: {base[b.leaf].dtype}"
        for b in bounds
        if not b.method.copies and not jnp.issubdtype(base[b.leaf].dtype, jnp.floating)
    ]
    if odd:
        raise AttachError(
            "a sum with these weights would be rounded to whole numbers; dequantise them first:\n" + paths.bullets(odd)
        )
    tied = set(tying.tied_heads(adapter.keymap, base).values())
    alone = [b.leaf for b in bounds if b.match.weight.kind == "embedding" and not tied.isdisjoint(b.modules)]
    if alone and not adapter.config.get("ensure_weight_tying"):
        raise AttachError(
            "these are adapted in the lookup of tokens alone, and this weight is the head as well: there is no sum that"
            " is right for both. Build the model with a head of its own, or train with ensure_weight_tying:\n"
            + paths.bullets(alone)
        )
    if adapter.keymap.name == GENERIC.name and not adapter.config.get("ensure_weight_tying"):
        _warn_of_heads(bounds, base)
    sites = adapter.sites
    out: dict[str, ChangedLeaf] = {}
    lost: list[str] = []
    for bound in sorted(bounds, key=lambda b: not b.method.copies):  # a copied bias first, what is added to it then
        out[bound.leaf] = ChangedLeaf(bound, sites[bound.leaf], base[bound.leaf], weight)
        beside = paths.join(bound.leaf.rpartition(".")[0], "bias")
        if bound.method.scales_bias(bound.hparams) or bound.method.adds_bias(bound.hparams):
            if beside in base:
                out[beside] = ChangedLeaf(bound, sites[bound.leaf], out.get(beside, base[beside]), bias)
            elif bound.method.adds_bias(bound.hparams):
                lost.append(bound.leaf)
    if lost:
        raise AttachError(
            "lora_bias gives these layers a bias, and they have none to merge it into:\n" + paths.bullets(lost)
        )
    for how, changed in {changed.how(): changed for changed in out.values()}.items():
        try:  # what a method refuses shows while everything is still as it was
            given = {**changed.params, **changed.site.data}
            jax.eval_shape(how, changed.spec, {name: _spec(x) for name, x in given.items()})
        except AttachError as error:
            raise AttachError(f"{changed.site.leaf}: {error}") from error
    return out


def _warn_of_heads(bounds: Sequence[bind.Site], base: Mapping[str, Any]) -> None:
    """A table of tokens in a model of which no table of names says what is tied: its head may be this very weight."""
    shapes = {path: np.shape(leaf) for path, leaf in base.items()}
    alone = [
        f"{b.leaf} ({b.fan_in} tokens)"
        for b in bounds
        if b.match.weight.kind == "embedding"
        and not b.method.copies
        and not any(b.fan_in in shape and len(shape) > 1 for path, shape in shapes.items() if path != b.leaf)
    ]
    if alone:
        warn(
            "no other weight here has as many rows or columns as this table of tokens, so the model may compute its"
            " logits with it too (`attend`). The adapter is for the lookup alone, as in PEFT; merged into the table it"
            " changes those logits as well. Give the model a head of its own, or keep the adapter beside the model:\n"
            + paths.bullets(alone)
        )


def _expected(bound: bind.Site, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    sizes = plan.axis_sizes(bound.match, shape)
    return {t.name: plan.model_shape(bound.match, t, sizes) for t in bound.tensors}
