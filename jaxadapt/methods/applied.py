"""Methods ready to run on one weight: one adapter or several, or another one for each row of a batch or each token.

For rows, the tensors have a leading axis of rows, and the method runs under `jax.vmap`, so no method has code for it.

For tokens that choose among all slots of a bank, the tensors have a leading axis of slots. `AppliedMask` computes every
slot for every token, so its cost grows with the slots. `AppliedSegments` sorts the tokens by slot and calls a grouped
product, such as `lax.ragged_dot`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.products import LAYER, LETTERS, RANK, Operation, Use, einsum, expand_to_letters
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.methods.base import CALL_KEY, Array, Axes, Drop, Effects, Method, Params, as_computable

# ---------------------------------------------------------------- adapters on one weight


class Applicable(Protocol):
    """A method on one base weight, without its tensors."""

    @property
    def method(self) -> Method: ...

    @property
    def hparams(self) -> Any: ...

    @property
    def axes(self) -> Any: ...  # Axes; pyright takes a cached property for no property


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMethod:
    """One adapter on one weight, ready to run; `tracing.rewrite` and the layers call it.

    It resolves partly targeted fused weights, so that a method only gets the parts it adapts.
    """

    method: Method
    hparams: Any
    params: Params
    axes: Axes
    drop: Drop | None = None
    stack: ClassVar[tuple[int, ...]] = ()  # the axes of the weight that stack layers, which only `Stacked` has

    @classmethod
    def in_call(cls, site: Applicable, params: Params, drop: Drop | None) -> AppliedMethod:
        """Return a site's method for one call of its layer, with a key as a tensor if it drops parts of its change."""
        if drop is not None and site.method.drops == "change":
            params, drop = {**params, CALL_KEY: drop.make_key()}, None
        return cls(site.method, site.hparams, params, site.axes, drop)

    @functools.cached_property
    def effects(self) -> Effects:
        return self.method.effects(self.hparams)

    @property
    def by_weight(self) -> bool:
        """True if the layer must run with the effective weight."""
        return self.effects.form == "weight"

    @property
    def adds_to_base(self) -> bool:
        """True if the change is a sum, computed from the base weight or its output also beside other adapters."""
        return self.effects.weight == "adds" and self.effects.reads

    def map(self, function: Callable[[AppliedMethod], AppliedMethod]) -> AppliedMethod:
        return function(self)

    def with_key(self) -> AppliedMethod:
        """Return the method with its dropout's key drawn now, for a part of a call that cannot advance a stream."""
        if self.drop is None:
            return self
        key = self.drop.make_key()
        return dataclasses.replace(self, drop=dataclasses.replace(self.drop, make_key=lambda: key))

    def in_step(self, step: Array) -> AppliedMethod:
        """Return the method in one step of a loop, where it drops other parts than in the other steps."""
        params, drop = self.params, self.drop
        if CALL_KEY in params:
            params = {**params, CALL_KEY: jax.random.fold_in(params[CALL_KEY], step)}
        if drop is not None:
            make_key = drop.make_key
            drop = dataclasses.replace(drop, make_key=lambda: jax.random.fold_in(make_key(), step))
        return dataclasses.replace(self, params=params, drop=drop)

    def input(self, use: Use | Operation, x: Array, w: Array) -> Array:
        w = w if self.axes.parts is None else w[self._parts]

        def changed(x: Array) -> Array:
            return self.method.input(self.hparams, self.params, use, x, w)

        return changed(x) if isinstance(use, Operation) else self._on_parts(use.x, x, changed, use)

    def follows(self, primitive: str) -> bool:
        return self.axes.parts is None and self.method.follows(self.hparams, primitive)

    def follows_use(self, use: Use) -> bool:
        return self.method.follows_use(self.hparams, use)

    @property
    def forward(self) -> bool:
        return self.method.forward(self.hparams)

    @property
    def apart(self) -> bool:
        """True if `output` must get the product before the layer adds its bias."""
        return self.effects.sees == "product"

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        if isinstance(use, Operation):
            return self.method.output(self.hparams, self.params, use, x, y, self.drop, w)
        if self.axes.parts is not None:
            index = self._parts_index(use.x, use)
            x = x if index is None else x[index]
            w = w[self._parts]

        def changed(y: Array) -> Array:
            return self.method.output(self.hparams, self.params, use, x, y, self.drop, w)

        return self._on_parts(use.y, y, changed, use)

    def weight(self, w: Array) -> Array:
        if self.drop is not None:
            raise AttachError(
                "cannot apply dropout: the model uses this weight in an operation other than a matmul, where"
                " jaxadapt can only replace the whole weight. Set the dropout of the configuration to 0.0, or exclude"
                " this layer with exclude_modules"
            )
        if self.effects.bias == "adds" and not self.by_weight:
            raise AttachError(
                "cannot apply the bias of the adapter: the model uses this weight in an operation other than a"
                " matmul, where jaxadapt can only replace the whole weight, which has no bias. Exclude this layer with"
                " exclude_modules"
            )
        return self._change_parts(w, self.method.weight)

    def merged(self, w: Array) -> Array:
        """Return the effective weight for a merge; the adapter's bias is in `merged_bias`."""
        return self._change_parts(w, self.method.merged)

    def unweight(self, w: Array) -> Array:
        return self._change_parts(w, self.method.unweight)

    def part(self, w: Array) -> Array:
        """Return the adapted parts of a weight."""
        return as_computable(w if self.axes.parts is None else w[self._parts])

    def bias(self, bias: Array) -> Array:
        """Return the bias that the layer must use in a call; a bias that `output` adds is not in it."""
        if self.effects.bias == "adds" and not self.by_weight:
            return bias
        return self.method.bias(self.hparams, self.params, self.axes, bias)

    def merged_bias(self, bias: Array, sign: int = 1) -> Array:
        """Return the layer's bias after a merge (sign 1), or before it (sign -1)."""
        return self.method.bias(self.hparams, self.params, self.axes, bias, undo=sign < 0)

    def _change_parts(self, w: Array, function: Callable[..., Array]) -> Array:
        axes = dataclasses.replace(self.axes, parts=None)
        new = function(self.hparams, self.params, axes, self.part(w)).astype(w.dtype)
        if self.axes.parts is None:
            return new
        return jnp.asarray(w).at[self._parts].set(new)

    @property
    def _parts(self) -> tuple[Any, ...]:
        """The adapted parts, as an index into the weight."""
        return (slice(None),) * self.axes.batch_axes[0] + (np.array(self.axes.parts),)

    def _parts_index(self, letters: str, use: Use) -> tuple[Any, ...] | None:
        letter = use.w[self.axes.batch_axes[0]]
        return None if letter not in letters else (slice(None),) * letters.index(letter) + (np.array(self.axes.parts),)

    def _on_parts(self, letters: str, value: Array, function: Callable[[Array], Array], use: Use) -> Array:
        index = None if self.axes.parts is None else self._parts_index(letters, use)
        return function(value) if index is None else value.at[index].set(function(value[index]))


def together(hooks: Sequence[AppliedMethod]) -> AppliedMethod | AppliedMethods:
    """Return several active adapters on one weight, at least one, as one."""
    return hooks[0] if len(hooks) == 1 else AppliedMethods(tuple(hooks))


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMethods:
    """Several active adapters on one weight.

    Each changes the result of the one before it; a copy of the weight comes before the others. The weight W becomes
    W·H₁·H₂, so the input goes through H₂ first. Outputs change in order.
    """

    hooks: tuple[AppliedMethod, ...]
    stack: tuple[int, ...] = ()

    @property
    def axes(self) -> Axes:
        """The roles of the axes of one layer's weight."""
        return self.hooks[0].axes

    def map(self, function: Callable[[AppliedMethod], AppliedMethod]) -> Self:
        return dataclasses.replace(self, hooks=tuple(map(function, self.hooks)))

    @property
    def by_weight(self) -> bool:
        return all(hook.by_weight for hook in self.hooks) or any(_replaces(hook) for hook in self.hooks)

    @property
    def _weight_order(self) -> tuple[AppliedMethod, ...]:
        """The adapters in the order in which they change the weight."""
        return weight_order([(_replaces(hook), hook.effects, hook) for hook in self.hooks])

    def input(self, use: Use | Operation, x: Array, w: Array) -> Array:
        for hook in reversed(self._weight_order):
            x = hook.input(dataclasses.replace(use, axes=hook.axes), x, w)  # with the layouts of its own tensors
        return x

    def follows(self, primitive: str) -> bool:
        return all(hook.follows(primitive) for hook in self.hooks)

    def follows_use(self, use: Use) -> bool:
        return all(hook.follows_use(use) for hook in self.hooks)

    @property
    def forward(self) -> bool:
        return any(hook.forward for hook in self.hooks)

    @property
    def apart(self) -> bool:
        return any(hook.apart or (hook.by_weight and hook.effects.bias is not None) for hook in self.hooks)

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        base = y
        for hook in self.hooks:
            own = dataclasses.replace(use, axes=hook.axes)
            y = y + (hook.output(own, x, base, w) - base) if hook.adds_to_base else hook.output(own, x, y, w)
        return y

    def weight(self, w: Array) -> Array:
        base = w
        for hook in self._weight_order:
            w = w + (hook.weight(base) - base) if hook.adds_to_base else hook.weight(w)
            base = w if _replaces(hook) else base
        return w

    def bias(self, bias: Array) -> Array:
        for hook in self.hooks:
            bias = hook.bias(bias)
        return bias


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(AppliedMethods):
    """Active adapters, or one, on a weight that stacks layers. A scan takes those of one layer at a time.

    Attributes:
        hooks: the adapters. Their tensors are stacked on the axes on which the weight is.
        stack: the axes of the weight that stack layers, in ascending order.
        whole: of each adapter, the names of the tensors that all layers have in common.
    """

    whole: tuple[frozenset[str], ...] = ()

    def weight(self, w: Array) -> Array:
        """Return the effective weight of all layers."""
        return self._map_layers(lambda hook, w: hook.weight(w), w)

    def bias(self, bias: Array) -> Array:
        """Return the bias that the layers must use, which is stacked as the weight is."""
        if all(hook.effects.bias is None for hook in self.hooks):
            return bias
        first = next(x for name, x in self.hooks[0].params.items() if name not in self.whole[0] and name != LAYER)
        sizes = [first.shape[axis] for axis in self.stack]
        if bias.ndim != 1 + len(sizes) or [bias.shape[axis] for axis in self.stack] != sizes:
            raise AttachError(f"a bias of shape {list(bias.shape)} is not stacked as the weight is")
        return self._map_layers(lambda hook, bias: hook.bias(bias), bias)

    def tensors(self, axis: int) -> list[dict[str, Array]]:
        """Return the tensors of each adapter for a scan over one of the stacked axes, which comes first in them."""
        position = self.stack.index(axis)
        return [
            {
                name: jnp.moveaxis(x, position if name == LAYER else axis, 0)
                for name, x in hook.params.items()
                if name not in whole
            }
            for hook, whole in zip(self.hooks, self.whole, strict=True)
        ]

    def layer(self, axis: int, tensors: Sequence[Params]) -> Hook:
        """Return the adapters of one step of a scan over an axis, with that step's slices of `tensors(axis)`."""
        hooks = self._with(tensors)
        rest = tuple(each - (each > axis) for each in self.stack if each != axis)
        return Stacked(hooks, rest, self.whole) if rest else together(hooks)

    def _with(self, tensors: Sequence[Params]) -> tuple[AppliedMethod, ...]:
        return tuple(
            dataclasses.replace(hook, params={**hook.params, **own})
            for hook, own in zip(self.hooks, tensors, strict=True)
        )

    def _map_layers(self, change: Callable[[Hook, Array], Array], value: Array) -> Array:
        def one(tensors: Sequence[Params], value: Array) -> Array:
            return change(together(self._with(tensors)), value)

        mapped: Any = one
        own = [
            {name: x for name, x in hook.params.items() if name not in whole}
            for hook, whole in zip(self.hooks, self.whole, strict=True)
        ]
        for position, axis in enumerate(self.stack):  # as in `adapters.adapter.map_layers`
            axes = [{name: position if name == LAYER else axis for name in tensors} for tensors in own]
            mapped = jax.vmap(mapped, in_axes=(axes, axis), out_axes=axis)
        return mapped(own, value)


def _replaces(hook: AppliedMethod) -> bool:
    """Return True for a copy that the layer runs with in place of its weight."""
    return hook.method.copies and hook.by_weight


_T = TypeVar("_T")


def weight_order(changes: Sequence[tuple[bool, Effects, _T]]) -> tuple[_T, ...]:
    """Return adapters in the order in which they change one weight, from (True for a copy of it, effects, adapter).

    Copies come first. Where all others turn the input, the last of them comes next.
    """
    others = [(effects.order, each) for is_copy, effects, each in changes if not is_copy]
    if all(order == "input" for order, _ in others):
        others.reverse()
    return (*(each for is_copy, _, each in changes if is_copy), *(each for _, each in others))


def refuse_rivals(leaves: Mapping[str, Mapping[str, Method]]) -> None:
    """Raise `AttachError` if several active adapters each replace the same leaf, or the same rows of it.

    Args:
        leaves: `{leaf: {adapter: method}}` of the active adapters.
    """
    conflicts: list[str] = []
    for leaf, methods in leaves.items():
        copies = {name: method for name, method in methods.items() if method.copies}
        pairs = itertools.combinations([m.replaced_rows for m in copies.values()], 2)
        if any(one is None or other is None or not one.isdisjoint(other) for one, other in pairs):
            conflicts.append(f"{leaf}: {', '.join(copies)}")
    raise_listed(
        AttachError,
        "cannot activate these adapters together: several hold a copy of the same weight, or of the same rows of it,"
        " and only one copy can replace it. Activate one of them:",
        conflicts,
    )


def check_biases(hooks: Iterable[Hook], others: Mapping[str, Array]) -> None:
    """Raise `AttachError` if a custom layer may have a bias under another name than "bias", for methods that scale it.

    `others` are the layer's other parameters. One with the size of the output may be added to the output, and the
    method would then have to scale it too; its name does not show that.
    """
    for hook in hooks:
        for name, value in others.items():
            try:
                changed = hook.bias(value) is not value
            except AttachError:
                continue  # another size, so it is not a bias of this output
            if changed:
                raise AttachError(
                    f"its parameter {name!r} has the size of the output: it may be a bias under another name, and the"
                    " method changes no bias but 'bias'. Rename the parameter to 'bias', exclude the layer, or make it"
                    " a feedforward module"
                )


# ---------------------------------------------------------------- rows


Hook = AppliedMethod | AppliedMethods


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedRows(AppliedMethod):
    """A method whose tensors have a leading axis: one adapter for each row of the batch.

    The rows are the first axis of the layer's input. Raises `AttachError` where the layer does not see them.

    Attributes:
        shared: the tensors without such an axis, which all rows have in common.
    """

    shared: Params = dataclasses.field(default_factory=dict[str, Array])

    @property
    def by_weight(self) -> bool:
        return False

    @property
    def tensors(self) -> Params:
        """The method's own tensors, all with a leading axis of rows."""
        return {name: x for name, x in self.params.items() if not name.startswith("~")}

    def input(self, use: Use | Operation, x: Array, w: Array) -> Array:
        inner, _ = self._without_rows(use, x)
        return jax.vmap(lambda params, x: self._one(params).input(inner, x, w))(self.params, x)

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        inner, axis = self._without_rows(use, x)

        def change(params: Params, x: Array, y: Array) -> Array:
            return self._one(params).output(inner, x, y, w)

        return jax.vmap(change, (0, 0, axis), axis)(self.params, x, y)

    def follows(self, primitive: str) -> bool:
        return False

    def follows_use(self, use: Use) -> bool:
        return self._one(self.tensors).follows_use(use)

    def weight(self, w: Array) -> Array:
        raise self._refuse(
            "the model uses this weight in an operation other than a matmul, so it must be the same for all batch rows"
        )

    def bias(self, bias: Array) -> Array:
        """Return the bias unchanged, unless the method changes it and it has the size of this output."""
        if self.effects.bias != "scales":
            return bias
        if self._one(jax.tree.map(lambda x: x[0], self.tensors)).bias(bias) is not bias:
            raise self._refuse("the method changes the bias, but the layer adds the bias itself")
        return bias

    def _one(self, params: Params) -> AppliedMethod:
        """Return the method of one row."""
        return AppliedMethod(self.method, self.hparams, {**params, **self.shared}, self.axes)

    def _without_rows(self, use: Use | Operation, x: Array) -> tuple[Use, int]:
        """Return the use of one row, and the axis of the rows in its result; in the input it is the first."""
        assert isinstance(use, Use)  # rows follow no other operation
        row, rows = use.x[0], jax.tree.leaves(self.tensors)[0].shape[0]
        if row in use.w or row not in use.y or x.shape[0] != rows:
            raise self._refuse(
                f"the layer's input has shape {list(x.shape)}, and its first axis is not the {rows} rows"
            )
        return dataclasses.replace(use, x=use.x[1:], y=use.y.replace(row, "")), use.y.index(row)

    def _refuse(self, problem: str) -> AttachError:
        return AttachError(
            f"cannot apply another {self.method.peft_type} in each row: {problem}. Exclude the layer from the bank, or"
            " merge the adapter"
        )


WEIGHTS = "~weights"
"""The tensor of a route with the weights of each row's adapters."""


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMixture(AppliedRows):
    """A method that adds to the output, with several adapters a row, (rows, adapters, …), and `WEIGHTS` for them."""

    def input(self, use: Use | Operation, x: Array, w: Array) -> Array:
        return x

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        inner, axis = self._without_rows(use, x)

        def change(params: Params, weights: Array, x: Array, y: Array) -> Array:
            zeros = jnp.zeros(y.shape, jnp.promote_types(y.dtype, jnp.float32))
            changes = jax.vmap(lambda params: self._one(params).output(inner, x, zeros, w))(params)
            return (y + jnp.tensordot(weights.astype(changes.dtype), changes, 1)).astype(y.dtype)

        return jax.vmap(change, (0, 0, 0, axis), axis)(self.tensors, self.params[WEIGHTS], x, y)


def split_rows(hooks: Mapping[str, Hook]) -> tuple[dict[str, Hook], dict[str, Hook]]:
    """Separate the methods of one layer into those to apply to its whole call, and those to apply inside.

    If a method needs the product without the bias (DoRA), the layer is rewritten, and a bias is then the same for all
    rows. Other rows may scale it (IA3), so these act on the finished output.
    """
    outer: dict[str, Hook] = {}
    inner: dict[str, Hook] = {}
    for leaf, hook in hooks.items():
        each = hook.hooks if isinstance(hook, AppliedMethods) else (hook,)
        outside = [one for one in each if hook.apart and isinstance(one, AppliedRows) and not one.apart]
        for part, chosen in ((outer, outside), (inner, [one for one in each if one not in outside])):
            if chosen:
                part[leaf] = together(chosen)
    return outer, inner


# ---------------------------------------------------------------- slots


Grouped = Callable[[Array, Array, Array], Array]
"""A grouped product with the signature of `jax.lax.ragged_dot`: (lhs, rhs, group_sizes)."""

Implementation = str | Grouped
"""The way in which rows take adapters: "gather", "layer", "mixture", "mask", or a grouped product for sorted rows."""

IDS, ORDER, INVERSE, SIZES = "~ids", "~order", "~inverse", "~sizes"
"""The tensors of a route: the slot of each row or token, their order by slot, its inverse, and each slot's number."""


def apply_rows(site: Applicable, how: Implementation, params: Params, shared: Params) -> AppliedRows:
    """Return a site's method where each row, or token, of a batch has an adapter of its own.

    `shared` are the tensors that all rows have in common.
    """
    kinds: Mapping[Any, type[AppliedRows]] = {"mixture": AppliedMixture, "mask": AppliedMask}
    if how == "gather":
        params = {name: jnp.moveaxis(x, 1, -1) if name in site.method.row_turned else x for name, x in params.items()}
    if how == "layer":
        params = {name: take_slots(x, params[IDS], 0) for name, x in params.items() if name != IDS}
    if callable(how):
        return AppliedSegments(site.method, site.hparams, params, site.axes, shared=shared, grouped=how)
    return kinds.get(how, AppliedRows)(site.method, site.hparams, params, site.axes, shared=shared)


def take_slots(x: Array, ids: Array, axis: int) -> Array:
    """Return the slots of these ids, with the axes of `ids` in place of `axis`; NaN where an id is no slot."""
    # JAX would take -1 for the last slot. An index that is too large gives NaN.
    return jnp.take(x, jnp.where(ids < 0, x.shape[axis], ids), axis, mode="fill", fill_value=jnp.nan)


def sort_ids(ids: Array, slots: int) -> dict[str, Array]:
    """Return `ORDER`, `INVERSE` and `SIZES` of the ids of a batch; an id that is no slot counts as slot 0."""
    flat = jnp.where((ids >= 0) & (ids < slots), ids, 0).reshape(-1)
    order = jnp.argsort(flat)
    return {ORDER: order, INVERSE: jnp.argsort(order), SIZES: jnp.bincount(flat, length=slots).astype(jnp.int32)}


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMask(AppliedRows):
    """A method with the tensors of all slots, and `IDS` of shape (rows) or (rows, time); NaN where an id is no slot.

    A low-rank pair is one product with the ranks of all slots side by side, masked. Other methods take one slot after
    another.
    """

    def input(self, use: Use | Operation, x: Array, w: Array) -> Array:
        if self._pair is not None:
            return x
        assert isinstance(use, Use)  # rows follow no other operation
        self._letters(use, x)
        return self._choose(use.x, x, lambda one: one.input(use, x, w), use)

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        assert isinstance(use, Use)  # rows follow no other operation
        letters = self._letters(use, x)
        if self._pair is None or self.axes.parts is not None or use.transposed:
            return self._choose(use.y, y, lambda one: one.output(use, x, y, w), use)
        (scale, a, b), is_right = self._finite_pair()
        slot = next(c for c in reversed(LETTERS) if c not in use.x + use.w + use.y)
        batch, inputs, out = use.letters("batch"), use.letters("in"), use.letters("out")
        mid = "".join(c for c in use.y if c not in out) + "".join(c for c in batch if c not in use.y) + slot + RANK
        h = einsum(f"{use.x},{slot}{batch}{RANK}{inputs}->{mid}", x.astype(a.dtype), a)
        numbers = jnp.arange(len(scale)).reshape(*[1] * self._ids.ndim, -1)
        chosen = (self._ids[..., None] == numbers).astype(h.dtype)
        chosen = jnp.where(is_right[..., None], chosen, jnp.nan)
        h = h * expand_to_letters(scale.astype(h.dtype), slot + batch, mid)
        h = h * expand_to_letters(chosen, letters + slot, mid)
        return (y + einsum(f"{mid},{slot}{batch}{out}{RANK}->{use.y}", h, b)).astype(y.dtype)

    @property
    def _ids(self) -> Array:
        return self.params[IDS]

    @property
    def _pair(self) -> tuple[Array, Array, Array] | None:
        return self.method.row_pair(self.hparams, self.tensors)

    def _finite_pair(self) -> tuple[tuple[Array, Array, Array], Array]:
        """Return the pair with zeros in slots that are not finite, and True for each token of an existing finite slot.

        A product over all slots would carry NaN and infinities, as 0 · NaN, to the tokens of other slots.
        """
        pair = self._pair
        assert pair is not None
        finite = jnp.stack([jnp.isfinite(x).reshape(len(x), -1).all(1) for x in pair]).all(0)
        scale, a, b = (jnp.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in pair)
        is_slot = (self._ids >= 0) & (self._ids < len(finite))
        return (scale, a, b), is_slot & jnp.take(finite, self._ids, mode="clip")

    def _letters(self, use: Use, x: Array) -> str:
        """Return the letters of the axes of `IDS`; raise `AttachError` if the input does not begin with these axes."""
        count = self._ids.ndim
        letters = use.x[:count]
        if x.shape[:count] != self._ids.shape or set(letters) & set(use.w) or not set(letters) <= set(use.y):
            kind = "rows" if count == 1 else "rows and tokens"
            raise self._refuse(
                f"the layer's input has shape {list(x.shape)}, and its first axes are not the {kind}"
                f" {list(self._ids.shape)}"
            )
        return letters

    def _choose(self, over: str, value: Array, change: Callable[[AppliedMethod], Array], use: Use) -> Array:
        """Return for each token the result of its slot's method, computed for one slot after another."""
        ids = expand_to_letters(self._ids, use.x[: self._ids.ndim], over)

        def step(chosen: Array, slot: tuple[Array, Params]) -> tuple[Array, None]:
            number, params = slot
            return jnp.where(ids == number, change(self._one(params)).astype(chosen.dtype), chosen), None

        slots = jnp.arange(len(jax.tree.leaves(self.tensors)[0]))
        return jax.lax.scan(step, jnp.full_like(value, jnp.nan), (slots, self.tensors))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedSegments(AppliedMask):
    """Low-rank pairs of all slots, for tokens that are sorted by slot once for the whole batch."""

    grouped: Grouped = jax.lax.ragged_dot

    def input(self, use: Use | Operation, x: Array, w: Array) -> Array:
        return x

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        assert isinstance(use, Use)  # rows follow no other operation
        if use.transposed or use.axes.batch_axes or self._pair is None:
            raise self._refuse(
                "sorted segments are for low-rank pairs of one matrix, without fused parts. Use implementation='gather'"
                " or 'mask'"
            )
        (scale, a, b), is_right = self._finite_pair()
        letters, inputs, out = self._letters(use, x), use.letters("in"), use.letters("out")
        rest = "".join(c for c in use.x if c not in letters + inputs)
        sizes = dict(zip(use.x, x.shape, strict=True)) | dict(zip(use.y, y.shape, strict=True))
        each = math.prod(sizes[c] for c in rest)
        x = x.transpose([use.x.index(c) for c in letters + rest + inputs]).astype(a.dtype)
        x = jnp.take(x.reshape(self._ids.size, -1), self.params[ORDER], 0).reshape(self._ids.size * each, -1)
        a = a.reshape(*a.shape[:2], -1) * scale[:, None, None].astype(a.dtype)
        b = b.reshape(len(b), -1, b.shape[-1])
        groups = self.params[SIZES] * each
        change = self.grouped(self.grouped(x, a.swapaxes(1, 2), groups), b.swapaxes(1, 2), groups)
        front = letters + rest + out
        change = jnp.take(change.reshape(self._ids.size, -1), self.params[INVERSE], 0).reshape(
            [sizes[c] for c in front]
        )
        change = change.transpose([front.index(c) for c in use.y])
        return jnp.where(expand_to_letters(is_right, letters, use.y), y + change, jnp.nan).astype(y.dtype)
